"""Losses: computed element by element, then left as they are (0), averaged (1) or summed (2)."""

from __future__ import annotations

from dataclasses import replace

from lightning_autotp.dataflow.event import Event, Operand
from lightning_autotp.dataflow.operators.combine import check_not_mixed, check_not_partial, combine, summed
from lightning_autotp.dataflow.operators.pointwise import linear_in, placed
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import DimPlacement, Placement


@register(
    *("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
)
def loss(event: Event) -> Placement:
    """A loss of elements; a mean over a sharded dim would be that of the rank's part."""
    shape = event.tensor("self").shape
    made = combine([placed(operand) for operand in event.operands], shape)
    return _reduced(event, made)


def _reduced(event: Event, made: Placement) -> Placement:
    over = set(range(len(made.dims))) if event["reduction"] else set()
    if event["reduction"] == 1:
        check_not_mixed(made, over, "takes the mean loss")
    return summed(made, over, False)


@register(
    *("mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward", "soft_margin_loss_backward"),
    "binary_cross_entropy_backward",
)
def loss_backward(event: Event) -> Placement:
    """Linear in the loss's gradient; that of a mean is divided by the number of elements."""
    made = linear_in(event, "grad_output")
    if event["reduction"] == 1:
        check_not_mixed(made, range(len(made.dims)), "divides by the number of elements")
    return made


def _check_classes(operand: Operand) -> None:
    check_not_mixed(operand.placement, {1}, "takes the loss of a class by index")


def _tokens(event: Event, operand: Operand, *more: Operand) -> Placement:
    """What the ranks hold of a value for each target, of all dims of the log-probabilities but the second."""
    target = event.tensor("target")
    check_not_partial(target.placement, "takes the loss of targets")
    if isinstance(event["weight"], Operand):
        check_not_partial(event["weight"].placement, "weighs classes by what is a part")
    dims = operand.placement.dims
    rows = target.shape, replace(operand.placement, dims=(*dims[:1], *dims[2:]))
    wanted = target.shape, replace(target.placement, zero=False)
    return combine([rows, wanted, *((o.shape, o.placement) for o in more)], target.shape, "product")


@register("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(event: Event) -> list[Placement]:
    """The loss of log-probabilities [rows, classes, places], and the number (or the weight) of the targets."""
    operand = event.tensor("self")
    _check_classes(operand)
    tokens = _tokens(event, operand)
    count = summed(replace(tokens, partial=False), range(len(tokens.dims)), False)
    return [_reduced(event, tokens), Placement(()) if event["reduction"] == 0 else count]


@register("nll_loss_backward", "nll_loss2d_backward")
def nll_loss_backward(event: Event) -> Placement:
    """The gradient of the log-probabilities; linear in the loss's gradient."""
    operand = event.tensor("self")
    _check_classes(operand)
    check_not_partial(event.tensor("total_weight").placement, "divides by the number of targets")
    known = Operand(operand.shape, replace(operand.placement, partial=False, zero=False), operand.dtype)
    tokens = _tokens(event, known, event.tensor("grad_output"))
    none: list[DimPlacement] = [None]
    return replace(tokens, dims=(*tokens.dims[:1], *none, *tokens.dims[1:]))
