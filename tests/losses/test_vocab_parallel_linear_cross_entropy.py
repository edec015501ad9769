"""The head fused with its loss: values, gradients, collectives and memory of the function; the switch in whole runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_autotp import AutoTPStrategy, TPConfig, TPTrainingConfig, cross_entropy, linear_cross_entropy, make_plan
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.estimation.tracker import StepTracker
from lightning_autotp.layout.layout import even_widths
from lightning_autotp.losses import vocab_parallel_cross_entropy as whole_room
from lightning_autotp.losses import vocab_parallel_linear_cross_entropy as room
from lightning_autotp.losses.loss_parallel import _ParallelLoss, set_loss_parallel
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.parallel.linear import ColumnParallelLinear
from tests.helpers import models
from tests.helpers.closeness import assert_close
from tests.helpers.fit_cases import HAND_WRITTEN
from tests.helpers.fused_head import FEW, OPTIONS, WIDTH, check, cut_head, drawn, gradients, of_rank, wanted, whole_head
from tests.helpers.loss_runs import (
    CASES,
    LossModel,
    adapted,
    adapted_head,
    check_run,
    checkpointed_llama,
    saved_head,
    setup_error,
)
from tests.helpers.models import quiet_trainer, tiny_llama, token_batches
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharded_runs import assert_parity, batches_for, reference_run
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


@pytest.mark.parametrize("case", OPTIONS)
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
    assert kept <= tracker.forward <= kept + 1.2 * 4 * 2**18  # the logits are 8 such runs
    tracker.begin_backward()
    assert tracker.kept <= kept + 2**12 and loss.requires_grad


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


# -- whole runs -------------------------------------------------------------------------------------------------------

HF_CASES = [case for case in CASES if case.startswith("hf")]


@pytest.mark.parametrize("case", HF_CASES)
@pytest.mark.ranks(2)
def test_tp2_is_the_unsharded_run(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CHUNK", 1000)
    check_run(case, 2, "fused")


@pytest.mark.parametrize("case", HF_CASES)
@pytest.mark.ranks(4)
def test_tp4_is_the_unsharded_run(case: str) -> None:
    check_run(case, 4, "fused")


@pytest.mark.parametrize("case", ["hf-tied", "hf-items-checkpointed"])
@pytest.mark.ranks(4)
def test_tp2_dp2_is_the_unsharded_run(case: str) -> None:
    check_run(case, 2, "fused")


class HiddenModel(LossModel):
    """Calls the function itself, of what the model gives its head."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        model: Any = self.model
        hidden = model.model(input_ids=batch).last_hidden_state
        loss = linear_cross_entropy(hidden[:, :-1], batch[:, 1:], model.lm_head)
        self.record.losses.append(loss.detach().clone())
        return loss


@pytest.mark.parametrize("loss_parallel", [False, True])
@pytest.mark.ranks(2)
def test_a_training_step_that_calls_the_function(loss_parallel: bool) -> None:
    options: dict[str, Any] = {"kv_heads": 4, "tied": True, "vocab": VOCABULARY}
    batches = batches_for(VOCABULARY)
    model = HiddenModel(batches, tiny_llama, "hf", **options)
    trainer = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "use_distributed_sampler": False}
    quiet_trainer(strategy=AutoTPStrategy(autotp_size=2, loss_parallel=loss_parallel), **trainer).fit(model)
    assert_parity(model, partial(reference_run, tiny_llama, batches, **options))


def adapted_body() -> nn.Module:
    return adapted(target_modules=["q_proj", "v_proj"])


def gptj() -> nn.Module:
    model: Any = small_model(small_config("gptj"))
    assert model.lm_head.bias is not None
    return model


@pytest.mark.parametrize("factory", [adapted_body, gptj])
@pytest.mark.ranks(2)
def test_a_frozen_head_and_one_with_a_bias(factory: Callable[..., nn.Module]) -> None:
    built: Any = factory()
    batches = batches_for(built.config.vocab_size)
    model = LossModel(batches, factory, "hf")
    trainer = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "use_distributed_sampler": False}
    strategy = AutoTPStrategy(autotp_size=2, loss_parallel="fused")
    quiet_trainer(strategy=strategy, limit_val_batches=0, **trainer).fit(model)
    assert model.widths == {0}
    assert_parity(model, partial(reference_run, factory, batches))


