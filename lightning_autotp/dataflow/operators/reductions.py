"""Operators that sum or mix over dims."""

from __future__ import annotations

from dataclasses import replace

from lightning_autotp.dataflow.event import Event, Operand, Unknown
from lightning_autotp.dataflow.operators.combine import check_not_mixed, check_not_partial, combine, summed, without
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


@register("amax", "amin", "max", "min", "any", "all", "argmax", "var", "prod", "logsumexp", "linalg_vector_norm")
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


@register("_softmax", "_log_softmax", "_safe_softmax", "sort", "topk")
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
    made = combine([(o.shape, o.placement) for o in (grad, output)], grad.shape, "product")
    check_not_mixed(made, {event.dim(of="grad_output")}, "takes the gradient of a softmax")
    return replace(made, zero=grad.placement.zero)


@register("tril", "triu")
def triangle(event: Event) -> Placement:
    """What lies on one side of the diagonal of the last two dims: linear, but asks for both in full."""
    placement = event.tensor("self").placement
    last = len(placement.dims)
    check_not_mixed(placement, {last - 1, last - 2}, f"takes {event.name}")
    return placement


@register("native_layer_norm", "_fused_rms_norm")
def layer_norm(event: Event) -> list[Placement]:
    """Norms over the last dims, with statistics of size 1 there."""
    operand = event.tensor("input")
    features = _features(event, operand)
    check_not_partial(operand.placement, "a norm is no linear function")
    check_not_mixed(operand.placement, features, "takes a norm")
    weights = [event[name] for name in ("weight", "bias") if isinstance(event.arguments.get(name), Operand)]
    if any(weight.placement.partial for weight in weights):
        raise Unknown("a norm with a weight or bias that is a partial sum has no rule.")
    made = combine([(o.shape, o.placement) for o in (operand, *weights)], operand.shape)
    return [made, *([without(made, features, True)] * (len(event.outputs) - 1))]


@register("native_layer_norm_backward")
def layer_norm_backward(event: Event) -> list[Placement]:
    """Linear in the gradient; the weights' gradients are sums over all but the last dims."""
    grad, operand = event.tensor("grad_out"), event.tensor("input")
    features = _features(event, operand)
    check_not_partial(operand.placement, "a norm's gradient")
    made = combine([(o.shape, o.placement) for o in (grad, operand)], operand.shape, "product")
    check_not_mixed(made, features, "takes the gradient of a norm")
    made = replace(made, zero=grad.placement.zero)
    weights = summed(made, set(range(len(made.dims))) - features, False)
    return [made, *([weights] * (len(event.outputs) - 1))]


def _features(event: Event, operand: Operand) -> set[int]:
    ndim = len(operand.shape)
    return set(range(ndim - len(event["normalized_shape"]), ndim))
