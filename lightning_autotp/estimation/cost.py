"""What a step costs on a layout of ranks: arithmetic on what one tensor parallel rank was seen to do.

Data parallelism and ZeRO are not run. Their sizes, with ``n`` data parallel ranks: DDP keeps the gradients once more,
in its buckets. Stage 1 keeps 1/n of the optimizer state, stage 2 also of the gradients besides one block's whole ones,
stage 3 also of the weights, besides one block's gathered ones and those in no block (Rajbhandari et al., "ZeRO",
arXiv:1910.02054). AdamW keeps two numbers of its parameter's dtype for each of them, and its step is the fused one,
which needs nothing while it works.

A ring moves (n - 1) / n of a tensor through each rank's link in a gather or a scatter, and twice that in an all-reduce.
An op takes as long as its operations or as its memory traffic, whichever is longer (the roofline).
"""

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from lightning_autotp.estimation.hardware import Machine
from lightning_autotp.estimation.job import Job
from lightning_autotp.estimation.step import Step, run_step
from lightning_autotp.estimation.tracker import Work

GIB = 2**30

RESERVED = 3.0
"""GiB that a step cannot have: the CUDA context, NCCL's buffers, cuBLAS's workspace, gaps between tensors."""

_ADAMW_STATES = 2

_ADAMW_PASSES = 7
"""Fused AdamW reads weight, gradient and two states, and writes all but the gradient."""


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank at the moment when most is allocated; they sum up to :attr:`peak`.

    Args:
        weights: parameters and buffers; with ZeRO 3 the gathered ones too.
        optimizer: AdamW's state.
        buckets: DDP's.
        gradients: those there at that moment.
        activations: all that comes and goes: activations, logits, temporaries.
        all_gradients: those there once the backward pass is done; no part of the sum.
        kept: of activations, at the end of the forward pass; no part of the sum.
        moment: ``forward`` or ``backward``.
    """

    weights: int
    optimizer: int
    buckets: int
    gradients: int
    activations: int
    all_gradients: int
    kept: int
    moment: str

    @property
    def peak(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` would be after a step."""
        return self.weights + self.optimizer + self.buckets + self.gradients + self.activations


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over one group of ranks in a step.

    Args:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter`` or ``broadcast``.
        group: ``tensor parallel``, ``ranks that share heads`` or ``data parallel``.
        ranks: the size of the group.
        link: the slowest link between its ranks.
        count: how many there are in a step; for data parallelism as if each were one.
        size: bytes of their full tensors.
        seconds: how long they take.
    """

    kind: str
    group: str
    ranks: int
    link: str
    count: int
    size: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a step of a job costs on a machine.

    Args:
        job: what was estimated.
        machine: what on.
        parameters: how many numbers the unsharded model has.
        tokens: what all ranks read in a step; 0 for a model that reads none.
        memory: of a rank.
        traffic: of a rank.
        flops: floating-point operations of a rank.
        compute: seconds of a rank's own work, its optimizer's included.
        took: seconds that the estimate took.
    """

    job: Job
    machine: Machine
    parameters: int
    tokens: int
    memory: Memory
    traffic: tuple[Traffic, ...]
    flops: int
    compute: float
    took: float

    @property
    def communication(self) -> float:
        """Seconds of all collectives, one after the other."""
        return sum(line.seconds for line in self.traffic)

    @property
    def shortest(self) -> float:
        """Seconds a step takes if computation hides communication, or the other way round."""
        return max(self.compute, self.communication)

    @property
    def longest(self) -> float:
        """Seconds a step takes if nothing hides communication."""
        return self.compute + self.communication

    @property
    def fits(self) -> bool:
        """Whether the peak leaves :data:`RESERVED` of the GPU's memory."""
        return self.memory.peak + RESERVED * GIB <= self.machine.sheet.memory * GIB

    def as_dict(self) -> dict[str, Any]:
        """Everything, with plain values; sizes in bytes, times in seconds."""
        found = {name: value for name, value in vars(self).items() if name not in ("job", "memory", "machine")}
        job = {name: value for name, value in vars(self.job).items() if name != "config"}
        derived = {name: getattr(self, name) for name in ("communication", "shortest", "longest", "fits")}
        memory = asdict(self.memory) | {"peak": self.memory.peak}
        traffic = [asdict(line) for line in self.traffic]
        return {"job": job, "machine": asdict(self.machine), **found, "memory": memory, "traffic": traffic, **derived}


