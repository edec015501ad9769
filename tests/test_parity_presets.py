"""Presets on today's transformers classes: sharded against unsharded, as ``test_parity_fit`` does it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_autotp import AutoTPStrategy
from tests.sharded_runs import assert_parity, batches_for, reference_run, sharded_run

TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny(model_type: str, tied: bool) -> nn.Module:
    """A causal language model of ``model_type``, with the same weights for the same arguments."""
    from transformers import AutoConfig, AutoModelForCausalLM

    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "mixtral" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, tie_word_embeddings=tied, attention_dropout=0.0, **TINY, **more)
        # the grouped matmul of the experts has no float64, which the reference for rounding needs
        experts = {"experts_implementation": "eager"} if more else {}
        return AutoModelForCausalLM.from_config(config, **experts)


MODEL_TYPES = ["llama", "mistral", "granite", "qwen2", "glm", "glm4", "mixtral"]


def check(model_type: str, tied: bool, tp_size: int, overlap: bool) -> None:
    options: dict[str, Any] = {"model_type": model_type, "tied": tied}
    batches = batches_for(131)
    model = sharded_run(AutoTPStrategy(autotp_size=tp_size, tp_overlap_comm=overlap), tiny, batches, **options)
    assert_parity(model, partial(reference_run, tiny, batches, **options))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.ranks(2)
def test_a_detected_preset_is_the_unsharded_run_at_tp2(model_type: str, tied: bool) -> None:
    check(model_type, tied, 2, overlap=True)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.ranks(4)
def test_a_detected_preset_is_the_unsharded_run_at_tp4(model_type: str) -> None:
    check(model_type, tied=True, tp_size=4, overlap=False)
