"""Whole runs with ``loss_parallel="fused"``: parity, what is kept, and which models are refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp import AutoTPStrategy, TPConfig, TPTrainingConfig, cross_entropy, linear_cross_entropy, make_plan
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.layout.layout import even_widths
from lightning_autotp.losses import vocab_parallel_linear_cross_entropy as room
from lightning_autotp.losses.loss_parallel import _ParallelLoss, set_loss_parallel
from lightning_autotp.model_sources.small import small_config, small_model
from tests.helpers import models
from tests.helpers.closeness import assert_close
from tests.helpers.corners import corners_of
from tests.helpers.fit_cases import HAND_WRITTEN
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
from tests.helpers.sharding import apply_plan
from tests.helpers.vocab_logits import VOCABULARY

HF_CASES = [case for case in CASES if case.startswith("hf")]


@pytest.mark.parametrize("case", HF_CASES)
@pytest.mark.ranks(2)
def test_tp2_is_the_unsharded_run(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CHUNK", 1000)
    check_run(case, 2, "fused")


@pytest.mark.parametrize("case", corners_of(HF_CASES, ["hf-items-checkpointed"]))
@pytest.mark.ranks(4)
def test_tp4_is_the_unsharded_run(case: str) -> None:
    check_run(case, 4, "fused")


@pytest.mark.parametrize("case", corners_of(["hf-tied", "hf-items-checkpointed"], ["hf-tied"]))
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


@pytest.mark.long
@pytest.mark.ranks(2, timeout=240)
def test_a_compiled_model() -> None:
    model = fused_llama(partial(tiny_llama, layers=1))
    tokens = token_batches(n=1, vocab=VOCABULARY)[0].to(rank_device())
    grads = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        call(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(grads[1], grads[0], 1e-5)


def of_type(model_type: str) -> nn.Module:
    return small_model(small_config(model_type))


@pytest.mark.parametrize("model_type", corners_of(["granite", "gemma2", "cohere"], ["cohere"]))
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
