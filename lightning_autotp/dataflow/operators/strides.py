"""Views by strides: those that autograd takes of the gradients of tensors that were written in parts, slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Optional

from lightning_autotp.dataflow.event import Event, Operand, Unknown
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.operators.slices import taken
from lightning_autotp.dataflow.placement import Placement, Shape


@register("as_strided", sizes=True)
def as_strided(event: Event) -> Placement:
    """A slice of all dims at once, if it keeps the strides of what it is taken of."""
    operand = event.tensor("self")
    full = _slices(event.arguments, operand.shape)
    local = [
        _slices(call.arguments, operand.placement.local_shape(operand.shape, rank))
        for rank, call in enumerate(event.ranks)
    ]
    known = [its for its in local if its is not None]
    alike = all(
        call.arguments[name] == event[name] for call in event.ranks for name in ("size", "stride", "storage_offset")
    )
    if operand.placement.is_replicated and alike:
        return Placement.replicated(len(event.outputs[0]))
    if full is None or len(known) < len(local):
        raise Unknown("as_strided that takes no slice has no rule.")
    placement = operand.placement
    for dim, mine in enumerate(full):
        whole = Operand(operand.shape, placement, operand.dtype)
        made = taken(whole, dim, mine, [its[dim] for its in known])
        placement = replace(placement, dims=(*placement.dims[:dim], made, *placement.dims[dim + 1 :]))
        operand = replace(operand, shape=(*operand.shape[:dim], len(mine), *operand.shape[dim + 1 :]))
    return placement


def _slices(arguments: Mapping[str, Any], shape: Shape) -> Optional[list[range]]:
    """The indices of each dim that a strided view of a tensor of ``shape`` takes; None if they are no block."""
    operand, size, strides = arguments["self"], arguments["size"], arguments["stride"]
    if operand.strides is None or len(size) != len(shape) or 0 in shape:
        return None
    start = operand.offset if arguments["storage_offset"] is None else arguments["storage_offset"]
    ahead = start - operand.offset
    found = [range(1)] * len(shape)
    order = sorted((at for at in range(len(shape)) if shape[at] > 1), key=lambda at: -operand.strides[at])
    reach = sum((shape[at] - 1) * operand.strides[at] for at in order)
    for at in order:
        stride = operand.strides[at]
        reach -= (shape[at] - 1) * stride
        if stride <= reach or size[at] > 1 and strides[at] != stride:
            return None  # dims that overlap in memory, or another order of dims
        begin, ahead = divmod(ahead, stride)
        if not 0 <= begin <= shape[at] - size[at]:
            return None
        found[at] = range(begin, begin + size[at])
    return None if ahead or any(size[at] != 1 for at in range(len(shape)) if shape[at] == 1) else found
