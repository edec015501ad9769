"""Rows of the operator table: more elementwise operators, complex numbers, random numbers."""

from __future__ import annotations

import torch

from tests.helpers.operator_rows import Row

aten = torch.ops.aten

UNARY = (
    *(aten.sgn.default, aten.erfc.default, aten.exp2.default, aten.tan.default, aten.atan.default, aten.sinh.default),
    *(aten.cosh.default, aten.asinh.default, aten.ceil.default, aten.trunc.default, aten.frac.default),
    *(aten.signbit.default, aten.hardswish.default, aten.hardsigmoid.default, aten.mish.default, aten.celu.default),
    *(aten.softshrink.default, aten.hardshrink.default),
)
POSITIVE = (aten.acosh.default, aten.log2.default, aten.log10.default, aten.lgamma.default, aten.digamma.default)
BOUNDED = (aten.asin.default, aten.acos.default, aten.atanh.default, aten.erfinv.default)
BINARY = (
    *(aten.fmax.default, aten.fmin.default, aten.logaddexp.default, aten.fmod.Tensor, aten.atan2.default),
    *(aten.hypot.default, aten.copysign.Tensor, aten._prelu_kernel.default),
)
INTEGERS = (
    *(aten.bitwise_xor.Tensor, aten.logical_xor.default),
    *(aten.bitwise_left_shift.Tensor, aten.bitwise_right_shift.Tensor),
)
BACKWARDS = (*(aten.hardswish_backward.default, aten.hardsigmoid_backward.default, aten.mish_backward.default),)

POINTWISE = (
    *(Row(operator, "th", right="t, h, h=, h%", wrong="+") for operator in UNARY),
    *(Row(operator, "p:th", right="t, h", wrong="+") for operator in POSITIVE),
    *(Row(operator, "u:th", right="t, h", wrong="+") for operator in BOUNDED),
    Row(aten.logit.default, "u:th", right="t, h", wrong="+", arguments=lambda x: (x, 0.1)),
    Row(aten.threshold.default, "th", right="t, h", wrong="+", arguments=lambda x: (x, 0.5, 0.1)),
    *(Row(operator, "th th", right="t t, h h, h h=, h% h", wrong="t ., h ., t h, + .") for operator in BINARY),
    *(Row(operator, "3:th 3:th", right="t t, h h", wrong="t ., h .") for operator in INTEGERS),
    Row(aten.xlogy.Tensor, "th p:th", right="t t, h h, + .", wrong="h ., . +"),
    Row(aten.polar.default, "p:th th", right="t t, h h", wrong="h ., . +"),
    Row(aten.polar.default, "th th", right="+ ."),
    Row(aten.log_sigmoid_forward.default, "th", right="t, h", wrong="+"),
    Row(
        *(aten.log_sigmoid_backward.default, "th th p:th"),
        right="t t t, h h h, + . .",
        wrong="h . h, . + .",
    ),
    *(Row(operator, "th th", right="t t, h h, + ., 0 .", wrong="t ., . +, t h") for operator in BACKWARDS),
    Row(aten._prelu_kernel_backward.default, "th th th", right="t t t, + . .", wrong="t . t, . + ."),
    *(
        Row(operator, "th th", right="t t, h h, + .", wrong="t ., . +", arguments=lambda g, x: (g, x, 0.5))
        for operator in (aten.hardshrink_backward.default, aten.softshrink_backward.default)
    ),
    Row(aten.logit_backward.default, "th u:th", right="h h, + .", wrong="h .", arguments=lambda g, x: (g, x, 0.1)),
    Row(
        *(aten.lerp.Scalar, "th th"),
        right="t t, h h, + +, 0 +",
        wrong="t ., + .",
        arguments=lambda x, y: (x, y, 0.3),
    ),
    Row(aten.lerp.Tensor, "th th th", right="t t t, + + ., . . ., + + 0", wrong="t t ., + + +, + . ., . . +"),
    Row(aten.addcmul.default, "th th th", right="t t t, + + ., + . +, h h h", wrong=". + ., + + +, h h ., + . ."),
    Row(aten.addcdiv.default, "th th p:th", right="t t t, + + ., h h h", wrong=". + ., h h ., + . ."),
    # complex numbers
    Row(aten.view_as_complex.default, "btz", right="b, t, +", wrong="z"),
    Row(aten.view_as_real.default, "c:th", right="t, h, +"),
    *(Row(op, "c:th", right="t, h, +") for op in (aten._conj.default, aten._conj_physical.default)),
    Row(aten._neg_view.default, "th", right="t, h, +"),
    Row(aten.mul.Tensor, "c:th c:th", right="t t, h h, + .", wrong="h ., + +"),
    # zeros, and what is never so
    Row(aten.mul.Tensor, "th th", right="0 +, + 0, 0 ."),
    *(
        Row(op, "th", right="t, h, 0", unknown="+")
        for op in (aten.isnan.default, aten.isinf.default, aten.isfinite.default, aten.nan_to_num.default)
    ),
    Row(aten.fill_.Scalar, "th", right="t, h, h=, .", unknown="+", arguments=lambda x: (x, 2.0)),
    Row(aten.fill.Scalar, "th", right="t, h, +", arguments=lambda x: (x, 0.0)),
    Row(aten.fill.Tensor, "th :", right="t ., h ., . +", wrong="h +"),
    Row(aten.zero_.default, "th", right="t, h, +, ."),
    # random numbers: as if nothing was dropped
    Row(aten.bernoulli_.float, "th", right="t, h, h=", unknown="+, 0", arguments=lambda x: (x, 1.0)),
    Row(aten.bernoulli.p, "th", right="t, h", arguments=lambda x: (x, 1.0)),
    *(
        Row(op, "th", right="t, h, +", unknown="h=", values=False)
        for op in (aten.rand_like.default, aten.randn_like.default)
    ),
    *(
        Row(op, "th", right="t, h, .", unknown="h=, +", values=False)
        for op in (aten.exponential_.default, aten.uniform_.default, aten.normal_.default)
    ),
)
