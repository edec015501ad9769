"""Taking parts of dims and putting them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_autotp.dataflow.event import Event, Operand, Unknown, Wrong
from lightning_autotp.dataflow.operators.combine import Placed, combine, relabelled
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import (
    Constant,
    DimPlacement,
    Part,
    Placement,
    Repeated,
    Shards,
    Sparse,
    constant,
    disjoint,
    labels,
    shards,
    sparse,
)


def _held(operand: Operand, dim: int, rank: int) -> list[int]:
    """The full indices that a rank holds along ``dim``, in local order."""
    here = operand.placement.dims[dim]
    if isinstance(here, Shards):
        return [at for start, length in here.parts[rank] for at in range(start, start + length)]
    return list(range(operand.shape[dim]))


def taken(operand: Operand, dim: int, full: range, local: Sequence[range]) -> DimPlacement:
    """What the ranks hold of the indices ``full`` of a dim, each taking ``local`` of what it has of the dim."""
    here = operand.placement.dims[dim]
    if isinstance(here, Constant) or here is None and operand.placement.zero:
        return constant(len(full), [len(mine) for mine in local])
    if isinstance(here, Repeated):
        return _taken_classes(here, dim, full, local, operand.placement.partial)
    if here is None and all(mine == full for mine in local):
        return None
    places = {index: at for at, index in enumerate(full)}
    parts: list[Part] = []
    kept = held = 0
    for rank, mine in enumerate(local):
        indices = _held(operand, dim, rank)
        chosen = [indices[at] for at in mine]
        other = [index for index in chosen if index not in places]
        if other:
            raise Wrong(f"rank {rank} takes index {other[0]} of dim {dim}, which the full model does not take.")
        kept += len(chosen)
        held += sum(index in places for index in indices)
        parts.append(tuple((places[index], 1) for index in chosen))
    if len({start for part in parts for start, _ in part}) != len(full):
        raise Wrong(f"no rank takes some of what the full model takes of dim {dim} ({here or 'replicated'}).")
    if operand.placement.partial and kept != held:
        raise Wrong(f"ranks take different parts of dim {dim} of a partial sum: sum it over the ranks first.")
    return shards(len(full), parts)


def _taken_classes(here: Repeated, dim: int, full: range, local: Sequence[range], partial: bool) -> DimPlacement:
    classes = [here.classes[at] for at in full]
    held = [[its[at] for at in mine] for its, mine in zip(here.held, local)]
    made = relabelled(classes, held, f"takes a part of dim {dim}")
    if partial and any(set(classes) & set(its) != set(mine) for its, mine in zip(here.held, held)):
        raise Unknown(f"ranks take different repeated entries of dim {dim} of a partial sum.")
    return made


def _replaced(operand: Operand, dim: int, by: DimPlacement) -> Placement:
    dims = operand.placement.dims
    return replace(operand.placement, dims=(*dims[:dim], by, *dims[dim + 1 :]))


def _local_sizes(event: Event, operand: Operand, dim: int) -> list[int]:
    return [operand.placement.local_shape(operand.shape, rank)[dim] for rank in range(len(event.ranks))]


def _sliced(arguments: Mapping[str, Any], size: int) -> range:
    return range(*slice(arguments["start"], arguments["end"], arguments["step"]).indices(size))


@register("slice", sizes=True)
def slices(event: Event) -> Placement:
    """A range of indices of one dim."""
    operand, dim = event.tensor("self"), event.dim()
    sizes = _local_sizes(event, operand, dim)
    local = [_sliced(call.arguments, size) for call, size in zip(event.ranks, sizes)]
    return _replaced(operand, dim, taken(operand, dim, _sliced(event.arguments, operand.shape[dim]), local))


@register("slice_backward", sizes=True)
def slice_backward(event: Event) -> Placement:
    """The gradient of a slice: zeros around it, whichever indices they are of."""
    grad = event.tensor("grad_output")
    dim, sizes = event.dim(of="grad_output"), event["input_sizes"]
    here = grad.placement.dims[dim]
    local = [call.arguments["input_sizes"][dim] for call in event.ranks]
    full, mine = _sliced(event.arguments, sizes[dim]), []
    for call, size in zip(event.ranks, local):
        mine.append(_sliced(call.arguments, size))
    if full == range(sizes[dim]) and all(its == range(size) for its, size in zip(mine, local)):
        return grad.placement
    if here is None and all(its == full for its in mine) and all(size == sizes[dim] for size in local):
        return grad.placement
    if isinstance(here, (Constant, Repeated, Sparse)):
        raise Unknown(f"the gradient of a slice that is {grad.placement} has no rule.")
    held = []
    for its, size, own in zip(mine, local, labels(here, len(full), len(local))[1]):
        if len(its) != len(own):
            raise Wrong(f"a rank has a gradient of {len(own)} indices for a slice of {len(its)}.")
        entries = [-1] * size
        for place, index in zip(its, own):
            entries[place] = full[index]
        held.append(entries)
    return _replaced(grad, dim, sparse(sizes[dim], held))


@register("slice_scatter", sizes=True)
def slice_scatter(event: Event) -> Placement:
    """A tensor with a slice of it replaced: each rank replaces what it holds of the slice by the same of the source."""
    operand, source, dim = event.tensor("self"), event.tensor("src"), event.dim()
    sizes = _local_sizes(event, operand, dim)
    if _sliced(event.arguments, operand.shape[dim]) == range(operand.shape[dim]) and all(
        _sliced(call.arguments, size) == range(size) for call, size in zip(event.ranks, sizes)
    ):
        return source.placement  # nothing of the tensor is left
    rest = [_without_dim(operand, dim), _without_dim(source, dim)]
    made = combine(rest, rest[0][0], "sum")
    here = operand.placement.dims[dim]
    if any(isinstance(held, (Constant, Repeated)) for held in (here, source.placement.dims[dim])):
        raise Unknown(f"no rule replaces a slice along dim {dim} where ranks hold fewer equal entries.")
    local = [_sliced(call.arguments, size) for call, size in zip(event.ranks, sizes)]
    summed = Operand(operand.shape, replace(operand.placement, partial=made.partial), operand.dtype)
    want = taken(summed, dim, _sliced(event.arguments, operand.shape[dim]), local)
    if source.placement.dims[dim] != want:
        raise Wrong(f"ranks replace {want or 'all'} of a slice by {source.placement.dims[dim] or 'all'} of the source.")
    return replace(made, dims=(*made.dims[:dim], here, *made.dims[dim:]))


def _entry(operand: Operand, dim: int, event: Event) -> None:
    """Refuse ranks that take another entry of ``dim`` than the full model."""
    size = operand.shape[dim]
    index = event["index"] % size
    classes, held = labels(operand.placement.dims[dim], size, len(event.ranks))
    for rank, (call, width) in enumerate(zip(event.ranks, _local_sizes(event, operand, dim))):
        own = call.arguments["index"]
        if not -width <= own < width or held[rank][own] != classes[index]:
            raise Wrong(f"takes entry {index} of dim {dim}, and rank {rank} takes another: {operand.placement}.")


def _dropped(placement: Placement, dim: int) -> Placement:
    return replace(placement, dims=placement.dims[:dim] + placement.dims[dim + 1 :])


@register("select", sizes=True)
def select(event: Event) -> Placement:
    """One entry of a dim."""
    operand, dim = event.tensor("self"), event.dim()
    _entry(operand, dim, event)
    return _dropped(operand.placement, dim)


@register("select_backward", sizes=True)
def select_backward(event: Event) -> Placement:
    """The gradient of one entry: zeros around it."""
    dims = event.tensor("grad_output").placement.dims
    dim = event["dim"] % len(event.outputs[0])
    if any(call.arguments["index"] != event["index"] for call in event.ranks):
        raise Wrong(f"ranks put the gradient of entry {event['index']} of dim {dim} at another place.")
    return replace(event.tensor("grad_output").placement, dims=(*dims[:dim], None, *dims[dim:]))


@register("select_scatter", sizes=True)
def select_scatter(event: Event) -> Placement:
    """A tensor with one entry of a dim replaced."""
    operand, source, dim = event.tensor("self"), event.tensor("src"), event.dim()
    if operand.placement.dims[dim] is not None:
        raise Unknown(f"no rule replaces an entry of dim {dim}, of which ranks hold {operand.placement.dims[dim]}.")
    if any(call.arguments["index"] != event["index"] for call in event.ranks):
        raise Wrong(f"ranks replace another entry of dim {dim} than the full model.")
    made = combine([_without_dim(operand, dim), (source.shape, source.placement)], source.shape, "sum")
    return replace(made, dims=(*made.dims[:dim], None, *made.dims[dim:]))


@register("unbind")
def unbind(event: Event) -> Placement:
    """All entries of a dim, a tensor each."""
    operand, dim = event.tensor("self"), event.dim()
    if isinstance(operand.placement.dims[dim], Repeated):
        raise Unknown(f"no rule unbinds dim {dim}, of which the ranks hold {operand.placement.dims[dim]}.")
    if isinstance(operand.placement.dims[dim], Shards):
        raise Wrong(f"unbinds dim {dim}, of which each rank holds its part only ({operand.placement.dims[dim]}).")
    return _dropped(operand.placement, dim)


@register("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", sizes=True)
def split(event: Event) -> list[Placement]:
    """A dim in pieces; of each piece every rank takes what it holds of it."""
    operand, dim = event.tensor("self"), event.dim()
    made = []
    start, starts = 0, [0] * len(event.ranks)
    for at, shape in enumerate(event.outputs):
        widths = [local[dim] for local in event.local_outputs(at)]
        local_ranges = [range(begin, begin + width) for begin, width in zip(starts, widths)]
        made.append(_replaced(operand, dim, taken(operand, dim, range(start, start + shape[dim]), local_ranges)))
        start, starts = start + shape[dim], [begin + width for begin, width in zip(starts, widths)]
    return made


@register("cat")
def cat(event: Event) -> Placement:
    """Tensors one behind the other along a dim: each rank has its parts of all of them, in order."""
    operands = [operand for operand in event.operands if operand.shape != (0,)]  # which torch leaves out
    dim = event["dim"] % len(event.outputs[0])
    partial = any(operand.placement.partial for operand in operands)
    # what no two ranks hold is a sum over its holders, too
    if partial and any(not _is_sum(operand.placement, dim) for operand in operands):
        raise Unknown("concatenates partial sums with what is none: partial in one part and not in another.")
    others = [(shape, replace(held, partial=partial)) for shape, held in (_without_dim(o, dim) for o in operands)]
    made = combine(others, others[0][0], "sum")
    here = [operand.placement.dims[dim] for operand in operands]
    if any(isinstance(held, (Constant, Repeated)) for held in here):
        raise Unknown(f"concatenates dim {dim}, of which the ranks hold fewer equal entries.")
    joint: DimPlacement = None
    if any(held is not None for held in here):
        starts = [sum(operand.shape[dim] for operand in operands[:at]) for at in range(len(operands))]
        joint = shards(
            event.outputs[0][dim],
            [
                [
                    (start + begin, length)
                    for operand, start, held in zip(operands, starts, here)
                    for begin, length in (held.parts[rank] if isinstance(held, Shards) else ((0, operand.shape[dim]),))
                ]
                for rank in range(len(event.ranks))
            ],
        )
    return replace(made, dims=(*made.dims[:dim], joint, *made.dims[dim:]))


def _without_dim(operand: Operand, dim: int) -> Placed:
    return operand.shape[:dim] + operand.shape[dim + 1 :], _dropped(operand.placement, dim)


@register("stack")
def stack(event: Event) -> Placement:
    """Tensors of one shape along a new dim."""
    operands = event.operands
    dim = event["dim"] % len(event.outputs[0])
    made = combine([(operand.shape, operand.placement) for operand in operands], operands[0].shape, "sum")
    return replace(made, dims=(*made.dims[:dim], None, *made.dims[dim:]))


def _is_sum(placement: Placement, dim: int) -> bool:
    """Whether a piece of a concatenation along ``dim`` is a sum over the ranks that hold it."""
    return placement.partial or placement.zero or disjoint((placement.dims[dim],))
