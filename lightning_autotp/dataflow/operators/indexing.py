"""Operators that choose by the values of index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lightning_autotp.dataflow.event import Event, Operand, Unknown, Wrong
from lightning_autotp.dataflow.operators.combine import Placed, check_not_mixed, check_not_partial, combine, summed
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import DimPlacement, Placement, Shape, covered


def _check_full(operand: Operand, dim: int, what: str) -> None:
    """Refuse to choose by index along a dim that the ranks do not hold in full."""
    check_not_mixed(operand.placement, {dim}, f"{what} by index")


def _choice(indices: Operand) -> Placed:
    """What the ranks hold of indices; that they are zero says nothing about what they choose."""
    return indices.shape, replace(indices.placement, zero=False)


def _checked(dims: Sequence[DimPlacement], partial: bool) -> Placement:
    if not covered(dims):
        raise Wrong("chooses by sharded indices from what is sharded, too: no rank computes some of the elements.")
    return Placement(tuple(dims), partial)


@register("embedding")
def embedding(event: Event) -> Placement:
    """Rows of a table; linear in the table."""
    table, indices = event.tensor("weight"), event.tensor("indices")
    _check_full(table, 0, "looks up")
    check_not_partial(indices.placement, "looks up by indices")
    _check_one_sharded(table, indices)
    return _checked([*indices.placement.dims, table.placement.dims[1]], table.placement.partial)


def _check_one_sharded(values: Operand, indices: Operand) -> None:
    """A partial sum lacks the other ranks' sums of what a rank chooses alone."""
    if values.placement.partial and any(dim is not None for dim in indices.placement.dims):
        raise Wrong("chooses by sharded indices from a partial sum: sum it over the ranks first.")


@register("embedding_dense_backward")
def embedding_backward(event: Event) -> Placement:
    """The gradient of a table: a sum over all looked-up rows, linear in the gradient."""
    grad, indices = event.tensor("grad_output"), event.tensor("indices")
    check_not_partial(indices.placement, "looks up by indices")
    rows = (*indices.shape, 1), Placement((*indices.placement.dims, None))
    made = summed(
        combine([(grad.shape, grad.placement), rows], grad.shape, "product"), set(range(len(rows[0]) - 1)), False
    )
    return replace(made, dims=(None, *made.dims))


def _index_tensors(event: Event) -> list[tuple[int, Operand]]:
    """Each index tensor with the first dim that it indexes; masks index several."""
    found, dim = [], 0
    for index in event["indices"]:
        if isinstance(index, Operand):
            found.append((dim, index))
        dim += len(index.shape) if isinstance(index, Operand) and index.dtype == torch.bool else 1
    return found


def _indexed(event: Event, operand: Operand) -> tuple[list[int], int, Placed]:
    """The dims that are indexed, where the indices' dims go, and what the ranks hold of these."""
    found = _index_tensors(event)
    for _, index in found:
        check_not_partial(index.placement, "chooses by indices")
    masks = [(dim, index) for dim, index in found if index.dtype == torch.bool]
    if masks:
        if len(found) > 1:
            raise Unknown("a mask beside other indices has no rule.")
        (dim, mask) = masks[0]
        if not mask.placement.is_replicated:
            raise Unknown(f"a mask that is {mask.placement} has no rule: ranks choose how many they like.")
        return [dim + at for at in range(len(mask.shape))], dim, ((-1,), Placement.replicated(1))
    used = [dim for dim, _ in found]
    shape = tuple(torch.broadcast_shapes(*(index.shape for _, index in found)))
    placement = combine([_choice(index) for _, index in found], shape)
    together = used == list(range(used[0], used[-1] + 1))
    return used, used[0] if together else 0, (shape, placement)


@register("index", "_unsafe_index")
def index(event: Event) -> Placement:
    """Chooses by index tensors or a mask; linear in what it chooses from."""
    operand = event.tensor("self")
    used, start, (_, chosen) = _indexed(event, operand)
    for dim in used:
        _check_full(operand, dim, "chooses")
    for _, tensor in _index_tensors(event):
        _check_one_sharded(operand, tensor)
    rest = [held for dim, held in enumerate(operand.placement.dims) if dim not in used]
    return _checked([*rest[:start], *chosen.dims, *rest[start:]], operand.placement.partial)


