"""Operators that make tensors out of numbers: of sizes that ranks may have of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_autotp.dataflow.event import Event, Unknown, Wrong
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import Placement, constant, shards


def _equal_entries(event: Event, zero: bool) -> Placement:
    local = event.local_outputs(0)
    dims = (constant(size, [shape[at] for shape in local]) for at, size in enumerate(event.outputs[0]))
    return Placement(tuple(dims), zero=zero)


@register("zeros", "new_zeros", "zeros_like", sizes=True)
def zeros(event: Event) -> Placement:
    """All entries are alike, and zero."""
    return _equal_entries(event, zero=True)


@register("empty", "new_empty", "new_empty_strided", "empty_like", sizes=True)
def empty(event: Event) -> Placement:
    """Nothing that may be read before it is written: as good as zeros."""
    return _equal_entries(event, zero=True)


@register("ones", "new_ones", "ones_like", sizes=True)
def ones(event: Event) -> Placement:
    """All entries are alike."""
    return _equal_entries(event, zero=False)


@register("full", "new_full", "full_like", sizes=True)
def full(event: Event) -> Placement:
    """All entries are the same number, if the ranks' number is the full model's."""
    for rank, call in enumerate(event.ranks):
        if call.arguments["fill_value"] != event["fill_value"]:
            raise Wrong(
                f"rank {rank} fills with {call.arguments['fill_value']}, the full model with {event['fill_value']}."
            )
    return replace(_equal_entries(event, zero=False), zero=event["fill_value"] == 0)


@register("arange", sizes=True)
def arange(event: Event) -> Placement:
    """Numbers in a row, of which ranks may make their own part."""
    if all(dict(call.arguments) == dict(event.arguments) for call in event.ranks):
        return Placement.replicated(1)
    numbers = _range(event.arguments)
    parts = []
    for rank, call in enumerate(event.ranks):
        mine = _range(call.arguments)
        other = [number for number in mine if number not in numbers]
        if other:
            raise Wrong(f"rank {rank} counts to {other[-1]}, the full model does not.")
        parts.append([(numbers.index(number), 1) for number in mine])
    return Placement((shards(len(numbers), parts),))


def _range(arguments: Mapping[str, Any]) -> range:
    bounds = arguments.get("start", 0), arguments["end"], arguments.get("step", 1)
    if not all(isinstance(bound, int) for bound in bounds):
        raise Unknown(f"ranks count with fractions of their own: {bounds}.")
    return range(*bounds)
