"""The head fused with its loss: values, gradients, collectives and memory of the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_autotp import cross_entropy, linear_cross_entropy
from lightning_autotp.estimation.tracker import StepTracker
from lightning_autotp.losses import vocab_parallel_cross_entropy as whole_room
from lightning_autotp.losses import vocab_parallel_linear_cross_entropy as room
from lightning_autotp.parallel.linear import ColumnParallelLinear
from tests.helpers.closeness import assert_close
from tests.helpers.corners import corners_of
from tests.helpers.fused_head import FEW, OPTIONS, WIDTH, check, cut_head, drawn, gradients, of_rank, wanted, whole_head
from tests.helpers.rank_pool import rank_device
from tests.helpers.vocab_logits import VOCABULARY


def check_all(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (room._CHUNK, FEW, 1):
        monkeypatch.setattr(room, "_CHUNK", chunk)
        for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            check(dtype, tol, bias=chunk != 1, overlap=chunk == FEW, **OPTIONS[case])


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.ranks(2)
def test_tp2_is_the_unsharded_heads_loss(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(case, monkeypatch)


@pytest.mark.parametrize("case", corners_of(OPTIONS, ["plain", "all"]))
@pytest.mark.ranks(4)
def test_tp4_is_the_unsharded_heads_loss(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(case, monkeypatch)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_head_that_is_not_cut(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (room._CHUNK, 4 * VOCABULARY):
        monkeypatch.setattr(room, "_CHUNK", chunk)
        for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            hidden, target = drawn(4, 9, dtype=dtype, ignored=OPTIONS[case].get("ignore_index", -100))
            head = whole_head(dtype)
            loss = linear_cross_entropy(hidden, target, head, **OPTIONS[case])
            want = wanted(head(hidden), target, **OPTIONS[case])
            assert_close({"loss": loss}, {"loss": want}, tol, "loss")
            assert_close(gradients(loss, hidden, head), gradients(want, hidden, head), tol)


@pytest.mark.ranks(2)
def test_a_gradient_that_others_sum_stays_partial() -> None:
    hidden, target = drawn(4, 9)
    head = cut_head(reduce=False)
    loss = linear_cross_entropy(hidden, target, head)
    with CommDebugMode() as calls:
        grad = gradients(loss, hidden, head)["hidden"]
    assert calls.get_total_counts() == 0
    dist.all_reduce(grad)
    full = whole_head()
    assert_close({"hidden": grad}, {"hidden": gradients(wanted(full(hidden), target), hidden, full)["hidden"]}, 1e-5)


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.ranks(2)
def test_the_mean_of_many_tokens_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CHUNK", 2**14)  # 265 runs, whose sum in half precision would be worse than one rounding
    hidden, target = drawn(2**16, dtype=dtype)
    full, head, rounding = whole_head(dtype), cut_head(dtype), torch.finfo(dtype).eps
    exact, exact_hidden = whole_head(dtype).float(), hidden.detach().float().requires_grad_()
    want = gradients(wanted(exact(exact_hidden), target), exact_hidden, exact)
    mine = of_rank(head, want)
    got = gradients(linear_cross_entropy(hidden, target, head), hidden, head)
    assert all(grad.dtype == dtype for grad in got.values())
    parameters = {name: grad.float() for name, grad in got.items() if name != "hidden"}
    assert_close(parameters, {name: mine[name] for name in parameters}, rounding)
    # those of single tokens, about 2 ** -16, are small for fp16: a loss that is scaled has them
    scaled = gradients(2**16 * linear_cross_entropy(hidden, target, head), hidden, head)["hidden"]
    assert_close({"hidden": scaled.float() / 2**16}, {"hidden": mine["hidden"]}, 2 * rounding)
    if dtype == torch.float16:  # what is at stake: with logits of their own, their gradient underflows
        lost = gradients(cross_entropy(full(hidden), target, full), hidden, full)
        with pytest.raises(AssertionError, match="bias"):
            assert_close({name: lost[name].float() for name in parameters}, {n: want[n] for n in parameters}, rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.ranks(1)
def test_a_factor_is_not_rounded_before_it_multiplies(dtype: torch.dtype) -> None:
    """On CUDA; the CPU does not round it."""
    summed = torch.randn(1000, device=rank_device()).to(dtype)
    factor = torch.tensor(1 / 52428, device=rank_device())
    assert torch.equal(room._times(summed, factor, dtype), (summed.float() * factor).to(dtype))


@pytest.mark.ranks(2)
def test_autocast() -> None:
    hidden, target = drawn(4, 9)
    full, head = whole_head(), cut_head()
    with torch.autocast(rank_device().type, torch.bfloat16):
        loss = linear_cross_entropy(hidden, target, head)
        want = wanted(full(hidden).float(), target)
    assert_close({"loss": loss}, {"loss": want}, 1e-5, "loss")
    got = gradients(loss, hidden, head)
    assert_close(got, of_rank(head, gradients(want, hidden, full)), torch.finfo(torch.bfloat16).eps)
    assert all(grad.dtype == torch.float32 for grad in got.values())
    assert not torch.equal(got["weight"], got["weight"].bfloat16().float())  # never rounded


# -- what is computed, and what is kept -------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """How many elements the largest tensor has that an op makes, and how many matrix products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_iter(output) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *made])
        self.products += str(func.overloadpacket) in ("aten.mm", "aten.addmm", "aten.addmm_")
        return output


