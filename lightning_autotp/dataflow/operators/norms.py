"""Norms: over the last dims, over groups of channels, over all but the channels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from lightning_autotp.dataflow.event import Event, Operand, Unknown, Wrong
from lightning_autotp.dataflow.operators.combine import (
    Placed,
    check_not_mixed,
    check_not_partial,
    combine,
    summed,
    unlike_zero,
    without,
)
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.operators.views import regrouped
from lightning_autotp.dataflow.placement import Placement


def _weights(event: Event) -> list[Operand]:
    """The weight and the bias."""
    found = [event[name] for name in ("weight", "bias") if isinstance(event.arguments.get(name), Operand)]
    if any(weight.placement.partial for weight in found):
        raise Unknown("a norm with a weight or bias that is a partial sum has no rule.")
    return found


def _features(event: Event, operand: Operand) -> set[int]:
    ndim = len(operand.shape)
    return set(range(ndim - len(event["normalized_shape"]), ndim))


def _chosen(event: Event, made: Sequence[Placement]) -> list[Placement]:
    """Those gradients that are asked for."""
    return [placement for placement, wanted in zip(made, event["output_mask"]) if wanted]


@register("native_layer_norm", "_fused_rms_norm")
def layer_norm(event: Event) -> list[Placement]:
    """Norms over the last dims, with statistics of size 1 there."""
    operand = event.tensor("input")
    features = _features(event, operand)
    check_not_partial(operand.placement, "a norm is no linear function")
    check_not_mixed(operand.placement, features, "takes a norm")
    made = combine([(o.shape, o.placement) for o in (operand, *_weights(event))], operand.shape)
    return [made, *([without(made, features, True)] * (len(event.outputs) - 1))]


@register("native_layer_norm_backward", "_fused_rms_norm_backward")
def layer_norm_backward(event: Event) -> list[Placement]:
    """Linear in the gradient; the weights' gradients are sums over all but the last dims."""
    grad, operand = event.tensor("grad_out"), event.tensor("input")
    features = _features(event, operand)
    _check_statistics(event)
    known = operand.shape, unlike_zero(operand.placement)
    made = combine([(grad.shape, grad.placement), known], operand.shape, "product")
    check_not_mixed(made, features, "takes the gradient of a norm")
    made = replace(made, zero=grad.placement.zero)
    weights = summed(made, set(range(len(made.dims))) - features, False)
    return _chosen(event, [made, weights, weights])


def _check_statistics(event: Event) -> None:
    """Refuse what the gradient is not linear in."""
    for name in ("input", "weight", "mean", "rstd", "save_mean", "save_invstd"):
        if isinstance(event.arguments.get(name), Operand):
            check_not_partial(event[name].placement, "a norm's gradient")


def _by_channel(operand: Operand, ndim: int) -> Placed:
    """A weight for each channel, as it meets an input [rows, channels, places]."""
    shape = (*operand.shape, *(1,) * (ndim - 2))
    return shape, replace(operand.placement, dims=(*operand.placement.dims, *(None,) * (ndim - 2)), zero=False)


def _groups(event: Event, placement: Placement, channels: int) -> Placement:
    """The placement as [rows, groups]; each rank must have as many groups and channels as it holds of them."""
    check_not_mixed(placement, range(2, len(placement.dims)), "takes a norm")
    number = event["group"]
    made, inner = regrouped([placement.dims[1]], [channels], [number, channels // number])
    if inner is not None:
        raise Wrong(f"takes a norm of groups of channels, of which each rank holds its part only ({inner}).")
    for rank, call in enumerate(event.ranks):
        held = number if made is None else made.widths[rank]
        if call.arguments["group"] != held:
            raise Wrong(f"rank {rank} takes a norm of {call.arguments['group']} groups and holds {held} of {number}.")
    return replace(placement, dims=(placement.dims[0], made))


@register("native_group_norm", sizes=True)
def group_norm(event: Event) -> list[Placement]:
    """A norm of each group of channels."""
    operand = event.tensor("input")
    ndim = len(operand.shape)
    check_not_partial(operand.placement, "a norm is no linear function")
    _check_eps(event)
    weights = [_by_channel(weight, ndim) for weight in _weights(event)]
    made = combine([(operand.shape, operand.placement), *weights], operand.shape)
    statistics = _groups(event, made, operand.shape[1])
    return [made, statistics, statistics]


def _check_eps(event: Event) -> None:
    if any(call.arguments["eps"] != event["eps"] for call in event.ranks):
        raise Wrong("ranks take a norm with another eps than the full model.")


@register("native_group_norm_backward", sizes=True)
def group_norm_backward(event: Event) -> list[Placement]:
    """Linear in the gradient; the weights' gradients are sums over rows and places."""
    grad, operand = event.tensor("grad_out"), event.tensor("input")
    ndim = len(operand.shape)
    _check_statistics(event)
    weights = [_by_channel(weight, ndim) for weight in _weights(event)]
    known = operand.shape, unlike_zero(operand.placement)
    made = combine([(grad.shape, grad.placement), known, *weights], operand.shape, "product")
    _groups(event, made, operand.shape[1])
    return _chosen(event, _gradients(made, grad))


def _gradients(made: Placement, grad: Operand) -> list[Placement]:
    """Of the input, the weight and the bias."""
    made = replace(made, zero=grad.placement.zero)
    weights = summed(made, _but_channels(made), False)
    return [made, weights, weights]


def _but_channels(placement: Placement) -> Collection[int]:
    return {0, *range(2, len(placement.dims))}


@register("native_batch_norm", "_native_batch_norm_legit")
def batch_norm(event: Event) -> list[Placement]:
    """A norm of each channel over rows and places, or one with known statistics."""
    operand = event.tensor("input")
    ndim, training = len(operand.shape), event.arguments.get("training", True)
    check_not_partial(operand.placement, "a norm is no linear function")
    others = [_by_channel(other, ndim) for other in (*_weights(event), *_running(event))]
    made = combine([(operand.shape, operand.placement), *others], operand.shape)
    if training:
        check_not_mixed(made, _but_channels(made), "takes a norm")
    statistics = Placement((made.dims[1],))
    return [made, *(statistics if shape == (operand.shape[1],) else Placement((None,)) for shape in event.outputs[1:])]


def _running(event: Event) -> list[Operand]:
    """Statistics of what was seen before."""
    found = [event[name] for name in ("running_mean", "running_var") if isinstance(event.arguments.get(name), Operand)]
    for operand in found:
        check_not_partial(operand.placement, "a norm with statistics")
    return found


@register("native_batch_norm_backward")
def batch_norm_backward(event: Event) -> list[Placement]:
    """Linear in the gradient, which mixes rows and places where the statistics are the batch's own."""
    grad, operand = event.tensor("grad_out"), event.tensor("input")
    ndim = len(operand.shape)
    _check_statistics(event)
    others = [_by_channel(other, ndim) for other in (*_weights(event), *_running(event))]
    known = operand.shape, unlike_zero(operand.placement)
    made = combine([(grad.shape, grad.placement), known, *others], operand.shape, "product")
    if event["train"]:
        check_not_mixed(made, _but_channels(made), "takes the gradient of a norm")
    return _chosen(event, _gradients(made, grad))
