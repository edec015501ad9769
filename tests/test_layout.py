"""Geometry: the boxes tile the full tensor, and every way of cutting equals the same cut made by torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_autotp.layout import Box, Interval, Layout, even_widths, replicated_widths, sub_parameters

# No deadline: the machine is shared with other work, and a slow moment is no failure.
properties = settings(deadline=None, max_examples=80)


@dataclass(frozen=True)
class Form:
    """What is to be cut: ``shape``, whose ``dim`` holds the sub-parameters ``subs`` (heads, head size), repeated."""

    shape: tuple[int, ...]
    dim: int
    subs: tuple[tuple[int, int], ...]
    repeat: int


@dataclass(frozen=True)
class Cut:
    """A layout, and by another way of counting the runs (start, length) of each rank along the cut dim."""

    layout: Layout
    dim: int
    runs: tuple[tuple[Interval, ...], ...]

    def expected(self, full: Tensor, rank: int) -> Tensor:
        """What ``rank`` holds of ``full``, by torch.cat of chunks."""
        if self.layout.is_replicated:
            return full
        return torch.cat([full.narrow(self.dim, start, length) for start, length in self.runs[rank]], self.dim)


@st.composite
def forms(draw: st.DrawFn) -> Form:
    subs = tuple(draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=3)))
    repeat = draw(st.integers(1, 3))
    others = draw(st.lists(st.integers(1, 3), max_size=2))
    dim = draw(st.integers(0, len(others)))
    size = repeat * sum(heads * unit for heads, unit in subs)
    return Form((*others[:dim], size, *others[dim:]), dim, subs, repeat)


@st.composite
def cuts(draw: st.DrawFn, form: Form | None = None) -> Cut:
    """A layout of any kind: whole, plain, packed, repeated, uneven, or with heads shared where ranks outnumber them."""
    form = draw(forms()) if form is None else form
    tp_size = draw(st.integers(1, 6))
    if draw(st.integers(0, 9)) == 0:
        return Cut(Layout.replicated(form.shape, tp_size), form.dim, ())
    widths, dealt = [], []
    for heads, unit in form.subs:
        if tp_size > heads and tp_size % heads == 0 and draw(st.booleans()):
            widths.append(replicated_widths(heads * unit, tp_size, unit))
            dealt.append([[rank * heads // tp_size] for rank in range(tp_size)])
        else:
            widths.append(even_widths(heads * unit, tp_size, unit))
            counts = [len(range(rank, heads, tp_size)) for rank in range(tp_size)]  # as cards are dealt
            dealt.append([list(range(sum(counts[:rank]), sum(counts[: rank + 1]))) for rank in range(tp_size)])
    runs: list[list[Interval]] = [[] for _ in range(tp_size)]
    start = 0
    for _ in range(form.repeat):
        for (heads, unit), hands in zip(form.subs, dealt):
            for rank, hand in enumerate(hands):
                runs[rank] += [(start + head * unit, unit) for head in hand]
            start += heads * unit
    layout = Layout.cut(form.shape, form.dim, tp_size, widths, form.repeat)
    return Cut(layout, form.dim, tuple(tuple(run) for run in runs))


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor whose elements all differ."""
    return torch.arange(prod(shape)).reshape(shape)


def region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(box.offset, box.size))


def shards(layout: Layout, full: Tensor) -> list[Tensor]:
    return [layout.shard(full, rank) for rank in range(layout.tp_size)]


# -- properties of every layout ---------------------------------------------------------------------------------------


@properties
@given(cuts())
def test_boxes_tile_the_full_tensor(cut: Cut) -> None:
    """Every element is held by exactly one rank, and by more only where the layout says that ranks share."""
    layout = cut.layout
    holders = torch.zeros(layout.shape, dtype=torch.int)
    for rank in range(layout.tp_size):
        mine = torch.zeros_like(holders)
        for box in layout.boxes(rank):
            mine[region(box)] += 1
        assert mine.numel() == 0 or mine.max() <= 1, "a rank holds an element twice"
        holders += mine
    assert holders.min() >= 1
    if layout.is_replicated:
        assert (holders == layout.tp_size).all()
    else:
        assert (holders.max() > 1) == layout.overlaps
        want = torch.zeros(layout.shape[cut.dim], dtype=torch.int)
        for run in cut.runs:
            for start, length in run:
                want[start : start + length] += 1
        assert torch.equal(holders.movedim(cut.dim, 0).reshape(len(want), -1)[:, 0], want)


