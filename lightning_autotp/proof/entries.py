"""Rules of what a trace makes of several operators, or of their constants: they are no operators of torch's.

The gradient of entries that were taken of a sharded dim has zeros around it, of which no operand tells what they stand
for: ``of`` is the tensor that was taken from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Union

from lightning_autotp.dataflow.event import Event, Operand, Unknown, Wrong
from lightning_autotp.dataflow.operators.matmul import einsum
from lightning_autotp.dataflow.operators.registry import propagate
from lightning_autotp.dataflow.operators.slices import taken
from lightning_autotp.dataflow.placement import Constant, DimPlacement, Placement, Shards, covered, disjoint


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


def entries(event: Event) -> Placement:
    """Some entries of a dim, by constant numbers."""
    operand, dim = event.tensor("self"), event["dim"]
    held = operand.placement.dims
    return replace(operand.placement, dims=(*held[:dim], _chosen(event, operand, dim), *held[dim + 1 :]))


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


def grouped_product_backward(event: Event) -> list[Placement]:
    """The gradients of transformers' own grouped product of rows: that of the rows, and that of the matrices."""
    rows, weight, grad = event.tensor("input"), event.tensor("weight"), event.tensor("grad_output")
    if not event.tensor("offs").placement.is_replicated:
        raise Unknown(f"{event.name} with groups that are {event.tensor('offs').placement} has no rule.")
    if weight.placement.dims[0] is not None or rows.placement.dims[0] is not None or grad.placement.dims[0] is not None:
        raise Unknown(f"{event.name} of groups of which ranks have their own has no rule.")
    matrix = replace(
        weight, shape=weight.shape[1:], placement=replace(weight.placement, dims=weight.placement.dims[1:])
    )
    of_rows = einsum("ik,jk->ij", grad, matrix)
    of_weight = einsum("ki,kj->ij", rows, grad)
    return [of_rows, replace(of_weight, dims=(None, *of_weight.dims))]


_RULES: dict[str, Callable[[Event], Union[Placement, list[Placement]]]] = {
    "index_entries": entries,
    "entries_gradient": entries_gradient,
    "grouped_mm_fallback_backward": grouped_product_backward,
}


def follow(event: Event) -> list[Placement]:
    """What the ranks hold of an event's outputs, by the table of operators or by the rules here.

    Raises:
        Wrong: if the ranks' results are not the full model's in any placement.
        Unknown: if no rule says what they are.
    """
    rule = _RULES.get(event.name)
    if rule is None:
        return propagate(event)
    result = rule(event)
    made = result if isinstance(result, list) else [result] * len(event.outputs)
    for at, (placement, shape) in enumerate(zip(made, event.outputs)):
        if not covered(placement.dims):
            raise Wrong(f"no rank computes some elements of {list(shape)}: it would be {placement}.")
        for rank, local in enumerate(event.local_outputs(at)):
            if tuple(local) != placement.local_shape(shape, rank):
                raise Wrong(f"rank {rank} makes {list(local)} of {list(shape)}, which is {placement}.")
    return made
