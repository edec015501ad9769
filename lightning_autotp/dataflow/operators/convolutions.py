"""Convolutions: products over channels, in groups, that mix along the other dims."""

from __future__ import annotations

from dataclasses import replace

from lightning_autotp.dataflow.event import Event, Operand, Unknown, Wrong
from lightning_autotp.dataflow.operators.combine import check_not_mixed, combine, summed
from lightning_autotp.dataflow.operators.matmul import einsum
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.operators.views import regrouped
from lightning_autotp.dataflow.placement import DimPlacement, Placement

SETTINGS = ("stride", "padding", "dilation", "transposed", "output_padding")


def _check_settings(event: Event) -> None:
    """Ranks may have their own number of groups only."""
    for rank, call in enumerate(event.ranks):
        for name in SETTINGS:
            if call.arguments[name] != event[name]:
                raise Wrong(f"rank {rank} convolves with {name} {call.arguments[name]}, the full model {event[name]}.")


def _is_pointwise(event: Event) -> bool:
    """Whether each place is computed by itself."""
    return (
        all(size == 1 for size in event.tensor("weight").shape[2:])
        and all(step == 1 for step in event["stride"])
        and not any(event["padding"])
        and not any(event["output_padding"])
    )


def _channels(event: Event, name: str) -> Operand:
    """An input or a gradient as (rows, groups, channels of a group), and its places where these are independent."""
    operand, groups = event.tensor(name), event["groups"]
    placement, shape = operand.placement, operand.shape
    rest = range(2, len(shape))
    places = rest if _is_pointwise(event) else ()
    for at in rest if not places else ():
        if placement.dims[at] is not None and event["stride"][at - 2] == event.tensor("weight").shape[at]:
            raise Unknown(f"no rule says whether patches along dim {at} lie within the ranks' shards.")
        check_not_mixed(placement, {at}, "convolves")
    split = _grouped(event, shape[1], placement.dims[1])
    dims = (placement.dims[0], *split, *(placement.dims[at] for at in places))
    sizes = (shape[0], groups, shape[1] // groups, *(shape[at] for at in places))
    return Operand(sizes, replace(placement, dims=dims), operand.dtype)


def _grouped(event: Event, size: int, dim: DimPlacement) -> list[DimPlacement]:
    """Channels as (groups, channels of a group); each rank must convolve in as many groups as it holds."""
    groups = event["groups"]
    made = [None, dim] if groups == 1 else regrouped([dim], [size], [groups, size // groups])
    for rank, call in enumerate(event.ranks):
        held = groups if made[0] is None else made[0].widths[rank]
        if call.arguments["groups"] != held:
            raise Wrong(f"rank {rank} convolves in {call.arguments['groups']} groups and holds {held} of {groups}.")
    return made


def _weight(event: Event) -> Operand:
    """The weight as (groups, channels of a group, channels of a group)."""
    weight, groups = event.tensor("weight"), event["groups"]
    placement, shape = weight.placement, weight.shape
    check_not_mixed(placement, range(2, len(shape)), "convolves")
    dims = (*_grouped(event, shape[0], placement.dims[0]), placement.dims[1])
    return Operand((groups, shape[0] // groups, shape[1]), replace(placement, dims=dims), weight.dtype)


def _letters(event: Event) -> tuple[str, str, str]:
    """Those of the input, of the weight and of the output; x, y and z are places that are independent."""
    places = "xyz"[: len(event.tensor("weight").shape) - 2] if _is_pointwise(event) else ""
    return f"ngc{places}", "gco" if event["transposed"] else "goc", f"ngo{places}"


def _merged(event: Event, made: Placement, at: int, size: int, ndim: int) -> Placement:
    """Groups and channels, dims ``at`` and the next, as one of ``size``; places that are not there are replicated."""
    groups = event["groups"]
    joint = regrouped(made.dims[at : at + 2], [groups, size // groups], [size])
    dims = (*made.dims[:at], *joint, *made.dims[at + 2 :])
    return replace(made, dims=(*dims, *(None,) * (ndim - len(dims))))


@register("convolution", sizes=True)
def convolution(event: Event) -> Placement:
    """A sum over the channels of a group, and a bias."""
    _check_settings(event)
    data, weight, out = _letters(event)
    shape = event.outputs[0]
    made = einsum(f"{data},{weight}->{out}", _channels(event, "input"), _weight(event))
    made = _merged(event, made, 1, shape[1], len(shape))
    bias = event["bias"]
    if not isinstance(bias, Operand):
        return made
    lifted = (*bias.shape, *(1,) * (len(shape) - 2))
    dims = (*bias.placement.dims, *(None,) * (len(shape) - 2))
    return combine([(shape, made), (lifted, replace(bias.placement, dims=dims))], shape, "sum")


@register("convolution_backward", sizes=True)
def convolution_backward(event: Event) -> list[Placement]:
    """Linear in the gradient; the weight's gradient is a sum over rows and places."""
    _check_settings(event)
    data, weight, out = _letters(event)
    grad, ndim = _channels(event, "grad_output"), len(event.tensor("input").shape)
    made = []
    if event["output_mask"][0]:
        its = einsum(f"{out},{weight}->{data}", grad, _weight(event))
        made.append(_merged(event, its, 1, event.tensor("input").shape[1], ndim))
    if event["output_mask"][1]:
        its = einsum(f"{out},{data}->{weight}", grad, _channels(event, "input"))
        made.append(_merged(event, its, 0, event.tensor("weight").shape[0], ndim))
    if event["output_mask"][2]:
        its = summed(grad.placement, {0, *range(3, len(grad.shape))}, False)
        made.append(_merged(event, its, 0, event.tensor("grad_output").shape[1], 1))
    return made
