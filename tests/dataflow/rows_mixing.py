"""Rows of the operator table: windows, pools, transforms, linear algebra."""

from __future__ import annotations

import torch

from tests.helpers.operator_rows import Row

aten = torch.ops.aten


MATRICES = (
    Row(
        aten.linalg_solve_triangular.default,
        "ndd ndk",
        right="n n, . .",
        wrong="n ., d d, + .",
        options={"upper": True},
    ),
    *(
        Row(operator, "ndd", right="n, .", wrong="+")
        for operator in (aten.linalg_inv_ex.default, aten.linalg_matrix_exp.default, aten._linalg_det.default)
    ),
    *(Row(operator, "ndd", right="n", wrong="+", values=False) for operator in (aten._linalg_slogdet.default,)),
    Row(aten.linalg_cholesky_ex.default, "ndd", right=".", values=False),
    Row(aten._linalg_eigh.default, "ndd", right="n", values=False, wrong="+"),
    Row(aten._linalg_svd.default, "ntd", right="n", wrong="t, d, +"),
    Row(aten.linalg_qr.default, "ntd", right="n", wrong="t, d, +"),
    Row(
        aten.linalg_cross.default,
        "thr thr",
        right="t t, h h, + .",
        wrong="t ., r r, + +",
        arguments=lambda x, y: (x, y),
    ),
    Row(
        aten._cdist_forward.default,
        "bth bkh",
        right="b b, t ., . k, . .",
        wrong="h h, t k, + ., b .",
        arguments=lambda x, y: (x, y, 2.0, None),
    ),
)

