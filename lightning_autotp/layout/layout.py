"""Geometry: which part of a full tensor each tensor parallel rank holds. Pure; no process group needed.

A :class:`Layout` is the one source of every offset: sharding at setup, gathering, checkpoint chunks, optimizer state
and the table shown to people are all derived from its boxes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Optional

import torch
from torch import Tensor

Interval = tuple[int, int]
"""(start, length) along the cut dim."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of a full tensor: its offset and its size, one number a dim."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def full(cls, shape: Sequence[int]) -> "Box":
        """All of a tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    def overlap(self, other: "Box") -> Optional["Box"]:
        """What both hold, None if that is nothing."""
        starts = tuple(max(a, b) for a, b in zip(self.offset, other.offset))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.offset, self.size, other.offset, other.size))
        size = tuple(end - start for start, end in zip(starts, ends))
        return Box(starts, size) if all(length > 0 for length in size) else None

    def view(self, tensor: Tensor, held: Optional["Box"] = None) -> Tensor:
        """A view of this box of ``tensor``, which holds the box ``held`` (None: all) of the full tensor."""
        for dim, (start, length) in enumerate(zip(self.offset, self.size)):
            tensor = tensor.narrow(dim, start if held is None else start - held.offset[dim], length)
        return tensor

    def pieces(self, most: int) -> Iterator["Box"]:
        """Boxes of at most ``most`` elements that tile this one, each of them contiguous in it.

        >>> [piece.size for piece in Box((0, 0), (5, 3)).pieces(6)]
        [(2, 3), (2, 3), (1, 3)]
        """
        if prod(self.size) <= most:
            yield self
            return
        dim = next(at for at, length in enumerate(self.size) if length > 1)
        rows = max(1, most // prod(self.size[dim + 1 :]))
        for start in range(0, self.size[dim], rows):
            offset, size = list(self.offset), list(self.size)
            offset[dim], size[dim] = offset[dim] + start, min(rows, size[dim] - start)
            yield from Box(tuple(offset), tuple(size)).pieces(most)


@dataclass(frozen=True)
class Share:
    """A run along the cut dim of what a rank holds, and all the ranks that hold it."""

    start: int
    length: int
    owners: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where the parts of a tensor of ``shape`` lie: ``parts[r]`` are rank r's intervals along ``dim``, in local order.

    ``dim`` None means that every rank holds everything. Ranks may hold the same interval (replicated key and value
    heads); every index of ``dim`` is held by at least one rank.
    """

    shape: tuple[int, ...]
    tp_size: int
    dim: Optional[int] = None
    parts: tuple[tuple[Interval, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.dim is None:
            return
        if len(self.parts) != self.tp_size:
            raise ValueError(f"{len(self.parts)} parts for a tensor parallel size of {self.tp_size}.")
        covered = 0
        for start, length in sorted(interval for part in self.parts for interval in part):
            if start > covered:
                break
            covered = max(covered, start + length)
        if covered != self.shape[self.dim]:
            raise ValueError(f"the parts {self.parts} do not cover dim {self.dim} of {self.shape}.")

    @classmethod
    def replicated(cls, shape: Sequence[int], tp_size: int) -> "Layout":
        """Every rank holds the whole tensor."""
        return cls(tuple(shape), tp_size)

    @classmethod
    def cut(
        cls, shape: Sequence[int], dim: int, tp_size: int, widths: Sequence[Sequence[Interval]], repeat: int = 1
    ) -> "Layout":
        """Cut ``dim`` into sub-parameters that lie one behind the other, ``repeat`` times over.

        ``widths[s]`` are the intervals of the ranks within sub-parameter s (one a rank, relative to its start).
        """
        sizes = [max(start + length for start, length in sub) for sub in widths]
        starts = [0, *accumulate(sizes * repeat)]
        parts = tuple(
            tuple(
                (starts[at] + widths[at % len(widths)][rank][0], widths[at % len(widths)][rank][1])
                for at in range(len(widths) * repeat)
                if widths[at % len(widths)][rank][1]
            )
            for rank in range(tp_size)
        )
        layout = cls(tuple(shape), tp_size, dim, tuple(_joined(part) for part in parts))
        if not layout.overlaps:
            return layout
        # what ranks share must be the same intervals on all of them, as a checkpoint's chunks are
        ends = sorted({at for part in layout.parts for start, length in part for at in (start, start + length)})
        runs = (
            (
                (a, b - a)
                for start, length in part
                for a, b in pairwise(at for at in ends if start <= at <= start + length)
            )
            for part in layout.parts
        )
        return cls(tuple(shape), tp_size, dim, tuple(tuple(run) for run in runs))

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the whole tensor."""
        return self.dim is None

    @property
    def overlaps(self) -> bool:
        """Whether some part is held by more than one rank, though not all of it by all."""
        return self.dim is not None and sum(self.widths) > self.shape[self.dim]

    @property
    def widths(self) -> tuple[int, ...]:
        """Each rank's size along the cut dim (empty when replicated)."""
        return tuple(sum(length for _, length in part) for part in self.parts)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of what ``rank`` holds."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.widths[rank], *self.shape[self.dim + 1 :])

    def boxes(self, rank: int) -> tuple[Box, ...]:
        """The boxes of the full tensor that ``rank`` holds, in local order."""
        if self.dim is None:
            return (Box.full(self.shape),)
        before, after = self.shape[: self.dim], self.shape[self.dim + 1 :]
        return tuple(
            Box((*(0 for _ in before), start, *(0 for _ in after)), (*before, length, *after))
            for start, length in self.parts[rank]
        )

    def row_boxes(self, rank: int, rows: Interval) -> tuple[tuple[Box, Box], ...]:
        """Of the rows (dim 0) that ``rank`` holds, those in ``rows``: their boxes of the full tensor and of these rows.

        >>> Layout.cut((6, 2), 0, 2, [((0, 1), (1, 2)), ((0, 2), (2, 1))]).row_boxes(0, (1, 2))
        ((Box(offset=(3, 0), size=(2, 2)), Box(offset=(0, 0), size=(2, 2))),)
        """
        first, count = rows
        wanted = Box((first, *(0 for _ in self.shape[1:])), (count, *self.local_shape(rank)[1:]))
        found = []
        local = 0
        for box in self.boxes(rank):
            dim = self.dim or 0
            at = tuple(local if d == dim else 0 for d in range(len(self.shape)))
            overlap = Box(at, box.size).overlap(wanted)
            local += box.size[dim]
            if overlap is not None:
                moved = tuple(o + f - a for o, f, a in zip(overlap.offset, box.offset, at))
                inside = tuple(o - w for o, w in zip(overlap.offset, wanted.offset))
                found.append((Box(moved, overlap.size), Box(inside, overlap.size)))
        return tuple(found)

    def shared(self, rank: int) -> tuple[Share, ...]:
        """The runs of what ``rank`` holds that other ranks hold too, in local order; none when replicated."""
        if not self.overlaps:
            return ()
        ends = sorted({at for part in self.parts for start, length in part for at in (start, start + length)})
        found: list[Share] = []
        local = 0
        for start, length in self.parts[rank]:
            for begin, end in pairwise(at for at in ends if start <= at <= start + length):
                owners = tuple(r for r, part in enumerate(self.parts) if any(s <= begin < s + n for s, n in part))
                before = found[-1] if found else None
                if before is not None and before.owners == owners and before.start + before.length == local:
                    found[-1] = Share(before.start, before.length + end - begin, owners)
                elif len(owners) > 1:
                    found.append(Share(local, end - begin, owners))
                local += end - begin
        return tuple(found)

    def split(self, local: Tensor, rank: int) -> tuple[Tensor, ...]:
        """Views of ``local``, one for each of ``boxes(rank)``."""
        if self.dim is None:
            return (local,)
        return local.split([length for _, length in self.parts[rank]], self.dim)

    def shard(self, full: Tensor, rank: int) -> Tensor:
        """What ``rank`` holds of ``full``: a new contiguous tensor (``full`` itself when replicated)."""
        self._check(full, self.shape)
        if self.dim is None:
            return full
        pieces = [full.narrow(self.dim, start, length) for start, length in self.parts[rank]]
        if not pieces:
            return full.new_empty(self.local_shape(rank))
        return torch.cat(pieces, self.dim)

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """The full tensor from what all ranks hold, in rank order."""
        if len(parts) != self.tp_size:
            raise ValueError(f"{len(parts)} parts were given, but the tensor is cut for {self.tp_size} ranks.")
        for rank, part in enumerate(parts):
            self._check(part, self.local_shape(rank))
        if self.dim is None:
            return parts[0]
        full = parts[0].new_empty(self.shape)
        for rank, part in enumerate(parts):
            for (start, length), piece in zip(self.parts[rank], self.split(part, rank)):
                full.narrow(self.dim, start, length).copy_(piece)
        return full

    def along(self, size: int) -> "Layout":
        """The same cut for a 1-D tensor of ``size`` (a bias that follows its weight)."""
        if self.dim is None or self.shape[self.dim] != size:
            raise ValueError(f"a bias of {size} does not follow a weight {self.shape} cut along dim {self.dim}.")
        return Layout((size,), self.tp_size, 0, self.parts)

    def _check(self, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"a tensor of shape {shape} belongs here, not {tuple(tensor.shape)}.")


def even_widths(total: int, tp_size: int, unit: int = 1) -> tuple[Interval, ...]:
    """``total`` cut into ``tp_size`` runs of whole units; the first ranks get one unit more where it does not divide.

    >>> even_widths(65, 2)
    ((0, 33), (33, 32))
    """
    units, rest = divmod(total, unit)
    if rest:
        raise ValueError(f"{total} is not a multiple of {unit}.")
    base, extra = divmod(units, tp_size)
    lengths = [(base + (rank < extra)) * unit for rank in range(tp_size)]
    return tuple(zip([0, *accumulate(lengths)], lengths))


def chunk(length: int, ranks: int, rank: int) -> Interval:
    """The run of ``length`` that ``rank`` holds of it as ``torch.chunk`` gives them: the last ranks less, or nothing.

    >>> [chunk(5, 4, rank) for rank in range(4)]
    [(0, 2), (2, 2), (4, 1), (5, 0)]
    """
    size = -(-length // ranks)
    start = min(rank * size, length)
    return start, min(size, length - start)


def _joined(part: Sequence[Interval]) -> tuple[Interval, ...]:
    """Neighbouring intervals as one, so that an uncut boundary leaves no seam in files and tables."""
    joined: list[Interval] = []
    for start, length in part:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return tuple(joined)
