"""What rules share: operands that meet element by element, and sums over dims."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from typing import Literal, Optional

from lightning_autotp.dataflow.event import Unknown, Wrong
from lightning_autotp.dataflow.placement import (
    Constant,
    DimPlacement,
    Placement,
    Repeated,
    Shape,
    Shards,
    Sparse,
    covered,
    disjoint,
    labels,
    repeated,
    sparse,
)

Linear = Optional[Literal["sum", "product"]]
"""In what an operator is linear: in all operands together, in each alone, or in none."""

Placed = tuple[Shape, Placement]


def combine(operands: Sequence[Placed], shape: Shape, linear: Linear = None) -> Placement:
    """The placement of a result of ``shape`` that is computed element by element, operands broadcast from the right."""
    dims = tuple(_met(operands, shape, at, linear) for at in range(len(shape)))
    if not covered(dims):
        sharded = [at for at, dim in enumerate(dims) if isinstance(dim, Shards)]
        raise Wrong(f"operands are sharded along different dims {sharded}: no rank computes some of the elements.")
    zeros = [placement.zero for _, placement in operands]
    zero = bool(zeros) and (any(zeros) if linear == "product" else linear == "sum" and all(zeros))
    partial = _is_partial(operands, dims, len(shape), linear)
    return Placement(dims, partial, zero)


def _met(operands: Sequence[Placed], shape: Shape, at: int, linear: Linear) -> DimPlacement:
    """What the ranks hold along dim ``at`` of a result, of what they hold of the operands that have it."""
    found: list[DimPlacement] = []
    for own, placement in operands:
        mine = at - (len(shape) - len(own))
        if mine >= 0 and (own[mine] != 1 or shape[at] == 1):
            found.append(placement.dims[mine])
    if any(isinstance(dim, Sparse) for dim in found):
        return _met_sparse(found, shape, at, linear, alone=len(found) < len(operands))
    repeats = next((dim for dim in found if isinstance(dim, Repeated)), None)
    if repeats is not None:
        return _met_classes(found, shape, at, len(repeats.held))
    sharded = [dim for dim in found if isinstance(dim, Shards)]
    constants = [dim for dim in found if isinstance(dim, Constant)]
    for dim in sharded[1:]:
        if dim != sharded[0]:
            raise Wrong(f"operands are sharded differently along dim {at} of {list(shape)}: {sharded[0]} and {dim}.")
    if sharded and None in found:
        raise Wrong(f"dim {at} of {list(shape)} is sharded in one operand ({sharded[0]}) and replicated in another.")
    longest = max(constants, key=lambda dim: dim.widths, default=None)
    first: DimPlacement = sharded[0] if sharded else None if None in found else longest
    widths = first.widths if first is not None else (shape[at],) * len(longest.widths if longest else ())
    for other in constants:  # a single entry is broadcast
        if any(mine not in (1, width) for mine, width in zip(other.widths, widths)):
            raise Wrong(
                f"dim {at} of {list(shape)}: an operand has {other}, which does not fit the other's local size."
            )
    return first


def _met_classes(found: Sequence[DimPlacement], shape: Shape, at: int, ranks: int) -> DimPlacement:
    """What is computed of operands of which indices of one class are alike: a value for each combination of classes."""
    known = [labels(dim, shape[at], ranks) for dim in found]
    classes = list(zip(*(own for own, _ in known)))
    held = []
    for rank in range(ranks):
        mine = [its[rank] for _, its in known]
        width = max(map(len, mine))
        if any(len(its) not in (1, width) for its in mine):
            raise Wrong(
                f"dim {at} of {list(shape)}: rank {rank}'s local sizes {[len(its) for its in mine]} do not fit."
            )
        held.append(list(zip(*(its if len(its) == width else [*its] * width for its in mine))))  # one is broadcast
    return relabelled(classes, held, f"combines indices of dim {at} of {list(shape)}")


def _met_sparse(found: Sequence[DimPlacement], shape: Shape, at: int, linear: Linear, alone: bool) -> DimPlacement:
    """What is zero but at some indices, added to others or multiplied; ``alone``: an operand does not have the dim."""
    if linear is None or linear == "sum" and alone or any(isinstance(dim, (Constant, Repeated)) for dim in found):
        raise Unknown(f"no rule follows dim {at} of {list(shape)}, the gradient of a slice, into this operator.")
    ranks = next(len(dim.held) for dim in found if isinstance(dim, Sparse))
    known = [labels(dim, shape[at], ranks)[1] for dim in found]
    held = []
    for rank in range(ranks):
        mine = [its[rank] for its in known]
        if len({len(its) for its in mine}) > 1:
            raise Wrong(
                f"dim {at} of {list(shape)}: rank {rank}'s local sizes {[len(its) for its in mine]} do not fit."
            )
        held.append([max(entry) for entry in zip(*mine)])
        for dim, its in zip(found, mine):
            for own, index in zip(its, held[-1]):
                if own not in (-1, index):
                    raise Wrong(f"rank {rank} combines indices {own} and {index} of dim {at} of {list(shape)}.")
                if own != index and isinstance(dim, Sparse) and index in dim.named:
                    raise Unknown(f"a rank has zero at index {index} of dim {at}, and another rank has not.")
    return sparse(shape[at], held)


def relabelled(classes: Sequence[Hashable], held: Sequence[Sequence[Hashable]], what: str) -> DimPlacement:
    """The dim of which these are the labels; Wrong if a rank has one that the full model does not."""
    known = set(classes)
    for rank, its in enumerate(held):
        for place, label in enumerate(its):
            if label not in known:
                raise Wrong(f"{what}, and entry {place} of rank {rank} ({label}) is none of the full model's.")
    return repeated(classes, held)


def unlike_zero(placement: Placement) -> Placement:
    """The placement of an operand that a result is no product with: that it is zero does not make the result zero."""
    return replace(placement, zero=False)


def _is_partial(operands: Sequence[Placed], dims: tuple[DimPlacement, ...], ndim: int, linear: Linear) -> bool:
    partials = [(shape, placement) for shape, placement in operands if placement.partial and not placement.zero]
    if not partials or linear == "product" and any(placement.zero for _, placement in operands):
        return False
    others = [placement for _, placement in operands if not placement.partial and not placement.zero]
    if linear is None:
        raise Wrong("a partial sum meets an operator that is not linear in it: sum it over the ranks first.")
    if linear == "sum" and others:
        raise Wrong("what is no partial sum is added to a partial sum: every rank would add it once.")
    if linear == "product" and len(partials) > 1:
        raise Wrong("two partial sums are multiplied: the product of sums is not the sum of the ranks' products.")
    for shape, placement in partials:
        held = (None,) * (ndim - len(shape)) + placement.dims
        if any(
            isinstance(dim, Shards) and dim != mine and not isinstance(mine, Sparse) for dim, mine in zip(dims, held)
        ):
            raise Wrong("a partial sum meets a sharded operand: a rank lacks the other ranks' sums of its part.")
        if any(isinstance(dim, Repeated) and dim != mine for dim, mine in zip(dims, held)):
            raise Unknown("a partial sum meets an operand of which the ranks hold repeated entries.")
        if any(isinstance(dim, Sparse) and not isinstance(mine, Sparse) for dim, mine in zip(dims, held)):
            raise Unknown("a partial sum meets the gradient of a slice of a sharded dim.")
    return True


def without(placement: Placement, over: Collection[int], keep: bool) -> Placement:
    """The placement without the dims ``over`` (or with replicated dims of size 1 there)."""
    dims = [None if at in over else dim for at, dim in enumerate(placement.dims) if keep or at not in over]
    return replace(placement, dims=tuple(dims))


def summed(placement: Placement, over: Collection[int], keep: bool) -> Placement:
    """The placement of a sum over the dims ``over``: of a sharded dim each rank sums its part, a partial sum."""
    for at in sorted(over):
        dim = placement.dims[at]
        if placement.zero:
            return replace(without(placement, over, keep), partial=False)
        if isinstance(dim, Constant):
            return _summed_equal(placement, at, dim, over, keep)
        if isinstance(dim, (Repeated, Sparse)):
            raise Unknown(f"no rule sums over dim {at} of what is {placement}.")
    if not any(isinstance(placement.dims[at], Shards) for at in over):
        return without(placement, over, keep)
    if not placement.partial and not disjoint(placement.dims):
        raise Wrong(f"sums over dims {sorted(over)}, parts of which several ranks hold: they would count twice.")
    return Placement(without(replace(placement, partial=False), over, keep).dims, True, placement.zero)


def _summed_equal(placement: Placement, at: int, dim: Constant, over: Collection[int], keep: bool) -> Placement:
    """Sums of equal entries: partial sums if the ranks have as many as there are between them."""
    if placement.partial or any(dim is not None for other, dim in enumerate(placement.dims) if other != at):
        raise Unknown(f"no rule sums over dim {at} of what is {placement}.")
    if sum(dim.widths) != dim.size:
        raise Wrong(f"sums over dim {at}, of whose {dim.size} entries the ranks have {dim}.")
    return Placement(without(placement, over, keep).dims, True, placement.zero)


def check_not_mixed(placement: Placement, over: Collection[int], what: str) -> None:
    """Refuse an operator that mixes elements along the dims ``over`` if ranks hold parts of one of them.

    Raises:
        Wrong: if one is sharded.
        Unknown: if the ranks have other numbers of equal entries of one.

    """
    for at in sorted(over):
        if isinstance(placement.dims[at], Shards):
            raise Wrong(f"{what} over dim {at}, of which each rank holds its part only ({placement.dims[at]}).")
        if placement.dims[at] is not None:
            raise Unknown(f"{what} over dim {at}, of which the ranks hold {placement.dims[at]}.")


def check_not_partial(placement: Placement, what: str) -> None:
    """Refuse what is not linear in a partial sum."""
    if placement.partial:
        raise Wrong(f"{what} of a partial sum: sum it over the ranks first.")