WINDOWS = (
    Row(aten.unfold.default, "bth", right="b, h, +", unknown="t", arguments=lambda x: (x, 1, 3, 2)),
    Row(
        aten.unfold_backward.default,
        "bkhr",
        right="b, h, +",
        unknown="k, r",
        arguments=lambda g: (g, [g.shape[0], g.shape[1] + 2, g.shape[2]], 1, 3, 1),
    ),
    Row(
        aten.im2col.default,
        "bhts",
        right="b, h, +",
        unknown="t",
        arguments=lambda x: (x, [2, 2], [1, 1], [0, 0], [1, 1]),
    ),
    Row(
        aten.col2im.default,
        "bqt",
        right="b, q, +",
        unknown="t",
        arguments=lambda x: (x, [2, 8], [2, 2], [1, 1], [0, 0], [1, 1]),
    ),
    Row(aten.pixel_shuffle.default, "bqtk", right="b, q, +", unknown="t", arguments=lambda x: (x, 2)),
    Row(aten.pixel_unshuffle.default, "bthd", right="b, t, +", unknown="h", arguments=lambda x: (x, 2)),
    *(
        Row(operator, "bths", right="b, t, +", unknown="h", arguments=lambda x, more=more: (x, *more))
        for operator, more in (
            (aten.avg_pool2d.default, ([2, 2],)),
            (aten._adaptive_avg_pool2d.default, ([2, 2],)),
            (aten.reflection_pad2d.default, ([1, 1, 1, 1],)),
            (aten.replication_pad2d.default, ([1, 1, 1, 1],)),
            (aten.upsample_nearest2d.default, ([16, 14],)),
            (aten.upsample_bilinear2d.default, ([16, 14], False)),
            (aten.upsample_bicubic2d.default, ([16, 14], False)),
        )
    ),
    *(
        Row(operator, "bth", right="b, t, +", unknown="h", arguments=lambda x, more=more: (x, *more))
        for operator, more in (
            (aten.reflection_pad1d.default, ([1, 1],)),
            (aten.replication_pad1d.default, ([1, 1],)),
            (aten.upsample_nearest1d.default, ([16],)),
            (aten.upsample_linear1d.default, ([16], False)),
        )
    ),
    *(
        Row(operator, "bthdd", right="b, t, +", unknown="h", arguments=lambda x, more=more: (x, *more))
        for operator, more in (
            (aten.avg_pool3d.default, ([2, 2, 2],)),
            (aten._adaptive_avg_pool3d.default, ([2, 2, 2],)),
            (aten.reflection_pad3d.default, ([1] * 6,)),
            (aten.replication_pad3d.default, ([1] * 6,)),
            (aten.upsample_nearest3d.default, ([16, 8, 8],)),
            (aten.upsample_trilinear3d.default, ([16, 8, 8], False)),
        )
    ),
    Row(aten.max_pool2d_with_indices.default, "bths", right="b, t", wrong="+", arguments=lambda x: (x, [2, 2])),
    Row(aten.max_pool3d_with_indices.default, "bthdd", right="b, t", wrong="+", arguments=lambda x: (x, [2, 2, 2])),
    *(
        Row(
            operator,
            "bths bths",
            right="b b, t t, + .",
            wrong="t .",
            arguments=lambda g, x, more=more: (g, x, *more),
            unchecked=True,
        )
        for operator, more in (
            (aten.avg_pool2d_backward.default, ([1, 1], [1, 1], [0, 0], False, True, None)),
            (aten._adaptive_avg_pool2d_backward.default, ()),
            (aten.reflection_pad2d_backward.default, ([0] * 4,)),
            (aten.replication_pad2d_backward.default, ([0] * 4,)),
        )
    ),
    *(
        Row(
            operator,
            "bth bth",
            right="b b, t t, + .",
            wrong="t .",
            arguments=lambda g, x: (g, x, [0, 0]),
            unchecked=True,
        )
        for operator in (aten.reflection_pad1d_backward.default, aten.replication_pad1d_backward.default)
    ),
    *(
        Row(
            operator,
            "bthdd bthdd",
            right="b b, t t, + .",
            arguments=lambda g, x, more=more: (g, x, *more),
            unchecked=True,
        )
        for operator, more in (
            (aten.avg_pool3d_backward.default, ([1] * 3, [1] * 3, [0] * 3, False, True, None)),
            (aten._adaptive_avg_pool3d_backward.default, ()),
            (aten.reflection_pad3d_backward.default, ([0] * 6,)),
            (aten.replication_pad3d_backward.default, ([0] * 6,)),
        )
    ),
    Row(
        aten.max_pool2d_with_indices_backward.default,
        "bths bths 8:bths",
        right="b b b, t t t, + . .",
        wrong="t . .",
        arguments=lambda g, x, i: (g, x, [1, 1], [1, 1], [0, 0], [1, 1], False, i),
        unchecked=True,
    ),
    Row(
        aten.max_pool3d_with_indices_backward.default,
        "bthdd bthdd 8:bthdd",
        right="b b b, t t t, + . .",
        arguments=lambda g, x, i: (g, x, [1] * 3, [1] * 3, [0] * 3, [1] * 3, False, i),
        unchecked=True,
    ),
    *(
        Row(
            operator,
            letters,
            right="b, t, +",
            unknown=letters[2],
            arguments=lambda g, more=more: (
                g,
                list(g.shape[2:]),
                [*g.shape[:2], *(s // 2 for s in g.shape[2:])],
                *more,
            ),
        )
        for operator, letters, more in (
            (aten.upsample_nearest1d_backward.default, "bth", ()),
            (aten.upsample_nearest2d_backward.default, "bthd", ()),
            (aten.upsample_nearest3d_backward.default, "bthdd", ()),
            (aten.upsample_linear1d_backward.default, "bth", (False,)),
            (aten.upsample_bilinear2d_backward.default, "bthd", (False,)),
            (aten.upsample_bicubic2d_backward.default, "bthd", (False,)),
            (aten.upsample_trilinear3d_backward.default, "bthdd", (False,)),
        )
    ),
    Row(aten._fft_r2c.default, "bth", right="b, h, +", wrong="t", arguments=lambda x: (x, [1], 0, True)),
    Row(aten._fft_c2c.default, "c:bth", right="b, h, +", wrong="t", arguments=lambda x: (x, [1], 0, True)),
    Row(aten._fft_c2r.default, "c:bth", right="b, h, +", wrong="t", arguments=lambda x: (x, [1], 0, 7)),
    Row(aten.glu.default, "bth", right="b, t", wrong="h, +", arguments=lambda x: (x, 2)),
    Row(
        aten.glu_backward.default,
        "btd bth",
        right="b b, t t, + ., + 0",
        wrong="b ., . +",
        arguments=lambda g, x: (g, x, 2),
    ),
    Row(aten.diagonal.default, "bth", right="b, +", unknown="t, h", arguments=lambda x: (x, 0, 1, 2)),
)

MIXING = (*MATRICES, *WINDOWS)