@properties
@given(cuts())
def test_shard_equals_torch_cat_of_chunks(cut: Cut) -> None:
    full = numbered(cut.layout.shape)
    for rank in range(cut.layout.tp_size):
        if cut.layout.is_replicated or cut.runs[rank]:
            assert torch.equal(cut.layout.shard(full, rank), cut.expected(full, rank))
        else:
            assert cut.layout.shard(full, rank).numel() == 0


@properties
@given(cuts())
def test_unshard_of_shards_is_the_identity(cut: Cut) -> None:
    full = numbered(cut.layout.shape)
    assert torch.equal(cut.layout.unshard(shards(cut.layout, full)), full)


@properties
@given(st.data())
def test_reshard_equals_direct_shard(data: st.DataObject) -> None:
    form = data.draw(forms())
    first, second = data.draw(cuts(form)).layout, data.draw(cuts(form)).layout
    full = numbered(form.shape)
    gathered = first.unshard(shards(first, full))
    for have, want in zip(shards(second, gathered), shards(second, full), strict=True):
        assert torch.equal(have, want)


@properties
@given(cuts())
def test_local_shape_is_the_shape_of_the_shard(cut: Cut) -> None:
    layout, full = cut.layout, numbered(cut.layout.shape)
    assert [layout.local_shape(r) for r in range(layout.tp_size)] == [tuple(s.shape) for s in shards(layout, full)]


@properties
@given(cuts())
def test_split_gives_a_view_for_each_box(cut: Cut) -> None:
    layout, full = cut.layout, numbered(cut.layout.shape)
    for rank, local in enumerate(shards(layout, full)):
        boxes, views = layout.boxes(rank), layout.split(local, rank)
        assert len(boxes) == len(views)
        for box, view in zip(boxes, views):
            assert torch.equal(view, full[region(box)])
            assert view.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()


@properties
@given(cuts())
def test_writing_through_split_writes_the_local_tensor(cut: Cut) -> None:
    layout = cut.layout
    for rank in range(layout.tp_size):
        local = torch.zeros(layout.local_shape(rank))
        for view in layout.split(local, rank):
            view += 1
        assert (local == 1).all()


@properties
@given(cuts())
def test_boxes_have_no_seams(cut: Cut) -> None:
    """Neighbouring runs are one box, so that a cut file has as few chunks as it can."""
    for part in cut.layout.parts:
        assert all(length > 0 for _, length in part)
        assert all(start + length != after for (start, length), (after, _) in zip(part, part[1:]))


@properties
@given(cuts())
def test_layout_along_a_bias_cuts_it_as_its_weight(cut: Cut) -> None:
    layout = cut.layout
    if layout.is_replicated:
        return
    full = numbered((layout.shape[cut.dim],))
    bias = layout.along(len(full))
    for rank in range(layout.tp_size):
        # a weight that holds its own index along the cut dim everywhere
        index = full.reshape([-1 if at == cut.dim else 1 for at in range(len(layout.shape))]).expand(layout.shape)
        rows = layout.shard(index, rank).movedim(cut.dim, 0)
        assert torch.equal(bias.shard(full, rank), rows.reshape(len(rows), prod(rows.shape[1:]))[:, 0])


@properties
@given(total=st.integers(1, 200), tp_size=st.integers(1, 9), unit=st.integers(1, 8))
def test_even_widths_are_contiguous_whole_units_and_differ_by_one(total: int, tp_size: int, unit: int) -> None:
    widths = even_widths(total * unit, tp_size, unit)
    starts, lengths = [start for start, _ in widths], [length for _, length in widths]
    assert starts == [sum(lengths[:rank]) for rank in range(tp_size)]
    assert sum(lengths) == total * unit
    assert all(length % unit == 0 for length in lengths)
    assert max(lengths) - min(lengths) in (0, unit)
    assert lengths == sorted(lengths, reverse=True)


@properties
@given(units=st.integers(1, 6), copies=st.integers(1, 4), unit=st.integers(1, 5))
def test_replicated_widths_give_each_unit_to_as_many_neighbours(units: int, copies: int, unit: int) -> None:
    widths = replicated_widths(units * unit, units * copies, unit)
    assert widths == tuple((at * unit, unit) for at in range(units) for _ in range(copies))


