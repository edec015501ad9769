"""Geometry: which part of a full tensor each tensor parallel rank holds. Pure; no process group needed.

A :class:`Layout` is the one source of every offset: sharding at setup, gathering, checkpoint chunks, optimizer state
and the table shown to people are all derived from its boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor

Interval = tuple[int, int]
"""(start, length) along the cut dim."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of a full tensor: its offset and its size, one number a dim."""

    offset: tuple[int, ...]
    size: tuple[int, ...]


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
            return (Box((0,) * len(self.shape), self.shape),)
        before, after = self.shape[: self.dim], self.shape[self.dim + 1 :]
        return tuple(
            Box((*(0 for _ in before), start, *(0 for _ in after)), (*before, length, *after))
            for start, length in self.parts[rank]
        )

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


def share_heads(queries: int, keys: int, tp_size: int) -> tuple[tuple[Interval, ...], tuple[Interval, ...]]:
    """Which heads each rank computes: intervals of the query heads, and of the key (and value) heads.

    A rank's query heads attend to its own key heads and to no others. With at least as many key heads as ranks, whole
    groups (a key head and its query heads) are shared out, the first ranks taking one more where they do not divide.
    With fewer, neighbouring ranks hold the same key head and share its query heads.

    >>> share_heads(6, 2, 4)
    (((0, 2), (2, 1), (3, 2), (5, 1)), ((0, 1), (0, 1), (1, 1), (1, 1)))

    Raises:
        ValueError: if there are more ranks than query heads.
    """
    group = queries // keys
    if tp_size <= keys:
        whole = even_widths(keys, tp_size)
        return tuple((start * group, length * group) for start, length in whole), whole
    if tp_size > queries:
        raise ValueError(
            f"{queries} query heads cannot be shared by {tp_size} ranks; use a tensor parallel size of at most"
            f" {queries}."
        )
    mine: list[Interval] = []
    held: list[Interval] = []
    for head, (_, ranks) in enumerate(even_widths(tp_size, keys)):
        mine += [(head * group + start, length) for start, length in even_widths(group, ranks)]
        held += [(head, 1)] * ranks
    return tuple(mine), tuple(held)


@dataclass(frozen=True)
class Fused:
    """How a fused parameter is divided along the dim that is cut.

    Args:
        sizes: the sub-parameters, one behind the other; each is cut separately.
        repeat: how often their sequence repeats.
        unit: the length of the runs that must stay together.
    """

    sizes: tuple[int, ...]
    repeat: int = 1
    unit: int = 1


def sub_parameters(shape: Any, cut_dim: int, weight: Sequence[int], weight_dim: int) -> Fused:
    """The sub-parameters of the fused weight of a linear.

    A view of as many dims as the weight names them one for one. A longer one divides the output features further, as
    ``(experts, 2, -1)`` with partition_dim 1 does: what lies before the cut dim repeats, what lies behind it must not
    be cut across.

    Args:
        shape: the view: sizes, one -1, and at ``cut_dim`` a count or a tuple of sizes.
        cut_dim: the dim of the view that is cut.
        weight: [out, in] of the weight.
        weight_dim: the dim of the weight that the cut dim of the view lies in.

    Raises:
        ValueError: if the weight cannot be viewed so.
    """
    if len(shape) < 2:
        raise ValueError(f"shape: {shape} has fewer dims than the weight {list(weight)}.")
    known = [sum(e) if isinstance(e, tuple) else e for e in shape]
    if shape[-1] not in (-1, weight[1]) and cut_dim != len(shape) - 1:
        raise ValueError(f"shape: the last entry of {shape} is not the weight's {weight[1]} input features.")
    if weight_dim == 1:
        if len(shape) != 2 or cut_dim != 1:
            raise ValueError(f"shape: a row rule cuts the input features, the last of two entries, not {shape}.")
        if known[0] not in (-1, weight[0]):
            raise ValueError(f"shape: the first entry of {shape} is not the weight's {weight[0]} output features.")
        return Fused(_parts_of(shape[1], weight[1]))
    if cut_dim == len(shape) - 1:
        raise ValueError(f"shape: a column rule cuts the output features, which the last entry of {shape} is not.")
    leading = list(known[:-1])
    leading[cut_dim] = 1
    if -1 in leading:
        if not isinstance(shape[cut_dim], tuple):
            raise ValueError(f"shape: {shape} leaves two sizes open; only one entry before the last may be -1.")
        leading[leading.index(-1)] = weight[0] // known[cut_dim]
    total, rest = divmod(weight[0], prod(leading))
    if rest:
        raise ValueError(f"shape: {shape} does not divide the weight's {weight[0]} output features.")
    before, after = prod(leading[:cut_dim]), prod(leading[cut_dim + 1 :])
    return Fused(tuple(size * after for size in _parts_of(shape[cut_dim], total)), before, after)


def fused_parameter(shape: Any, cut_dim: int, parameter: Sequence[int]) -> Fused:
    """The sub-parameters of any fused parameter, along its dim ``cut_dim``.

    Entries of ``shape`` are the parameter's dims one for one; further ones directly behind the cut entry divide that
    dim into runs that stay together.

    Raises:
        ValueError: if the parameter cannot be viewed so.
    """
    behind = len(shape) - len(parameter)
    if behind < 0 or cut_dim >= len(parameter):
        raise ValueError(f"shape: {shape} cut along its dim {cut_dim} is no view of a parameter {list(parameter)}.")
    runs = shape[cut_dim + 1 : cut_dim + 1 + behind]
    outer = (*shape[:cut_dim], -1, *shape[cut_dim + 1 + behind :])
    if any(e not in (-1, size) for e, size in zip(outer, parameter)) or any(e == -1 for e in runs):
        raise ValueError(f"shape: {shape} is no view of a parameter {list(parameter)}.")
    unit = prod(runs)
    if parameter[cut_dim] % unit:
        raise ValueError(f"shape: {parameter[cut_dim]} features do not divide into runs of {unit}.")
    parts = _parts_of(shape[cut_dim], parameter[cut_dim] // unit)
    return Fused(tuple(size * unit for size in parts), 1, unit)


def _parts_of(entry: Any, total: int) -> tuple[int, ...]:
    """The sub-parameter sizes that a ``shape`` entry gives for a dim of ``total``."""
    if isinstance(entry, tuple):
        if sum(entry) != total:
            raise ValueError(f"shape: the sub-parameters {entry} add up to {sum(entry)}, but the weight has {total}.")
        return entry
    if entry == -1:
        return (total,)
    if total % entry:
        raise ValueError(f"shape: {total} features do not divide into {entry} equal sub-parameters.")
    return (total // entry,) * entry


def _joined(part: Sequence[Interval]) -> tuple[Interval, ...]:
    """Neighbouring intervals as one, so that an uncut boundary leaves no seam in files and tables."""
    joined: list[Interval] = []
    for start, length in part:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return tuple(joined)