@register("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(event: Event) -> Placement:
    """Writes or adds values where indices say: values must be placed as what they go into."""
    operand, values = event.tensor("self"), event.tensor("values")
    used, start, (shape, chosen) = _indexed(event, operand)
    for dim in used:
        _check_full(operand, dim, "writes")
    if not chosen.is_replicated:
        if event.arguments.get("accumulate"):
            return _accumulated(operand, values, used, start, (shape, chosen))
        raise Unknown(f"writes where indices say that are {chosen}.")
    if shape == (-1,):
        shape = _written_by_mask(operand, used, start, values)
    rest = [
        (size, held) for dim, (size, held) in enumerate(zip(operand.shape, operand.placement.dims)) if dim not in used
    ]
    fresh = [(size, None) for size in shape]
    target = [*rest[:start], *fresh, *rest[start:]]
    into = replace(operand.placement, dims=tuple(held for _, held in target))
    full = tuple(size for size, _ in target)
    made = combine([(full, into), (values.shape, values.placement)], full, "sum")
    kept = [*made.dims[:start], *made.dims[start + len(shape) :]]
    for dim in used:
        kept.insert(dim, None)
    return Placement(tuple(kept), made.partial)


def _accumulated(operand: Operand, values: Operand, used: Sequence[int], start: int, chosen: Placed) -> Placement:
    """Adds values where sharded indices say: each rank adds those of its part, a partial sum."""
    shape, indices = chosen
    rest = [at for at in range(len(operand.shape)) if at not in used]
    kept = tuple(operand.shape[at] for at in rest)
    full = (*kept[:start], *shape, *kept[start:])
    fresh = range(start, start + len(shape))
    lines = tuple(size if at in fresh else 1 for at, size in enumerate(full))
    none = (None,) * start, (None,) * (len(rest) - start)
    where = replace(indices, dims=(*none[0], *indices.dims, *none[1]), zero=False)
    total = summed(combine([(values.shape, values.placement), (lines, where)], full, "product"), fresh, False)
    own = replace(operand.placement, dims=tuple(operand.placement.dims[at] for at in rest))
    made = combine([(kept, own), (kept, total)], kept, "sum")
    dims = list(made.dims)
    for dim in used:
        dims.insert(dim, None)
    return replace(made, dims=tuple(dims))


def _written_by_mask(operand: Operand, used: Sequence[int], start: int, values: Operand) -> Shape:
    """How many entries a mask chooses: as many as there are values."""
    if len(values.shape) != len(operand.shape) - len(used) + 1:
        raise Unknown("writing by a mask what is broadcast has no rule.")
    return values.shape[start : start + 1]


@register("gather")
def gather(event: Event) -> Placement:
    """Of each line along a dim what an index tensor says; linear in what it chooses from."""
    operand, indices, dim = event.tensor("self"), event.tensor("index"), event.dim()
    _check_full(operand, dim, "gathers")
    check_not_partial(indices.placement, "gathers by indices")
    shape = tuple(1 if at == dim else size for at, size in enumerate(indices.shape))
    if any(o != i for at, (o, i) in enumerate(zip(operand.shape, indices.shape)) if at != dim):
        raise Unknown("gathers by indices of another shape than the tensor's.")
    lines = shape, replace(operand.placement, dims=tuple(operand.placement.dims))
    return combine([lines, _choice(indices)], indices.shape, "product")


@register("scatter_reduce")
def scatter_reduce(event: Event) -> Placement:
    """A sum is that of scatter_add; what else there is, is linear in nothing."""
    if event["reduce"] != "sum":
        for name in ("self", "src"):
            check_not_partial(event.tensor(name).placement, f"{event['reduce']} is no linear function")
    made = _scattered(event)
    return replace(made, zero=made.zero and event["reduce"] == "sum")


@register("scatter", "scatter_add")
def scatter(event: Event) -> Placement:
    """Writes or adds values along a dim where an index tensor says."""
    return _scattered(event)


def _scattered(event: Event) -> Placement:
    operand, indices, dim = event.tensor("self"), event.tensor("index"), event.dim()
    values = event.arguments.get("src", event.arguments.get("value"))
    tensors = [operand, indices, *([values] if isinstance(values, Operand) else [])]
    for tensor in tensors:
        _check_full(tensor, dim, "scatters")
        if any(a != b for at, (a, b) in enumerate(zip(tensor.shape, operand.shape)) if at != dim):
            raise Unknown("scatters into a tensor of another shape.")
    check_not_partial(indices.placement, "scatters by indices")
    lined = [(operand.shape, tensor.placement) for tensor in tensors if tensor is not indices]
    lines = combine(lined, operand.shape, "sum")
    if not isinstance(values, Operand) and values != 0:
        check_not_partial(lines, "writes a number into a part")
    if not isinstance(values, Operand):
        lines = replace(lines, zero=lines.zero and values == 0)
    return combine([(operand.shape, lines), (operand.shape, _choice(indices)[1])], operand.shape, "product")


@register("index_select")
def index_select(event: Event) -> Placement:
    """Entries of a dim as a list of indices says; linear in what it chooses from."""
    operand, indices, dim = event.tensor("self"), event.tensor("index"), event.dim()
    _check_full(operand, dim, "selects")
    check_not_partial(indices.placement, "selects by indices")
    _check_one_sharded(operand, indices)
    dims = operand.placement.dims
    return _checked([*dims[:dim], indices.placement.dims[0], *dims[dim + 1 :]], operand.placement.partial)


@register("index_add")
def index_add(event: Event) -> Placement:
    """Adds entries along a dim where a list of indices says; what is sharded along it makes a partial sum."""
    operand, indices, values, dim = event.tensor("self"), event.tensor("index"), event.tensor("source"), event.dim()
    _check_full(operand, dim, "adds")
    check_not_partial(indices.placement, "adds by indices")
    lines = tuple(size if at == dim else 1 for at, size in enumerate(values.shape))
    where = tuple(indices.placement.dims[0] if at == dim else None for at in range(len(lines)))
    each = combine([(values.shape, values.placement), (lines, Placement(where))], values.shape, "product")
    total = summed(each, {dim}, True)
    return combine([(operand.shape, operand.placement), (operand.shape, total)], operand.shape, "sum")