# -- chosen examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "tp_size", "unit", "want"),
    [
        (8, 2, 1, ((0, 4), (4, 4))),
        (65, 2, 1, ((0, 33), (33, 32))),
        (6, 4, 1, ((0, 2), (2, 2), (4, 1), (5, 1))),
        (48, 4, 8, ((0, 16), (16, 16), (32, 8), (40, 8))),
        (2, 4, 1, ((0, 1), (1, 1), (2, 0), (2, 0))),
        (7, 1, 7, ((0, 7),)),
    ],
)
def test_even_widths(total: int, tp_size: int, unit: int, want: tuple[Interval, ...]) -> None:
    assert even_widths(total, tp_size, unit) == want


def test_even_widths_refuse_a_part_of_a_unit() -> None:
    with pytest.raises(ValueError, match=r"^10 is not a multiple of 4"):
        even_widths(10, 2, unit=4)


@pytest.mark.parametrize(
    ("total", "tp_size", "unit", "want"),
    [
        (2, 4, 1, ((0, 1), (0, 1), (1, 1), (1, 1))),
        (16, 4, 8, ((0, 8), (0, 8), (8, 8), (8, 8))),
        (8, 3, 8, ((0, 8), (0, 8), (0, 8))),
        (4, 4, 1, ((0, 1), (1, 1), (2, 1), (3, 1))),
    ],
)
def test_replicated_widths(total: int, tp_size: int, unit: int, want: tuple[Interval, ...]) -> None:
    assert replicated_widths(total, tp_size, unit) == want


@pytest.mark.parametrize(
    ("total", "tp_size", "unit", "message"),
    [
        (2, 3, 1, "^2 units cannot be shared evenly by 3 ranks"),
        (4, 2, 1, "^4 units cannot be shared evenly by 2 ranks"),
        (10, 4, 4, "^2 units cannot be shared evenly by 4 ranks"),
    ],
)
def test_replicated_widths_refuse_uneven_sharing(total: int, tp_size: int, unit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replicated_widths(total, tp_size, unit)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 8), (16, 4, 4)])
def test_packed_parts_are_cut_one_by_one(sizes: tuple[int, ...], tp_size: int) -> None:
    full = torch.randn(sum(sizes), 5)
    layout = Layout.cut(full.shape, 0, tp_size, [even_widths(size, tp_size) for size in sizes])
    for rank in range(tp_size):
        want = torch.cat([part.chunk(tp_size)[rank] for part in full.split(list(sizes))])
        assert torch.equal(layout.shard(full, rank), want)
        assert len(layout.boxes(rank)) == len(sizes)


def test_boxes_of_a_packed_weight() -> None:
    layout = Layout.cut((6, 3), 0, 2, [even_widths(4, 2), even_widths(2, 2)])
    assert layout.boxes(0) == (Box((0, 0), (2, 3)), Box((4, 0), (1, 3)))
    assert layout.boxes(1) == (Box((2, 0), (2, 3)), Box((5, 0), (1, 3)))
    assert layout.widths == (3, 3)
    assert not layout.overlaps


def test_one_rank_holds_one_box_however_many_parts() -> None:
    layout = Layout.cut((9, 2), 0, 1, [even_widths(3, 1), even_widths(6, 1)])
    assert layout.boxes(0) == (Box((0, 0), (9, 2)),)


def test_whole_layout() -> None:
    layout = Layout.replicated((2, 3), 4)
    assert layout.is_replicated and not layout.overlaps and layout.widths == ()
    assert layout.boxes(3) == (Box((0, 0), (2, 3)),)
    full = torch.randn(2, 3)
    assert layout.shard(full, 2) is full
    assert layout.split(full, 2) == (full,)


def test_shared_heads_overlap() -> None:
    layout = Layout.cut((4, 2), 0, 4, [replicated_widths(4, 4, unit=2)])
    assert layout.overlaps
    assert layout.widths == (2, 2, 2, 2)
    assert [box.offset[0] for rank in range(4) for box in layout.boxes(rank)] == [0, 0, 2, 2]


def test_scalars_can_be_whole() -> None:
    layout = Layout.replicated((), 2)
    scalar = torch.tensor(3.0)
    assert layout.boxes(1) == (Box((), ()),)
    assert torch.equal(layout.unshard([scalar, scalar]), scalar)