@pytest.mark.ranks(2)
def test_the_switch_is_set_by_every_run() -> None:
    """Fused, with parts of the logits, fused again, without: the head and the loss are what the last Trainer wants."""
    model = LossModel(token_batches(n=2, vocab=VOCABULARY), tiny_llama, "hf", vocab=VOCABULARY)
    llama: Any = model.model
    settings: list[Any] = ["fused", True, "fused", False]
    for setting in settings:
        model.widths.clear()
        strategy = AutoTPStrategy(autotp_size=2, loss_parallel=setting)
        trainer = quiet_trainer(strategy=strategy, use_distributed_sampler=False)
        trainer.fit(model)
        trainer.validate(model)
        mine = even_widths(VOCABULARY, 2)[strategy.tp_rank][1]
        assert model.widths == {{"fused": 0, True: mine, False: VOCABULARY}[setting]}
        assert llama.lm_head.defers == (setting == "fused") and llama.lm_head.keeps_part == bool(setting)
        assert isinstance(llama.loss_function, _ParallelLoss) == bool(setting)


def fused_llama(factory: Callable[..., nn.Module] = tiny_llama) -> Any:
    model: Any = factory(kv_heads=4, vocab=VOCABULARY).to(rank_device())
    plan = make_plan(model, TPTrainingConfig(autotp_size=2))
    apply_plan(model, plan, build_mesh(2, TPConfig()), rank_device(), overlap=False)
    set_loss_parallel(model, plan, "fused")
    return model


@pytest.mark.parametrize("factory", [tiny_llama, checkpointed_llama])
@pytest.mark.ranks(2)
def test_the_heads_input_is_free_once_there_is_a_loss(factory: Callable[..., nn.Module]) -> None:
    model = fused_llama(factory)
    kept: list[Any] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: kept.append(weakref.ref(args[0].untyped_storage())))
    tokens = token_batches(n=1, vocab=VOCABULARY)[0].to(rank_device())
    without = model(input_ids=tokens)
    assert kept[-1]() is not None and without.logits.shape == (*tokens.shape, 0)  # a loss may come yet
    output = model(input_ids=tokens, labels=tokens)
    assert kept[-1]() is None and output.logits.shape == (*tokens.shape, 0)
    output.loss.backward()
    assert model.lm_head.weight.grad.any()


@pytest.mark.ranks(2)
def test_without_gradients_logits_are_whole() -> None:
    model = fused_llama()
    tokens = token_batches(n=1, vocab=VOCABULARY)[0].to(rank_device())
    unsharded: Any = tiny_llama(kv_heads=4, vocab=VOCABULARY)
    want = unsharded.to(rank_device())(input_ids=tokens, labels=tokens)
    with torch.no_grad():
        output = model(input_ids=tokens, labels=tokens)
    assert_close({"logits": output.logits, "loss": output.loss}, {"logits": want.logits, "loss": want.loss}, 1e-5)


@pytest.mark.ranks(2, timeout=240)
def test_a_compiled_model() -> None:
    model = fused_llama()
    tokens = token_batches(n=1, vocab=VOCABULARY)[0].to(rank_device())
    grads = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        call(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(grads[1], grads[0], 1e-5)


def of_type(model_type: str) -> nn.Module:
    return small_model(small_config(model_type))


@pytest.mark.parametrize("model_type", ["granite", "gemma2", "cohere"])
@pytest.mark.ranks(2)
def test_models_that_change_their_logits_are_refused(model_type: str) -> None:
    factory = partial(of_type, model_type)
    built: Any = factory()
    model = LossModel(batches_for(built.config.vocab_size), factory, "hf")
    strategy = AutoTPStrategy(autotp_size=2, loss_parallel="fused")
    trainer = quiet_trainer(strategy=strategy, use_distributed_sampler=False, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="loss_parallel: 'fused' .* changes its logits .*; use loss_parallel=True"):
        trainer.fit(model)


@pytest.mark.ranks(2)
def test_logits_changed_in_place_are_seen() -> None:
    model = fused_llama()
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.mul_(2))
    tokens = token_batches(n=1, vocab=VOCABULARY)[0].to(rank_device())
    with pytest.raises(ValueError, match="changes its logits"):
        model(input_ids=tokens, labels=tokens)


