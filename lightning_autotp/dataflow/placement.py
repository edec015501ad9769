"""What each rank holds of a full tensor: for each dim which indices, and whether the ranks' values are partial sums.

    local_r = full[indices of rank r along each dim]     (not partial: all ranks that hold an element hold its value)
    full    = sum over the ranks that hold an element    (partial)

Indices, not only "sharded along dim d": packed, interleaved, uneven and overlapping shards are one thing, and a view of
them is arithmetic.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, product
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


@dataclass(frozen=True)
class Repeated:
    """A dim along which indices of one class have the same value: keys that are repeated for all heads that read them.

    ``classes[i]`` is the class of index i, ``held[r]`` those of rank r's entries in local order.
    """

    classes: tuple[int, ...]
    held: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """The full size."""
        return len(self.classes)

    @property
    def widths(self) -> tuple[int, ...]:
        """Each rank's local size."""
        return tuple(len(mine) for mine in self.held)

    def __str__(self) -> str:
        """Each rank's entries, by their first index with that value: ``2 of 0:1 | 2 of 4:5``."""
        return " | ".join(", ".join(_counted(self.classes.index(at) for at in mine)) or "none" for mine in self.held)


@dataclass(frozen=True)
class Sparse:
    """A dim that is zero but at some indices: the gradient of slices, before those of the other slices are added.

    ``held[r]`` are the indices of rank r's entries in local order; -1 stands for one that is zero. The full tensor is
    zero at every index that no rank names.
    """

    size: int
    held: tuple[tuple[int, ...], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Each rank's local size."""
        return tuple(len(mine) for mine in self.held)

    @property
    def named(self) -> frozenset[int]:
        """The indices that are not zero."""
        return frozenset(at for mine in self.held for at in mine if at >= 0)

    def __str__(self) -> str:
        """Each rank's intervals, without what is zero."""
        own = (joined((at, 1) for at in mine if at >= 0) for mine in self.held)
        return " | ".join(",".join(f"{start}:{start + length}" for start, length in part) or "zeros" for part in own)


DimPlacement = Optional[Union[Shards, Constant, Repeated, Sparse]]
"""None: every rank holds all indices in order."""


_WORDS = {Shards: "sharded", Constant: "constant", Repeated: "repeated", Sparse: "sharded and else zero"}


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
        words = [f"{_WORDS[type(dim)]} along dim {at} ({dim})" for at, dim in enumerate(self.dims) if dim is not None]
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


def labels(dim: DimPlacement, size: int, ranks: int) -> tuple[Sequence[int], list[Sequence[int]]]:
    """A label for each index of a dim, alike where the value is, and the labels of each rank's entries in order."""
    if isinstance(dim, Repeated):
        return dim.classes, list(dim.held)
    if isinstance(dim, Sparse):
        return range(size), list(dim.held)
    if isinstance(dim, Constant):
        return [0] * size, [[0] * width for width in dim.widths]
    if isinstance(dim, Shards):
        return range(size), [[at for start, n in part for at in range(start, start + n)] for part in dim.parts]
    return range(size), [range(size)] * ranks


def repeated(classes: Sequence[Hashable], held: Sequence[Sequence[Hashable]]) -> DimPlacement:
    """The dim of which these are the labels: see :func:`labels`. Those of ranks must be among the full dim's."""
    numbers: dict[Hashable, int] = {}
    own = tuple(numbers.setdefault(label, len(numbers)) for label in classes)
    mine = tuple(tuple(numbers[label] for label in its) for its in held)
    if all(its == own for its in mine):
        return None
    if len(numbers) == len(own):
        return shards(len(own), [[(at, 1) for at in its] for its in mine])
    return constant(len(own), [len(its) for its in mine]) if len(numbers) == 1 else Repeated(own, mine)


def sparse(size: int, held: Sequence[Sequence[int]]) -> DimPlacement:
    """A dim of which these are the ranks' indices, -1 where zero; shards if the ranks name all indices."""
    if all(at >= 0 for mine in held for at in mine) and len({at for mine in held for at in mine}) == size:
        return shards(size, [[(at, 1) for at in mine] for mine in held])
    return Sparse(size, tuple(tuple(mine) for mine in held))


def _counted(entries: Iterable[int]) -> Iterator[str]:
    return (f"{len(list(alike))} of {at}:{at + 1}" for at, alike in groupby(entries))


def covered(dims: Sequence[DimPlacement]) -> bool:
    """Whether every element is held by some rank (shards along two dims can leave holes)."""
    return all(holders for holders in _cells(dims))


def disjoint(dims: Sequence[DimPlacement]) -> bool:
    """Whether the tensor is sharded, and no element is held by two ranks."""
    sharded = any(isinstance(dim, (Shards, Repeated, Sparse)) for dim in dims)
    return sharded and all(holders <= 1 for holders in _cells(dims))


def _cells(dims: Sequence[DimPlacement]) -> Iterator[int]:
    """How often each block is held: those between neighbouring ends of intervals, and classes of equal entries."""
    held = [_blocks(dim) for dim in dims if isinstance(dim, (Shards, Repeated, Sparse))]
    for cell in product(*held) if held else ():
        yield sum(map(prod, zip(*cell)))


def _blocks(dim: Union[Shards, Repeated, Sparse]) -> list[list[int]]:
    """How often each rank holds each block of a dim that is not zero."""
    if isinstance(dim, Sparse):
        return [[mine.count(at) for mine in dim.held] for at in sorted(dim.named)]
    if isinstance(dim, Repeated):
        return [[at in mine for mine in dim.held] for at in range(max(dim.classes) + 1)]
    ends = {0, dim.size, *(at for part in dim.parts for start, length in part for at in (start, start + length))}
    return [
        [sum(start <= begin and end <= start + length for start, length in part) for part in dim.parts]
        for begin, end in pairwise(sorted(ends))
    ]
