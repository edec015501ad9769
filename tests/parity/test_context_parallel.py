"""Context parallelism through Trainer.fit: 5 optimizer steps, accumulation 2, clipping on, on every rank."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.sharding.state import sharded
from tests.helpers import models
from tests.helpers.corners import corners_of
from tests.helpers.fit_cases import HAND_WRITTEN
from tests.helpers.models import TokenDataset, next_token_loss, quiet_trainer
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharded_runs import assert_parity, batches_for, reference_run, sharded_run

VOCAB = 131


def small(name: str) -> nn.Module:
    """A small model of a type; of Mistral's, windows of some tokens."""
    return small_model(small_config(name))


class Packed(nn.Module):
    """Two documents a row: positions begin anew, and tokens see their own document."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.model = models.tiny_llama(**options)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        positions = torch.cat([torch.arange(5), torch.arange(length - 5)]).expand(tokens.shape).to(tokens.device)
        found: Tensor = self.model(tokens, position_ids=positions).logits
        return found


def packed(**options: Any) -> nn.Module:
    return Packed(**options)


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "llama": (models.tiny_llama, {"kv_heads": 2, "vocab": VOCAB}, {}),
    "packed": (packed, {"kv_heads": 4, "vocab": VOCAB}, {}),
    "qwen3": (small, {"name": "qwen3"}, {}),
    "mistral": (small, {"name": "mistral"}, {}),
    "hand-written": (models.transformer, {"bias": True, "kv_heads": 4}, {"partition_config": HAND_WRITTEN}),
}


def check(case: str, tp_size: int, cp_size: int, **switches: Any) -> None:
    factory, options, rules = CASES[case]
    batches = batches_for(options.get("vocab", 66 if "name" in options else 128))
    strategy = AutoTPStrategy(autotp_size=tp_size, context_parallel_size=cp_size, proof="require", **rules, **switches)
    model = sharded_run(strategy, factory, batches, **options)
    assert (strategy.tp_size, strategy.cp_size) == (tp_size, cp_size)
    found = sharded(model)
    assert found is not None and found.context is not None and found.context.split is not None
    assert found.context.split.mine[1] == 12 // cp_size
    assert_parity(model, partial(reference_run, factory, batches, **options))


@pytest.mark.parametrize("case", corners_of(CASES, ["mistral", "packed"]))
@pytest.mark.ranks(4, timeout=240)
def test_tp2_cp2_is_the_unsharded_run(case: str) -> None:
    check(case, 2, 2)


@pytest.mark.parametrize("case", corners_of(CASES, ["hand-written"]))
@pytest.mark.ranks(4, timeout=240)
def test_cp4_is_the_unsharded_run(case: str) -> None:
    check(case, 1, 4)


@pytest.mark.parametrize(
    ("sizes", "stage"), [((2, 2), 3), pytest.param((1, 2), 2, marks=pytest.mark.long)], ids=["tp2-cp2", "cp2-dp2"]
)
@pytest.mark.ranks(4, timeout=240)
def test_zero_shares_states_over_context_parallel_ranks_too(sizes: tuple[int, int], stage: int) -> None:
    check("llama", *sizes, zero_stage=stage)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(8, timeout=600)
def test_tp2_cp2_dp2_is_the_unsharded_run(case: str) -> None:
    check(case, 2, 2)


@pytest.mark.ranks(4, timeout=240)
def test_a_run_validates_generates_and_saves_what_an_unsharded_one_reads(tmp_path: Any) -> None:
    options: dict[str, Any] = {"kv_heads": 2, "vocab": VOCAB}
    batches = batches_for(VOCAB)
    strategy = AutoTPStrategy(autotp_size=2, context_parallel_size=2)
    model = sharded_run(strategy, models.tiny_llama, batches, trainer={"enable_checkpointing": True}, **options)
    path = str(tmp_path / "here.ckpt")
    model.trainer.save_checkpoint(path)
    want: Any = models.LanguageModel(models.tiny_llama, **options)
    quiet_trainer(strategy=AutoTPStrategy(autotp_size=1, context_parallel_size=4), max_steps=10).fit(
        resumed := type(model)(batches, models.tiny_llama, **options), ckpt_path=path
    )
    assert not resumed.record.losses  # all steps were taken before
    weights = {name: p.detach() for name, p in resumed.named_parameters()}
    want.load_state_dict(weights)
    (metrics,) = resumed.trainer.validate(resumed, DataLoader(TokenDataset(batches[:2]), 4), verbose=False)
    want.to(rank_device()).eval()
    losses = [next_token_loss(want(tokens), tokens) for tokens in (batch.to(rank_device()) for batch in batches[:2])]
    torch.testing.assert_close(metrics["val_loss"], float(torch.stack(losses).mean()), rtol=1e-5, atol=0)
    prompts = batches[0][:, :5].to(rank_device())
    chosen: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = want.model.generate(prompts, **chosen)
    for trained in (model, resumed):
        inner: Any = trained.eval().model
        assert torch.equal(inner.generate(prompts, **chosen), wanted)


def dropping(**options: Any) -> nn.Module:
    return models.tiny_llama(attention_dropout=0.3, **options)


@pytest.mark.ranks(4, timeout=240)
def test_dropout_in_blocks_is_warned_of_and_differs_from_rank_to_rank() -> None:
    """What is drawn outside of blocks stays the same on the ranks that see one batch."""
    batches = batches_for(VOCAB, steps=1)
    strategy = AutoTPStrategy(autotp_size=2, context_parallel_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = sharded_run(strategy, dropping, batches, kv_heads=2, vocab=VOCAB)
    told = any("context parallel ranks draw random numbers of their own" in str(one.message) for one in caught)
    assert told == strategy.is_global_zero
    losses, drawn = torch.stack(model.record.losses), torch.rand(3)
    everyones = strategy.mesh.collectives.gather_objects((losses, drawn), "batch")
    for theirs in everyones:
        torch.testing.assert_close(theirs[0], losses)
        assert torch.equal(theirs[1], drawn)
    without = reference_run(models.tiny_llama, batches, kv_heads=2, vocab=VOCAB).losses
    assert not torch.allclose(losses, torch.stack(without).cpu(), rtol=1e-4)
