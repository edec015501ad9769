"""The attention kernel of CPUs: rows and heads are computed by themselves, tokens and features are mixed.

Those of GPUs have no rules: where placements are followed they are not called.
"""

from __future__ import annotations

from dataclasses import replace

from lightning_autotp.dataflow.event import Event, Operand, Unknown
from lightning_autotp.dataflow.operators.combine import Placed, check_not_mixed, check_not_partial, combine
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import Placement

_BATCH = 2
"""Rows and heads."""


def _rows_and_heads(operand: Operand, what: str) -> Placed:
    """What the ranks hold of rows and heads; tokens and features must be there in full."""
    ndim = len(operand.shape)
    check_not_mixed(operand.placement, range(_BATCH, ndim), what)
    return operand.shape[:_BATCH], replace(operand.placement, dims=operand.placement.dims[:_BATCH], zero=False)


def _attended(event: Event, grad: str | None) -> Placement:
    """The rows and heads of the result; linear in the values alone, or in the gradient alone."""
    queries, keys, values = (event.tensor(name) for name in ("query", "key", "value"))
    if not queries.shape[:_BATCH] == keys.shape[:_BATCH] == values.shape[:_BATCH]:
        raise Unknown("attention to fewer heads of keys than of queries inside a kernel has no rule.")
    linear = event.tensor(grad) if grad else values  # the values' gradient is linear in the gradient, too
    known = [operand for operand in (queries, keys, values) if operand is not linear]
    for operand in known:
        check_not_partial(operand.placement, "attention is no linear function")
    masks = [event["attn_mask"]] if isinstance(event["attn_mask"], Operand) else []
    for mask in masks:
        check_not_partial(mask.placement, "attention is no linear function")
        if len(mask.shape) != len(queries.shape):
            raise Unknown("attention with a mask that has other dims than the queries has no rule.")
    found = [_rows_and_heads(operand, "attends") for operand in (linear, *known, *masks)]
    return combine(found, queries.shape[:_BATCH], "product")


@register("_scaled_dot_product_flash_attention_for_cpu")
def attention(event: Event) -> list[Placement]:
    """The output of each row, head and token, and the logarithms of their sums."""
    made = _attended(event, None)
    return [replace(made, dims=(*made.dims, None, None)), replace(made, dims=(*made.dims, None), partial=False)]


@register("_scaled_dot_product_flash_attention_for_cpu_backward")
def attention_backward(event: Event) -> Placement:
    """The gradients of queries, keys and values; linear in the output's gradient."""
    made = _attended(event, "grad_out")
    for operand in (event.tensor("out"), event.tensor("logsumexp")):
        check_not_partial(operand.placement, "the gradient of attention")
        made = combine(
            [(operand.shape[:_BATCH], made), _rows_and_heads(operand, "attends")], operand.shape[:_BATCH], "product"
        )
    return replace(made, dims=(*made.dims, None, None))
