"""Rows of the operator table: grouped products, views by strides, and others that training steps make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.operator_rows import Row

aten = torch.ops.aten


def grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """What a grouped product computes, in fp64: its kernel takes no such numbers."""
    bounds = [0, *offsets.tolist()]
    if a.ndim == 2 and b.ndim == 3:
        return torch.cat([a[lo:hi] @ m for lo, hi, m in zip(bounds, bounds[1:], b)])
    if a.ndim == 3:
        return torch.cat([m @ b[:, lo:hi] for lo, hi, m in zip(bounds, bounds[1:], a)], 1)
    return torch.stack([a[:, lo:hi] @ b[lo:hi] for lo, hi in zip(bounds, bounds[1:])])


def strided(x: Tensor, size: list[int], offset: int) -> tuple[Any, ...]:
    """A slice by strides."""
    return x, size, list(x.stride()), x.storage_offset() + offset


GROUPS = (
    Row(
        aten.new_empty_strided.default,
        "th",
        right="t, h, .",
        arguments=lambda x: (x, list(x.shape), list(x.stride())),
        values=False,
    ),
    Row(
        *(aten.as_strided.default, "bth"),
        right="b, t, +, ., t%, 0",
        unknown="h~",
        arguments=lambda x: strided(x, [x.shape[0], x.shape[1], 2], 1),
    ),
    Row(
        *(aten.as_strided.default, "bth"),
        right="b, h, h=, +",
        wrong="t, t*",
        arguments=lambda x: strided(x, [x.shape[0], 1, x.shape[2]], x.shape[2]),
    ),
    Row(
        *(aten.as_strided.default, "bth"),
        right=".",
        unknown="b, t, h",
        arguments=lambda x: (x, [x.shape[0], 2, x.shape[2]], [x.stride(0), 2 * x.stride(1), 1], 0),
    ),
    Row(aten.unsafe_split.Tensor, "tq", right="t, +", wrong="q", arguments=lambda x: (x, 5, 1)),
    Row(
        aten.unsafe_split_with_sizes.default,
        "th",
        right="t, +",
        wrong="h",
        arguments=lambda x: (x, [x.shape[1] - 1, 1], 1),
    ),
    Row(
        aten._unsafe_index.Tensor,
        "thk 7:s",
        right="h ., . s, + .",
        wrong="t ., h s",
        arguments=lambda x, i: (x, [i]),
    ),
    *(
        Row(
            *(operator, "hk 8:t tk"),
            right="k . k, + . +, 0 . +, . . ., 0 t t, + t t",
            wrong="h . ., . . +, . . k, . t t, 0 t .",
            arguments=lambda x, i, v: (x, [i], v, True),
        )
        for operator in (aten._unsafe_index_put.default, aten._index_put_impl.default)
    ),
    *(
        Row(
            *(aten._grouped_mm.default, "th bhk e:b"),
            right=". k ., h h ., . . ., + . ., . + .",
            wrong=". h ., h . ., + + .",
            unknown="t . ., . b .",
            computed=grouped,
            called=name,
        )
        for name in ("_grouped_mm", "grouped_mm_fallback")
    ),
    Row(
        *(aten._grouped_mm.default, "bht tk e:b"),
        right="h . ., t t ., . . ., + . .",
        wrong="t . .",
        unknown=". k ., b . .",
        computed=grouped,
    ),
    Row(
        *(aten._grouped_mm.default, "ht tk e:b"),
        right="h . ., . k ., . . ., + . .",
        wrong="h k ., + + .",
        unknown="t t .",
        computed=grouped,
    ),
    Row(
        *(aten._grouped_mm.default, "bth bhk"),
        right="b b, h h, t ., . k",
        wrong="b ., h .",
        computed=torch.bmm,
    ),
    Row(
        *(aten.scatter_reduce.two, "th 8:tk tk"),
        right="t t t, + . +, 0 . +, . . .",
        wrong="h . ., t . ., . . +",
        arguments=lambda x, i, s: (x, 1, i, s, "sum"),
    ),
    Row(
        *(aten.scatter_reduce.two, "th 8:tk tk"),
        right="t t t, . . .",
        wrong="h . ., t . ., . . +, + . +",
        arguments=lambda x, i, s: (x, 1, i, s, "amax"),
    ),
    Row(
        *(aten.select_scatter.default, "bth bh"),
        right="b b, h h, + +, 0 +, . .",
        wrong="b ., . h, + .",
        unknown="t .",
        arguments=lambda x, y: (x, y, 1, 2),
    ),
)
