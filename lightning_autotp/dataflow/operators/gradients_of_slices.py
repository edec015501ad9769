"""Entries of a dim that are known by number, and the gradients of what was taken from a sharded dim.

Such a gradient has zeros around it, of which no operand tells what they stand for: ``of`` is the tensor that was taken
from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_autotp.dataflow.event import Event, Operand, Unknown, Wrong
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.operators.slices import taken
from lightning_autotp.dataflow.placement import Constant, DimPlacement, Placement, Shards, disjoint


def _chosen(event: Event, operand: Operand, dim: int) -> DimPlacement:
    """What the ranks hold of ``entries`` of ``dim``, each taking its own entries of what it has."""
    sizes = [operand.placement.local_shape(operand.shape, rank)[dim] for rank in range(len(event.ranks))]
    full = _entries(event["entries"], operand.shape[dim])
    local = [_entries(call.arguments["entries"], size) for call, size in zip(event.ranks, sizes)]
    if len(set(full)) != len(full):
        raise Unknown("entries that are chosen twice have no rule.")
    return taken(operand, dim, full, local)  # type: ignore[arg-type]


def _entries(given: Sequence[int], size: int) -> list[int]:
    if any(not -size <= entry < size for entry in given):
        raise Wrong(f"takes the entries {list(given)} of a dim of {size}.")
    return [entry % size for entry in given]


@register("index_entries", sizes=True)
def entries(event: Event) -> Placement:
    """Some entries of a dim, by constant numbers."""
    operand, dim = event.tensor("self"), event["dim"]
    held = operand.placement.dims
    return replace(operand.placement, dims=(*held[:dim], _chosen(event, operand, dim), *held[dim + 1 :]))


@register("entries_gradient", sizes=True)
def entries_gradient(event: Event) -> Placement:
    """The gradient of some entries of a dim: zeros around it, where ``of`` has other entries."""
    of, grad, dim = event.tensor("of"), event.tensor("grad"), event["dim"]
    here = of.placement.dims[dim]
    if isinstance(here, Constant):
        raise Unknown(f"the gradient of entries of dim {dim}, of which the ranks hold {here}, has no rule.")
    chosen = _chosen(event, replace(of, placement=replace(of.placement, partial=False)), dim)
    if grad.placement.dims[dim] != chosen:
        raise Wrong(f"the gradient of entries of dim {dim} is {grad.placement}, and the entries are {chosen}.")
    dims = (*grad.placement.dims[:dim], here, *grad.placement.dims[dim + 1 :])
    # what no two ranks hold is a sum over its holders, too
    single = isinstance(here, Shards) and disjoint((chosen,))
    return replace(grad.placement, dims=dims, partial=grad.placement.partial or single)