def estimate(job: Job, machine: Machine) -> Estimate:
    """What a step of ``job`` costs on ``machine``; nothing is trained, and no process group is needed or touched.

    Raises:
        ValueError: if the model cannot be read, its plan is refused, or its step needs to know the values of tensors.
    """
    started = time.monotonic()
    step = run_step(job)
    updated = step.held.trained / (job.dp if job.zero >= 1 else 1)
    compute = sum(_seconds(work, machine) * count for work, count in step.work.items())
    compute += _ADAMW_PASSES * updated / (machine.sheet.hbm * machine.link_share)
    return Estimate(
        job=job,
        machine=machine,
        parameters=step.held.parameters,
        tokens=step.tokens * job.dp,
        memory=memory_of(step, job),
        traffic=(*_tensor_parallel(step, job, machine), *_data_parallel(step, job, machine)),
        flops=sum(work.flops * count for work, count in step.work.items()),
        compute=compute,
        took=time.monotonic() - started,
    )


def memory_of(step: Step, job: Job) -> Memory:
    """The memory of a rank when most is allocated."""
    held, dp = step.held, job.dp
    share = {stage: dp if job.zero >= stage else 1 for stage in (1, 2, 3)}
    gathered = min(held.weights, held.block + held.outside) if share[3] > 1 else 0
    whole = min(held.trained, held.block) if share[2] > 1 else 0

    def gradients(bytes_there: int) -> int:
        return ceil(bytes_there / share[2])

    before = 0 if job.own_loop else gradients(held.trained)
    moments = [(before, step.forward, "forward")]
    moments += [(gradients(g) + min(g, whole), others, "backward") for g, others in step.backward.items()]
    at_peak, activations, moment = max(moments, key=lambda m: m[0] + m[1])
    return Memory(
        weights=ceil(held.weights / share[3]) + gathered + held.buffers,
        optimizer=ceil(_ADAMW_STATES * held.trained / share[1]),
        buckets=held.trained if dp > 1 and job.zero == 0 else 0,
        gradients=at_peak,
        activations=activations,
        all_gradients=gradients(held.trained),
        kept=step.kept,
        moment=moment,
    )


def _seconds(work: Work, machine: Machine) -> float:
    peak = machine.sheet.fp32 if work.fp32 else machine.sheet.bf16
    return max(work.flops / (peak * machine.matmul_share), work.moved / (machine.sheet.hbm * machine.link_share))


def _tensor_parallel(step: Step, job: Job, machine: Machine) -> list[Traffic]:
    found: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for (kind, ranks, size), count in step.collectives.items():
        sums = found[(kind, ranks)]
        sums[0] += count
        sums[1] += size * count
    names = {True: "tensor parallel", False: "ranks that share heads"}
    return [
        _traffic(kind, names[ranks == job.tp], ranks, 1, count, size, job, machine)
        for (kind, ranks), (count, size) in found.items()
        if ranks > 1
    ]


def _data_parallel(step: Step, job: Job, machine: Machine) -> list[Traffic]:
    if job.dp == 1:
        return []
    weights, trained = step.held.weights, step.held.trained
    lines = {
        0: [("all-reduce", 1, trained)],
        1: [("reduce-scatter", 1, trained), ("all-gather", 1, trained)],
        2: [("reduce-scatter", 1, trained), ("all-gather", 1, trained)],
        3: [("reduce-scatter", 1, trained), ("all-gather", 2, 2 * weights)],  # for the forward and the backward pass
    }
    return [
        _traffic(kind, "data parallel", job.dp, job.tp, count, size, job, machine)
        for kind, count, size in lines[job.zero]
    ]


def _traffic(
    kind: str, group: str, ranks: int, stride: int, count: int, size: int, job: Job, machine: Machine
) -> Traffic:
    link, bandwidth = machine.link(ranks, stride, job.tp * job.dp)
    through = {"all-reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0}.get(kind, (ranks - 1) / ranks)
    return Traffic(kind, group, ranks, link, count, size, size * through / bandwidth)