@pytest.mark.ranks(2)
def test_what_else_is_computed_of_logits_that_were_left_out_is_an_error() -> None:
    """Not a zero, which a sum over no logits is."""
    model = fused_llama()
    tokens = token_batches(n=1, vocab=VOCABULARY)[0].to(rank_device())
    output = model(input_ids=tokens, labels=tokens)
    entropy = -(output.logits.softmax(-1) * output.logits.log_softmax(-1)).sum(-1).mean()
    with pytest.raises(ValueError, match="'fused' leaves the logits out in training.*; use loss_parallel=True"):
        (output.loss - 0.1 * entropy).backward()
    output = model(input_ids=tokens, labels=tokens)
    with pytest.raises(ValueError, match="of these logits a second one is computed; use loss_parallel=True"):
        model.loss_function(logits=output.logits, labels=tokens, vocab_size=VOCABULARY)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    assert_close({"": model.loss_function(logits, tokens)}, {"": output.loss}, 1e-5)


@pytest.mark.ranks(2)
def test_an_input_of_the_head_that_changed_is_seen() -> None:
    model = fused_llama()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)

    def clear(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        args[0].zero_()

    model.lm_head.register_forward_hook(clear)
    tokens = token_batches(n=1, vocab=VOCABULARY)[0].to(rank_device())
    with pytest.raises(ValueError, match="changes its logits"):
        model(input_ids=tokens, labels=tokens)


@pytest.mark.parametrize("factory", [adapted_head, saved_head])
@pytest.mark.ranks(2)
def test_adapters_on_the_head_are_refused(factory: Callable[..., nn.Module]) -> None:
    message = "loss_parallel: 'fused' .* the head of LlamaForCausalLM is wrapped by PEFT .*; use loss_parallel=True"
    setup_error(factory, message, loss_parallel="fused")


def unlabelled() -> Any:
    llama: Any = tiny_llama()

    def forward(self: Any, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        return logits

    llama.__class__ = type("Unlabelled", (type(llama),), {"forward": forward})
    return llama


def own_loss() -> Any:
    llama: Any = tiny_llama()
    llama.loss_function = lambda logits, labels, **_: logits.sum()
    return llama


@pytest.mark.ranks(2)
def test_models_without_a_loss_of_their_own_are_refused() -> None:
    hand_written = {"partition_config": HAND_WRITTEN}
    message = "call lightning_autotp.linear_cross_entropy in your training_step"
    setup_error(models.transformer, f"loss_parallel: 'fused' is for .*{message}", loss_parallel="fused", **hand_written)
    setup_error(unlabelled, f"the forward of Unlabelled takes no `labels`.*{message}", loss_parallel="fused")
    setup_error(own_loss, "'fused' leaves no logits to the loss_function that", loss_parallel="fused")


@pytest.mark.ranks(2)
def test_logits_that_were_left_out_are_no_logits() -> None:
    model = fused_llama()
    tokens = token_batches(n=1, vocab=VOCABULARY)[0].to(rank_device())
    logits = model(input_ids=tokens).logits
    with pytest.raises(ValueError, match="logits: with loss_parallel='fused' the head makes none"):
        cross_entropy(logits[:, :-1], tokens[:, 1:], model.lm_head)


@pytest.mark.ranks(1)
def test_one_rank_has_nothing_to_share() -> None:
    model = LossModel(token_batches(n=1, vocab=VOCABULARY), tiny_llama, "hf", vocab=VOCABULARY)
    strategy = AutoTPStrategy(autotp_size=1, loss_parallel="fused")
    quiet_trainer(strategy=strategy, use_distributed_sampler=False).fit(model)
    assert model.widths == {VOCABULARY}


def test_other_settings_of_the_switch_are_refused() -> None:
    for wrong in ("true", "fuse", 1):
        with pytest.raises(ValueError, match=r"loss_parallel: .* is none of True, False and 'fused'"):
            AutoTPStrategy(autotp_size=2, loss_parallel=wrong)  # type: ignore[arg-type]
