"""The Triton kernels of experts: what they give is what the plain functions give in fp64.

They run on CUDA (``AUTOTP_TEST_DEVICE=cuda pytest -m gpu``), or under Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_autotp.kernels.dispatch import DTYPES, kernels_of
from lightning_autotp.parallel import experts as room
from tests.helpers import grouped_experts as whole
from tests.helpers.closeness import assert_close
from tests.helpers.rank_pool import rank_device

kernels: Any = pytest.importorskip(
    "lightning_autotp.kernels.experts", reason="the kernels need Triton, which is not installed"
)

SHAPES = [(1, 1, 1), (5, 2, 131), (7, 8, 2048), (3, 22, 4100)]
"""Tokens, copies of each, features."""


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the test runs; the interpreter's tensors, which are on the CPU, are given to the kernels, too."""
    device = rank_device()
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the kernels run on CUDA, and on the CPU with TRITON_INTERPRET=1")
        monkeypatch.setattr(room, "kernels_of", lambda _, x: kernels if x.dtype in DTYPES else None)
    assert room.kernels_of("experts", torch.zeros(1, device=device)) is kernels
    return device


def drawn(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[T, H]``, rows ``[T k, H]``, a permutation ``[T, k]``."""
    count, k, width = shape
    generator = torch.Generator().manual_seed(0)
    x, rows = (torch.randn(n, width, generator=generator).to(device, dtype) for n in (count, count * k))
    return x, rows, torch.randperm(count * k, generator=generator).view(count, k).to(device)


def assert_rounded(got: Tensor, want: Tensor) -> None:
    """fp32's rounding, and once that of the dtype: half its machine epsilon."""
    once = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    if got.device.type == "cpu" and got.dtype == torch.bfloat16:
        once *= 2  # the interpreter cuts off what bf16 does not hold
    atol = 1e-6 * float(want.abs().amax())
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5 + once, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.ranks(1)
def test_rows_are_moved(shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows, place = drawn(use_kernels(monkeypatch), shape, dtype)
    assert torch.equal(kernels.spread(x, place), room._spread(x, place))
    assert_rounded(kernels.join(rows, None, place, dtype), room._join(rows.double(), None, place, torch.float64))


@pytest.mark.parametrize("of_weights", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.ranks(1)
def test_rows_are_weighted(
    shape: tuple[int, int, int], dtype: torch.dtype, of_weights: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, rows, place = drawn(use_kernels(monkeypatch), shape, dtype)
    weights = torch.rand(place.shape, device=x.device).to(of_weights or dtype)
    for out in DTYPES:
        want = room._join(rows.double(), weights.double(), place, torch.float64)
        found = kernels.join(rows, weights, place, out)
        assert found.dtype == out
        assert_rounded(found, want)
    found = kernels.join_gradient(x, rows, weights, place)
    exact = room._join_gradient(x.double(), rows.double(), weights.double(), place)
    assert [t.dtype for t in found] == [rows.dtype, weights.dtype]
    for got, want in zip(found, exact, strict=True):
        assert_rounded(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.ranks(1)
def test_gates(shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    grad, rows, _ = drawn(use_kernels(monkeypatch), shape, dtype)
    both = torch.cat([5 * rows[: len(grad)], grad], 1)  # silu is almost a line at the ends, almost none between
    assert_rounded(kernels.swiglu(both), room._swiglu(both.double()))
    assert_rounded(kernels.swiglu_gradient(grad, both), room._swiglu_gradient(grad.double(), both.double()))


@pytest.mark.ranks(1)
def test_rows_of_any_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows, place = drawn(use_kernels(monkeypatch), (6, 2, 131), torch.float32)
    weights = torch.rand(2, 6, device=x.device).t()
    for t in (x, rows):
        t.data = torch.cat([t, t], 1)[:, 3:134]
        assert not t.is_contiguous()
    assert torch.equal(kernels.spread(x, place), room._spread(x, place))
    assert_rounded(kernels.join(rows, weights, place, x.dtype), room._join(rows, weights, place, torch.float64))
    found = kernels.join_gradient(x, rows, weights, place)
    for got, want in zip(found, room._join_gradient(x.double(), rows.double(), weights.double(), place), strict=True):
        assert_rounded(got, want)


@pytest.mark.parametrize("kind", whole.KINDS)
@pytest.mark.ranks(1)
def test_experts_by_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = use_kernels(monkeypatch)
    experts = whole.built(kind).to(device)
    grouped = room.GroupedExperts.of(experts)
    assert grouped is not None
    given = [t.to(device) for t in whole.routed(experts, 33)]
    found = whole.run(experts, lambda *args: grouped(experts, *args), *given)
    experts.config._experts_implementation = "eager"
    assert_close(found, whole.run(experts, experts, *given), 1e-5)


@pytest.mark.ranks(1)
def test_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows, place = drawn(use_kernels(monkeypatch), (0, 2, 131), torch.bfloat16)
    weights = torch.rand(0, 2, device=x.device)
    assert kernels.spread(x, place).shape == (0, 131)
    assert kernels.join(rows, weights, place, x.dtype).shape == (0, 131)
    assert [t.shape for t in kernels.join_gradient(x, rows, weights, place)] == [(0, 131), (0, 2)]
    assert kernels.swiglu(torch.cat([rows, rows], 1)).shape == (0, 131)


# ---- what only a GPU shows


@pytest.mark.gpu
@pytest.mark.ranks(1)
def test_the_only_memory_is_the_results() -> None:
    x, rows, place = drawn(rank_device(), (2048, 2, 4096), torch.bfloat16)
    weights = torch.rand(2048, 2, device=x.device)
    calls = {  # sizes in units of that of x
        2: lambda: kernels.spread(x, place),
        1: lambda: kernels.join(rows, weights, place, x.dtype),
        2.002: lambda: kernels.join_gradient(x, rows, weights, place),
        0.5: lambda: kernels.swiglu(x),
    }
    for size, call in calls.items():
        call()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        highest = (torch.cuda.max_memory_allocated() - before) / (x.numel() * 2)
        assert kept is not None and size * 0.99 <= highest <= size * 1.01


@pytest.mark.gpu
@pytest.mark.ranks(1, timeout=120)
def test_more_features_than_32_bits_count() -> None:
    device, count, width = rank_device(), 2**17 + 4, 2**14
    x = torch.zeros(count, width, dtype=torch.bfloat16, device=device)
    x[-4:] = torch.randn(4, width, device=device)
    place = torch.arange(count, device=device).flip(0).unsqueeze(1)
    y = kernels.spread(x, place)
    assert torch.equal(y[:4], x[-4:].flip(0)) and not y[4:].any()
    assert torch.equal(kernels.join(y, None, place, x.dtype), x)
    gates = kernels.swiglu(x)
    assert_rounded(gates[-4:], room._swiglu(x[-4:].double()))
    assert not gates[:-4].any()
    assert kernels_of("experts", x) is kernels