@pytest.mark.parametrize("dim", [0, 1])
def test_shard_is_a_contiguous_copy(dim: int) -> None:
    """Or a shard would keep the full tensor's memory alive, and training would write into it."""
    full = torch.randn(4, 4)
    for tp_size in (1, 2):
        local = Layout.cut((4, 4), dim, tp_size, [even_widths(4, tp_size)]).shard(full, 0)
        assert local.is_contiguous()
        assert local.untyped_storage().data_ptr() != full.untyped_storage().data_ptr()
        assert local.untyped_storage().nbytes() == local.nbytes


def test_meta_tensors_and_dtypes_pass_through() -> None:
    layout = Layout.cut((5, 4), 0, 2, [even_widths(5, 2)])
    local = layout.shard(torch.empty(5, 4, device="meta", dtype=torch.bfloat16), 1)
    assert (local.device.type, local.dtype, tuple(local.shape)) == ("meta", torch.bfloat16, (2, 4))


def test_rank_that_holds_nothing_has_an_empty_shard() -> None:
    layout = Layout.cut((2, 3), 0, 3, [even_widths(2, 3)])
    full = torch.randn(2, 3)
    assert layout.boxes(2) == ()
    assert layout.split(layout.shard(full, 2), 2) == ()
    assert tuple(layout.shard(full, 2).shape) == layout.local_shape(2) == (0, 3)
    assert torch.equal(layout.unshard(shards(layout, full)), full)


def test_layouts_are_values() -> None:
    first = Layout.cut((65, 4), 0, 2, [even_widths(65, 2)])
    second = Layout((65, 4), 2, 0, (((0, 33),), ((33, 32),)))
    assert first == second and hash(first) == hash(second)
    assert first != Layout.replicated((65, 4), 2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((((0, 4),),), r"^1 parts for a tensor parallel size of 2"),
        ((((0, 2),), ((3, 1),)), r"do not cover dim 0 of \(4, 3\)"),
        ((((0, 2),), ((2, 1),)), r"do not cover dim 0 of \(4, 3\)"),
        ((((0, 2),), ((2, 3),)), r"do not cover dim 0 of \(4, 3\)"),
        (((), ()), r"do not cover dim 0 of \(4, 3\)"),
    ],
)
def test_layout_refuses_parts_that_do_not_cover(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout((4, 3), 2, 0, parts)


def test_tensors_of_another_shape_are_refused() -> None:
    layout = Layout.cut((4, 3), 0, 2, [even_widths(4, 2)])
    with pytest.raises(ValueError, match=r"a tensor of shape \(4, 3\) belongs here, not \(3, 4\)"):
        layout.shard(torch.zeros(3, 4), 0)
    with pytest.raises(ValueError, match=r"a tensor of shape \(2, 3\) belongs here, not \(1, 3\)"):
        layout.unshard([torch.zeros(2, 3), torch.zeros(1, 3)])


@pytest.mark.parametrize("ranks", [0, 1, 3])
def test_unshard_needs_the_parts_of_all_ranks(ranks: int) -> None:
    """A missing part would leave uninitialised memory in the full tensor."""
    layout = Layout.cut((4, 3), 0, 2, [even_widths(4, 2)])
    with pytest.raises(ValueError, match="2"):
        layout.unshard([torch.zeros(2, 3)] * ranks)


def test_bias_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a bias of 3 does not follow a weight \(4, 3\) cut along dim 0"):
        Layout.cut((4, 3), 0, 2, [even_widths(4, 2)]).along(3)
    with pytest.raises(ValueError, match=r"^a bias of 4 does not follow"):
        Layout.replicated((4, 3), 2).along(4)


# -- sub-parameters of a fused weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "cut_dim", "weight", "weight_dim", "want"),
    [
        ((2, -1), 0, (12, 5), 0, ([6, 6], 1)),
        ((3, -1), 0, (12, 5), 0, ([4, 4, 4], 1)),
        ((3, 5), 0, (12, 5), 0, ([4, 4, 4], 1)),
        ((-1, 5), 0, (12, 5), 0, ([12], 1)),
        (((8, 2, 2), -1), 0, (12, 5), 0, ([8, 2, 2], 1)),
        (((12,), -1), 0, (12, 5), 0, ([12], 1)),
        # what lies before the cut dim repeats: experts, each with a gate and an up part
        ((3, 2, -1), 1, (12, 5), 0, ([2, 2], 3)),
        ((3, 2, 5), 1, (12, 5), 0, ([2, 2], 3)),
        ((2, (4, 2), -1), 1, (12, 5), 0, ([4, 2], 2)),
        ((-1, (4, 2), -1), 1, (12, 5), 0, ([4, 2], 2)),
        ((2, 3, -1, 5), 2, (12, 5), 0, ([2], 6)),
        # what lies behind the cut dim is not cut across
        ((2, 3, -1), 0, (12, 5), 0, ([6, 6], 1)),
        (((1, 3), 3, -1), 0, (12, 5), 0, ([3, 9], 1)),
        # rows
        ((-1, 3), 1, (5, 12), 1, ([4, 4, 4], 1)),
        ((5, 3), 1, (5, 12), 1, ([4, 4, 4], 1)),
        ((-1, (8, 4)), 1, (5, 12), 1, ([8, 4], 1)),
    ],
)
def test_sub_parameters(
    shape: Any, cut_dim: int, weight: tuple[int, int], weight_dim: int, want: tuple[list[int], int]
) -> None:
    sizes, repeat = sub_parameters(shape, cut_dim, weight, weight_dim)
    assert (sizes, repeat) == want
    assert sum(sizes) * repeat == weight[weight_dim]


