"""Process groups: tensor parallel ranks side by side (inside a node), then context parallel ones, data parallel across.

Rank ``(dp * cp_size + cp) * tp_size + tp`` of the run is ``tp`` of its model's shards, ``cp`` of those that split the
tokens of one batch, and ``dp`` of those that have batches of their own.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Optional

import torch.distributed as dist

from lightning_autotp.compat import nccl_options
from lightning_autotp.config.training_config import TPConfig
from lightning_autotp.distributed.collectives import Collectives
from lightning_autotp.distributed.live import LiveCollectives


@dataclass(frozen=True)
class Mesh:
    """This rank's place in a data x context x tensor parallel arrangement of all ranks.

    Args:
        tp_rank: this rank among those that share one model, each with its shard of it, of ``tp_size``.
        tp_size: the tensor parallel size.
        dp_rank: this rank among those that hold the same shards, each with its own data, of ``dp_size``.
        dp_size: the data parallel size.
        collectives: what these ranks send one another.
        cp_rank: this rank among those that hold the same shards and see the same batch, each with its part of the
            tokens, of ``cp_size``.
        cp_size: the context parallel size.
    """

    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    collectives: Collectives
    cp_rank: int = 0
    cp_size: int = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mesh":
        # sharded modules refer to their mesh, and process groups cannot be copied
        return self

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The process group of the ranks that share one model, for engines that send by themselves."""
        return self.collectives.process_group("tp")

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """The process group of the ranks that hold the same shards, each with its own batches."""
        return self.collectives.process_group("dp")

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The process group of all ranks that hold the same shards, data and context parallel: gradients' averages."""
        return self.collectives.process_group("replicas")

    @property
    def replicas(self) -> int:
        """How many ranks hold the same shards: data parallel times context parallel ones."""
        return self.dp_size * self.cp_size

    @property
    def batch_ranks(self) -> int:
        """How many ranks see the same batch: tensor parallel times context parallel ones."""
        return self.tp_size * self.cp_size

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the ranks that see its batch."""
        return self.tp_rank == self.cp_rank == 0

    @property
    def tp_source(self) -> int:
        """The global rank of the first rank that shares this rank's model."""
        return self.collectives.tp_source


def build_mesh(tp_size: int, given: TPConfig, timeout: Optional[timedelta] = None, *, cp_size: int = 1) -> Mesh:
    """The mesh of this process; every process must call it.

    Args:
        tp_size: the tensor parallel size that the config asks for.
        given: groups of the user's, as an mpu or a tensor parallel group.
        timeout: how long a collective of the groups made here may wait; None for torch's default.
        cp_size: the context parallel size that the config asks for.

    Raises:
        ValueError: if the sizes do not go together; on every rank alike.
    """
    world_size = dist.get_world_size()
    if world_size % tp_size:
        raise ValueError(
            f"autotp_size: {tp_size} does not divide the {world_size} processes of this run; use a tensor parallel size"
            f" that does, or start a multiple of {tp_size} processes (devices x nodes)."
        )
    if world_size % (tp_size * cp_size):
        raise ValueError(
            f"context_parallel_size: {cp_size} ranks x autotp_size {tp_size} do not divide the {world_size} processes"
            f" of this run; {_fitting(world_size // tp_size)}, or start a multiple of {tp_size * cp_size} processes"
            " (devices x nodes)."
        )
    if given.mpu is not None and cp_size > 1:
        raise ValueError(
            "context_parallel_size: an mpu of yours has no groups for it; leave `tensor_parallel.mpu` out, or"
            " context_parallel_size."
        )
    if given.mpu is not None:
        return _from_mpu(given.mpu, tp_size, timeout)
    if given.tp_group is not None:
        group = given.tp_group() if callable(given.tp_group) else given.tp_group
        return _from_tp_group(group, tp_size, timeout, cp_size)
    neighbours = [list(range(first, first + tp_size)) for first in range(0, world_size, tp_size)]
    tp_group, _ = dist.new_subgroups_by_enumeration(neighbours, timeout=timeout, pg_options=_in_front(timeout))
    return _with_replicas(tp_group, neighbours, timeout, cp_size)


