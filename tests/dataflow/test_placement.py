"""Placements: those of layouts hold what the layouts shard, and a view's arithmetic is that of the view itself."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autotp.dataflow.placement import (
    Constant,
    Part,
    Placement,
    Shards,
    constant,
    covered,
    disjoint,
    joined,
    shards,
)
from lightning_autotp.dataflow.view_dims import flattened, groups, unflattened
from lightning_autotp.layout.layout import Layout, even_widths
from tests.helpers.operator_rows import holds


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_layouts_placement_holds_what_the_layout_shards(dim: int, repeat: int) -> None:
    widths = [even_widths(7 if dim == 0 else 5, 3), even_widths(3, 3)]
    shape = tuple(sum(s + n for s, n in (sub[-1] for sub in widths)) * repeat if at == dim else 4 for at in range(2))
    layout = Layout.cut(shape, dim, 3, widths, repeat)
    full = torch.randn(shape, dtype=torch.float64)
    placement = Placement.from_layout(layout)
    local = [layout.shard(full, rank) for rank in range(3)]
    assert holds(placement, full, local)
    assert not holds(placement, full, local[::-1])
    assert [placement.local_shape(shape, rank) for rank in range(3)] == [layout.local_shape(rank) for rank in range(3)]


def test_a_replicated_layout_is_replicated() -> None:
    placement = Placement.from_layout(Layout.replicated((3, 4), 2))
    assert placement == Placement.replicated(2) and placement.is_replicated
    assert placement.local_shape((3, 4), 1) == (3, 4)


def test_equal_indices_are_equal_placements() -> None:
    assert shards(6, [[(0, 2), (2, 0), (2, 1)], [(3, 3)]]) == shards(6, [[(0, 3)], [(3, 3)]])
    assert shards(6, [[(0, 6)], [(0, 3), (3, 3)]]) is None
    assert shards(6, [[(3, 3), (0, 3)]] * 2) is not None  # all of it, in another order
    assert constant(4, (4, 4)) is None and constant(4, (2, 2)) == Constant(4, (2, 2))


def test_words() -> None:
    half = Shards(4, (((0, 2),), ((2, 2),)))
    both = Shards(4, (((0, 3),), ((1, 3),)))
    assert str(Placement((None, None))) == "replicated"
    assert str(Placement((None, half))) == "sharded along dim 1 (0:2 | 2:4)"
    assert str(Placement((None,), partial=True)) == "partial"
    assert str(Placement((both,), partial=True)) == "sharded along dim 0 (0:3 | 1:4) and partial"
    assert str(Placement((Constant(4, (2, 2)),))) == "constant along dim 0 (2 | 2 equal entries)"
    assert str(Shards(2, (((0, 2),), ()))) == "0:2 | none"


def test_a_sum_over_a_single_holder_is_no_partial_sum() -> None:
    half = Shards(4, (((0, 2),), ((2, 2),)))
    both = Shards(4, (((0, 3),), ((1, 3),)))
    assert disjoint([None, half]) and not disjoint([both]) and not disjoint([None])
    assert Placement((half,), partial=True) == Placement((half,))
    assert Placement((both,), partial=True) != Placement((both,))


def test_shards_along_two_dims_leave_holes() -> None:
    half = Shards(4, (((0, 2),), ((2, 2),)))
    rows, columns = (Shards(4, tuple(((at, 2),) for at in starts)) for starts in ((0, 0, 2, 2), (0, 2, 0, 2)))
    assert covered([half, None]) and not covered([half, half])
    assert covered([rows, columns]) and disjoint([rows, columns])


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Part]]:
    """Sizes of dims, and of each some indices in some order."""
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    orders = (draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)) for n in sizes)
    return sizes, [joined((at, 1) for at in order) for order in orders]


@given(blocks())
def test_a_block_survives_being_flattened(block: tuple[tuple[int, ...], list[Part]]) -> None:
    sizes, parts = block
    numbers = torch.arange(prod(sizes)).reshape(sizes)
    for at, part in enumerate(parts):
        numbers = numbers.index_select(at, torch.tensor([i for start, n in part for i in range(start, start + n)]))
    runs = flattened(parts, sizes)
    assert [i for start, n in runs for i in range(start, start + n)] == numbers.flatten().tolist()
    assert unflattened(runs, sizes) == parts


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
def test_only_a_block_is_one(indices: list[int]) -> None:
    found = unflattened(joined((at, 1) for at in indices), (2, 3))
    rows, columns = list(dict.fromkeys(i // 3 for i in indices)), list(dict.fromkeys(i % 3 for i in indices))
    is_block = indices == [row * 3 + column for row, column in product(rows, columns)]
    assert (found is not None) == is_block


def test_dims_that_are_merged_and_split_together_are_one_group() -> None:
    assert list(groups((2, 6, 4), (2, 3, 2, 4))) == [([0], [0]), ([1], [1, 2]), ([2], [3])]
    assert list(groups((2, 3, 4), (6, 4))) == [([0, 1], [0]), ([2], [1])]
    assert list(groups((4, 6), (3, 8))) == [([0, 1], [0, 1])]
    assert list(groups((2, 4), (2, 1, 4, 1))) == [([0], [0, 1]), ([1], [2, 3])]
