"""A small model of every preset, and a few optimizer steps with it, sharded or not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autotp.model_sources.small import small_batches, small_config, small_model
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.gradients import TPGradients
from tests.helpers.rank_pool import rank_device

STEPS, CLIP = 3, 0.5

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "patch_embeddings")
"""Modules before the layers: the gradients of their outputs are those of the input of all that is cut."""

CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    # model type, changes to its small config, tied
    "llama": ("llama", {}, False),
    "llama-tied": ("llama", {}, True),
    "mistral": ("mistral", {}, False),
    "granite": ("granite", {}, True),
    "stablelm": ("stablelm", {}, False),
    "bloom": ("bloom", {}, True),  # alibi, whose slopes are those of the full model
    "glm": ("glm", {}, False),
    "glm4": ("glm4", {}, True),
    "mixtral": ("mixtral", {}, False),
    "deepseek_v2": ("deepseek_v2", {}, False),  # latent attention, with and without a query rank
    "deepseek_v2-lite": ("deepseek_v2", {"q_lora_rank": None}, True),
    "deepseek_v3": ("deepseek_v3", {}, False),
    "qwen2": ("qwen2", {}, True),
    "phi3": ("phi3", {}, False),  # fused parts of unequal size
    "qwen3": ("qwen3", {}, True),  # norms of queries and keys, whose gradients are partial
    "qwen3_moe": ("qwen3_moe", {}, False),
    "gemma": ("gemma", {}, True),
    "gemma2": ("gemma2", {}, True),
    "gemma3": ("gemma3_text", {}, True),
    "gpt_neox": ("gpt_neox", {}, False),
    "gpt2": ("gpt2", {}, True),  # Conv1D
    "gpt_bigcode": ("gpt_bigcode", {}, True),
    "gptj": ("gptj", {}, False),
    "gpt_neo": ("gpt_neo", {}, True),
    "opt": ("opt", {}, True),
    "bart": ("bart", {}, True),
    "falcon-multi-query": ("falcon", {}, True),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, False),
    "falcon-alibi": ("falcon", {"multi_query": False, "num_kv_heads": 8, "alibi": True, "bias": True}, True),
    "mpt": ("mpt", {}, True),
    "starcoder2": ("starcoder2", {}, True),
    "olmo2": ("olmo2", {}, False),  # norms over all features of a sharded projection
    "olmo3": ("olmo3", {}, False),
    "glm4_moe": ("glm4_moe", {}, False),
    "gpt_oss": ("gpt_oss", {}, False),  # attention sinks, and experts whose parts are interleaved and have biases
    "t5": ("t5", {}, True),  # encoders and cross-attention
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu"}, False),
    "bert": ("bert", {}, True),
    "vit": ("vit", {}, False),
}


@dataclass
class Steps:
    """What was seen: losses, gradients of the embedding's output and of parameters a step, weights at the end."""

    losses: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def build(case: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model_type, changes, tied = CASES[case]
    config = small_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    model = small_model(config, tied=tied)
    return model.to(rank_device()), small_batches(config, STEPS)


def train(model: nn.Module, batches: list[dict[str, Any]], gradients: TPGradients | None = None) -> Steps:
    seen = Steps()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    handles = [
        module.register_forward_hook(lambda _, __, output: _keep_gradient(seen, output))
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in EMBEDDINGS
    ]
    for batch in batches:
        found: Any = model(**{name: value.to(rank_device()) for name, value in batch.items()})
        found.loss.backward()
        if gradients is not None:
            gradients.complete()
        seen.losses.append(found.loss.detach())
        seen.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if gradients is None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        else:
            gradients.clip_norm(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        shards = sharded(model)
        if shards is not None:
            shards.settle()
    for handle in handles:
        handle.remove()
    seen.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return seen


def _keep_gradient(seen: Steps, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda grad: seen.inputs.append(grad.detach().clone()))


def parts(plan: ShardingPlan, rank: int, full: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: plan.layouts[name].shard(tensor, rank) for name, tensor in full.items()}
