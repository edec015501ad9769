"""Rows of the operator table: norms, losses, attention kernels, more reductions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from tests.helpers.operator_rows import Row

aten = torch.ops.aten

REDUCTIONS = (
    *(
        Row(operator, "th", right="t", wrong="h, +", unknown="h=", arguments=lambda x: (x, [1]))
        for operator in (aten.std.correction, aten.var_mean.correction, aten.std_mean.correction)
    ),
    Row(aten.aminmax.default, "th", right="t, .", wrong="h, +", options={"dim": 1}),
    Row(aten.aminmax.default, "th", right=".", wrong="t, h, +"),
    Row(aten.argmin.default, "th", right="t", wrong="h, +", arguments=lambda x: (x, 1)),
    *(
        Row(operator, "th", right="t", wrong="h, +", arguments=lambda x: (x, 1))
        for operator in (aten.median.dim, aten.mode.default)
    ),
    Row(aten.kthvalue.default, "th", right="t", wrong="h, +", arguments=lambda x: (x, 2, 1)),
    Row(aten.count_nonzero.dim_IntList, "2:th", right="t, h, .", wrong="h*", arguments=lambda x: (x, [1])),
    *(
        Row(operator, "th", right="t, t%", wrong="h, +", arguments=lambda x: (x, 1))
        for operator in (aten.cummax.default, aten.cummin.default, aten.cumprod.default, aten.logcumsumexp.default)
    ),
    Row(aten.argsort.default, "th", right="t", wrong="h, +", arguments=lambda x: (x, 1)),
)


def group_norm(x: Tensor, w: Tensor, b: Tensor, groups: int) -> tuple[object, ...]:
    return x, w, b, x.shape[0], x.shape[1], x.shape[2], groups, 1e-5


def with_eps(x: Tensor, *others: Tensor) -> float | None:
    """Nothing that the kernel takes where sizes do not fit: it would write behind its tensors' ends."""
    return 1e-5 if all(other.numel() == x.shape[1] for other in others if other.ndim == 1) else None