@pytest.mark.ranks(2)
def test_no_tensor_has_the_size_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CHUNK", FEW)
    head = cut_head()
    part_of_weight: int = head.weight.numel()
    hidden, target = drawn(100)
    with Seen() as seen:
        linear_cross_entropy(hidden, target, head).backward()
    assert seen.largest == max(hidden.numel(), part_of_weight) < 600
    with Seen() as seen:
        cross_entropy(F.linear(hidden, head.weight, head.bias), target, head)
    assert seen.largest >= 100 * 65


def test_the_only_memory_is_the_gradients_and_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CHUNK", 2**18)
    monkeypatch.setattr(whole_room, "_CHUNK", 2**12)
    head = nn.Linear(64, 1024)
    hidden, target = torch.randn(2048, 64, requires_grad=True), torch.randint(1024, (2048,))
    with StepTracker(head, [hidden, target, *head.parameters()]) as tracker:
        loss = linear_cross_entropy(hidden, target, head)
    kept = 4 * (hidden.numel() + head.weight.numel() + 1024)
    assert kept <= tracker.trace.most_forward <= kept + 1.2 * 4 * 2**18  # the logits are 8 such runs
    tracker.begin_backward()
    assert tracker.trace.kept <= kept + 2**12 and loss.requires_grad


@pytest.mark.gpu
@pytest.mark.ranks(1)
def test_the_only_memory_on_a_gpu_is_the_gradients_and_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CHUNK", 2**25)
    head = nn.Linear(256, 32064, bias=False).to(rank_device(), torch.bfloat16)
    hidden = torch.randn(4096, 256, device=rank_device(), dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(32064, (4096,), device=rank_device())
    linear_cross_entropy(hidden[:8], target[:8], head).backward()  # what a first call allocates for good
    head.weight.grad = hidden.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, target, head)
    highest = torch.cuda.max_memory_allocated() - before
    run, kept = 2 * 2**25, 2 * hidden.numel() + 4 * head.weight.numel()
    assert highest <= 1.02 * (kept + run)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden bias", "weight bias", ""])
@pytest.mark.ranks(2)
def test_what_is_frozen_costs_nothing(trained: str) -> None:
    hidden, target = drawn(4, 9)
    full, head = whole_head(), cut_head()
    for linear in (full, head):
        for name, parameter in linear.named_parameters():
            parameter.requires_grad_(name in trained)
    hidden.requires_grad_("hidden" in trained)
    with Seen() as seen:
        loss = linear_cross_entropy(hidden, target, head)
    assert seen.products == 1 + ("hidden" in trained) + ("weight" in trained)
    assert loss.requires_grad == bool(trained)
    if trained:
        with CommDebugMode() as calls:
            got = gradients(loss, hidden, head)
        assert calls.get_total_counts() == ("hidden" in trained)
        want = gradients(wanted(full(hidden), target), hidden, full)
        assert_close(got, of_rank(head, want), 1e-5)


@pytest.mark.ranks(2)
def test_without_gradients_nothing_is_computed_for_them() -> None:
    hidden, target = drawn(4, 9)
    head = cut_head()
    with torch.no_grad(), Seen() as seen:
        loss = linear_cross_entropy(hidden, target, head)
    assert seen.products == 1 and not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(hidden, target, head))


