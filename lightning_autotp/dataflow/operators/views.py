"""Views and moves: the same values, arranged in another way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import prod

from lightning_autotp.dataflow.event import Event, Unknown, Wrong
from lightning_autotp.dataflow.operators.combine import check_not_mixed
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import (
    Constant,
    DimPlacement,
    Placement,
    Repeated,
    Sparse,
    constant,
    labels,
    repeated,
    shards,
)
from lightning_autotp.dataflow.view_dims import factored, flattened, groups, unflattened

MOST_LABELS = 1 << 16
"""Of how many entries with labels a view is followed: more would take seconds."""


@register("view", "_unsafe_view", "unsqueeze", "squeeze", sizes=True)
def view(event: Event) -> Placement:
    """Merged and split dims; the ranks' sizes must be those of what they hold."""
    operand = event.tensor("self")
    new, local = event.outputs[0], event.local_outputs(0)
    if prod(operand.shape) != prod(new) and operand.placement.is_replicated:
        return Placement.replicated(len(new))
    if prod(operand.shape) != prod(new):
        raise Unknown(
            f"no rule follows a view of {list(operand.shape)} as {list(new)}: its numbers are read otherwise."
        )
    dims: list[DimPlacement] = [None] * len(new)
    for before, after in groups(operand.shape, new):
        held = [operand.placement.dims[at] for at in before]
        if all(dim is None for dim in held):
            continue
        sizes, wanted = [operand.shape[at] for at in before], [new[at] for at in after]
        if any(isinstance(dim, Sparse) for dim in held) and sizes != wanted:
            raise Unknown(f"no rule follows a view of dims {sizes} as {wanted} of the gradient of a slice.")
        if sizes == wanted:
            made: Sequence[DimPlacement] = held
        elif all(isinstance(dim, Constant) or dim is None and size == 1 for dim, size in zip(held, sizes)):
            made = [constant(new[at], [shape[at] for shape in local]) for at in after]
        elif any(isinstance(dim, (Constant, Repeated)) for dim in held):
            made = _relabelled(held, sizes, wanted, [[shape[at] for at in after] for shape in local])
        else:
            made = regrouped(held, sizes, wanted)
        for at, dim in zip(after, made):
            dims[at] = dim
    return replace(operand.placement, dims=tuple(dims))


def _relabelled(
    held: list[DimPlacement], sizes: list[int], new: list[int], local: list[list[int]]
) -> Sequence[DimPlacement]:
    """One group of dims, of which some have repeated entries, as dims of sizes ``new``."""
    if prod(sizes) > MOST_LABELS:
        raise Unknown(f"no rule follows a view of dims {sizes} as {new} with so many repeated entries.")
    known = [labels(dim, size, len(local)) for dim, size in zip(held, sizes)]
    mine = [list(product(*(entries[rank] for _, entries in known))) for rank in range(len(local))]
    made = factored(list(product(*(classes for classes, _ in known))), new, mine, local)
    if made is None:
        raise Unknown(f"no rule follows a view of dims {sizes} as {new} of what ranks repeat: {known}.")
    return made


def regrouped(dims: Sequence[DimPlacement], sizes: list[int], new: list[int]) -> list[DimPlacement]:
    """One group of dims of ``sizes``, without repeated entries, as dims of sizes ``new``."""
    held = [dim for dim in dims if not isinstance(dim, (Constant, Repeated, Sparse))]
    if len(held) < len(dims):
        raise Unknown(f"no rule regroups dims {sizes} as {new} of what ranks repeat.")
    ranks = next((len(dim.parts) for dim in held if dim is not None), 0)
    if not ranks:
        return [None] * len(new)
    blocks = []
    for rank in range(ranks):
        parts = [((0, size),) if dim is None else dim.parts[rank] for dim, size in zip(held, sizes)]
        runs = flattened(parts, sizes)
        block = unflattened(runs, new) if runs else None
        if runs and block is None:
            raise Wrong(
                f"a view of dims {list(sizes)} as {new}: what rank {rank} holds is no block of whole entries there; the"
                " shards go across them."
            )
        blocks.append(block)
    whole = [((0, size),) for size in new]
    split = [at for at in range(len(new)) if any(block is not None and block[at] != whole[at] for block in blocks)]
    nothing = [() if at == split[0] else part for at, part in enumerate(whole)] if split else [()] * len(new)
    full = [nothing if block is None else block for block in blocks]
    return [shards(size, [block[at] for block in full]) for at, size in enumerate(new)]


