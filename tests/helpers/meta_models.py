"""Small models on the meta device, their batches and plans."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.model_sources import small
from lightning_autotp.model_sources.factory import loss_of
from lightning_autotp.model_sources.full_size import build
from lightning_autotp.model_sources.small import group_experts, small_batches, small_config, small_model
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.recipe.make_plan import make_plan


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the meta device; what it shares stays shared."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


REAL: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "Llama-3.1-405B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 163840,
    },
}
"""Models in their real sizes, as their configs say."""


def real_model(name: str) -> nn.Module:
    """One of :data:`REAL`, or a model type with the sizes that transformers gives it, in bf16 on the meta device."""
    config = name
    if name in REAL:
        folder = Path(tempfile.mkdtemp())
        config = str(folder / "config.json")
        Path(config).write_text(json.dumps(REAL[name]))
    with torch.device("meta"):
        model, _ = build(config, dtype=torch.bfloat16, seq=8)
    group_experts(model)
    return model


@contextmanager
def deep_configs(least: int) -> Iterator[None]:
    """Inside, small configs have at least so many layers, if their types have."""
    cover = small._cover
    with mock.patch.object(small, "_cover", lambda layers: sorted({*cover(layers), *range(min(least, len(layers)))})):
        yield


def small_step(
    model_type: str, tp_size: int, **config: Any
) -> tuple[nn.Module, ShardingPlan, TPTrainingConfig, Callable[[nn.Module], Tensor]]:
    """A small model of a type on the meta device, its plan, the config, and what runs a training step of it."""
    described = small_config(model_type)
    model = small_model(described)
    group_experts(model)
    batch = {name: tensor.to("meta") for name, tensor in small_batches(described, 1)[0].items()}
    model = meta_copy(model).train()
    given = TPTrainingConfig(autotp_size=tp_size, **config)
    return model, make_plan(model, given, tp_size), given, lambda run: loss_of(run(**batch))
