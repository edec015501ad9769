"""What a step costs on a layout of ranks: arithmetic on what one tensor parallel rank was seen to do.

Data and context parallelism and ZeRO are not run: see :mod:`~lightning_autotp.estimation.memory`,
:mod:`~lightning_autotp.estimation.context` and :mod:`~lightning_autotp.estimation.traffic`.

An op takes as long as its operations or as its memory traffic, whichever is longer (the roofline). A step takes that,
for each batch, the optimizer's step, the collectives that stand in its way, and what those that go on beside it take
longer than what they go on beside: two thirds of the last batch (its backward pass) without ZeRO, all batches with it.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

from lightning_autotp.estimation.context import in_context
from lightning_autotp.estimation.extrapolate import at_batch
from lightning_autotp.estimation.hardware import Machine
from lightning_autotp.estimation.job import Job
from lightning_autotp.estimation.memory import Memory, memory_of
from lightning_autotp.estimation.step import Rank, Seen, Step, built, repeated, without_values
from lightning_autotp.estimation.trace import Work
from lightning_autotp.estimation.traffic import Traffic, traffic_of

GIB = 2**30

RESERVED = 3.0
"""GiB that a step cannot have: the CUDA context, NCCL's buffers, cuBLAS's workspace, gaps between tensors."""

_ADAMW_PASSES = 7
"""Fused AdamW reads weight, gradient and two states, and writes all but the gradient."""


@dataclass(frozen=True)
class Compute:
    """Seconds of a rank's own work in a step.

    Args:
        products: of ops that their operations bound.
        moves: of ops that their memory traffic bounds.
        optimizer: of AdamW's step.
    """

    products: float
    moves: float
    optimizer: float

    @property
    def batches(self) -> float:
        """Of all forward and backward passes."""
        return self.products + self.moves

    @property
    def all(self) -> float:
        """Of everything."""
        return self.batches + self.optimizer


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
        work: seconds of a rank's own work.
        took: seconds that the estimate took.
    """

    job: Job
    machine: Machine
    parameters: int
    tokens: int
    memory: Memory
    traffic: tuple[Traffic, ...]
    flops: int
    work: Compute
    took: float

    @property
    def compute(self) -> float:
        """Seconds of a rank's own work, its optimizer's included."""
        return self.work.all

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
    def waits(self) -> dict[str, float]:
        """Seconds of a step that each kind of collective takes, but for what is computed meanwhile."""
        beside = sum(line.seconds for line in self.traffic if line.beside)
        window = self.work.batches if self.job.shards > 1 else self.work.batches / self.job.accumulate * 2 / 3
        left = max(0.0, 1 - window / beside) if beside else 0.0
        found: dict[str, float] = {}
        for line in self.traffic:
            name = f"{line.kind}, {line.group}"
            found[name] = found.get(name, 0.0) + line.seconds * (left if line.beside else 1.0)
        return found

    @property
    def seconds(self) -> float:
        """How long a step takes."""
        return self.compute + sum(self.waits.values())

    @property
    def fits(self) -> bool:
        """Whether the peak leaves :data:`RESERVED` of the GPU's memory."""
        return self.lacks <= 0

    @property
    def lacks(self) -> float:
        """Bytes of a GPU's memory that are missing; negative where some are left."""
        return self.memory.peak + RESERVED * GIB - self.machine.sheet.memory * GIB

    def as_dict(self) -> dict[str, Any]:
        """Everything, with plain values; sizes in bytes, times in seconds."""
        found = {name: value for name, value in vars(self).items() if name not in ("job", "memory", "machine", "work")}
        job = {name: value for name, value in vars(self.job).items() if name != "config"}
        times = ("compute", "communication", "shortest", "longest", "waits", "seconds", "fits")
        derived = {name: getattr(self, name) for name in times}
        memory = asdict(self.memory) | {"peak": self.memory.peak}
        traffic = [asdict(line) for line in self.traffic]
        return {"job": job, "machine": asdict(self.machine), **found, "memory": memory, "traffic": traffic, **derived}


def estimate(job: Job, machine: Machine) -> Estimate:
    """What a step of ``job`` costs on ``machine``; nothing is trained, and no process group is needed or touched.

    Raises:
        ValueError: if the model cannot be read, its plan is refused, or its step needs to know the values of tensors.
    """
    started = time.monotonic()
    with without_values(job.model):
        model, batch = built(job)
        rank = Rank(model, job, job.tp)
        seen = rank.run(batch)
        if job.cp > 1:
            seen = of_context(seen, rank.run(repeated(batch, 2, job.model)), (1, 2), 1, job.cp)
    return priced(Step.of(seen), job, machine, started)


def of_context(small: Seen, large: Seen, sizes: tuple[int, int], size: int, cp: int) -> Seen:
    """What a context parallel rank does with ``size`` sequences, before its exchanges, of two sizes without it."""
    return at_batch(small, large, sizes, size / cp)


def priced(step: Step, job: Job, machine: Machine, started: float) -> Estimate:
    """An estimate of a step that was seen, or worked out: that of a batch of ``job`` on one rank.

    Args:
        step: with context parallelism that of a ``cp``-th of the batch, before its exchanges.
        job: what it is of.
        machine: what on.
        started: when, by ``time.monotonic``.

    Raises:
        ValueError: if context parallel ranks cannot share its heads.
    """
    step = in_context(step, job.cp, checkpointing=job.checkpointing)
    products = moves = 0.0
    for work, count in step.work.items():
        operations, moved = _seconds(work, machine)
        products += count * operations if operations >= moved else 0.0
        moves += count * moved if operations < moved else 0.0
    updated = _ADAMW_PASSES * step.held.trained / job.shards / (machine.sheet.hbm * machine.link_share)
    return Estimate(
        job=job,
        machine=machine,
        parameters=step.held.parameters,
        tokens=step.tokens * job.cp * job.dp * job.accumulate,
        memory=memory_of(step, job),
        traffic=traffic_of(step, job, machine),
        flops=sum(work.flops * count for work, count in step.work.items()) * job.accumulate,
        work=Compute(products * job.accumulate, moves * job.accumulate, updated),
        took=time.monotonic() - started,
    )


def _seconds(work: Work, machine: Machine) -> tuple[float, float]:
    """Of its operations, and of its memory traffic."""
    peak = machine.sheet.fp32 if work.fp32 else machine.sheet.bf16
    return work.flops / (peak * machine.matmul_share), work.moved / (machine.sheet.hbm * machine.link_share)
