"""Collectives that are counted on their way: how many of each kind, over how many ranks, and how many bytes."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_autotp.distributed.collectives import Collectives, Operation, Over
from lightning_autotp.distributed.mesh import Mesh


class Collective(NamedTuple):
    """A collective: ``all-reduce`` or the like, over how many ranks, and the bytes of its full tensor on a rank."""

    kind: str
    ranks: int
    size: int


class RecordingCollectives(Collectives):
    """Those of another kind, which do the work. What is sent as objects is not counted: it is no part of a step.

    Args:
        inner: what does the work.

    Attributes:
        counts: how often each collective ran. Regions that are compiled count as they are traced, once.
    """

    def __init__(self, inner: Collectives) -> None:
        self.inner = inner
        self.world_rank, self.tp_source = inner.world_rank, inner.tp_source
        self.batch_source = inner.batch_source
        self.sends_between_gpus = inner.sends_between_gpus
        self.counts: Counter[Collective] = Counter()

    def number(self, kind: str) -> int:
        """How many collectives of ``kind`` ran."""
        return sum(count for collective, count in self.counts.items() if collective.kind == kind)

    def bytes(self, kind: str) -> int:
        """The bytes of the full tensors of all collectives of ``kind``."""
        return sum(collective.size * count for collective, count in self.counts.items() if collective.kind == kind)

    def size(self, over: Over = "tp") -> int:
        return self.inner.size(over)

    def all_reduce(self, x: Tensor, over: Over = "tp", *, op: Operation = "sum") -> Tensor:
        self._count("all-reduce", over, x.nbytes)
        return self.inner.all_reduce(x, over, op=op)

    def start_all_reduce(self, x: Tensor, over: Over = "tp") -> Callable[[], Tensor]:
        self._count("all-reduce", over, x.nbytes)
        return self.inner.start_all_reduce(x, over)

    def all_gather(self, x: Tensor, over: Over = "tp") -> Tensor:
        self._count("all-gather", over, x.nbytes * self.size(over))
        return self.inner.all_gather(x, over)

    def start_all_gather(self, x: Tensor, over: Over = "tp") -> Callable[[], Tensor]:
        self._count("all-gather", over, x.nbytes * self.size(over))
        return self.inner.start_all_gather(x, over)

    def reduce_scatter(self, x: Tensor, over: Over = "tp") -> Tensor:
        self._count("reduce-scatter", over, x.nbytes)
        return self.inner.reduce_scatter(x, over)

    def start_reduce_scatter(self, x: Tensor, over: Over = "tp") -> Callable[[], Tensor]:
        self._count("reduce-scatter", over, x.nbytes)
        return self.inner.start_reduce_scatter(x, over)

    def broadcast(self, x: Tensor, over: Over = "world") -> Tensor:
        self._count("broadcast", over, x.nbytes)
        return self.inner.broadcast(x, over)

    def exchange(self, parts: Sequence[Tensor], lengths: Sequence[int], over: Over = "tp") -> list[Tensor]:
        self._count("all-to-all", over, sum(part.nbytes for part in parts))
        return self.inner.exchange(parts, lengths, over)

    def all_gather_matmul(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        self._count("all-gather", "tp", x.nbytes * self.size())
        return self.inner.all_gather_matmul(x, weights)

    def matmul_reduce_scatter(self, x: Tensor, weight: Tensor) -> Tensor:
        self._count("reduce-scatter", "tp", x.shape[0] * weight.shape[0] * x.element_size())
        return self.inner.matmul_reduce_scatter(x, weight)

    def gather_objects(self, value: Any, over: Over = "tp") -> list[Any]:
        return self.inner.gather_objects(value, over)

    def broadcast_object(self, value: Any, over: Over = "tp") -> Any:
        return self.inner.broadcast_object(value, over)

    def add_groups(self, members: Iterable[tuple[int, ...]]) -> None:
        self.inner.add_groups(members)

    def process_group(self, over: Over = "tp") -> ProcessGroup:
        return self.inner.process_group(over)

    def _count(self, kind: str, over: Over, size: int) -> None:
        self.counts[Collective(kind, self.size(over), size)] += 1


def recording_mesh(mesh: Mesh) -> tuple[Mesh, RecordingCollectives]:
    """Make a mesh whose collectives are those of ``mesh``, counted; and what counts them."""
    recorder = RecordingCollectives(mesh.collectives)
    return replace(mesh, collectives=recorder), recorder