def _fitting(ranks: int) -> str:
    """Which context parallel sizes there can be."""
    sizes = ", ".join(str(size) for size in range(1, ranks + 1) if ranks % size == 0)
    return f"use one of {sizes}"


def _in_front(timeout: Optional[timedelta]) -> Any:
    """Options with which NCCL's kernels of a group go before others that wait for the GPU; None for other backends.

    A step waits for what its tensor parallel ranks exchange, and beside it run matmuls that fill the GPU.
    """
    if not dist.is_nccl_available() or dist.get_backend() != "nccl":
        return None
    return nccl_options(timeout)


def _from_mpu(mpu: Any, tp_size: int, timeout: Optional[timedelta]) -> Mesh:
    mesh = Mesh(
        mpu.get_model_parallel_rank(),
        mpu.get_model_parallel_world_size(),
        mpu.get_data_parallel_rank(),
        mpu.get_data_parallel_world_size(),
        LiveCollectives(mpu.get_model_parallel_group(), mpu.get_data_parallel_group(), timeout),
    )
    if mesh.tp_size != tp_size:
        raise ValueError(f"tensor_parallel.mpu: its model parallel size is {mesh.tp_size}, autotp_size is {tp_size}.")
    if mesh.tp_size * mesh.dp_size != dist.get_world_size():
        raise ValueError(
            f"tensor_parallel.mpu: {mesh.tp_size} model x {mesh.dp_size} data parallel ranks are not the"
            f" {dist.get_world_size()} processes of this run."
        )
    return mesh


def _from_tp_group(tp_group: dist.ProcessGroup, tp_size: int, timeout: Optional[timedelta], cp_size: int) -> Mesh:
    world_size = dist.get_world_size()
    everyones: list[list[int]] = [[] for _ in range(world_size)]
    dist.all_gather_object(everyones, dist.get_process_group_ranks(tp_group))
    groups = sorted({tuple(ranks) for ranks in everyones})
    if sorted(r for ranks in groups for r in ranks) != list(range(world_size)):
        raise ValueError(f"tensor_parallel.tp_group: the groups {groups} do not share out all {world_size} processes.")
    if {len(ranks) for ranks in groups} != {tp_size}:
        raise ValueError(
            f"tensor_parallel.tp_group: groups of {sorted({len(ranks) for ranks in groups})} processes, but autotp_size"
            f" is {tp_size}."
        )
    return _with_replicas(tp_group, [list(ranks) for ranks in groups], timeout, cp_size)


def _with_replicas(
    tp_group: dist.ProcessGroup, tp_ranks: list[list[int]], timeout: Optional[timedelta], cp_size: int
) -> Mesh:
    """Groups join processes that have the same rank in their tensor parallel groups, and such as see the same batch."""
    tp_size, rank = len(tp_ranks[0]), dist.get_rank()
    models = [tp_ranks[first : first + cp_size] for first in range(0, len(tp_ranks), cp_size)]
    tp_rank = dist.get_group_rank(tp_group, rank)
    replicas = [[ranks[place] for ranks in tp_ranks] for place in range(tp_size)]
    dp_rank, cp_rank = divmod(replicas[tp_rank].index(rank), cp_size)

    def joined(groups: list[list[int]]) -> dist.ProcessGroup:
        group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout)
        assert group is not None
        return group

    replica_group = joined(replicas)
    if cp_size == 1:
        collectives = LiveCollectives(tp_group, replica_group, timeout)
        return Mesh(tp_rank, tp_size, dp_rank, len(models), collectives)
    collectives = LiveCollectives(
        tp_group,
        joined([[model[cp][tp] for model in models] for cp in range(cp_size) for tp in range(tp_size)]),
        timeout,
        cp_group=joined([[ranks[tp] for ranks in model] for model in models for tp in range(tp_size)]),
        batch_group=joined([sorted(r for ranks in model for r in ranks) for model in models]),
        replica_group=replica_group,
    )
    return Mesh(tp_rank, tp_size, dp_rank, len(models), collectives, cp_rank, cp_size)
