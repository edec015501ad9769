"""What a step runs on: GPUs, their memory, and the links between them."""

from dataclasses import dataclass
from typing import NamedTuple, Optional


class GPU(NamedTuple):
    """Data sheet figures, dense, one direction of each link.

    Args:
        memory: GiB that torch can see (a little less than the name says).
        bf16: operations a second of bf16 matrices.
        fp32: operations a second of fp32 matrices, without TF32, which torch leaves off.
        hbm: bytes a second of the GPU's memory.
        nvlink: bytes a second to the GPUs of the node.
        network: bytes a second to other nodes, a GPU's share of the node's adapters.
    """

    memory: float
    bf16: float
    fp32: float
    hbm: float
    nvlink: float
    network: float


GPUS = {
    "a100": GPU(79, 312e12, 19.5e12, 2.0e12, 300e9, 25e9),
    "h100": GPU(79, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": GPU(139, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "b200": GPU(178, 2250e12, 75e12, 7.7e12, 900e9, 50e9),
}
"""NVIDIA's data sheets of the SXM boards (A100 80 GB, H100 80 GB, H200 141 GB, HGX B200), for the network those of DGX
A100 (8 x 200 Gb/s), DGX H100, DGX H200 and DGX B200 (8 x 400 Gb/s each)."""


@dataclass(frozen=True)
class Machine:
    """The GPUs of a job.

    Args:
        gpu: of :data:`GPUS`.
        gpus_per_node: GPUs that NVLink joins.
        nvlink: bytes a second between GPUs of a node, in one direction, instead of the data sheet's.
        network: bytes a second between nodes, for one GPU and in one direction, instead of the data sheet's.
        matmul_share: the part of the peak that matrix products reach.
        link_share: the part of a bandwidth (memory, NVLink, network) that is reached.

    Raises:
        ValueError: on what cannot be; the message names the field and the fix.
    """

    gpu: str = "h100"
    gpus_per_node: int = 8
    nvlink: Optional[float] = None
    network: Optional[float] = None
    matmul_share: float = 0.6
    link_share: float = 0.8

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"gpu: {self.gpu!r} is not known; give one of {', '.join(sorted(GPUS))}.")
        if self.gpus_per_node < 1:
            raise ValueError(f"gpus_per_node: {self.gpus_per_node} is not a positive number; give 1 or more.")
        for name in ("matmul_share", "link_share"):
            share = getattr(self, name)
            if not 0 < share <= 1:
                raise ValueError(f"{name}: {share} is not a part of the whole; give more than 0, up to 1.")
        for name in ("nvlink", "network"):
            given = getattr(self, name)
            if given is not None and not given > 0:
                raise ValueError(f"{name}: {given} is not a bandwidth; give a positive number.")

    @property
    def sheet(self) -> GPU:
        """The data sheet."""
        return GPUS[self.gpu]

    def link(self, ranks: int, stride: int, total: int) -> tuple[str, float]:
        """The slowest link of a ring over ``ranks``, and its bytes a second for one rank, at the share reached.

        Args:
            ranks: how many.
            stride: how far they lie apart: 1 for tensor parallel ranks, the tensor parallel size for data parallel
                ones. Those of a node reach the next node through that many GPUs' share of the network.
            total: how many ranks the job has; where they do not divide a node, some group lies across two.
        """
        inside = max(1, self.gpus_per_node // stride)
        nvlink = (self.nvlink or self.sheet.nvlink) * self.link_share
        network = (self.network or self.sheet.network) * self.link_share
        within = total <= self.gpus_per_node or ranks <= inside and self.gpus_per_node % (ranks * stride) == 0
        return ("NVLink", nvlink) if within else ("network", min(nvlink, network * inside))
