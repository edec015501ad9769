"""The Triton kernels of the vocabulary parallel cross entropy: what they give is what the plain functions give in fp64.

They run on CUDA (``AUTOTP_TEST_DEVICE=cuda pytest -m gpu``), or under Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_autotp import TPConfig
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.kernels.dispatch import DTYPES
from lightning_autotp.losses import vocab_parallel_cross_entropy as room
from lightning_autotp.losses.vocab_parallel_cross_entropy import Terms, Vocabulary, vocab_parallel_cross_entropy
from tests.helpers import fused_head as head
from tests.helpers import vocab_logits as whole
from tests.helpers.rank_pool import rank_device

kernels: Any = pytest.importorskip(
    "lightning_autotp.kernels.cross_entropy", reason="the kernels need Triton, which is not installed"
)

SHAPES = [(1, 1), (3, 131), (17, 4096), (5, 32064), (2, 50257)]
TERMS = {
    "plain": Terms(),
    "smoothed": Terms(label_smoothing=0.1),
    "z-loss": Terms(z_loss=1e-2),
    "all": Terms(label_smoothing=0.3, z_loss=1e-2),
}


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the test runs; the interpreter's tensors, which are on the CPU, are given to the kernels, too."""
    device = rank_device()
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the kernels run on CUDA, and on the CPU with TRITON_INTERPRET=1")
        monkeypatch.setattr(room, "kernels_of", lambda _, x: kernels if x.dtype in DTYPES else None)
    assert room.kernels_of("cross_entropy", torch.zeros(1, device=device)) is kernels
    return device


def drawn(device: torch.device, count: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Vocabulary]:
    """Logits of the second of three ranks, and targets ``[T]``: its own, the others', some that do not count."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, width, generator=generator, dtype=torch.float64)
    target = torch.randint(width, 2 * width, (count,), generator=generator)
    target[1::4] = torch.randint(3 * width, target[1::4].shape, generator=generator)
    target[2::4] = -100
    return logits.to(device, dtype), target.to(device), Vocabulary(width, width, 3 * width)


def statistics(module: Any, logits: Tensor, target: Tensor, vocabulary: Vocabulary) -> Tensor:
    compute = module.statistics if module is kernels else module._statistics
    return compute(logits, *room._place(target, vocabulary), with_sum=True)


def loss_and_gradient(logits: Tensor, target: Tensor, vocabulary: Vocabulary, terms: Terms) -> tuple[Tensor, Tensor]:
    """The losses ``[T]`` and the gradient ``[T, V_r]`` of the logits, as if no other rank had any."""
    leaf = logits.detach().requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf, target, vocabulary, build_mesh(1, TPConfig()), terms)
    (losses * whole.weights(losses)).sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def assert_rounded(got: Tensor, want: Tensor) -> None:
    """fp32's rounding, and once that of the dtype: half its machine epsilon."""
    once = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    if got.device.type == "cpu" and got.dtype == torch.bfloat16:
        once *= 2  # the interpreter cuts off what bf16 does not hold
    rtol = 1e-5 + once
    atol = 1e-6 * float(want.nan_to_num(0.0, 0.0, 0.0).abs().amax()) if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


