"""Operators that compute element by element."""

from __future__ import annotations

from dataclasses import replace

from lightning_autotp.dataflow.event import Event, Operand, Unknown, Wrong
from lightning_autotp.dataflow.operators.combine import (
    Linear,
    Placed,
    check_not_mixed,
    check_not_partial,
    combine,
    unlike_zero,
)
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.placement import Constant, Placement, Repeated, Sparse


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
    *("eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum", "fmax", "fmin", "logaddexp"),
    *("logical_not", "logical_and", "logical_or", "logical_xor"),
    *("bitwise_not", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift"),
    *("floor_divide", "remainder", "fmod", "floor", "ceil", "round", "trunc", "frac", "sgn", "signbit", "copysign"),
    *("erfc", "erfinv", "exp2", "log2", "log10", "logit", "lgamma", "digamma", "hypot"),
    *("tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("hardswish", "hardsigmoid", "mish", "celu", "threshold", "softshrink", "hardshrink", "_prelu_kernel"),
)
def nonlinear(event: Event) -> Placement:
    """Each element by itself, linear in nothing."""
    return together(event, None)


@register("isnan", "isinf", "isfinite", "nan_to_num")
def finite(event: Event) -> Placement:
    """As good as never so: partial sums say nothing about it, and the answer is most likely the same."""
    if any(operand.placement.partial for operand in event.operands):
        raise Unknown(f"{event.name} of a partial sum is not that of the sum.")
    return together(event, None)


@register("log_sigmoid_forward")
def log_sigmoid(event: Event) -> list[Placement]:
    """With a buffer, that is empty on some devices."""
    made = together(event, None)
    return [
        made,
        *(made if shape == event.outputs[0] else Placement((None,) * len(shape)) for shape in event.outputs[1:]),
    ]


@register("neg", "_to_copy", "clone", "detach", "alias", "lift_fresh", "_conj", "_conj_physical", "_neg_view")
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
    return linear_in(event, "self") if event.arguments.get("rounding_mode") is None else together(event, None)


@register("polar", "xlogy")
def scaled(event: Event) -> Placement:
    """A function of the second operand times the first."""
    return linear_in(event, "abs" if event.name == "polar" else "self")


@register("lerp")
def lerp(event: Event) -> Placement:
    """Linear in both ends together, for a given weight."""
    weight, shape = event["weight"], event.outputs[0]
    ends = combine([placed(event.tensor(name)) for name in ("self", "end")], shape, "sum")
    if not isinstance(weight, Operand):
        return ends
    check_not_partial(weight.placement, "weighs two tensors by what is a part")
    return combine([(shape, ends), (weight.shape, unlike_zero(weight.placement))], shape, "product")


@register("addcmul", "addcdiv")
def add_product(event: Event) -> Placement:
    """A product or a quotient, added."""
    first, second, shape = event.tensor("tensor1"), event.tensor("tensor2"), event.outputs[0]
    if event.name == "addcdiv" and second.placement.partial:
        raise Wrong("divides by a partial sum: sum it over the ranks first.")
    product = combine([placed(first), placed(second)], shape, "product")
    return combine([placed(event.tensor("self")), (shape, product)], shape, "sum")


@register("view_as_complex")
def view_as_complex(event: Event) -> Placement:
    """Pairs of the last dim become complex numbers."""
    placement = event.tensor("self").placement
    check_not_mixed(placement, {len(placement.dims) - 1}, "takes pairs as complex numbers")
    return replace(placement, dims=placement.dims[:-1])


@register("view_as_real")
def view_as_real(event: Event) -> Placement:
    """Complex numbers become pairs."""
    placement = event.tensor("self").placement
    return replace(placement, dims=(*placement.dims, None))


@register(
    *("threshold_backward", "silu_backward", "gelu_backward", "sigmoid_backward", "tanh_backward"),
    *("softplus_backward", "leaky_relu_backward", "elu_backward", "hardtanh_backward", "log_sigmoid_backward"),
    *("hardswish_backward", "hardsigmoid_backward", "mish_backward", "logit_backward", "_prelu_kernel_backward"),
    *("hardshrink_backward", "softshrink_backward"),
)
def activation_backward(event: Event) -> Placement:
    """Linear in the gradient."""
    return linear_in(event, "grad_out" if "grad_out" in event.arguments else "grad_output")


def linear_in(event: Event, argument: str) -> Placement:
    """The placement of what all tensors make element by element, linear in one of them alone."""
    shape = event.outputs[0]
    others = [
        o
        for name, o in event.arguments.items()
        if name != argument and isinstance(o, Operand) and (name != "buffer" or o.shape == shape)
    ]
    if any(isinstance(dim, Sparse) for o in others for dim in o.placement.dims):
        raise Unknown(f"{event.name} of the gradient of a slice has no rule.")
    is_zero = event.tensor(argument).placement.zero
    linear: Linear = "product" if is_zero or not any(o.placement.partial for o in others) else None
    known = [(o.shape, unlike_zero(o.placement)) for o in others]
    made = combine([placed(event.tensor(argument)), *known], shape, linear)
    return replace(made, zero=is_zero)


@register("masked_fill")
def masked_fill(event: Event) -> Placement:
    """Linear where the value is zero."""
    value = event["value"]
    if not isinstance(value, (int, float)) or value != 0:
        return together(event, None)
    mask = event.tensor("mask")
    check_not_partial(mask.placement, "a mask")
    return combine(
        [placed(event.tensor("self")), (mask.shape, unlike_zero(mask.placement))], event.outputs[0], "product"
    )


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


@register("fill", "zero")
def fill(event: Event) -> Placement:
    """The same number everywhere."""
    written, value = event.tensor("self"), event.arguments.get("value", 0)
    if isinstance(value, Operand):
        emptied = replace(written.placement, partial=False, zero=True)
        made = combine([placed(value), (written.shape, emptied)], written.shape, "sum")
        return replace(made, zero=value.placement.zero)
    return replace(written.placement, partial=written.placement.partial and value == 0, zero=value == 0)


@register("bernoulli", "rand_like", "randn_like", "exponential", "uniform", "normal")
def random_like(event: Event) -> Placement:
    """Random numbers of their own for what each rank holds: the full model's up to their randomness."""
    placement = event.tensor("self").placement
    if event.name != "bernoulli" and any(isinstance(dim, (Constant, Repeated)) for dim in placement.dims):
        raise Unknown(f"{event.name} of other numbers of equal entries than the full model's: they differ.")
    p = event.arguments.get("p")
    if event.name == "bernoulli" and (placement.partial or isinstance(p, Operand)):
        raise Unknown("no rule draws with probabilities that are tensors, or partial sums.")
    return replace(placement, partial=False, zero=False)


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