LAYERS = (
    Row(
        aten._fused_rms_norm_backward.default,
        "th th p:to h",
        right="t t t ., + . . ., . . . .",
        wrong="h h . h, . + . ., t . . .",
        arguments=lambda g, x, r, w: (g, x, list(w.shape), r, w, [True, True]),
        computed=decomposition_table[aten._fused_rms_norm_backward.default],
    ),
    Row(  # the input's gradient is not asked for
        aten.native_layer_norm_backward.default,
        "th th p:to p:to h h",
        right="t t t t . ., + . . . . .",
        wrong="t . t t . .",
        arguments=lambda g, x, m, r, w, b: (g, x, list(w.shape), m, r, w, b, [False, True, True]),
    ),
    Row(
        aten.native_group_norm.default,
        "bqt q q",
        right="b . ., q q q, . . .",
        wrong="q . ., t . ., + . ., . q q",
        arguments=lambda x, w, b: group_norm(x, w, b, x.shape[1] // 4),
    ),
    Row(
        aten.native_group_norm.default,
        "bqt q q",
        right="b . .",
        wrong="q q q",
        arguments=lambda x, w, b: group_norm(x, w, b, 1),
    ),
    Row(
        aten.native_group_norm_backward.default,
        "bqt bqt bn bn q",
        right="b b b b ., q q n n q, + . . . ., . . . . ., + 0 . . 0",
        wrong="q q n n ., . + . . ., t t . . .",
        arguments=lambda g, x, m, r, w: (g, x, m, r, w, *x.shape, x.shape[1] // 4, [True] * 3),
    ),
    Row(
        aten.native_batch_norm.default,
        "bht h h h p:h",
        right="h h h h h, . . . . .",
        wrong="b . . . ., t . . . ., h . . h h, + . . . .",
        arguments=lambda x, w, b, m, v: (x, w, b, m, v, True, 0.1, with_eps(x, w, b, m, v)),
    ),
    Row(
        aten.native_batch_norm.default,
        "bht h h h p:h",
        right="h h h h h, b . . . ., t . . . .",
        wrong="h h h . ., + . . . .",
        arguments=lambda x, w, b, m, v: (x, w, b, m, v, False, 0.1, with_eps(x, w, b, m, v)),
    ),
    Row(
        aten._native_batch_norm_legit.no_stats,
        "bht h h",
        right="h h h, . . .",
        wrong="b . ., h . .",
        arguments=lambda x, w, b: (x, w, b, True, 0.1, with_eps(x, w, b)),
    ),
    Row(
        aten.native_batch_norm_backward.default,
        "bht bht h h p:h h p:h",
        right="h h h h h h h, + . . . . . ., . . . . . . ., + 0 0 . . . .",
        wrong="b b . . . . ., h h . h h h h, . + . . . . .",
        arguments=lambda g, x, w, m, v, sm, sv: (g, x, w, m, v, sm, sv, True, with_eps(x, w, m, v, sm, sv), [True] * 3),
    ),
)

LOSSES = (
    *(
        Row(operator, "th th", right="t t, h h, . .", wrong="t ., + .", arguments=lambda x, y: (x, y, 0))
        for operator in (aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default)
    ),
    Row(aten.mse_loss.default, "th th", right="t t, h h", wrong="t ., + ., h* h*", arguments=lambda x, y: (x, y, 2)),
    Row(aten.mse_loss.default, "th th", right=". .", wrong="t t, h h, + .", arguments=lambda x, y: (x, y, 1)),
    Row(
        aten.soft_margin_loss.default,
        "th 2:th",
        right="t t, h h",
        wrong="t ., + .",
        arguments=lambda x, y: (x, y, 2),
    ),
    Row(aten.binary_cross_entropy.default, "u:th u:th", right=". .", wrong="t t, h ."),
    Row(
        aten.binary_cross_entropy_with_logits.default,
        "th u:th p:h",
        right="t t ., h h h",
        wrong="h h ., + . .",
        arguments=lambda x, y, w: (x, y, w, None, 2),
    ),
    *(
        Row(
            operator,
            f"{grad} th th",
            right=right,
            wrong=wrong,
            arguments=lambda g, x, y, how=how, more=more: (g, x, y, how, *more),
        )
        for operator, more in (
            (aten.mse_loss_backward.default, ()),
            (aten.smooth_l1_loss_backward.default, (1.0,)),
            (aten.huber_loss_backward.default, (1.0,)),
            (aten.soft_margin_loss_backward.default, ()),
        )
        for grad, how, right, wrong in (
            ("th", 0, "t t t, h h h, + . .", "t . ., . + ."),
            (":", 1, ". . ., + . .", ". t t, . + ."),
            (":", 2, ". t t, + . .", ". t ."),
        )
    ),
    Row(
        aten.binary_cross_entropy_backward.default,
        ": u:th u:th",
        right=". t t, + . .",
        wrong=". t ., + t t",
        arguments=lambda g, x, y: (g, x, y, None, 2),
    ),
    *(
        Row(
            aten.nll_loss2d_forward.default,
            "bhtd 8:btd",
            right=right,
            wrong=wrong,
            arguments=lambda x, y, how=how: (x, y, None, how, -100),
        )
        for how, right, wrong in (
            (0, "t t, b b, . ., + .", "h ., t ."),
            (1, "+ ., . .", "t t, h ., t ."),
            (2, "t t, b b, + ., . .", "h ., t ."),
        )
    ),
    Row(
        aten.nll_loss2d_backward.default,
        ": bhtd 8:btd p:",
        right=". t t ., + . . ., . b b .",
        wrong=". h . ., . t . .",
        arguments=lambda g, x, y, n: (g, x, y, None, 2, -100, n),
    ),
)


CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

KERNELS = (
    Row(
        CPU,
        "bntd bntd bntd",
        right="n n n, b b b, . . +, . . .",
        wrong="n . ., t t t, d d d, + . ., n* n n",
        unchecked=True,
    ),
    Row(
        CPU_BACKWARD,
        "bntd bntd bntd bntd bntd bnt",
        right="n n n n n n, b b b b b b, + . . . . .",
        wrong="n . . . . ., . + . . . ., d d d d d .",
        arguments=lambda *tensors: (*tensors, 0.0, False),
        unchecked=True,
    ),
)

NORMS = (*REDUCTIONS, *LAYERS, *LOSSES, *KERNELS)
