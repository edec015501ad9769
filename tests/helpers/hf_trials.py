"""Small models of transformers as trials, each built once."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.model_sources.small import group_experts, small_batches, small_config, small_model
from lightning_autotp.recipe.make_plan import make_plan
from tests.helpers.truth import Batch, Trained, Trial, unsharded

SEED, PROOF_SEED = 5, 9

ONLY_FP32 = ("inkling2_text", "inkling2_loop_text")
"""Types that make tensors of fp32 whatever their weights are."""

RIGHT_IN_FP32 = 1e-2


@lru_cache(maxsize=16)
def model_of(name: str) -> nn.Module:
    """The model of a type."""
    return small_model(small_config(name), seed=SEED)


def trial_of(name: str, size: int, **switches: bool) -> Trial:
    """A type with the plan that is made for it.

    Raises:
        ValueError: if none is.
    """
    config = TPTrainingConfig.load(dict(switches))
    model = model_of(name)
    trial = Trial(model, make_plan(model, config, size), config, _batches(name), group_experts)
    return replace(trial, dtype=torch.float32, right=RIGHT_IN_FP32) if name in ONLY_FP32 else trial


def _batches(name: str) -> list[dict[str, Tensor]]:
    return small_batches(small_config(name), 3, seed=SEED)


@lru_cache(maxsize=16)
def truth_of(name: str) -> Trained:
    """The unsharded training of a type."""
    return unsharded(trial_of(name, 1))


def proof_batch(name: str) -> Batch:
    """What a run would prove with: a few rows, of other tokens than those that are judged with."""
    return {key: rows[:3] for key, rows in small_batches(small_config(name), 1, seed=PROOF_SEED)[0].items()}
