"""Products: operands meet along the dims they share, and are summed over those that the result lacks."""

from __future__ import annotations

from dataclasses import replace

from lightning_autotp.dataflow.event import Event, Operand, Unknown
from lightning_autotp.dataflow.operators.combine import Placed, combine, summed
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import Placement

LETTERS = {"mm": "ik,kj->ij", "bmm": "bik,bkj->bij", "mv": "ik,k->i", "dot": "k,k->"}


def einsum(letters: str, a: Operand, b: Operand) -> Placement:
    """The placement of a product that is written in letters."""
    left, out = letters.split("->")
    first, second = left.split(",")
    order = [*out, *(letter for letter in dict.fromkeys(first + second) if letter not in out)]
    size = dict(zip(first + second, (*a.shape, *b.shape)))
    lifted = [_lifted(operand, own, order) for operand, own in ((a, first), (b, second))]
    made = combine(lifted, tuple(size[letter] for letter in order), "product")
    return summed(made, set(range(len(out), len(order))), False)


def _lifted(operand: Operand, own: str, order: list[str]) -> Placed:
    shape = tuple(operand.shape[own.index(letter)] if letter in own else 1 for letter in order)
    dims = tuple(operand.placement.dims[own.index(letter)] if letter in own else None for letter in order)
    return shape, replace(operand.placement, dims=dims)


@register("mm", "bmm", "mv", "dot")
def product(event: Event) -> Placement:
    """Linear in each operand."""
    first, second = event.operands
    return einsum(LETTERS[event.name], first, second)


@register("addmm", "baddbmm")
def product_and_sum(event: Event) -> Placement:
    """A product added to something: to a bias that every rank would add to its partial sum, if that is what it is."""
    bias, first, second = event.operands
    made = einsum(LETTERS["mm" if event.name == "addmm" else "bmm"], first, second)
    shape = event.outputs[0]
    return combine([(shape, made), (bias.shape, bias.placement)], shape, "sum")


@register("_grouped_mm", "grouped_mm_fallback")
def grouped_product(event: Event) -> Placement:
    """Products of groups of rows with a matrix each, or of groups of what is summed."""
    first, second, *others = event.operands
    for other in others:
        if not other.placement.is_replicated:
            raise Unknown(f"{event.name} with groups or a bias that are {other.placement} has no rule.")
    if len(others) > 1:
        raise Unknown(f"{event.name} with a bias has no rule.")
    ndims = len(first.shape), len(second.shape)
    if ndims == (3, 3):
        return einsum(LETTERS["bmm"], first, second)
    grouped = {(2, 3): (0, 0), (3, 2): (0, 1), (2, 2): (1, 0)}[ndims]  # rows in groups, or the groups themselves
    for operand, at in zip((first, second), grouped):
        if operand.placement.dims[at] is not None:
            raise Unknown(f"{event.name} of groups that are {operand.placement} has no rule: ranks have their own.")
    one = _without_groups(first), _without_groups(second)
    if ndims == (2, 2):
        made = einsum("ik,kj->ij", *one)
        return replace(made, dims=(None, *made.dims))
    return einsum("ik,kj->ij", *one)


def _without_groups(operand: Operand) -> Operand:
    if len(operand.shape) == 2:
        return operand
    return replace(
        operand, shape=operand.shape[1:], placement=replace(operand.placement, dims=operand.placement.dims[1:])
    )
