"""Geometry: the boxes tile the full tensor, and every way of cutting equals the same cut made by torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_autotp.layout.heads import share_heads
from lightning_autotp.layout.layout import Box, Interval, Layout, Share, even_widths
from tests.helpers.layouts import Sharing, numbered, properties, sharings


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
            # the keys of multi-head attention with as many query heads as ranks
            widths.append(
                tuple((start * unit, length * unit) for start, length in share_heads(tp_size, heads, tp_size)[1])
            )
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


def seams(part: tuple[Interval, ...]) -> set[int]:
    """Where a run begins at the end of the one before it."""
    return {after for (start, length), (after, _) in zip(part, part[1:]) if start + length == after}


def edges(part: tuple[Interval, ...]) -> set[int]:
    return {at for start, length in part for at in (start, start + length)} - seams(part)


SHARED = (((0, 1), (1, 1)), ((0, 1), (2, 1)))
"""Both ranks hold the first element: the first one's two runs stay two, because the other's ends between them."""


@properties
@given(cuts())
@example(Cut(Layout((3,), 2, 0, SHARED), 0, SHARED))
def test_boxes_have_no_seams(cut: Cut) -> None:
    """Neighbouring runs are one box, so that a cut file has as few chunks as it can.

    But where ranks share: what they share is cut alike on all of them.
    """
    parts = cut.layout.parts
    everyones = set().union(*map(edges, parts)) if cut.layout.overlaps else set()
    for part in parts:
        assert all(length > 0 for _, length in part)
        assert seams(part) <= everyones


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
@given(cuts())
def test_shared_runs_are_those_that_several_ranks_hold(cut: Cut) -> None:
    """Against the definition: element by element of what a rank holds, in local order, all ranks that hold it."""
    layout = cut.layout
    if layout.is_replicated:
        assert [layout.shared(rank) for rank in range(layout.tp_size)] == [()] * layout.tp_size
        return
    indices = [
        list(layout.along(layout.shape[cut.dim]).shard(numbered((layout.shape[cut.dim],)), rank).tolist())
        for rank in range(layout.tp_size)
    ]
    for rank, mine in enumerate(indices):
        owners = [tuple(r for r, theirs in enumerate(indices) if index in theirs) for index in mine]
        want = {at: who for at, who in enumerate(owners) if len(who) > 1}
        have: dict[int, tuple[int, ...]] = {}
        runs = layout.shared(rank)
        for run in runs:
            assert run.length > 0 and rank in run.owners
            assert not have.keys() & set(range(run.start, run.start + run.length)), "runs overlap"
            have |= dict.fromkeys(range(run.start, run.start + run.length), run.owners)
        assert have == want
        assert [run.start for run in runs] == sorted(run.start for run in runs), "in local order"
        assert all((a.start + a.length, a.owners) != (b.start, b.owners) for a, b in zip(runs, runs[1:])), (
            "neighbouring runs of the same owners are one"
        )


@properties
@given(sharings(), st.integers(1, 3), st.integers(1, 3))
def test_unshard_of_overlapping_parts_is_the_identity(sharing: Sharing, dim: int, behind: int) -> None:
    """A fused projection of q, k and v whose key heads ranks share."""
    queries, keys = share_heads(sharing.queries, sharing.keys, sharing.tp_size)
    widths = [[(s * dim, n * dim) for s, n in part] for part in (queries, keys, keys)]
    full = numbered(((sharing.queries + 2 * sharing.keys) * dim, behind))
    layout = Layout.cut(full.shape, 0, sharing.tp_size, widths)
    assert layout.overlaps == (sharing.tp_size > sharing.keys)
    q, k, v = full.split([sharing.queries * dim, sharing.keys * dim, sharing.keys * dim])
    for rank, part in enumerate(shards(layout, full)):
        pieces = [
            t.split(dim)[h]
            for t, (s, n) in zip((q, k, v), (queries[rank], keys[rank], keys[rank]))
            for h in range(s, s + n)
        ]
        assert torch.equal(part, torch.cat(pieces))
    assert torch.equal(layout.unshard(shards(layout, full)), full)


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
    _, keys = share_heads(4, 2, 4)
    layout = Layout.cut((4, 2), 0, 4, [[(start * 2, length * 2) for start, length in keys]])
    assert layout.overlaps
    assert layout.widths == (2, 2, 2, 2)
    assert [box.offset[0] for rank in range(4) for box in layout.boxes(rank)] == [0, 0, 2, 2]
    assert [layout.shared(rank) for rank in range(4)] == 2 * [(Share(0, 2, (0, 1)),)] + 2 * [(Share(0, 2, (2, 3)),)]


def test_shared_runs_of_a_fused_weight() -> None:
    """Each rank's own queries are its alone; the key and the value it shares, with whom depends on the head."""
    queries, keys = ((0, 1), (1, 1), (2, 2)), ((0, 1), (0, 1), (1, 1))
    layout = Layout.cut((8, 2), 0, 3, [queries, keys, keys])
    assert [layout.shared(rank) for rank in range(3)] == 2 * [(Share(1, 2, (0, 1)),)] + [()]
    packed = Layout((4, 1), 3, 0, (((0, 3),), ((1, 3),), ((2, 1),)))
    assert packed.shared(0) == (Share(1, 1, (0, 1)), Share(2, 1, (0, 1, 2)))
    assert packed.shared(1) == (Share(0, 1, (0, 1)), Share(1, 1, (0, 1, 2)))
    assert packed.shared(2) == (Share(0, 1, (0, 1, 2)),)


def test_what_is_cut_plainly_or_whole_is_not_shared() -> None:
    assert Layout.cut((6,), 0, 2, [even_widths(6, 2)]).shared(1) == ()
    assert Layout.replicated((6,), 2).shared(0) == ()


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