@pytest.mark.ranks(2)
def test_two_backward_passes() -> None:
    hidden, target = drawn(4, 9)
    head = cut_head()
    loss = linear_cross_entropy(hidden, target, head)
    leaves = [hidden, *head.parameters()]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    factor = torch.ones_like(loss, requires_grad=True)
    of_first = torch.autograd.grad(loss, leaves, factor, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_first[0].sum().backward()


@pytest.mark.ranks(2)
def test_tokens_that_do_not_count() -> None:
    hidden, target = drawn(6)
    head, none = cut_head(), torch.full_like(target, -100)
    loss = linear_cross_entropy(hidden, none, head, z_loss=0.1, label_smoothing=0.1)
    assert loss.isnan()  # as torch's
    assert not any(grad.any() for grad in gradients(loss, hidden, head).values())
    for tokens in (6, 0):
        total = linear_cross_entropy(hidden[:tokens], none[:tokens], head, reduction="sum")
        assert not total.any()
        assert not any(grad.any() for grad in gradients(total, hidden, head).values())


@pytest.mark.ranks(2, device="cpu")
def test_a_target_out_of_range_is_an_error() -> None:
    hidden, target = drawn(6)
    for head in (cut_head(), whole_head()):
        for wrong in (VOCABULARY, -1):
            target[3] = wrong
            with pytest.raises(RuntimeError, match="out of range for the 131 logits"):
                linear_cross_entropy(hidden, target, head)


@pytest.mark.ranks(2, device="cpu")
def test_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CHUNK", FEW)
    hidden, target = drawn(4, 9)
    head = cut_head()
    want = gradients(linear_cross_entropy(hidden, target, head), hidden, head)
    torch.use_deterministic_algorithms(True)  # fills what nobody has written with NaN, too
    try:
        got = gradients(linear_cross_entropy(hidden, target, head), hidden, head)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.ranks(2, timeout=240)
def test_inside_a_compiled_function_it_breaks_the_graph() -> None:
    hidden, target = drawn(4, 9)
    head = cut_head()

    def step(hidden: Tensor) -> Tensor:
        return 2 * linear_cross_entropy(hidden * 3, target, head)

    got, want = (gradients(call(hidden), hidden, head) for call in (torch.compile(step, backend="eager"), step))
    assert_close(got, want, 1e-6)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the loss of a fused head is computed eagerly"):
        torch.compile(step, backend="eager", fullgraph=True)(hidden)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_logits_may_be_written_over_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_room, "_CHUNK", 200)
    hidden, target = drawn(36)
    logits = whole_head()(hidden).detach().to(dtype)
    vocabulary, terms = whole_room.Vocabulary(0, VOCABULARY, VOCABULARY), whole_room.Terms(-100, 0.1, 0.1)
    _, log_sum = whole_room.token_losses(logits, target, vocabulary, terms, None)
    given = (target, log_sum, torch.ones_like(log_sum), vocabulary, terms)
    want = whole_room.logits_gradient(logits, *given)
    got = whole_room.logits_gradient(logits, *given, out=logits)
    assert got is logits and torch.equal(got, want)


# -- what is refused --------------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        return 2 * super().forward(input)


class Wrapped(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = whole_head()


def hooked() -> nn.Module:
    head = whole_head()
    head.register_forward_hook(lambda *_: None)
    return head


def patched() -> nn.Module:
    head: Any = whole_head()
    head.forward = lambda x: 2 * x
    return head


def test_wrong_arguments_are_named() -> None:
    head = whole_head()
    hidden, target = drawn(4, 9)
    fix = "call the head and use lightning_autotp.cross_entropy"
    wrong: list[tuple[str, Callable[[], Tensor]]] = [
        ("head: .* not Embedding", lambda: linear_cross_entropy(hidden, target, nn.Embedding(3, 3))),
        (rf"head: it is wrapped by PEFT \(Wrapped\).*{fix}", lambda: linear_cross_entropy(hidden, target, Wrapped())),
        (f"head: it has a forward.*Scaled.*{fix}", lambda: linear_cross_entropy(hidden, target, Scaled(5, 131))),
        (f"head: it has a forward of its own.*{fix}", lambda: linear_cross_entropy(hidden, target, patched())),
        (f"head: it has hooks.*{fix}", lambda: linear_cross_entropy(hidden, target, hooked())),
        ("hidden: the last size is 4", lambda: linear_cross_entropy(hidden[..., 1:], target, head)),
        ("hidden: floating-point", lambda: linear_cross_entropy(hidden.long(), target, head)),
        ("hidden: it is torch.bfloat16, but", lambda: linear_cross_entropy(hidden.bfloat16(), target, head)),
        ("target: ids of shape", lambda: linear_cross_entropy(hidden, target[:1], head)),
        ("target: ids of shape", lambda: linear_cross_entropy(hidden, target.float(), head)),
        (
            "reduction: 'none' .* use 'sum' or 'mean'",
            lambda: linear_cross_entropy(hidden, target, head, reduction="none"),
        ),
        ("reduction: 'average'", lambda: linear_cross_entropy(hidden, target, head, reduction="average")),
        ("label_smoothing: 2", lambda: linear_cross_entropy(hidden, target, head, label_smoothing=2)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.ranks(2)
def test_a_cut_head_with_a_forward_of_its_own_is_refused() -> None:
    head = cut_head()
    scaled: Any = Scaled(WIDTH, VOCABULARY)
    scaled.weight, scaled.bias = head.weight, head.bias
    ColumnParallelLinear.convert(scaled, head.mesh, head.layout, overlap=False, gather=True)
    hidden, target = drawn(4, 9)
    with pytest.raises(ValueError, match="head: it has a forward of its own"):
        linear_cross_entropy(hidden, target, scaled)
