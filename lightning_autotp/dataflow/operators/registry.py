"""The table of operators: which rule follows which operator, and how an event goes through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Union

import torch
from torch.utils._pytree import tree_leaves

from lightning_autotp.dataflow.event import Event, Operand, Unknown, Wrong
from lightning_autotp.dataflow.placement import Constant, Placement, Repeated, Sparse, covered

Rule = Callable[[Event], Union[Placement, list[Placement]]]
"""One placement for all outputs, or a list with one each."""


@dataclass(frozen=True)
class Registered:
    """A rule; ``sizes``: numbers are sizes, which ranks may have of their own; ``always``: asked of replicated, too."""

    rule: Rule
    sizes: bool
    always: bool


TABLE: dict[str, Registered] = {}


def register(*names: str, sizes: bool = False, always: bool = False) -> Callable[[Rule], Rule]:
    """Say that a rule follows the operators ``names`` (names of OpOverloadPackets, or of autograd functions of ours).

    A rule gets the event and returns what the ranks hold of the outputs, or raises Wrong or Unknown with a sentence.
    It is asked only if a tensor is not replicated, or with ``always`` (a collective changes what is replicated, too) or
    ``sizes``: then it answers for the numbers that ranks have of their own, while those of other operators must be the
    full model's. What it returns is checked against the shapes that the ranks make. A collective or an autograd
    function registers its rule in the file it is written in::

        @register("reduce_output", always=True)
        def reduce_output(event: Event) -> Placement:
            if not event.tensor("input").placement.partial:
                raise Wrong("sums over the ranks what each of them holds already.")
            return Placement.replicated(len(event.outputs[0]))
    """

    def add(rule: Rule) -> Rule:
        for name in names:
            if name in TABLE:
                raise ValueError(f"the operator {name!r} has a rule already.")
            TABLE[name] = Registered(rule, sizes, sizes or always)
        return rule

    return add


def propagate(event: Event, *, alone: bool = False) -> list[Placement]:
    """What the ranks hold of an event's outputs, one placement an output.

    Args:
        event: the call of the operator.
        alone: whether nothing else shares the memory of what the operator writes, if it writes in place: then what is
            written may be placed in another way than before.

    Raises:
        Wrong: if the ranks' results are not the full model's in any placement.
        Unknown: if no rule says what they are.

    """
    in_place = event.name.endswith("_") and not event.name.endswith("__")
    event = replace(event, name=event.name.removesuffix("_")) if in_place else event
    found = TABLE.get(event.name)
    if found is None or not found.sizes:
        _check_numbers(event, Unknown if found is None else Wrong)
    if all(operand.placement.is_replicated for operand in event.operands) and not (found and found.always):
        made = [Placement.replicated(len(shape)) for shape in event.outputs]
    elif found is None:
        raise Unknown(f"no rule says what {event.name} makes of {_placed(event)}.")
    elif event.name not in _FOLLOW_SPARSE and any(_is_sparse(operand) for operand in event.operands):
        raise Unknown(f"no rule says what {event.name} makes of the gradient of a slice: {_placed(event)}.")
    else:
        result = found.rule(event)
        made = result if isinstance(result, list) else [result] * len(event.outputs)
    for at, placement in enumerate(made):
        _check_shapes(event, at, placement)
    if in_place and not alone:
        _check_written(event, made[0])
    return made


_FOLLOW_SPARSE = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "mm", "bmm", "sum", "masked_fill", "native_dropout_backward", "copy"),
        *("_to_copy", "clone", "detach", "alias", "slice_backward", "zeros_like", "new_zeros"),
        *("view", "_unsafe_view", "unsqueeze", "squeeze", "transpose", "t", "permute"),
    )
)
"""Operators that make zeros of zeros."""


def is_random(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator draws random numbers: on sharded tensors the ranks' are not the full model's."""
    return torch.Tag.nondeterministic_seeded in operator.tags


def _is_sparse(operand: Operand) -> bool:
    return any(isinstance(dim, Sparse) for dim in operand.placement.dims)


def _placed(event: Event) -> str:
    return ", ".join(f"{list(o.shape)} {o.placement}" for o in event.operands if not o.placement.is_replicated)


def _numbers(arguments: Mapping[str, Any]) -> list[Any]:
    return [leaf for leaf in tree_leaves(dict(arguments)) if not isinstance(leaf, Operand)]


def _check_numbers(event: Event, finding: type[Exception]) -> None:
    """Other numbers than the full model's are wrong, unless no rule knows what the operator does with them."""
    mine = _numbers(event.arguments)
    for rank, call in enumerate(event.ranks):
        theirs = _numbers(call.arguments)
        if len(theirs) != len(mine):
            raise finding(f"rank {rank} gives {event.name} {len(theirs)} arguments, the full model {len(mine)}.")
        for full, local in zip(mine, theirs):
            if full != local and full == full:
                raise finding(f"rank {rank} computes {event.name} with {local} where the full model has {full}.")


def _check_shapes(event: Event, at: int, placement: Placement) -> None:
    shape = event.outputs[at]
    if not covered(placement.dims):
        raise Wrong(f"no rank computes some elements of {list(shape)}: it would be {placement}.")
    if any(isinstance(dim, (Constant, Repeated)) and 0 in dim.widths for dim in placement.dims):
        raise Unknown(f"no rule follows what a rank has no entry of: {placement}.")
    for rank, local in enumerate(event.local_outputs(at)):
        want = placement.local_shape(shape, rank)
        if tuple(local) != want:
            raise Wrong(
                f"rank {rank} makes {list(local)} where its part of {list(shape)}, {placement}, would be {list(want)}."
            )


def _check_written(event: Event, made: Placement) -> None:
    """What shares memory with the written tensor stays what it was only if its placement does."""
    written: Operand = event.tensor("self")
    if replace(made, zero=False) != replace(written.placement, zero=False) or written.placement.zero and not made.zero:
        raise Unknown(f"{event.name}_ writes what is {made} into a tensor that is {written.placement}.")
