"""What the package's layers make of placements: known, because their collectives are."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

from lightning_autotp.dataflow.event import Unknown, Wrong
from lightning_autotp.dataflow.placement import Placement, Shape, Shards, shards
from lightning_autotp.layout.layout import Layout
from lightning_autotp.proof.markers import Marked


def crosses(
    mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, made: Shape, floating: bool
) -> Placement:
    """What the ranks hold of what crosses into or out of a module.

    Args:
        mark: the module.
        leaves: whether it is its output (or the gradient of it) that crosses.
        backward: whether it is a gradient.
        held: what the ranks hold of it on this side.
        shape: its full shape on this side.
        made: its full shape on the other side.
        floating: whether it is of a dtype that has gradients.

    Raises:
        Wrong: if the module needs something else.
        Unknown: if it is not known what it makes of this.
    """
    if mark.kind.endswith("tokens") or mark.tokens and leaves:
        return _tokens(mark, leaves, backward, held, shape, made)
    rule = {
        "column": _column,
        "row": _row,
        "vocabulary": _replicating,
        "column embedding": _replicating,
        "partial outputs": _partial_outputs,
        "reduced": _reduced,
        "passing": _passing,
        "heads": _heads,
        "once": _once,
        "loss": _loss,
    }[mark.kind]
    return rule(mark, leaves, backward, held, shape, floating)


def _needs_replicated(held: Placement, what: str) -> None:
    if not held.is_replicated and not (held.zero and all(dim is None for dim in held.dims)):
        raise Wrong(f"{what} must be replicated, but it is {held}.")


def _last(layout: Layout, ndim: int) -> Placement:
    """The placement of features that are sharded as the layout of a weight says."""
    dim = shards(layout.shape[layout.dim or 0], layout.parts)
    return Placement((None,) * (ndim - 1) + (dim,))


def _column(mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, floating: bool) -> Placement:
    layout = _layout(mark)
    replicated = Placement.replicated(len(shape))
    if not leaves:
        if not backward:
            _needs_replicated(held, "the input of a column parallel linear")
        return replace(replicated, partial=backward and not mark.sums)
    sharded = _last(layout, len(shape))
    if mark.moves and layout.overlaps:
        raise Unknown("a column parallel linear whose ranks share heads gathers its output, which has no rule.")
    if not backward:
        return replicated if mark.moves else sharded
    if mark.moves:
        _needs_replicated(held, "the gradient of a gathered output")
        return replicated
    _needs_like(held, replace(sharded, partial=layout.overlaps), "the gradient of a column parallel linear's output")
    return sharded


def _needs_like(held: Placement, want: Placement, what: str) -> None:
    if held.dims != want.dims or held.partial != want.partial and not held.zero:
        if held.zero and all(dim is None for dim in held.dims):
            return
        raise Wrong(f"{what} must be {want}, but it is {held}.")


def _row(mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, floating: bool) -> Placement:
    layout = _layout(mark)
    replicated = Placement.replicated(len(shape))
    if leaves:
        if backward:
            _needs_replicated(held, "the gradient of a row parallel linear's output")
        return replicated
    if layout.overlaps:
        raise Unknown("a row parallel linear of which ranks share a part has no rule.")
    sharded = _last(layout, len(shape))
    if backward:
        return replicated if mark.moves else sharded
    if mark.moves:
        _needs_replicated(held, "the input of a row parallel linear with split_input")
    elif held != sharded and held != replace(sharded, zero=True):
        raise Wrong(_other_input(held, sharded, shape))
    return replicated if mark.moves else sharded


def _other_input(held: Placement, want: Placement, shape: Shape) -> str:
    said = f"the input of a row parallel linear must be {want}, as its weight is, but it is {held}."
    if held.is_replicated:
        return f"{said} Shard what makes it by a column rule, or give the row rule `split_input`."
    sizes = packed_sizes(held.dims[-1]) if not held.partial and not any(held.dims[:-1]) else None
    if sizes is not None:
        return f"{said} The row rule needs `shape=(-1, {sizes})` and `partition_dim=1`."
    return said


def packed_sizes(dim: object) -> Optional[tuple[int, ...]]:
    """The sizes of the pieces, one behind the other, each of which is sharded by itself; None if there are none."""
    if not isinstance(dim, Shards) or len({len(part) for part in dim.parts}) != 1:
        return None
    sizes: list[int] = []
    at = 0
    for pieces in zip(*dim.parts):
        for start, length in pieces:
            if start != at:
                return None
            at = start + length
        sizes.append(at - sum(sizes))
    return tuple(sizes) if at == dim.size else None


def _replicating(mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, _: bool) -> Placement:
    if leaves == backward:  # the input, or the output's gradient
        what = "the gradient of its output" if backward else "its input"
        _needs_replicated(held, f"{what} ({mark.kind})")
    return Placement.replicated(len(shape))


def _partial_outputs(mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, _: bool) -> Placement:
    replicated = Placement.replicated(len(shape))
    if leaves and backward:
        if any(dim is not None for dim in held.dims) or mark.count < shape[-1] and held.partial:
            raise Wrong(
                f"of the last {mark.count} outputs the gradients are summed over the ranks, but all are {held}."
            )
        if not held.partial and not held.zero:
            raise Wrong(
                f"of the last {mark.count} outputs the gradients are summed over the ranks, but are replicated."
            )
    elif not leaves and not backward:
        _needs_replicated(held, "its input")
    return replicated


def _reduced(mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, floating: bool) -> Placement:
    if leaves != backward:  # the output, or the input's gradient: summed
        what = "the gradient of what enters" if backward else "the output of"
        if any(dim is not None for dim in held.dims):
            raise Wrong(f"{what} a module whose output is summed over the ranks is {held}.")
        if not held.partial and not held.zero:
            raise Wrong(f"{what} a module whose output is summed over the ranks is replicated: each would count.")
        return Placement.replicated(len(shape))
    if floating:
        what = "the gradient of the output of" if backward else "what enters"
        _needs_replicated(held, f"{what} a module whose output is summed over the ranks")
    return held


def _passing(mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, floating: bool) -> Placement:
    if leaves == backward:
        _needs_replicated(held, "what the first rank passes on")
        return held
    return Placement((None,) * len(shape), partial=True)


def _once(mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, floating: bool) -> Placement:
    if backward:
        _needs_replicated(held, "the gradient of what is added once")
        return held
    return Placement((None,) * len(shape), partial=True)


def _loss(mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, floating: bool) -> Placement:
    if leaves:
        if backward:
            _needs_replicated(held, "the gradient of the loss")
        return Placement.replicated(len(shape))
    if not backward and floating and not held.is_replicated:
        assert mark.head is not None
        _needs_like(held, _last(mark.head, len(shape)), "what the loss of a sharded vocabulary reads")
    elif not backward:
        _needs_replicated(held, "what the loss reads")
    return held


def _heads(mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, floating: bool) -> Placement:
    given = mark.given
    assert given is not None
    replicated = Placement.replicated(len(shape))
    simple = not given.batched or len(shape) == 4
    dim = given.dim + given.batched if simple else given.dim
    if simple and shape[dim] != given.heads:
        return held
    sequences = shape[dim] // given.heads
    parts = [[(start + at * given.heads, length) for at in range(sequences)] for start, length in given.parts]
    own = Placement((*replicated.dims[:dim], shards(shape[dim], parts), *replicated.dims[dim + 1 :]))
    if not leaves:
        if not backward:
            _needs_replicated(held, f"{given.argument}, of which ranks take their own heads,")
            return replicated
        return Placement(replicated.dims, partial=True)
    if backward:
        _needs_like(held, own, f"the gradient of a rank's own heads of {given.argument}")
    return own


def _tokens(mark: Marked, leaves: bool, backward: bool, held: Placement, shape: Shape, made: Shape) -> Placement:
    """Tokens ``[1, T, H]`` of which each rank has its own, on the outer side of regions; all of them inside."""
    splits = mark.kind in ("split tokens", "scatter tokens", "row")
    if leaves != backward:  # what comes out
        return _own(mark, made) if splits != backward else Placement.replicated(len(made))
    if splits == backward:
        _needs_like(held, _own(mark, shape), "what has tokens on the other side")
    elif backward and mark.sums:
        if any(dim is not None for dim in held.dims) or not held.partial and not held.zero:
            raise Wrong(f"the gradient of all tokens is summed over the ranks, but it is {held}.")
    else:
        _needs_replicated(held, "the gradient of all tokens" if backward else "what is split into ranks' own tokens")
    return Placement.replicated(len(made)) if splits else _own(mark, made)


def _own(mark: Marked, shape: Shape) -> Placement:
    """Every rank has as many tokens, one behind the other."""
    if len(shape) != 3 or shape[0] != 1 or shape[1] % mark.ranks:
        raise Wrong(f"{list(shape)} is not all tokens as one sequence.")
    each = shape[1] // mark.ranks
    return Placement((None, shards(shape[1], [[(rank * each, each)] for rank in range(mark.ranks)]), None))


def _layout(mark: Marked) -> Layout:
    assert mark.layout is not None
    return mark.layout
