"""Views and moves: the same values, arranged in another way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Optional

from lightning_autotp.dataflow.event import Event, Unknown, Wrong
from lightning_autotp.dataflow.operators.combine import check_not_mixed
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import Constant, DimPlacement, Placement, Shape, Shards, constant, shards
from lightning_autotp.dataflow.view_dims import flattened, groups, unflattened


@register("view", "_unsafe_view", "unsqueeze", "squeeze", sizes=True)
def view(event: Event) -> Placement:
    """Merged and split dims; the ranks' sizes must be those of what they hold."""
    operand = event.tensor("self")
    new, local = event.outputs[0], event.local_outputs(0)
    dims: list[DimPlacement] = [None] * len(new)
    for before, after in groups(operand.shape, new):
        held = [operand.placement.dims[at] for at in before]
        if any(isinstance(dim, Constant) for dim in held):
            if any(dim is None and operand.shape[at] > 1 or isinstance(dim, Shards) for at, dim in zip(before, held)):
                raise Unknown(
                    f"merges dims of which the ranks have fewer equal entries with others: {operand.placement}."
                )
            for at in after:
                dims[at] = constant(new[at], [shape[at] for shape in local])
        elif any(dim is not None for dim in held):
            sizes = [operand.shape[at] for at in before]
            made = _regrouped([dim for dim in held if not isinstance(dim, Constant)], sizes, [new[at] for at in after])
            for at, dim in zip(after, made):
                dims[at] = dim
    return replace(operand.placement, dims=tuple(dims))


def _regrouped(held: Sequence[Optional[Shards]], sizes: Shape | list[int], new: list[int]) -> list[Optional[Shards]]:
    """One group of dims of ``sizes`` as dims of sizes ``new``."""
    ranks = len(next(dim for dim in held if dim is not None).parts)
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


@register("repeat")
def repeat(event: Event) -> Placement:
    """Copies one behind the other, along dims that are not sharded."""
    operand = event.tensor("self")
    more = len(event["repeats"]) - len(operand.shape)
    often = {at - more for at, times in enumerate(event["repeats"]) if times != 1 and at >= more}
    if any(isinstance(operand.placement.dims[at], Shards) for at in often):
        raise Unknown(f"repeats a sharded dim: {operand.placement}.")
    check_not_mixed(operand.placement, often, "repeats")
    return replace(operand.placement, dims=(None,) * more + operand.placement.dims)


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
