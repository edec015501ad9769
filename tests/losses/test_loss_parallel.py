"""Whole runs with ``loss_parallel=True``: parity, what sets the switch, and which models are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp import AutoTPStrategy, cross_entropy
from lightning_autotp.layout.layout import even_widths
from lightning_autotp.losses.loss_parallel import _ParallelLoss, parallel_hf_loss
from lightning_autotp.model_sources.small import small_config, small_model
from tests.helpers.closeness import assert_close
from tests.helpers.corners import corners_of
from tests.helpers.loss_runs import CASES, LossModel, adapted_head, check_run, of_type, saved_head, setup_error
from tests.helpers.models import quiet_trainer, tiny_llama, token_batches
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharded_runs import (
    ACCUMULATE,
    CLIP,
    assert_parity,
    batches_for,
    reference_run,
)
from tests.helpers.vocab_logits import VOCABULARY, assert_same_bits, drawn, part, sharded_head


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(2)
def test_tp2_is_the_unsharded_run(case: str) -> None:
    check_run(case, 2)


@pytest.mark.parametrize("case", corners_of(CASES, ["hf-items-checkpointed", "own-hand-written-tied"]))
@pytest.mark.ranks(4)
def test_tp4_is_the_unsharded_run(case: str) -> None:
    check_run(case, 4)


@pytest.mark.parametrize("case", corners_of(["hf-tied", "own-llama"], ["own-llama"]))
@pytest.mark.ranks(4)
def test_tp2_dp2_is_the_unsharded_run(case: str) -> None:
    check_run(case, 2)


@pytest.mark.ranks(2)
def test_the_switch_is_set_by_every_run() -> None:
    """fit, validate, fit again, and then a run without: the head and the loss are what the last Trainer wants."""
    model = LossModel(token_batches(n=2, vocab=VOCABULARY), tiny_llama, "hf", vocab=VOCABULARY)
    llama: Any = model.model
    strategy = AutoTPStrategy(autotp_size=2, loss_parallel=True)
    trainer = quiet_trainer(strategy=strategy, use_distributed_sampler=False)
    for run in (trainer.fit, trainer.validate, trainer.fit):
        run(model)
        assert isinstance(llama.loss_function, _ParallelLoss) and llama.lm_head.keeps_part
    assert model.widths == {even_widths(VOCABULARY, 2)[strategy.tp_rank][1]}
    model.widths.clear()
    quiet_trainer(strategy=AutoTPStrategy(autotp_size=2), use_distributed_sampler=False).fit(model)
    assert model.widths == {VOCABULARY}
    assert "_loss_function" not in vars(llama) and not llama.lm_head.keeps_part


def gemma2() -> nn.Module:
    return small_model(small_config("gemma2"))


def gpt2() -> nn.Module:
    return small_model(small_config("gpt2"))


@pytest.mark.parametrize("factory", [adapted_head, saved_head, gemma2, gpt2])
@pytest.mark.ranks(2)
def test_adapters_on_the_head_capped_logits_and_other_families(factory: Callable[..., nn.Module]) -> None:
    built: Any = factory()
    vocabulary: int = built.config.vocab_size
    batches = batches_for(vocabulary)
    model = LossModel(batches, factory, "hf")
    trainer = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP, "use_distributed_sampler": False}
    strategy = AutoTPStrategy(autotp_size=2, loss_parallel=True)
    quiet_trainer(strategy=strategy, limit_val_batches=0, **trainer).fit(model)
    assert max(model.widths) < vocabulary
    assert_parity(model, partial(reference_run, factory, batches))


@pytest.mark.ranks(2, timeout=240)
def test_a_whole_model_with_its_loss_in_one_graph() -> None:
    model = LossModel(token_batches(n=1, vocab=VOCABULARY), tiny_llama, "hf", vocab=VOCABULARY, layers=1)
    strategy = AutoTPStrategy(autotp_size=2, loss_parallel=True)
    quiet_trainer(strategy=strategy, use_distributed_sampler=False, limit_val_batches=0).fit(model)
    tokens = model.batches[0].to(rank_device())
    compiled: Any = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    grads = []
    for call in (model.model, compiled):
        model.zero_grad()
        call(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close(grads[1], grads[0], 1e-5)


@pytest.mark.parametrize(("model_type", "name"), [("t5", "T5ForConditionalGeneration"), ("bert", "BertForMaskedLM")])
@pytest.mark.ranks(2)
def test_a_loss_inside_forward_is_refused(model_type: str, name: str) -> None:
    setup_error(partial(of_type, model_type), f"loss_parallel: {name} computes its loss inside its forward")


@pytest.mark.ranks(2)
def test_models_that_pick_logits_by_their_ids_are_refused() -> None:
    model: Any = tiny_llama()
    model.__class__ = type("InklingForCausalLM", (type(model),), {})
    with pytest.raises(ValueError, match="loss_parallel: InklingForCausalLM picks logits by their ids"):
        parallel_hf_loss(model)
    head = sharded_head()
    logits, target = drawn(2, 5)
    with pytest.raises(ValueError, match="loss_parallel: the model reads 100 of the 131 outputs"):
        _ParallelLoss(head)(part(head, logits), target, vocab_size=100)
    width = head.weight.shape[0]  # some models name the width of what they give
    assert_same_bits(_ParallelLoss(head)(part(head, logits), target, vocab_size=width))


def masked_llama() -> nn.Module:
    model = tiny_llama()
    model.loss_type = "ForMaskedLM"
    return model


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)


@pytest.mark.ranks(2)
def test_other_losses_and_models_without_a_head_are_refused() -> None:
    setup_error(masked_llama, "loss_parallel: the loss of LlamaForCausalLM is ForMaskedLMLoss")
    rules = {
        "layer_specs": [
            {"patterns": [r".*\.up\.weight"], "partition_type": "column"},
            {"patterns": [r".*\.down\.weight"], "partition_type": "row"},
        ]
    }
    setup_error(Headless, "loss_parallel: there is no head", partition_config=rules)


@pytest.mark.ranks(2)
def test_a_loss_function_of_the_users_stays() -> None:
    def own(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return cross_entropy(logits[:, :-1], labels[:, 1:], llama.lm_head, z_loss=0.1)

    model = LossModel(token_batches(n=1, vocab=VOCABULARY), tiny_llama, "hf", vocab=VOCABULARY)
    llama: Any = model.model
    llama.loss_function = own
    strategy = AutoTPStrategy(autotp_size=2, loss_parallel=True)
    quiet_trainer(strategy=strategy, use_distributed_sampler=False, limit_val_batches=0).fit(model)
    assert llama.loss_function is own and max(model.widths) < VOCABULARY


@pytest.mark.ranks(1)
def test_one_rank_has_nothing_to_share() -> None:
    model = LossModel(token_batches(n=1, vocab=VOCABULARY), tiny_llama, "own", vocab=VOCABULARY)
    strategy = AutoTPStrategy(autotp_size=1, loss_parallel=True)
    quiet_trainer(strategy=strategy, use_distributed_sampler=False).fit(model)
    assert model.widths == {VOCABULARY}
