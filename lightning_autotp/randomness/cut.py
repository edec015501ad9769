"""Which part of a full tensor a rank holds where random numbers are drawn, whatever the size of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Optional, Union

import torch
from torch import Tensor

Shape = tuple[int, ...]
Index = Union[slice, tuple[int, ...]]


class OtherShapeError(ValueError):
    """A tensor is not shaped as the one by which the cut was found."""


@dataclass(frozen=True)
class Cut:
    """How the ranks share a tensor of ``ndim`` dims: rank r has the indices ``parts[r]`` along a dim.

    Args:
        ndim: how many dims the tensor has.
        dim: the dim; the first of two, if heads in groups are two dims.
        sizes: of the full tensor along it, or along both.
        parts: by rank, in local order, along both dims as one.
        tokens: instead, ranks have their own tokens along ``dim``: ``[1, T_r, ...]``, or ``[T_r, ...]``, of
            ``[B, S, ...]``.
    """

    ndim: int
    dim: int = 0
    sizes: Shape = ()
    parts: tuple[tuple[int, ...], ...] = ()
    tokens: bool = False

    def of(self, local: Sequence[int], rank: int, ranks: int, tokens: int) -> Part:
        """The part that ``rank`` has, of a tensor of which it holds ``local``.

        Args:
            local: the shape that it holds.
            rank: its number.
            ranks: how many share the tensor.
            tokens: how many tokens the batch has; 0 if that is not known.

        Raises:
            OtherShapeError: if nobody can have such a part.
        """
        if len(local) != self.ndim:
            raise OtherShapeError(f"{list(local)} has not {self.ndim} dims")
        return self._of_tokens(local, rank, ranks, tokens) if self.tokens else self._along(local, rank)

    def _of_tokens(self, local: Sequence[int], rank: int, ranks: int, tokens: int) -> Part:
        lead = (1,) * self.dim
        mine = local[self.dim]
        count = tokens if -(-tokens // ranks) == mine else ranks * mine
        start = min(rank * mine, count)
        full = (*lead, count, *local[self.dim + 1 :])
        return Part(full, self.dim, 1, slice(start, min(start + mine, count)), mine)

    def _along(self, local: Sequence[int], rank: int) -> Part:
        count, indices = len(self.sizes), self.parts[rank]
        held, after = prod(local[self.dim : self.dim + count]), tuple(local[self.dim + count :])
        size, index = self.sizes, _index(indices)
        if held != len(indices):
            if count > 1:
                raise OtherShapeError(f"{list(local)} has not {len(indices)} entries along dim {self.dim}")
            full, indices = _scaled(self.sizes[0], self.parts, rank, held)
            size, index = (full,), _index(indices)
        return Part((*local[: self.dim], *size, *after), self.dim, count, index, held)


@dataclass(frozen=True)
class Part:
    """A rank's part of a full tensor.

    Args:
        full: the full shape.
        dim: the dim that is cut; the first of them.
        count: how many dims are cut as one.
        index: the indices along it.
        held: how many entries the rank has along it; more than there are indices if the last ones are padding.
    """

    full: Shape
    dim: int
    count: int
    index: Index
    held: int

    @property
    def shape(self) -> Shape:
        """Of the rank's part, with the dims that are cut as one."""
        return (*self.full[: self.dim], self.held, *self.full[self.dim + self.count :])

    def take(self, full: Tensor, shape: Sequence[int]) -> Tensor:
        """The part of ``full``, in the rank's own ``shape``; padding is one of its numbers, or zero."""
        flat = full.flatten(self.dim, self.dim + self.count - 1) if self.count > 1 else full
        part = flat[(slice(None),) * self.dim + (self._key(full.device),)]
        lacking = self.held - part.shape[self.dim]
        if lacking:
            rest = list(part.shape)
            rest[self.dim] = lacking
            part = torch.cat([part, part.new_zeros(rest)], self.dim)
        return part.reshape(tuple(shape))

    def put(self, local: Tensor, full: Tensor) -> Tensor:
        """``full`` with the rank's part in its place; gradients go to ``local``."""
        flat = full.flatten(self.dim, self.dim + self.count - 1) if self.count > 1 else full.clone()
        own = local.reshape(self.shape)
        key = self._key(full.device)
        length = key.stop - key.start if isinstance(key, slice) else len(key)
        own = own.narrow(self.dim, 0, length)
        flat[(slice(None),) * self.dim + (key,)] = own
        return flat.reshape(full.shape)

    def _key(self, device: torch.device) -> Union[slice, Tensor]:
        return self.index if isinstance(self.index, slice) else torch.tensor(self.index, device=device)


def full_like(part: Part, local: Tensor, order: Sequence[int], value: float) -> Tensor:
    """A full tensor of the same numbers everywhere, whose dims lie in memory in ``order``, the outermost first."""
    order = order if len(order) == len(part.full) else range(len(part.full))
    shape = [part.full[dim] for dim in order]
    made = torch.full(shape, value, dtype=local.dtype, device=local.device)
    return made.permute([list(order).index(dim) for dim in range(len(shape))])


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dims of ``tensor``, the outermost in memory first."""
    return tuple(sorted(range(tensor.ndim), key=lambda dim: (-tensor.stride()[dim], dim)))


def _index(indices: tuple[int, ...]) -> Index:
    first = indices[0] if indices else 0
    return slice(first, first + len(indices)) if indices == tuple(range(first, first + len(indices))) else indices


def _scaled(size: int, parts: Sequence[tuple[int, ...]], rank: int, held: int) -> tuple[int, tuple[int, ...]]:
    """The full size and a rank's indices of a dim of which it holds ``held`` entries: it is heads times something.

    A dim of rows times heads repeats; one of heads times something has longer pieces.
    """
    found = _repeats(size, parts)
    mine = parts[rank]
    if found is not None:
        times, period = found
        unit = len(mine) // times
        if unit and held % unit == 0:
            first = mine[:unit]
            return held // unit * period, tuple(again * period + at for again in range(held // unit) for at in first)
    elif mine and size * held % len(mine) == 0:
        starts = [mine[0], *(b for a, b in zip(mine, mine[1:]) if b != a + 1)]
        lengths = _lengths(mine)
        if all(at * held % len(mine) == 0 for at in (*starts, *lengths)):
            pieces = [(at * held // len(mine), length * held // len(mine)) for at, length in zip(starts, lengths)]
            return size * held // len(mine), tuple(at + i for at, length in pieces for i in range(length))
    raise OtherShapeError(f"{held} entries do not fit {len(mine)} of {size}")


def _repeats(size: int, parts: Sequence[tuple[int, ...]]) -> Optional[tuple[int, int]]:
    """How often the parts repeat along the dim, and the size of what repeats; None if they do not."""
    for times in (n for n in range(size, 1, -1) if size % n == 0):
        period = size // times
        if all(_is_repeated(part, times, period) for part in parts):
            return times, period
    return None


def _is_repeated(part: tuple[int, ...], times: int, period: int) -> bool:
    unit = len(part) // times
    first = part[:unit]
    return part == tuple(again * period + at for again in range(times) for at in first) and all(
        a < period for a in first
    )


def _lengths(indices: tuple[int, ...]) -> list[int]:
    ends = [n for n, (a, b) in enumerate(zip(indices, indices[1:]), start=1) if b != a + 1]
    return [b - a for a, b in zip([0, *ends], [*ends, len(indices)])]
