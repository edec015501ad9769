"""Small models on the meta device, their batches and plans."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.model_sources.factory import loss_of
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
