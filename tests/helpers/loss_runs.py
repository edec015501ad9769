"""Runs whose loss is over a sharded vocabulary: the model that is trained, its variants, and their parity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp import AutoTPStrategy, cross_entropy
from lightning_autotp.config.switches import LossParallel
from lightning_autotp.layout.layout import even_widths
from lightning_autotp.model_sources.small import small_config, small_model
from tests.helpers import models
from tests.helpers.fit_cases import HAND_WRITTEN
from tests.helpers.models import LanguageModel, quiet_trainer, tiny_llama
from tests.helpers.sharded_runs import (
    ACCUMULATE,
    CLIP,
    RecordedModel,
    assert_parity,
    batches_for,
    reference_run,
)
from tests.helpers.vocab_logits import VOCABULARY


class LossModel(RecordedModel):
    """Trains a Hugging Face model, or one that gives logits, by the loss that ``loss`` names."""

    def __init__(self, batches: list[Tensor], factory: Callable[..., nn.Module], loss: str, **options: Any) -> None:
        super().__init__(batches, factory, **options)
        self.loss = loss
        self.widths: set[int] = set()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.loss == "own":
            logits = self(batch)
            loss = cross_entropy(logits[:, :-1], batch[:, 1:], self.model.lm_head)  # type: ignore[arg-type]
        else:
            items = batch[:, 1:].numel()
            extra = {"hf": {}, "hf-items": {"num_items_in_batch": torch.tensor(items)}}[self.loss]
            out = self.model(input_ids=batch, labels=batch, **extra)
            loss, logits = out.loss, out.logits
        self.widths.add(logits.shape[-1])
        self.record.losses.append(loss.detach().clone())
        return loss

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        logits = self(batch)
        assert logits.shape[-1] == VOCABULARY
        want = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        losses = [cross_entropy(logits[:, :-1], batch[:, 1:], self.model.lm_head)]  # type: ignore[arg-type]
        if self.loss != "own":
            losses.append(self.model(input_ids=batch, labels=batch).loss)
        for loss in losses:
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=0.0)


def checkpointed_llama(**options: Any) -> nn.Module:
    model = tiny_llama(**options)
    model.gradient_checkpointing_enable()
    return model.train()


CASES: dict[str, tuple[str, Callable[..., nn.Module], dict[str, Any], dict[str, Any]]] = {
    "hf-untied": ("hf", tiny_llama, {"kv_heads": 4}, {}),
    "hf-tied": ("hf", tiny_llama, {"kv_heads": 4, "tied": True}, {}),
    "hf-items-checkpointed": ("hf-items", checkpointed_llama, {"kv_heads": 4, "tied": True}, {}),
    "own-llama": ("own", tiny_llama, {"kv_heads": 4}, {}),
    "own-hand-written-tied": ("own", models.transformer, {"tied": True}, {"partition_config": HAND_WRITTEN}),
}


def check_run(case: str, tp_size: int, loss_parallel: LossParallel = True) -> None:
    loss, factory, options, rules = CASES[case]
    options = options | {"vocab": VOCABULARY}
    batches = batches_for(VOCABULARY)
    model = LossModel(batches, factory, loss, **options)
    strategy = AutoTPStrategy(autotp_size=tp_size, loss_parallel=loss_parallel, **rules)
    trainer = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP, "use_distributed_sampler": False}
    quiet_trainer(strategy=strategy, num_sanity_val_steps=1, **trainer).fit(model)
    widths = [length for _, length in even_widths(VOCABULARY, tp_size)]
    assert model.widths == {0 if loss_parallel == "fused" else widths[strategy.tp_rank]}
    assert_parity(model, partial(reference_run, factory, batches, **options))


def adapted(**settings: Any) -> nn.Module:
    """A Llama whose head, too, has an adapter, or is trained as a copy."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, init_lora_weights=False, **settings)
        llama: Any = tiny_llama(vocab=VOCABULARY, kv_heads=4)
        return get_peft_model(llama, config)


def adapted_head() -> nn.Module:
    return adapted(target_modules=["q_proj", "v_proj", "lm_head"])


def saved_head() -> nn.Module:
    return adapted(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])


class Bare(LanguageModel):
    """Says what a strategy's setup says of a model."""

    def train_dataloader(self) -> Any:
        return models.token_loader(vocab=100)


def setup_error(factory: Callable[..., nn.Module], message: str, **options: Any) -> None:
    trainer = quiet_trainer(strategy=AutoTPStrategy(**{"autotp_size": 2, "loss_parallel": True} | options))
    with pytest.raises(ValueError, match=message):
        trainer.fit(Bare(factory))


def of_type(model_type: str) -> nn.Module:
    return small_model(small_config(model_type))
