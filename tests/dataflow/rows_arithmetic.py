"""Rows of the operator table: elementwise operators, reductions, norms, products."""

from __future__ import annotations

import torch

from tests.helpers.operator_rows import Row

aten = torch.ops.aten

UNARY = (
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default),
    *(aten.exp.default, aten.abs.default, aten.sin.default, aten.cos.default, aten.erf.default, aten.softplus.default),
    *(aten.leaky_relu.default, aten.elu.default, aten.hardtanh.default, aten.expm1.default),
    *(aten.floor.default, aten.round.default),
)
POSITIVE = (aten.log.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.log1p.default)
COMPARED = (
    *(aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor),
    *(aten.maximum.default, aten.minimum.default, aten.remainder.Tensor, aten.floor_divide.default),
)
BACKWARDS = (
    *(
        aten.silu_backward.default,
        aten.gelu_backward.default,
        aten.sigmoid_backward.default,
        aten.tanh_backward.default,
    ),
)

ARITHMETIC = (
    *(Row(operator, "th", right="., t, h, t*, h=", wrong="+") for operator in UNARY),
    *(Row(operator, "p:th", right="t, h", wrong="+") for operator in POSITIVE),
    *(
        Row(operator, "th th", right="t t, h h, h h=", wrong="t ., h ., t h, . h=, + .")
        for operator in COMPARED
        if operator not in (aten.eq.Tensor, aten.ne.Tensor)
    ),
    *(
        Row(operator, "3:th 3:th", right="t t, h h, h h=", wrong="t ., h ., t h")
        for operator in (aten.eq.Tensor, aten.ne.Tensor)
    ),
    Row(aten.sign.default, "th", right="t, h", wrong="+"),
    Row(aten.clamp.default, "th", right="t, h", wrong="+", arguments=lambda x: (x, -0.5, 0.5)),
    Row(aten.clamp_min.default, "th", right="t, h", wrong="+", arguments=lambda x: (x, 0.1)),
    Row(aten.clamp_max.default, "th", right="t, h", wrong="+", arguments=lambda x: (x, 0.1)),
    Row(aten.pow.Tensor_Scalar, "p:th", right="t, h", wrong="+", arguments=lambda x: (x, 3)),
    Row(aten.logical_not.default, "2:th", right="t, h"),
    Row(aten.bitwise_not.default, "?:th", right="t, h"),
    *(
        Row(operator, "?:th ?:th", right="t t, h h", wrong="t ., h ., t h")
        for operator in (
            aten.logical_and.default,
            aten.logical_or.default,
            aten.bitwise_and.Tensor,
            aten.bitwise_or.Tensor,
        )
    ),
    *(
        Row(operator, "th", right="t, h, t*, h=, +, 0")
        for operator in (
            aten.neg.default,
            aten.clone.default,
            aten.detach.default,
            aten.alias.default,
            aten.lift_fresh.default,
        )
    ),
    Row(aten._to_copy.default, "th", right="t, h, +", options={"dtype": torch.float32}, values=False),
    Row(
        aten.add.Tensor,
        "th th",
        right="t t, h h, + +, + 0, 0 +, h h=, h= h=, h* h*",
        wrong="t ., h ., + ., . +, t h, h h*",
    ),
    Row(
        aten.add.Tensor,
        "th th",
        right="h h%, h% h, h% h%, h% h=, h/ h/, h^ h^",
        wrong="h h/, h% ., h% h*, h% h/, h^ h",
    ),
    Row(aten.add.Tensor, "bth h", right="t ., b ., h h, + +", wrong="h ., + .", conservative=". h"),
    Row(aten.add.Tensor, "th", right="t, h", wrong="+", arguments=lambda x: (x, 2.0)),
    Row(aten.add.Tensor, "th", wrong="t, h", arguments=lambda x: (x, x.shape[0] * x.shape[1])),
    Row(aten.add_.Tensor, "th th", right="t t, h h, + +", wrong="+ .", unknown="0 +, h= h"),
    Row(aten.sub.Tensor, "th th", right="t t, h h, + +", wrong="t ., + ., t h"),
    Row(aten.rsub.Scalar, "th", right="t, h", wrong="+", arguments=lambda x: (x, 1.0)),
    Row(aten.mul.Tensor, "th th", right="t t, h h, + ., . +, + 0", wrong="t ., t h, + +, + h, h= ."),
    Row(aten.mul.Tensor, "bth to", right="t t, b ., h ., + .", wrong="t ., + +"),
    Row(aten.mul.Tensor, "th", right="t, h, +", arguments=lambda x: (x, 3.0)),
    Row(aten.mul.Tensor, "th", wrong="h", arguments=lambda x: (x, x.shape[1] ** -0.5)),
    Row(aten.mul_.Tensor, "th th", right="t t, h h, + .", wrong="+ +, t .", unknown=". +"),
    Row(aten.div.Tensor, "th p:th", right="t t, h h, + .", wrong="t ., . +, + +, t h"),
    Row(aten.div.Tensor, "th", right="t", wrong="h", arguments=lambda x: (x, x.shape[1])),
    Row(aten.div.Tensor_mode, "th p:th", right="h h", wrong="+ ., h .", options={"rounding_mode": "floor"}),
    Row(
        aten.threshold_backward.default,
        "th th",
        right="t t, h h, + .",
        wrong="t ., . +, t h",
        arguments=lambda g, x: (g, x, 0),
    ),
    Row(
        aten.leaky_relu_backward.default,
        "th th",
        right="h h, + .",
        wrong="h ., . +",
        arguments=lambda g, x: (g, x, 0.1, False),
    ),
    Row(
        aten.elu_backward.default,
        "th th",
        right="h h, + .",
        wrong="h ., . +",
        arguments=lambda g, x: (g, 1.0, 1.0, 1.0, False, x),
    ),
    Row(
        aten.hardtanh_backward.default,
        "th th",
        right="h h, + .",
        wrong="h ., . +",
        arguments=lambda g, x: (g, x, -0.5, 0.5),
    ),
    Row(
        aten.softplus_backward.default,
        "th th",
        right="h h, + .",
        wrong="h ., . +",
        arguments=lambda g, x: (g, x, 1.0, 20.0),
    ),
    *(Row(operator, "th th", right="t t, h h, + ., 0 ., + 0, 0 +", wrong="t ., . +, t h") for operator in BACKWARDS),
    Row(aten.masked_fill.Scalar, "th ?:th", right="t t, h h, + .", wrong="t ., h .", arguments=lambda x, m: (x, m, 0)),
    Row(aten.masked_fill.Scalar, "th ?:th", right=". 0, + 0", arguments=lambda x, m: (x, m, 0)),
    Row(
        aten.masked_fill.Scalar,
        "bnts ?:bots",
        right="n ., b b, t t",
        wrong="+ ., t .",
        arguments=lambda x, m: (x, m, -9.0),
    ),
    Row(aten.where.self, "?:th th th", right="t t t, h h h, . + +, . + 0, . . .", wrong=". t ., t . ., . + ., h h ."),
    Row(aten.native_dropout.default, "th", right="t, h, +", unknown="h=", arguments=lambda x: (x, 0.0, True)),
    Row(
        aten.native_dropout_backward.default,
        "th ?:th",
        right="t t, h h, + .",
        wrong="t ., h .",
        arguments=lambda g, m: (g, m, 2.0),
    ),
    Row(aten.copy_.default, "th th", right="t t, h h, . .", wrong="t ., h .", unknown=". +, 0 ., h= h"),
    Row(aten.copy.default, "th h", right=". ., h h, t ., h= h", wrong="h ., . h"),
    # reductions and what mixes along a dim
    Row(aten.sum.dim_IntList, "bth", right="t, h, +, b, 0, t=", arguments=lambda x: (x, [1], True)),
    Row(aten.sum.dim_IntList, "bth", right="h, t, b, +, h*", arguments=lambda x: (x, [0, 1])),
    Row(aten.sum.default, "th", right="t, h, +, h=", wrong="t*, h*, h~"),
    Row(aten.mean.dim, "th", right="t, +, h=", wrong="h, h*", arguments=lambda x: (x, [-1], True)),
    Row(aten.mean.default, "th", right="+, .", wrong="t, h"),
    *(
        Row(operator, "th", right="t", wrong="h, +", unknown="h=", arguments=lambda x: (x, [1]))
        for operator in (aten.amax.default, aten.amin.default, aten.logsumexp.default)
    ),
    *(
        Row(operator, "th", right="t", wrong="h, +", arguments=lambda x: (x, 1))
        for operator in (aten.max.dim, aten.min.dim)
    ),
    Row(aten.max.default, "th", right=".", wrong="t, h, +"),
    *(
        Row(operator, "?:thb", right="t, h", wrong="b", arguments=lambda x: (x, 2))
        for operator in (aten.any.dim, aten.all.dim)
    ),
    Row(aten.argmax.default, "th", right="t", wrong="h, +", arguments=lambda x: (x, 1)),
    Row(aten.prod.dim_int, "th", right="t", wrong="h, +", arguments=lambda x: (x, 1)),
    Row(aten.var.correction, "th", right="t", wrong="h, +", arguments=lambda x: (x, [1])),
    Row(aten.linalg_vector_norm.default, "th", right="t", wrong="h, +", arguments=lambda x: (x, 2, [1])),
    Row(aten.linalg_vector_norm.default, "th", right=".", wrong="t, h, +"),
    Row(aten.cumsum.default, "th", right="t, +", wrong="h", arguments=lambda x: (x, 1)),
    *(
        Row(operator, "th", right="t, t*", wrong="h, +", arguments=lambda x: (x, -1, False))
        for operator in (aten._softmax.default, aten._log_softmax.default)
    ),
    *(
        Row(
            operator,
            "th th",
            right="t t, + ., + 0",
            wrong="h h, . +, t .",
            arguments=lambda g, y: (g, y, -1, torch.float64),
        )
        for operator in (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default)
    ),
    Row(aten._safe_softmax.default, "bth", right="b, t", wrong="h, +", arguments=lambda x: (x, -1)),
    Row(aten.sort.default, "th", right="t", wrong="h, +", arguments=lambda x: (x, -1)),
    Row(aten.topk.default, "th", right="t", wrong="h, +", arguments=lambda x: (x, 2, -1)),
    Row(aten.tril.default, "bth", right="b, +", wrong="t, h"),
    Row(aten.triu.default, "bth", right="b, +", wrong="t, h", arguments=lambda x: (x, 1)),
    Row(
        *(aten.native_layer_norm.default, "th h h"),
        right="t . .",
        wrong="h h h, + . ., t h h, h . .",
        arguments=lambda x, w, b: (x, [x.shape[1]], w, b, 1e-5),
    ),
    Row(
        *(aten.native_layer_norm.default, "th h h"),
        wrong="h h h",
        right="t . .",
        arguments=lambda x, w, b: (x, list(w.shape), w, b, 1e-5),
    ),
    Row(
        *(aten.native_layer_norm_backward.default, "th th to p:to h h"),
        right="t t t t . ., + . . . . ., . . . . . ., + 0 . . . .",
        wrong="h h . . h h, . + . . . ., t . . . . .",
        arguments=lambda g, x, m, r, w, b: (g, x, list(w.shape), m, r, w, b, [True] * 3),
    ),
    Row(
        aten._fused_rms_norm.default,
        "th h",
        right="t .",
        wrong="h h, + ., t h",
        arguments=lambda x, w: (x, list(w.shape), w, 1e-5),
    ),
    # products
    Row(aten.mm.default, "th hk", right="t ., . k, h h, + ., . +, h h=, 0 .", wrong="t k, h ., . h, + +, h* h*, + k"),
    Row(aten.bmm.default, "nth nhk", right="n n, t ., . k, h h, + ., n* n*", wrong="n ., t k, h ., n h, + +, h* h*"),
    Row(
        aten.bmm.default,
        "hts hsk",
        right="h h%, h% h, h% h%, h= h%",
        wrong="h h/, h h^, . h%, + h%",
    ),
    Row(aten.mm.default, "th hk", right="h h%, h% h", unknown="h% h%", wrong="h h/"),
    Row(aten.mv.default, "th h", right="t ., h h, + .", wrong="h ., + +, t h"),
    Row(aten.dot.default, "h h", right="h h, + .", wrong="h ., + +, h* h*"),
    Row(
        aten.addmm.default,
        "k th hk",
        right="k . k, . t ., + h h, 0 h h, . . .",
        wrong=". h h, . . k, + . ., k t ., k h h",
    ),
    Row(aten.baddbmm.default, "ntk nth nhk", right="n n n, + h h", wrong=". h h, n n ., . n n"),
)
