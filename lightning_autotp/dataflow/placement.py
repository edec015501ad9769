"""What each rank holds of a full tensor: for each dim which indices, and whether the ranks' values are partial sums.

    local_r = full[indices of rank r along each dim]     (not partial: all ranks that hold an element hold its value)
    full    = sum over the ranks that hold an element    (partial)

Indices, not only "sharded along dim d": packed, interleaved, uneven and overlapping shards are one thing, and a view of
them is arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import Optional, Union

from lightning_autotp.layout.layout import Interval, Layout

Shape = tuple[int, ...]
Part = tuple[Interval, ...]
"""What one rank holds along a dim: (start, length) intervals in local order."""


@dataclass(frozen=True)
class Shards:
    """A sharded dim of ``size``: ``parts[r]`` are rank r's intervals, neighbours joined."""

    size: int
    parts: tuple[Part, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Each rank's local size."""
        return tuple(sum(length for _, length in part) for part in self.parts)

    def __str__(self) -> str:
        """Each rank's intervals, as ``0:4 | 4:8``."""
        return " | ".join(",".join(f"{start}:{start + length}" for start, length in p) or "none" for p in self.parts)


@dataclass(frozen=True)
class Constant:
    """A dim along which the value is the same at every index: how many a rank holds matters, which ones does not."""

    size: int
    widths: tuple[int, ...]

    def __str__(self) -> str:
        """Each rank's local size."""
        return f"{' | '.join(map(str, self.widths))} equal entries"


DimPlacement = Optional[Union[Shards, Constant]]
"""None: every rank holds all indices in order."""


@dataclass(frozen=True)
class Placement:
    """What the ranks hold of a full tensor, one entry a dim; ``zero``: all is zero, and so a partial sum as well."""

    dims: tuple[DimPlacement, ...]
    partial: bool = False
    zero: bool = False

    def __post_init__(self) -> None:
        """Know a sum over a single holder as what it is: no partial sum."""
        if self.partial and disjoint(self.dims):
            object.__setattr__(self, "partial", False)

    @classmethod
    def replicated(cls, ndim: int) -> Placement:
        """Every rank holds the full tensor."""
        return cls((None,) * ndim)

    @classmethod
    def from_layout(cls, layout: Layout) -> Placement:
        """What the ranks hold of a parameter or buffer that is sharded as ``layout`` says."""
        dims: list[DimPlacement] = [None] * len(layout.shape)
        if layout.dim is not None:
            dims[layout.dim] = shards(layout.shape[layout.dim], layout.parts)
        return cls(tuple(dims))

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the full tensor."""
        return not self.partial and all(dim is None for dim in self.dims)

    def local_shape(self, shape: Shape, rank: int) -> Shape:
        """The shape of what ``rank`` holds of a tensor of ``shape``."""
        return tuple(size if dim is None else dim.widths[rank] for size, dim in zip(shape, self.dims))

    def __str__(self) -> str:
        """The placement in words: replicated, sharded along dim d, partial."""
        words = [
            f"sharded along dim {at} ({dim})" if isinstance(dim, Shards) else f"constant along dim {at} ({dim})"
            for at, dim in enumerate(self.dims)
            if dim is not None
        ]
        return " and ".join([*words, *(["partial"] if self.partial else [])]) or "replicated"


def joined(intervals: Iterable[Interval]) -> Part:
    """Intervals without empty ones and with neighbours joined: one form for each sequence of indices."""
    found: list[Interval] = []
    for start, length in intervals:
        if not length:
            continue
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return tuple(found)


def shards(size: int, parts: Sequence[Iterable[Interval]]) -> Optional[Shards]:
    """A dim of which the ranks hold ``parts``; None if each of them holds all of it in order."""
    tidy = tuple(joined(part) for part in parts)
    whole = ((0, size),) if size else ()
    return None if all(part == whole for part in tidy) else Shards(size, tidy)


def constant(size: int, widths: Sequence[int]) -> Optional[Constant]:
    """A dim of equal entries; None if each rank holds as many as there are."""
    return None if all(width == size for width in widths) else Constant(size, tuple(widths))


def covered(dims: Sequence[DimPlacement]) -> bool:
    """Whether every element is held by some rank (shards along two dims can leave holes)."""
    return all(holders for holders in _cells(dims))


def disjoint(dims: Sequence[DimPlacement]) -> bool:
    """Whether the tensor is sharded, and no element is held by two ranks."""
    sharded = any(isinstance(dim, Shards) for dim in dims)
    return sharded and all(holders <= 1 for holders in _cells(dims))


def _cells(dims: Sequence[DimPlacement]) -> Iterator[int]:
    """How often each block is held: those between two neighbouring ends of intervals."""
    sharded = [dim for dim in dims if isinstance(dim, Shards)]
    if not sharded:
        return
    ranks = range(len(sharded[0].parts))
    segments = []
    for dim in sharded:
        ends = {0, dim.size, *(at for part in dim.parts for start, length in part for at in (start, start + length))}
        segments.append(list(pairwise(sorted(ends))))
    for cell in product(*segments):
        times = (
            prod(
                sum(start <= begin and end <= start + length for start, length in dim.parts[rank])
                for dim, (begin, end) in zip(sharded, cell)
            )
            for rank in ranks
        )
        yield sum(times)
