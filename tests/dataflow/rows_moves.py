"""Rows of the operator table: views, slices, what chooses by index, factories."""

from __future__ import annotations

import torch

from tests.helpers.operator_rows import Row

aten = torch.ops.aten
DOUBLE = {"dtype": torch.float64}

MOVES = (
    Row(aten.view.default, "btq", right="q, b, t, +, q*, .", arguments=lambda x: (x, [*x.shape[:2], -1, 4])),
    Row(aten.view.default, "btq", right="b, t, .", wrong="q", arguments=lambda x: (x, [*x.shape[:2], 5, -1])),
    Row(aten.view.default, "btq", right="t, .", wrong="q", arguments=lambda x: (x, [*x.shape[:2], 4, -1])),
    Row(aten.view.default, "bth", right="b, h, +, t", arguments=lambda x: (x, [-1, x.shape[2]])),
    Row(aten.view.default, "btnd", right="b, t, .", wrong="n, d", arguments=lambda x: (x, [*x.shape[:2], 20])),
    Row(
        aten.view.default,
        "btnd",
        right="n, d, n*, +, b",
        arguments=lambda x: (x, [*x.shape[:2], x.shape[2] * x.shape[3]]),
    ),
    Row(aten.view.dtype, "td", right=".", unknown="t", arguments=lambda x: (x, torch.float32)),
    Row(aten.view.default, "bodt", right="d=, t=, b, t", arguments=lambda x: (x, [x.shape[0], x.shape[2], x.shape[3]])),
    Row(
        aten.view.default,
        "bdt",
        right="d, b, d=, t=, d%, d^, d/, t%, t^, t/",
        arguments=lambda x: (x, [x.shape[0], x.shape[1] * x.shape[2]]),
    ),
    Row(aten.view.default, "bhd", right="h%, h^, h/, b%, d%", arguments=lambda x: (x, [-1, x.shape[2]])),
    Row(aten.view.default, "btq", right="q%, q=", arguments=lambda x: (x, [*x.shape[:2], -1, 4])),
    Row(
        *(aten.view.default, "btq"),
        right="t%, b%",
        wrong="q%",
        arguments=lambda x: (x, [*x.shape[:2], 5, x.shape[2] // 5]),
    ),
    Row(aten.view.default, "th", right="t, h, .", arguments=lambda x: (x, [x.shape[0] * x.shape[1]])),
    Row(
        aten._unsafe_view.default,
        "ntd",
        right="n, t, d, +",
        arguments=lambda x: (x, [x.shape[0] * x.shape[1], x.shape[2]]),
    ),
    Row(aten.unsqueeze.default, "th", right="t, h, +, h=", arguments=lambda x: (x, 1)),
    Row(aten.squeeze.dim, "toh", right="t, h, +", arguments=lambda x: (x, 1)),
    Row(aten.squeeze.dim, "bth", right="t, .", arguments=lambda x: (x, 0)),
    Row(aten.transpose.int, "bth", right="t, h, b, +, h=", arguments=lambda x: (x, 1, -1)),
    Row(aten.t.default, "th", right="t, h, +"),
    Row(aten.permute.default, "btnd", right="t, n, d, +", arguments=lambda x: (x, [0, 2, 1, -1])),
    Row(aten.expand.default, "oto", right="t, +, .", arguments=lambda x: (x, [3, -1, 4])),
    Row(aten.expand.default, "bots ?:bnts", right=". n", arguments=lambda x, y: (x, [-1, y.shape[1], -1, -1])),
    Row(aten.expand.default, "th", right="t, h, .", arguments=lambda x: (x, [2, *x.shape])),
    Row(aten.expand.default, "bt", right="t, .", wrong="b", arguments=lambda x: (x, [3, x.shape[1]])),
    Row(aten.repeat.default, "th", right="t, +, h, h=, h%, h^, h*", arguments=lambda x: (x, [3, 1, 2])),
    Row(aten.repeat.default, "th", right="h, t, ., h/", arguments=lambda x: (x, [1, 16 // x.shape[1]])),
    Row(aten.repeat.default, "ot ?:th", right=". h, t .", arguments=lambda x, y: (x, [y.shape[1], 1])),
    Row(aten.flip.default, "th", right="t, +", wrong="h", arguments=lambda x: (x, [1])),
    Row(aten.roll.default, "bth", right="b, h, +", wrong="t", arguments=lambda x: (x, [1], [1])),
    Row(aten.constant_pad_nd.default, "bth", right="b, h, +", wrong="t", arguments=lambda x: (x, [0, 0, 1, -1])),
    Row(aten.constant_pad_nd.default, "bth", right="b, h, 0", wrong="t, +", arguments=lambda x: (x, [0, 0, 1, 0], 1.0)),
    # slices
    Row(aten.slice.Tensor, "bth", right="b, h, t, t*, +, t=", arguments=lambda x: (x, 1)),
    Row(aten.slice.Tensor, "th", right="h/", wrong="h, h%", arguments=lambda x: (x, 1, 0, x.shape[1] // 2)),
    Row(aten.slice.Tensor, "bth", right="b, h, +, 0", wrong="t", arguments=lambda x: (x, 1, 1)),
    Row(aten.slice.Tensor, "th", right="h, t", arguments=lambda x: (x, 0, 0, x.shape[0])),
    Row(aten.slice.Tensor, "th th", right=". ., 0 t", wrong=". t, + t", arguments=lambda x, y: (x, 0, 0, y.shape[0])),
    Row(aten.slice_backward.default, "th", right="t, h, +", arguments=lambda g: (g, list(g.shape), 0, 0, 2**63 - 1, 1)),
    Row(
        aten.slice_backward.default,
        "th",
        right="h, +, ., t, t*",
        unknown="t=",
        arguments=lambda g: (g, [g.shape[0] + 2, g.shape[1]], 0, 1, g.shape[0] + 1, 1),
    ),
    *(
        Row(
            *(operator, "th th"),
            right=right,
            wrong="h- ., h- t",
        )
        for operator, right in (
            (aten.add.Tensor, "h- h_, h- h|, h- h-, h| h_"),
            (aten.sub.Tensor, "h- h_, h| h-"),
            (aten.mul.Tensor, "h- h|, h| h-"),
        )
    ),
    Row(aten.mul.Tensor, "th to", right="h- ."),
    Row(aten.div.Tensor, "th p:th", right="h- h|", wrong="h- ."),
    Row(aten.mm.default, "th hk", right="h- h|, h| h-"),
    Row(aten.mm.default, "ht tk", right="h- ."),
    *(
        Row(operator, "th", right="h-", arguments=arguments)
        for operator, arguments in (
            (aten.transpose.int, lambda x: (x, 0, 1)),
            (aten.unsqueeze.default, lambda x: (x, 0)),
            (aten.sum.dim_IntList, lambda x: (x, [0])),
            (aten.neg.default, lambda x: (x,)),
        )
    ),
    *(
        Row(operator, "th", right="t", unknown="h-", arguments=arguments)
        for operator, arguments in (
            (aten.sum.dim_IntList, lambda x: (x, [1])),
            (aten.relu.default, lambda x: (x,)),
            (aten._softmax.default, lambda x: (x, 1, False)),
            (aten.add.Tensor, lambda x: (x, 1.0)),
            (aten.view.default, lambda x: (x, [x.shape[0], x.shape[1] // 2, 2])),
        )
    ),
    Row(
        *(aten.slice_scatter.default, "th bh"),
        right="h h, . ., + +, 0 +, h= h",
        wrong="t ., . b, . h, . +, + .",
        arguments=lambda x, y: (x, y, 0, 2, 2 + y.shape[0]),
    ),
    Row(
        aten.slice_scatter.default,
        "th th",
        right="t t, h h, t* t*, 0 +, t= t, t t=, . +",
        wrong="t ., . t",
        arguments=lambda x, y: (x, y, 0),
    ),
    Row(aten.select.int, "bth", right="b, h, +, t=", wrong="t", arguments=lambda x: (x, 1, -1)),
    Row(aten.select.int, "bth", right="b, h, t/, b%", wrong="t, t%, t^", arguments=lambda x: (x, 1, 0)),
    Row(
        aten.select_backward.default, "bh", right="b, h, +", arguments=lambda g: (g, [g.shape[0], 7, g.shape[1]], 1, 2)
    ),
    Row(aten.unbind.int, "bth", right="b, h, +, h%", wrong="t", unknown="t%", arguments=lambda x: (x, 1)),
    Row(aten.split.Tensor, "tq", right="t, +", wrong="q", arguments=lambda x: (x, 5, 1)),
    Row(aten.split.Tensor, "tq", right="t, +", wrong="q", arguments=lambda x: (x, x.shape[1] // 2, 1)),
    Row(
        aten.split_with_sizes.default,
        "th",
        right="t, +, h=",
        wrong="h",
        arguments=lambda x: (x, [x.shape[1] - 1, 1], 1),
    ),
    Row(
        aten.cat.default,
        "th th",
        right="h h, t t, + +, + 0, h .",
        wrong="t ., h t",
        unknown="+ ., h= h, h% h",
        arguments=lambda x, y: ([x, y], 1),
    ),
    Row(
        aten.stack.default,
        "th th",
        right="h h, t t, + +, + 0, h h=",
        wrong="t ., + .",
        arguments=lambda x, y: ([x, y], 1),
    ),
    # chosen by index
    Row(aten.embedding.default, "hk 8:bt", right=". b, . t, k ., + .", wrong="h ., k t, + t"),
    Row(
        *(aten.embedding_dense_backward.default, "btk 8:bt"),
        right="k ., t t, b b, + .",
        wrong="t ., . t",
        arguments=lambda g, i: (g, i, 8, -1, False),
    ),
    Row(
        aten.index.Tensor, "hk 8:t", right=". t, k ., + ., . .", wrong="h ., k t, + t", arguments=lambda x, i: (x, [i])
    ),
    Row(
        aten.index.Tensor,
        "bthk 2:s 7:s",
        right="h . ., . s s, + . .",
        wrong="t . ., . s .",
        arguments=lambda x, i, j: (x, [i, j]),
    ),
    Row(
        aten.index.Tensor, "thk ?:t", right="h ., k ., + .", wrong="t .", unknown=". t", arguments=lambda x, m: (x, [m])
    ),
    Row(
        *(aten.index_put.default, "hk 8:t tk"),
        right="k . k, + . +, 0 . +, . . ., 0 t t, + t t",
        wrong="h . ., . . +, . . k, . t t, 0 t .",
        arguments=lambda x, i, v: (x, [i], v, True),
    ),
    Row(
        *(aten.index_put.default, "hk 8:t tk"),
        right="k . k, . . .",
        unknown="0 t t",
        arguments=lambda x, i, v: (x, [i], v),
    ),
    Row(
        *(aten.index_put.default, "hk ?:h :"),
        right=". . .",
        unknown="k . .",
        arguments=lambda x, m, v: (x, [m], v),
    ),
    Row(
        aten.index_put_.default,
        "hk 8:t tk",
        right="k . k",
        wrong=". . k",
        unknown="0 . +",
        arguments=lambda x, i, v: (x, [i], v, True),
    ),
    Row(aten.gather.default, "th 8:tk", right="t t, . k, + .", wrong="h ., t ., . t", arguments=lambda x, i: (x, 1, i)),
    Row(
        aten.scatter.src,
        "th 8:tk tk",
        right="t t t, + . +, 0 . +, . . .",
        wrong="h . ., t . ., . . +, . k k",
        arguments=lambda x, i, s: (x, 1, i, s),
    ),
    Row(aten.scatter.value, "th 8:tk", right="t t, . .", wrong="h ., t ., + .", arguments=lambda x, i: (x, 1, i, 2.0)),
    Row(
        aten.scatter_add.default,
        "th 8:tk tk",
        right="t t t, + . +, 0 . +",
        wrong="h . ., t . ., . . +",
        arguments=lambda x, i, s: (x, 1, i, s),
    ),
    Row(
        aten.index_select.default,
        "th 8:k",
        right="t ., . k, + .",
        wrong="h ., t k, + k",
        arguments=lambda x, i: (x, 1, i),
    ),
    Row(
        *(aten.index_add.default, "hk 8:t tk"),
        right="k . k, + . +, 0 . +, 0 t t, . . .",
        wrong="h . ., . . +, . t t, . . k",
        arguments=lambda x, i, v: (x, 0, i, v),
    ),
    *(
        Row(
            aten.nll_loss_forward.default,
            "th 8:t",
            right=right,
            wrong=wrong,
            arguments=lambda x, y, how=how: (x, y, None, how, -100),
        )
        for how, right, wrong in (
            (0, "t t, . ., + .", "h ., t ."),
            (1, "+ ., . .", "t t, h ., t ."),
            (2, "t t, + ., . .", "h ., t ."),
        )
    ),
    *(
        Row(
            aten.nll_loss_backward.default,
            inputs,
            right=right,
            wrong=wrong,
            arguments=lambda g, x, y, n, how=how: (g, x, y, None, how, -100, n),
        )
        for how, inputs, right, wrong in (
            (0, "t th 8:t p:", "t t t ., + . . .", "t . . ., . h . ."),
            (1, ": th 8:t p:", ". t t ., + . . .", ". t . ., . h . ."),
        )
    ),
    # factories
    *(
        Row(operator, "th", right="t, h, .", arguments=lambda x: (list(x.shape),), options=DOUBLE)
        for operator in (aten.zeros.default, aten.ones.default)
    ),
    Row(aten.empty.memory_format, "th", right="t, h", arguments=lambda x: (list(x.shape),), values=False),
    Row(aten.new_empty.default, "th", right="t, h", arguments=lambda x: (x, list(x.shape)), values=False),
    Row(aten.empty_like.default, "th", right="t, h", values=False),
    *(
        Row(operator, "th", right="t, h, +", arguments=lambda x: (x, list(x.shape)))
        for operator in (aten.new_zeros.default, aten.new_ones.default)
    ),
    *(Row(operator, "th", right="t, h, +") for operator in (aten.zeros_like.default, aten.ones_like.default)),
    Row(aten.full.default, "th", right="t, h", arguments=lambda x: (list(x.shape), 2.0), options=DOUBLE),
    Row(aten.full.default, "th", right=".", wrong="t", arguments=lambda x: ([3], x.shape[0] ** 2), options=DOUBLE),
    Row(aten.new_full.default, "th", right="t, h", arguments=lambda x: (x, list(x.shape), 0.0)),
    Row(aten.full_like.default, "th", right="t, h", arguments=lambda x: (x, 2.0)),
    Row(aten.arange.start, "t", right=".", wrong="t", arguments=lambda x: (0, x.shape[0])),
    Row(aten.arange.start_step, "7:t", right=".", wrong="t", arguments=lambda x: (0, 2 * x.shape[0], 2)),
)
