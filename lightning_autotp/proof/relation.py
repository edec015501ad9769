"""How all ranks' local tensors relate to the full one, found from their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import torch
from torch import Tensor

TOLERANCE = 2e-4
"""Of the largest value: what rounding explains."""

_INFINITE = 1e30
"""What stands for minus infinity in masks is no scale."""


@dataclass(frozen=True)
class Relation:
    """What the ranks hold of a full tensor.

    Args:
        kind: ``replicated``; ``partial``, a sum over the ranks; ``sharded`` along ``dim``, rank r with the indices
            ``indices[r]``; both of these; ``tokens``, shards of all tokens as one sequence; ``nothing``, of which
            nothing can be said, because there is nothing but zeros or no rank has an element.
    """

    kind: Literal["replicated", "partial", "sharded", "sharded partial", "tokens", "nothing"]
    dim: Optional[int] = None
    indices: tuple[Tensor, ...] = ()

    def __str__(self) -> str:
        """The relation in words."""
        return self.kind if self.dim is None else f"{self.kind} along dim {self.dim}"


def relate(
    full: Tensor, local: Sequence[Tensor], hint: Optional[Relation] = None, least: float = 0.0
) -> Optional[Relation]:
    """Find how ``local``, a tensor a rank, relates to ``full``; None if nothing explains it.

    Args:
        full: of the unsharded run.
        local: by rank.
        hint: of a tensor whose gradient this is.
        least: values that are all smaller are rounding.
    """
    if full.is_complex():
        full = torch.view_as_real(full.resolve_conj())
        local = [torch.view_as_real(t.resolve_conj()) for t in local]
    if not full.numel() or all(not t.numel() for t in local):
        return Relation("nothing")
    if full.is_floating_point() and max(map(_scale, [full, *local])) <= least:
        return Relation("nothing")
    scale = _scale(full) if full.is_floating_point() else 1.0
    if full.ndim >= 3 and full.shape[0] > 1 and all(t.ndim == full.ndim and t.shape[0] == 1 for t in local):
        rows = full.flatten(0, 1)[None]  # sequence parallelism: all tokens as one sequence, or a rank's own
        if all(t.shape[1] == rows.shape[1] for t in local):
            return relate(rows, local, hint, least)
        if sum(t.shape[1] for t in local) >= rows.shape[1]:
            return _tokens(rows[0], local, scale)
    if all(t.shape == full.shape for t in local):
        if all(_close(t, full, scale) for t in local):
            return Relation("replicated")
        if full.is_floating_point() and _close(torch.stack([t.double() for t in local]).sum(0), full, scale):
            return Relation("partial")
        return None
    if any(t.ndim != full.ndim for t in local):
        return None
    differ = sorted({dim for t in local for dim in range(full.ndim) if t.shape[dim] != full.shape[dim]})
    if len(differ) == 2 and differ[1] - differ[0] == 1:  # heads in groups: both of their dims
        first = differ[0]
        merged = [t.flatten(first, first + 1) for t in local]
        return _sharded(full.flatten(first, first + 1), merged, first, scale, hint)
    return _sharded(full, local, differ[0], scale, hint) if len(differ) == 1 else None


def _scale(tensor: Tensor) -> float:
    values = tensor.double().abs()
    values = values[torch.isfinite(values) & (values < _INFINITE)]
    return float(values.max()) if values.numel() else 0.0


def _close(got: Tensor, want: Tensor, scale: float) -> bool:
    if not want.is_floating_point():
        return bool((got == want).all())
    difference = (got.double() - want.double()).abs()[torch.isfinite(want)]
    return not difference.numel() or float(difference.max()) <= TOLERANCE * scale + 1e-30


def _tokens(rows: Tensor, local: Sequence[Tensor], scale: float) -> Optional[Relation]:
    if any(t.shape[2:] != rows.shape[1:] for t in local):
        return None
    at = 0
    for t in local:
        length = min(t.shape[1], max(0, len(rows) - at))  # the rest is padding
        if not _close(t[0, :length], rows[at : at + length], scale):
            return None
        at += t.shape[1]
    return Relation("tokens")


def _sharded(
    full: Tensor, local: Sequence[Tensor], dim: int, scale: float, hint: Optional[Relation]
) -> Optional[Relation]:
    want, parts = _slices(full, dim), [_slices(t, dim) for t in local]
    if any(part.shape[1] != want.shape[1] for part in parts):
        return None
    generator = torch.Generator().manual_seed(0)
    width = want.shape[1]
    probe = torch.randn(width, 2, generator=generator, dtype=torch.float64) / max(width, 1) ** 0.5
    seen, indices = want @ probe, []
    for part in parts:
        nearest = torch.cdist(part @ probe, seen).argmin(1) if len(part) else torch.zeros(0, dtype=torch.long)
        if len(part) and float((part - want[nearest]).abs().max()) > TOLERANCE * scale + 1e-30:
            break
        indices.append(nearest)
    if len(indices) == len(parts):
        return Relation("sharded", dim, tuple(indices))
    if hint is not None and hint.indices and hint.dim == dim:
        total = torch.zeros_like(want)
        for part, at in zip(parts, hint.indices):
            if len(part) != len(at):
                return None
            total.index_add_(0, at, part)
        if float((total - want).abs().max()) <= TOLERANCE * scale + 1e-30:
            return Relation("sharded partial", dim, hint.indices)
    return None


def _slices(tensor: Tensor, dim: int) -> Tensor:
    """A row for each index along ``dim``; what is not finite is zero."""
    moved = tensor.movedim(dim, 0).double()
    rows = moved.reshape(moved.shape[0], -1) if moved.numel() else moved.new_zeros(moved.shape[0], moved[:1].numel())
    return torch.where(torch.isfinite(rows) & (rows.abs() < _INFINITE), rows, 0.0)
