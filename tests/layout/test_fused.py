"""Sub-parameters of fused weights and of any fused parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_autotp.layout.fused import Fused, fused_parameter, sub_parameters
from lightning_autotp.layout.layout import Layout, even_widths
from tests.helpers.layouts import numbered, properties


@pytest.mark.parametrize(
    ("shape", "cut_dim", "weight", "weight_dim", "want"),
    [
        ((2, -1), 0, (12, 5), 0, Fused((6, 6), 1)),
        ((3, -1), 0, (12, 5), 0, Fused((4, 4, 4), 1)),
        ((3, 5), 0, (12, 5), 0, Fused((4, 4, 4), 1)),
        ((-1, 5), 0, (12, 5), 0, Fused((12,), 1)),
        (((8, 2, 2), -1), 0, (12, 5), 0, Fused((8, 2, 2), 1)),
        (((12,), -1), 0, (12, 5), 0, Fused((12,), 1)),
        # what lies before the cut dim repeats: experts, each with a gate and an up part
        ((3, 2, -1), 1, (12, 5), 0, Fused((2, 2), 3)),
        ((3, 2, 5), 1, (12, 5), 0, Fused((2, 2), 3)),
        ((2, (4, 2), -1), 1, (12, 5), 0, Fused((4, 2), 2)),
        ((-1, (4, 2), -1), 1, (12, 5), 0, Fused((4, 2), 2)),
        ((2, 3, -1, 5), 2, (12, 5), 0, Fused((2,), 6)),
        # what lies behind the cut dim is not cut across
        ((2, 3, -1), 0, (12, 5), 0, Fused((6, 6), unit=3)),
        (((1, 3), 3, -1), 0, (12, 5), 0, Fused((3, 9), unit=3)),
        # rows
        ((-1, 3), 1, (5, 12), 1, Fused((4, 4, 4), 1)),
        ((5, 3), 1, (5, 12), 1, Fused((4, 4, 4), 1)),
        ((-1, (8, 4)), 1, (5, 12), 1, Fused((8, 4), 1)),
    ],
)
def test_sub_parameters(shape: Any, cut_dim: int, weight: tuple[int, int], weight_dim: int, want: Fused) -> None:
    fused = sub_parameters(shape, cut_dim, weight, weight_dim)
    assert fused == want
    assert sum(fused.sizes) * fused.repeat == weight[weight_dim]


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
    fused = sub_parameters((experts, parts, -1), 1, full.shape, 0)
    layout = Layout.cut(full.shape, 0, tp_size, [even_widths(size, tp_size) for size in fused.sizes], fused.repeat)
    for rank in range(tp_size):
        want = full.view(experts, parts, width, 2).chunk(tp_size, 2)[rank].reshape(-1, 2)
        assert torch.equal(layout.shard(full, rank), want)


def cut_fused(fused: Fused, full: Tensor, dim: int, tp_size: int) -> Layout:
    widths = [even_widths(size, tp_size, fused.unit) for size in fused.sizes]
    return Layout.cut(full.shape, dim, tp_size, widths, fused.repeat)


@pytest.mark.parametrize(
    ("shape", "cut_dim", "parameter", "want"),
    [
        # parts one behind the other, along any dim
        ((-1, 2, -1), 1, (3, 12, 5), Fused((6, 6))),
        ((3, 2, 5), 1, (3, 12, 5), Fused((6, 6))),
        ((-1, (8, 4), -1), 1, (3, 12, 5), Fused((8, 4))),
        ((-1, -1, -1), 1, (3, 12, 5), Fused((12,))),
        ((-1, -1, 4), 2, (3, 5, 12), Fused((3, 3, 3, 3))),
        ((3, -1, -1), 0, (6, 5, 2), Fused((2, 2, 2))),
        ((2,), 0, (12,), Fused((6, 6))),
        # runs that stay together: gate and up of each feature side by side
        ((-1, -1, -1, 2), 2, (3, 5, 12), Fused((12,), unit=2)),
        ((-1, -1, 2), 1, (3, 12), Fused((12,), unit=2)),
        ((-1, -1, 2, 3), 1, (3, 12), Fused((12,), unit=6)),
        ((-1, 2, 3, -1), 1, (3, 12, 5), Fused((6, 6), unit=3)),
        ((-1, (1, 3), 3, -1), 1, (3, 12, 5), Fused((3, 9), unit=3)),
    ],
)
def test_fused_parameter(shape: Any, cut_dim: int, parameter: tuple[int, ...], want: Fused) -> None:
    fused = fused_parameter(shape, cut_dim, parameter)
    assert fused == want
    assert sum(fused.sizes) * fused.repeat == parameter[cut_dim]
    assert all(size % fused.unit == 0 for size in fused.sizes)


@pytest.mark.parametrize(
    ("shape", "cut_dim", "message"),
    [
        ((2, -1), 0, r"^shape: \(2, -1\) cut along its dim 0 is no view of a parameter \[3, 12, 5\]"),
        ((-1, -1, -1, 5), 3, r"^shape: .* cut along its dim 3 is no view of a parameter \[3, 12, 5\]"),
        ((4, 2, -1), 1, r"^shape: \(4, 2, -1\) is no view of a parameter \[3, 12, 5\]"),
        ((-1, 2, 6), 1, r"^shape: \(-1, 2, 6\) is no view of a parameter"),
        ((-1, 5, -1), 1, r"^shape: 12 features do not divide into 5 equal sub-parameters"),
        ((-1, (8, 2), -1), 1, r"^shape: the sub-parameters \(8, 2\) add up to 10, but .* 12"),
        ((-1, -1, 5, -1), 1, r"^shape: 12 features do not divide into runs of 5"),
        ((-1, (2, 2), 4, -1), 1, r"^shape: the sub-parameters \(2, 2\) add up to 4, but .* 3"),
        ((-1, -1, -1, -1), 1, r"^shape: \(-1, -1, -1, -1\) is no view of a parameter"),
    ],
)
def test_view_that_a_parameter_does_not_have_is_refused(shape: Any, cut_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_parameter(shape, cut_dim, (3, 12, 5))


@properties
@given(
    dim=st.integers(0, 2), parts=st.integers(1, 3), width=st.integers(1, 3), run=st.integers(1, 3), tp=st.integers(1, 4)
)
def test_parts_of_a_parameter_are_cut_in_whole_runs(dim: int, parts: int, width: int, run: int, tp: int) -> None:
    shape: list[Any] = [2, 3, 4]
    shape[dim] = parts * width * tp * run
    full = numbered(tuple(shape))
    view: list[Any] = [-1, -1, -1]
    view[dim] = parts
    if run > 1:
        view.insert(dim + 1, run)
    layout = cut_fused(fused_parameter(tuple(view), dim, full.shape), full, dim, tp)
    for rank in range(tp):
        runs = full.movedim(dim, 0).reshape(parts, width * tp, run, -1).chunk(tp, 1)[rank]
        want = runs.reshape(-1, *full.movedim(dim, 0).shape[1:]).movedim(0, dim)
        assert torch.equal(layout.shard(full, rank), want)
