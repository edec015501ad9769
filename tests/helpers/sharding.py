"""Shard a model by a plan alone, for the tests of layers that need no Trainer."""

from __future__ import annotations

import torch
from torch import nn

from lightning_autotp import ShardingPlan, TPTrainingConfig
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.sharding.shard import shard


def apply_plan(model: nn.Module, plan: ShardingPlan, mesh: Mesh, device: torch.device, *, overlap: bool) -> None:
    """Shard ``model`` in place with no switch on but ``tp_overlap_comm``, where ``overlap`` says so."""
    shard(model, plan, mesh, TPTrainingConfig(autotp_size=mesh.tp_size, tp_overlap_comm=overlap), device=device)
