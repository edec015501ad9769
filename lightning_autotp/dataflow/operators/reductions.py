"""Operators that sum or mix over dims."""

from __future__ import annotations

from dataclasses import replace

from lightning_autotp.dataflow.event import Event
from lightning_autotp.dataflow.operators.combine import (
    check_not_mixed,
    check_not_partial,
    combine,
    summed,
    unlike_zero,
    without,
)
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import Constant, Placement


def _over(event: Event, argument: str = "dim") -> set[int]:
    """The dims that are reduced: all if none is named."""
    ndim = len(event.tensor("self").shape)
    given = event.arguments.get(argument)
    named = [given] if isinstance(given, int) else list(given or range(ndim))
    return {at % ndim for at in named} if ndim else set()


@register("sum")
def sums(event: Event) -> Placement:
    """A sum of a sharded dim is a partial sum."""
    return summed(event.tensor("self").placement, _over(event), bool(event.arguments.get("keepdim")))


@register("mean")
def mean(event: Event) -> Placement:
    """A mean of a sharded dim is that of the rank's part, divided by its own length; equal entries have their own."""
    placement, over = event.tensor("self").placement, _over(event)
    check_not_mixed(placement, over - _equal(placement), "takes the mean")
    return without(placement, over, bool(event.arguments.get("keepdim")))


def _equal(placement: Placement) -> set[int]:
    return {at for at, dim in enumerate(placement.dims) if isinstance(dim, Constant)}


@register("count_nonzero")
def count_nonzero(event: Event) -> Placement:
    """A count of a sharded dim is a partial sum."""
    placement = event.tensor("self").placement
    check_not_partial(placement, "count_nonzero is no linear function")
    return replace(summed(replace(placement, zero=False), _over(event), False), zero=placement.zero)


@register(
    *("amax", "amin", "aminmax", "max", "min", "any", "all", "argmax", "argmin", "median", "mode", "kthvalue"),
    *("var", "std", "var_mean", "std_mean", "prod", "logsumexp", "linalg_vector_norm"),
)
def reduction(event: Event) -> list[Placement]:
    """Reductions that are linear in nothing."""
    operand, over = event.tensor("self"), _over(event)
    check_not_partial(operand.placement, f"{event.name} is no linear function")
    check_not_mixed(operand.placement, over, f"takes {event.name}")
    made = without(replace(operand.placement, zero=False), over, bool(event.arguments.get("keepdim")))
    return [made] * len(event.outputs)


@register("cumsum")
def cumsum(event: Event) -> Placement:
    """Sums of all that lies before: linear, and mixes along its dim."""
    placement = event.tensor("self").placement
    check_not_mixed(placement, {event.dim()}, "takes cumsum")
    return placement


@register(
    *("_softmax", "_log_softmax", "_safe_softmax", "sort", "topk", "argsort"),
    *("cummax", "cummin", "cumprod", "logcumsumexp"),
)
def along(event: Event) -> list[Placement]:
    """Operators that mix along one dim and are linear in nothing."""
    placement = event.tensor("self").placement
    check_not_partial(placement, f"{event.name} is no linear function")
    check_not_mixed(placement, {event.dim()}, f"takes {event.name}")
    return [replace(placement, zero=False)] * len(event.outputs)


@register("_softmax_backward_data", "_log_softmax_backward_data")
def softmax_backward(event: Event) -> Placement:
    """Linear in the gradient; mixes along the dim of the softmax."""
    grad, output = event.tensor("grad_output"), event.tensor("output")
    check_not_partial(output.placement, "a softmax's gradient")
    known = output.shape, unlike_zero(output.placement)
    made = combine([(grad.shape, grad.placement), known], grad.shape, "product")
    check_not_mixed(made, {event.dim(of="grad_output")}, "takes the gradient of a softmax")
    return replace(made, zero=grad.placement.zero)


@register("tril", "triu")
def triangle(event: Event) -> Placement:
    """What lies on one side of the diagonal of the last two dims: linear, but asks for both in full."""
    placement = event.tensor("self").placement
    last = len(placement.dims)
    check_not_mixed(placement, {last - 1, last - 2}, f"takes {event.name}")
    return placement