@pytest.mark.parametrize(
    ("shape", "cut_dim", "weight_dim", "message"),
    [
        ((12,), 0, 0, r"^shape: \(12,\) has fewer dims than the weight \[12, 5\]"),
        ((2, 7), 0, 0, r"^shape: the last entry of \(2, 7\) is not the weight's 5 input features"),
        ((3, 2, 7), 1, 0, r"^shape: the last entry of \(3, 2, 7\) is not the weight's 5 input features"),
        ((2, -1), 1, 0, r"^shape: a column rule cuts the output features, which the last entry of \(2, -1\) is not"),
        ((5, -1), 0, 0, r"^shape: 12 features do not divide into 5 equal sub-parameters"),
        (((8, 2), -1), 0, 0, r"^shape: the sub-parameters \(8, 2\) add up to 10, but the weight has 12"),
        (((8, 2, 4), -1), 0, 0, r"^shape: the sub-parameters \(8, 2, 4\) add up to 14, but the weight has 12"),
        ((5, 2, -1), 1, 0, r"^shape: \(5, 2, -1\) does not divide the weight's 12 output features"),
        ((3, 3, -1), 1, 0, r"^shape: 4 features do not divide into 3 equal sub-parameters"),
        ((-1, 2, -1), 1, 0, r"^shape: \(-1, 2, -1\) leaves two sizes open"),
        ((-1, (5, 2), -1), 1, 0, r"^shape: .*add up to 7, but the weight has 12"),
        ((2, -1), 0, 1, r"^shape: a row rule cuts the input features, the last of two entries, not \(2, -1\)"),
        ((-1, 2, 5), 1, 1, r"^shape: a row rule cuts the input features"),
        ((7, 5), 1, 1, r"^shape: the first entry of \(7, 5\) is not the weight's 12 output features"),
        ((-1, 2), 1, 1, r"^shape: 5 features do not divide into 2 equal sub-parameters"),
        ((-1, (3, 3)), 1, 1, r"^shape: the sub-parameters \(3, 3\) add up to 6, but the weight has 5"),
    ],
)
def test_view_that_the_weight_does_not_have_is_refused(shape: Any, cut_dim: int, weight_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sub_parameters(shape, cut_dim, (12, 5), weight_dim)


@properties
@given(experts=st.integers(1, 4), parts=st.integers(1, 3), width=st.integers(1, 4), tp_size=st.integers(1, 4))
def test_view_with_experts_cuts_inside_each_part_of_each(experts: int, parts: int, width: int, tp_size: int) -> None:
    width *= tp_size
    full = torch.arange(experts * parts * width * 2).reshape(-1, 2)
    sizes, repeat = sub_parameters((experts, parts, -1), 1, full.shape, 0)
    layout = Layout.cut(full.shape, 0, tp_size, [even_widths(size, tp_size) for size in sizes], repeat)
    for rank in range(tp_size):
        want = full.view(experts, parts, width, 2).chunk(tp_size, 2)[rank].reshape(-1, 2)
        assert torch.equal(layout.shard(full, rank), want)