def check(logits: Tensor, target: Tensor, vocabulary: Vocabulary, terms: Terms) -> None:
    """Statistics, loss and gradient are those of the plain functions in fp64; the logits stay as they are."""
    before = logits.clone()
    found = statistics(kernels, logits, target, vocabulary)
    assert found.dtype == torch.float32 and found.is_contiguous()
    for got, want in zip(found, statistics(room, logits.double(), target, vocabulary), strict=True):
        assert_rounded(got, want)
    losses, grad = loss_and_gradient(logits, target, vocabulary, terms)
    assert losses.dtype == torch.float32 and grad.dtype == logits.dtype
    for got, want in zip((losses, grad), loss_and_gradient(logits.double(), target, vocabulary, terms), strict=True):
        assert_rounded(got, want)
    torch.testing.assert_close(logits, before, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.ranks(1)
def test_they_are_the_plain_functions(
    shape: tuple[int, int], dtype: torch.dtype, terms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(*drawn(use_kernels(monkeypatch), *shape, dtype), TERMS[terms])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.ranks(1)
def test_masked_logits_and_broken_ones(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, vocabulary = drawn(use_kernels(monkeypatch), 9, 9000, dtype)
    target[:] = vocabulary.start + 8999
    logits[0, :8500] = -torch.inf  # more than the first block
    logits[1, 100:8999] = -torch.inf
    logits[2, 8999] = -torch.inf  # the target
    logits[3] = -torch.inf
    logits[4, 8500] = torch.inf
    logits[5, 100] = torch.inf
    check(logits, target, vocabulary, Terms())
    logits[6, 100] = torch.nan  # the largest of a row is another number, then, but the loss is NaN all the same
    losses, grad = loss_and_gradient(logits, target, vocabulary, Terms())
    assert losses.isfinite().tolist() == [True, True, *[False] * 5, True, True]
    assert losses[2].isposinf() and losses[3:7].isnan().all() and grad[3:7].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.ranks(1)
def test_rows_of_any_stride(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, vocabulary = drawn(use_kernels(monkeypatch), 6, 131, dtype)
    wide = torch.cat([logits, logits, logits], 1)
    for rows in (wide[:, 65:196], logits.t().contiguous().t(), logits[:1].expand(6, 131)):
        assert not rows.is_contiguous()
        check(rows, target, vocabulary, TERMS["all"])
    every_second = torch.cat([logits, logits])[::2]
    check(every_second, target, vocabulary, TERMS["all"])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.ranks(1)
def test_targets_of_any_integer_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, vocabulary = drawn(use_kernels(monkeypatch), 9, 131, torch.float32)
    check(logits, target.to(dtype), vocabulary, TERMS["all"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.ranks(1)
def test_gradients_of_logits_may_be_written_over_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, vocabulary = drawn(use_kernels(monkeypatch), 9, 9000, dtype)
    _, log_sum = room.token_losses(logits, target, vocabulary, TERMS["all"], None)
    given = (target, log_sum, torch.ones_like(log_sum), vocabulary, TERMS["all"])
    want = room.logits_gradient(logits, *given)
    got = room.logits_gradient(logits, *given, out=logits)
    assert got is logits and torch.equal(got, want)


@pytest.mark.parametrize("case", head.OPTIONS)
@pytest.mark.ranks(2)
def test_a_head_that_is_fused_with_its_loss(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch)
    for chunk in (head.room._CHUNK, head.FEW):
        monkeypatch.setattr(head.room, "_CHUNK", chunk)
        head.check(torch.float32, 1e-5, **head.OPTIONS[case])


@pytest.mark.ranks(1)
def test_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, vocabulary = drawn(use_kernels(monkeypatch), 0, 131, torch.bfloat16)
    losses, grad = loss_and_gradient(logits, target, vocabulary, TERMS["all"])
    assert losses.shape == (0,) and grad.shape == (0, 131)


@pytest.mark.parametrize("case", whole.OPTIONS)
@pytest.mark.ranks(2)
def test_the_loss_of_two_ranks_is_torchs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch)
    for dtype in DTYPES:
        logits, target = whole.drawn(4, 9, dtype=dtype)
        options = whole.OPTIONS[case]
        whole.check(logits, target.masked_fill(target < 0, options.get("ignore_index", -100)), 1e-5, **options)


# ---- what only a GPU shows


@pytest.mark.gpu
@pytest.mark.ranks(1)
def test_the_only_memory_is_the_gradients() -> None:
    logits, target, vocabulary = drawn(rank_device(), 2048, 32064, torch.bfloat16)
    loss_and_gradient(logits[:1], target[:1], vocabulary, TERMS["all"])  # what a first call allocates for good
    leaf, mesh = logits.requires_grad_(), build_mesh(1, TPConfig())

    def peak() -> float:
        """In units of the logits' size, since the last call."""
        highest = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        return highest / (logits.numel() * logits.element_size())

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses = vocab_parallel_cross_entropy(leaf, target, vocabulary, mesh, TERMS["all"])
    assert peak() < 0.01
    losses.sum().backward()
    assert 1.0 <= peak() < 1.01


@pytest.mark.gpu
@pytest.mark.ranks(1, timeout=120)
def test_more_logits_than_32_bits_count() -> None:
    rows, target, vocabulary = drawn(rank_device(), 8, 32768, torch.bfloat16)
    count = 2**16 + 8
    logits = torch.zeros(count, 32768, dtype=torch.bfloat16, device=rank_device())
    targets = target.new_full((count,), -100)
    logits[-8:], targets[-8:] = rows, target
    losses, grad = loss_and_gradient(logits, targets, vocabulary, Terms())
    leaf = rows.double().requires_grad_()
    want = vocab_parallel_cross_entropy(leaf, target, vocabulary, build_mesh(1, TPConfig()), Terms())
    (want * whole.weights(losses)[-8:]).sum().backward()
    assert leaf.grad is not None and not grad[:-8].any()
    assert_rounded(losses[-8:], want.detach())
    assert_rounded(grad[-8:], leaf.grad)
