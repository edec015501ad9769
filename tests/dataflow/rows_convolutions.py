"""Rows of the operator table: convolutions."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.operator_rows import Row

aten = torch.ops.aten


def plain(stride: int = 1, padding: int = 1, transposed: bool = False, groups: int = 1) -> tuple[Any, ...]:
    """The numbers of a convolution along one dim."""
    return ([stride], [padding], [1], transposed, [0], groups)


MASK = ([True, True, True],)

CONVOLUTIONS = (
    Row(
        aten.convolution.default,
        "bht khr k",
        right="b . ., h h +, . k k, + . +, . + +, . . .",
        wrong="h . ., t . ., . h ., . k ., . . k, + . ., + + +, . r ., h k k, h h .",
        arguments=lambda x, w, b: (x, w, b, *plain()),
    ),
    Row(
        aten.convolution.default,
        "bht kho",
        right="b ., h h, t ., . k, + .",
        wrong="t k, h ., . h",
        arguments=lambda x, w: (x, w, None, *plain(padding=0)),
    ),
    Row(  # in patches
        aten.convolution.default,
        "bhq khd",
        right="b ., h h",
        unknown="q .",
        arguments=lambda x, w: (x, w, None, *plain(4, 0)),
    ),
    Row(  # a group for each channel
        aten.convolution.default,
        "bht hor h",
        right="h h h, b . ., + . +, . . .",
        wrong="h . ., h h ., . h h, t . .",
        arguments=lambda x, w, b: (x, w, b, *plain(groups=x.shape[1])),
    ),
    Row(  # groups of four channels
        aten.convolution.default,
        "bqt qdo",
        right="q q, b ., + .",
        wrong="q ., . q, q* .",
        arguments=lambda x, w: (x, w, None, *plain(padding=0, groups=x.shape[1] // 4)),
    ),
    Row(  # ranks that think they have all groups, or one
        *(aten.convolution.default, "bqt qdo"),
        right="b .",
        wrong="q q",
        arguments=lambda x, w: (x, w, None, *plain(padding=0, groups=5)),
    ),
    Row(
        aten.convolution.default,
        "bht hkr",
        right="b ., h h, . k, + .",
        wrong="h ., t ., . h",
        arguments=lambda x, w: (x, w, None, *plain(transposed=True)),
    ),
    Row(
        aten.convolution_backward.default,
        "bkt bht khr",
        right=". . ., k . k, . h h, b b ., + . .",
        wrong="k . ., . h ., . . k, t t ., b . .",
        arguments=lambda g, x, w: (g, x, w, [g.shape[1]], *plain(), *MASK),
    ),
    Row(
        aten.convolution_backward.default,
        "bkt bht kho",
        right=". . ., k . k, . h h, b b ., t t ., + . .",
        wrong="k . ., . h ., t . .",
        arguments=lambda g, x, w: (g, x, w, [g.shape[1]], *plain(padding=0), *MASK),
    ),
    Row(
        aten.convolution_backward.default,
        "bht bht hor",
        right="h h h, . . ., b b ., + . .",
        wrong="h h ., h . h",
        arguments=lambda g, x, w: (g, x, w, [g.shape[1]], *plain(groups=g.shape[1]), [True, True, False]),
    ),
)
