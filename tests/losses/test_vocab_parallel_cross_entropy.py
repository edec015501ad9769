"""The loss of a sharded vocabulary: values, gradients, its one collective, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from lightning_autotp import cross_entropy
from lightning_autotp.losses import vocab_parallel_cross_entropy as room
from tests.helpers.closeness import assert_close
from tests.helpers.vocab_logits import OPTIONS, VOCABULARY, assert_same_bits, check, drawn, part, sharded_head, wanted


def check_all(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (room._CHUNK, 200):  # 200: a few rows at a time
        monkeypatch.setattr(room, "_CHUNK", chunk)
        for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            logits, target = drawn(4, 9, dtype=dtype)
            if "ignore_index" in options:
                target = target.masked_fill(target == -100, options["ignore_index"])
            check(logits, target, tol, **options)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.ranks(2)
def test_tp2_is_torchs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(OPTIONS[case], monkeypatch)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.ranks(3)
def test_tp3_is_torchs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(OPTIONS[case], monkeypatch)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.ranks(4)
def test_tp4_is_torchs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(OPTIONS[case], monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.ranks(2)
def test_half_precision_logits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    logits, target = drawn(40, dtype=dtype)
    assert check(logits, target, 1e-5, label_smoothing=0.1, z_loss=1e-3).dtype == torch.float32


@pytest.mark.ranks(2)
def test_huge_logits_and_masked_ones() -> None:
    logits, target = drawn(30, scale=3e4)
    assert torch.isfinite(check(logits, target, 1e-5))
    assert torch.isfinite(check(-logits.abs() - 1e5, target, 1e-5))
    logits, target = drawn(30)
    logits[:, 70:] = -torch.inf  # all that the second rank has
    assert torch.isfinite(check(logits, target.clamp(max=69), 1e-5))
    head, impossible = sharded_head(), torch.full_like(target, 70)
    mine = part(head, logits)
    loss = cross_entropy(mine, impossible, head)
    loss.backward()
    want, grad = wanted(logits, impossible)
    assert loss.isinf() and want.isinf() and mine.grad is not None
    assert_close({"logits": mine.grad}, {"logits": part(head, grad)}, 1e-5)


@pytest.mark.ranks(2)
def test_tokens_that_do_not_count() -> None:
    head = sharded_head()
    logits, target = drawn(6)
    none = torch.full_like(target, -100)
    mine = part(head, logits)
    losses = cross_entropy(mine, none, head, reduction="none", z_loss=0.1, label_smoothing=0.1)
    losses.sum().backward()
    assert mine.grad is not None and not losses.any() and not mine.grad.any()
    assert cross_entropy(mine, none, head).isnan() and F.cross_entropy(logits, none).isnan()
    assert not cross_entropy(mine, none, head, reduction="sum").any()
    empty = cross_entropy(mine[:0], none[:0], head, reduction="sum")
    assert not empty.any()


@pytest.mark.ranks(2, device="cpu")
def test_a_target_out_of_range_is_an_error() -> None:
    head = sharded_head()
    logits, target = drawn(6)
    for wrong in (VOCABULARY, -1):
        target[3] = wrong
        with pytest.raises(RuntimeError, match="out of range for the 131 logits"):
            cross_entropy(part(head, logits), target, head)


@pytest.mark.ranks(2)
def test_gradients_of_gradients_are_an_error() -> None:
    """Not zeros, though the gradient that comes in is a constant."""
    head = sharded_head()
    logits, target = drawn(6)
    mine = part(head, logits)
    (grad,) = torch.autograd.grad(cross_entropy(mine, target, head), mine, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


@pytest.mark.ranks(3)
def test_one_collective_forward_and_none_backward() -> None:
    head = sharded_head()
    logits, target = drawn(50)
    for options in OPTIONS.values():
        target = target.masked_fill(target < 0, options.get("ignore_index", -100))
        mine = part(head, logits)
        with CommDebugMode() as forward:
            loss = cross_entropy(mine, target, head, **options)
        with CommDebugMode() as backward:
            loss.sum().backward()
        assert (forward.get_total_counts(), backward.get_total_counts()) == (1, 0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.ranks(2, timeout=240)
def test_in_one_graph(backend: str) -> None:
    head = sharded_head()
    logits, target = drawn(4, 9)
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2}
    compiled = torch.compile(partial(cross_entropy, **options), backend=backend, fullgraph=True)
    mine = part(head, logits)
    loss = compiled(mine, target, head)
    loss.backward()
    want, grad = wanted(logits, target, **options)
    assert mine.grad is not None
    assert_close({"loss": loss}, {"loss": want}, 1e-5, "loss")
    assert_close({"logits": mine.grad}, {"logits": part(head, grad)}, 1e-5)
    assert_same_bits(loss)


@pytest.mark.ranks(2)
def test_all_logits_of_a_sharded_head() -> None:
    head = sharded_head()
    logits, target = drawn(4, 9)
    want, grad = wanted(logits, target, z_loss=0.1)
    with torch.no_grad(), CommDebugMode() as calls:
        loss = cross_entropy(logits, target, head, z_loss=0.1)
    assert calls.get_total_counts() == 1
    assert_close({"loss": loss}, {"loss": want}, 1e-5, "loss")
    whole = logits.clone().requires_grad_()
    with CommDebugMode() as calls:
        cross_entropy(whole, target, head, z_loss=0.1).backward()
    assert calls.get_total_counts() == 0 and whole.grad is not None
    assert_close({"logits": whole.grad}, {"logits": grad}, 1e-5)


def test_a_head_that_is_not_cut() -> None:
    head = nn.Linear(3, VOCABULARY)
    logits, target = drawn(4, 9)
    for options in OPTIONS.values():
        if "ignore_index" not in options:
            want, _ = wanted(logits, target, **options)
            assert_close({"loss": cross_entropy(logits, target, head, **options)}, {"loss": want}, 1e-6, "loss")
    assert cross_entropy(logits.bfloat16(), target, head).dtype == torch.float32


def test_wrong_arguments_are_named() -> None:
    head = nn.Linear(3, VOCABULARY)
    logits, target = drawn(4, 9)
    wrong: list[tuple[str, Callable[[], Tensor]]] = [
        ("head: .* not Embedding", lambda: cross_entropy(logits, target, nn.Embedding(3, 3))),
        ("logits: the last size is 130", lambda: cross_entropy(logits[..., 1:], target, head)),
        ("logits: floating-point", lambda: cross_entropy(logits.long(), target, head)),
        ("target: ids of shape", lambda: cross_entropy(logits, target[:1], head)),
        ("target: ids of shape", lambda: cross_entropy(logits, target.float(), head)),
        ("reduction: 'average'", lambda: cross_entropy(logits, target, head, reduction="average")),
        ("label_smoothing: 2", lambda: cross_entropy(logits, target, head, label_smoothing=2)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.ranks(2)
def test_logits_that_are_neither_all_nor_this_ranks() -> None:
    head = sharded_head()
    logits, target = drawn(4)
    with pytest.raises(ValueError, match="of which this rank holds"):
        cross_entropy(logits[:, :50], target, head)