def _moved(event: Event, order: Sequence[int]) -> Placement:
    placement = event.tensor("self").placement
    return replace(placement, dims=tuple(placement.dims[at] for at in order))


@register("transpose")
def transpose(event: Event) -> Placement:
    """Two dims change places."""
    order = list(range(len(event.outputs[0])))
    a, b = event.dim("dim0"), event.dim("dim1")
    order[a], order[b] = order[b], order[a]
    return _moved(event, order)


@register("t")
def t(event: Event) -> Placement:
    """A matrix's dims change places."""
    return _moved(event, range(len(event.outputs[0]))[::-1])


@register("permute")
def permute(event: Event) -> Placement:
    """Dims in another order."""
    return _moved(event, [at % len(event.outputs[0]) for at in event["dims"]])


@register("expand", sizes=True)
def expand(event: Event) -> Placement:
    """A dim of size 1 becomes one of equal entries, of which ranks may ask for as many as they like."""
    operand, new = event.tensor("self"), event.outputs[0]
    local = event.local_outputs(0)
    more = len(new) - len(operand.shape)
    dims = [
        constant(size, [shape[at] for shape in local])
        if at < more or operand.shape[at - more] != size or isinstance(operand.placement.dims[at - more], Constant)
        else operand.placement.dims[at - more]
        for at, size in enumerate(new)
    ]
    return replace(operand.placement, dims=tuple(dims))


@register("repeat", sizes=True)
def repeat(event: Event) -> Placement:
    """Copies one behind the other; ranks may make as many as they like of equal entries."""
    operand, new, local = event.tensor("self"), event.outputs[0], event.local_outputs(0)
    more = len(new) - len(operand.shape)
    dims: list[DimPlacement] = []
    for at, size in enumerate(new):
        before = operand.shape[at - more] if at >= more else 1
        here = operand.placement.dims[at - more] if at >= more else None
        times = [call.arguments["repeats"][at] for call in event.ranks]
        if before == 1 and here is None or isinstance(here, Constant):
            dims.append(constant(size, [shape[at] for shape in local]))
        elif all(often == 1 for often in (*times, event["repeats"][at])):
            dims.append(here)
        elif size > MOST_LABELS:
            raise Unknown(f"no rule repeats {size} entries that are not alike.")
        else:
            classes, held = labels(here, before, len(local))
            copies = [[*its] * often for its, often in zip(held, times)]
            dims.append(repeated([*classes] * event["repeats"][at], copies))
    return replace(operand.placement, dims=tuple(dims))


@register("flip", "roll")
def reorder(event: Event) -> Placement:
    """Indices along some dims in another order."""
    placement = event.tensor("self").placement
    over = {at % len(placement.dims) for at in event["dims"]} or set(range(len(placement.dims)))
    check_not_mixed(placement, over, "reorders what lies")
    return placement


@register("constant_pad_nd")
def pad(event: Event) -> Placement:
    """Entries before and behind; (1, -1) keeps the size and shifts what is there."""
    placement, amounts = event.tensor("self").placement, event["pad"]
    last = len(placement.dims) - 1
    over = {last - at // 2 for at, amount in enumerate(amounts) if amount}
    check_not_mixed(placement, over, "pads or shifts")
    if event["value"] != 0 and placement.partial:
        raise Wrong("pads a partial sum: every rank would add the padding once.")
    return replace(placement, zero=placement.zero and event["value"] == 0)
