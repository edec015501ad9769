"""Operators that compute element by element."""

from __future__ import annotations

from dataclasses import replace

from lightning_autotp.dataflow.event import Event, Operand, Unknown
from lightning_autotp.dataflow.operators.combine import Linear, Placed, combine
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import Constant, Placement, Repeated


def placed(operand: Operand) -> Placed:
    """An operand's shape and placement."""
    return operand.shape, operand.placement


def together(event: Event, linear: Linear) -> Placement:
    """The placement of a result that all tensor arguments make element by element."""
    return combine([placed(operand) for operand in event.operands], event.outputs[0], linear)


@register(
    *(
        "relu",
        "gelu",
        "silu",
        "sigmoid",
        "tanh",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "abs",
        "sin",
        "cos",
        "erf",
    ),
    *("softplus", "leaky_relu", "elu", "hardtanh", "log1p", "expm1", "sign", "clamp", "clamp_min", "clamp_max", "pow"),
    *("eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum", "isnan", "isinf", "isfinite"),
    *("logical_not", "logical_and", "logical_or", "bitwise_not", "bitwise_and", "bitwise_or"),
    *("floor_divide", "remainder", "floor", "round"),
)
def nonlinear(event: Event) -> Placement:
    """Each element by itself, linear in nothing."""
    return together(event, None)


@register("neg", "_to_copy", "clone", "detach", "alias", "lift_fresh")
def linear_alone(event: Event) -> Placement:
    """Each element by itself, linear."""
    return event.tensor("self").placement


@register("add", "sub", "rsub")
def add(event: Event) -> Placement:
    """Linear in both operands together, unless one is a number: every rank would add it to its partial sum."""
    other = event["other"]
    affine = isinstance(other, (int, float)) and other != 0
    return together(event, None if affine else "sum")


@register("mul", "native_dropout_backward")
def mul(event: Event) -> Placement:
    """Linear in each operand alone."""
    return together(event, "product")


@register("div")
def div(event: Event) -> Placement:
    """Linear in what is divided, unless it is rounded."""
    return _linear_in(event, "self") if event.arguments.get("rounding_mode") is None else together(event, None)


@register(
    *("threshold_backward", "silu_backward", "gelu_backward", "sigmoid_backward", "tanh_backward"),
    *("softplus_backward", "leaky_relu_backward", "elu_backward", "hardtanh_backward"),
)
def activation_backward(event: Event) -> Placement:
    """Linear in the gradient."""
    return _linear_in(event, "grad_output")


def _linear_in(event: Event, argument: str) -> Placement:
    others = [o for name, o in event.arguments.items() if name != argument and isinstance(o, Operand)]
    linear: Linear = None if any(o.placement.partial for o in others) else "product"
    made = together(event, linear)
    return replace(made, zero=event.tensor(argument).placement.zero)


@register("masked_fill")
def masked_fill(event: Event) -> Placement:
    """Linear where the value is zero."""
    value = event["value"]
    return together(event, "product" if isinstance(value, (int, float)) and value == 0 else None)


@register("where")
def where(event: Event) -> Placement:
    """Linear in both values together, not in the condition."""
    values = [placed(o) for o in (event["self"], event["other"]) if isinstance(o, Operand)]
    numbers = [n for n in (event["self"], event["other"]) if isinstance(n, (int, float)) and n != 0]
    shape = event.outputs[0]
    made = combine(values, shape, None if numbers else "sum")
    condition = combine([(shape, replace(made, partial=False)), placed(event.tensor("condition"))], shape)
    return Placement(condition.dims, made.partial, made.zero)


@register("native_dropout")
def native_dropout(event: Event) -> list[Placement]:
    """Linear in its input for a given mask; the mask itself is random."""
    made = event.tensor("input").placement
    if any(isinstance(dim, (Constant, Repeated)) for dim in made.dims):
        raise Unknown(
            "dropout of other numbers of equal entries than the full model's: what it leaves is not equal any more."
        )
    return [made, replace(made, partial=False, zero=False)]


@register("copy")
def copy(event: Event) -> Placement:
    """The source, broadcast to what is written."""
    written = event.tensor("self")
    made = combine(
        [placed(event.tensor("src")), (written.shape, replace(written.placement, partial=False, zero=True))],
        written.shape,
        "sum",
    )
    return replace(made, zero=event.tensor("src").placement.zero)
