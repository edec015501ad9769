"""What a rank sends in a step, through which link, and for how long.

A ring moves (n - 1) / n of a tensor through each rank's link in a gather or a scatter, and twice that in an all-reduce;
an all-to-all sends (n - 1) / n of what a rank has.

- Tensor parallel collectives are those that were seen, for each batch; they stand in the way of what is computed.
- So do the all-to-alls of context parallelism (:mod:`~lightning_autotp.estimation.context`).
- Without ZeRO gradients are all-reduced once a step, over data and context parallel ranks, while the last batch's
  backward pass goes on.
- With ZeRO each batch gathers all weights (stage 3 those of blocks twice: for the forward and the backward pass) and
  reduce-scatters its gradients, over the ranks that share them, while blocks are computed. In hybrid sharding the parts
  are then all-reduced over the ranks that hold the same, and with context parallelism over those, once a step.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_autotp.distributed.recording import Collective
from lightning_autotp.estimation.context import exchanges
from lightning_autotp.estimation.hardware import Machine
from lightning_autotp.estimation.job import Job
from lightning_autotp.estimation.step import Step


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over one group of ranks in a step.

    Args:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all`` or ``broadcast``.
        group: ``tensor parallel``, ``ranks that share heads``, ``context parallel``, ``data parallel``, or with ZeRO
            ``ranks that share weights`` and ``ranks that hold the same``.
        ranks: the size of the group.
        link: the slowest link between its ranks.
        count: how many there are in a step; for data parallelism as if each were one.
        size: bytes of their full tensors; for all-to-alls of a rank's own.
        seconds: how long they take.
        beside: whether they go on beside what is computed.
    """

    kind: str
    group: str
    ranks: int
    link: str
    count: int
    size: int
    seconds: float
    beside: bool


def traffic_of(step: Step, job: Job, machine: Machine) -> tuple[Traffic, ...]:
    """All that a rank sends in a step of the optimizer."""
    return (*_tensor_parallel(step, job, machine), *_context(step, job, machine), *_data_parallel(step, job, machine))


def _tensor_parallel(step: Step, job: Job, machine: Machine) -> Iterator[Traffic]:
    found: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for collectives, times in ((step.collectives, job.accumulate), (step.once, 1)):
        for (kind, ranks, size), count in collectives.items():
            sums = found[(kind, ranks)]
            sums[0] += count * times
            sums[1] += size * count * times
    names = {True: "tensor parallel", False: "ranks that share heads"}
    for (kind, ranks), (count, size) in found.items():
        if ranks > 1:
            yield _traffic(kind, names[ranks == job.tp], ranks, 1, count, size, job, machine)


def _context(step: Step, job: Job, machine: Machine) -> Iterator[Traffic]:
    if job.cp == 1:
        return
    sent: Counter[Collective] = exchanges(step.attention.items(), job.cp, checkpointing=job.checkpointing)
    count = sum(sent.values()) * job.accumulate
    size = sum(collective.size * times for collective, times in sent.items()) * job.accumulate
    yield _traffic("all-to-all", "context parallel", job.cp, job.tp, count, size, job, machine)


def _data_parallel(step: Step, job: Job, machine: Machine) -> Iterator[Traffic]:
    held, shards, times = step.held, job.shards, job.accumulate
    if shards == 1:
        if job.replicas > 1:
            whole = (job.replicas, job.tp, 1, held.trained)
            yield _traffic("all-reduce", "data parallel", *whole, job, machine, beside=True)
        return
    gathers, size = (2, 2 * held.weights - held.outside) if job.zero == 3 else (1, held.weights)
    lines = [("reduce-scatter", times, held.trained * times), ("all-gather", gathers * times, size * times)]
    name = "ranks that share weights" if shards < job.replicas else "data parallel"
    for kind, count, size in lines:
        yield _traffic(kind, name, shards, job.tp, count, size, job, machine, beside=True)
    if shards < job.replicas:
        same = (job.replicas // shards, job.tp * shards, times, held.trained // shards * times)
        yield _traffic("all-reduce", "ranks that hold the same", *same, job, machine, beside=True)


def _traffic(
    kind: str,
    group: str,
    ranks: int,
    stride: int,
    count: int,
    size: int,
    job: Job,
    machine: Machine,
    *,
    beside: bool = False,
) -> Traffic:
    link, bandwidth = machine.link(ranks, stride, job.ranks)
    through = {"all-reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0}.get(kind, (ranks - 1) / ranks)
    return Traffic(kind, group, ranks, link, count, size, size * through / bandwidth, beside)
