"""Layers sharded in place, and their outputs and gradients beside those of the unsharded ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_autotp import TPConfig, TPTrainingConfig, make_plan
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.sharding.state import sharded
from tests.helpers.closeness import assert_close
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharding import apply_plan


def spec(pattern: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"patterns": [pattern], "partition_type": kind, **more}


def shard(model: nn.Module, *specs: dict[str, Any], overlap: bool = False) -> Any:
    """Shard ``model`` in place over all ranks of the test."""
    config = TPTrainingConfig(autotp_size=dist.get_world_size(), partition_config={"layer_specs": list(specs)})
    mesh = build_mesh(config.size, TPConfig())
    apply_plan(model, make_plan(model, config), mesh, rank_device(), overlap=overlap)
    return model


class MLP(nn.Module):
    """Column, row."""

    def __init__(self, width: int = 24, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(16, width, bias=bias)
        self.gate = nn.Linear(16, width, bias=bias)
        self.down = nn.Linear(width, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return out


MLP_SPECS = [spec("up|gate", "column"), spec("down", "row")]


def seeded(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(3)
    return build().to(rank_device())


def gradients(model: nn.Module, run: Callable[[Any, Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """The output, its input's gradient and every parameter's gradient, of one forward and backward pass."""
    x = x.detach().clone().requires_grad_()
    out = run(model, x)
    torch.manual_seed(5)
    (out * torch.randn_like(out)).sum().backward()
    assert x.grad is not None
    found = {"output": out.detach(), "input": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    build: Callable[[], nn.Module],
    specs: list[dict[str, Any]],
    x: Tensor,
    run: Callable[[Any, Tensor], Tensor] = lambda model, x: model(x),
    overlap: bool = False,
) -> Any:
    """The sharded module's output and gradients are this rank's part of the unsharded one's."""
    want = gradients(seeded(build), run, x)
    model = shard(seeded(build), *specs, overlap=overlap)
    got = gradients(model, run, x)
    found = sharded(model)
    assert found is not None
    layouts = found.plan.layouts
    parts = {n: layouts[n].shard(t, found.mesh.tp_rank) if n in layouts else t for n, t in want.items()}
    assert_close(got, parts, 1e-5)
    return model


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(rank_device())


LLAMA_SPECS = [
    spec(r".*\.(q|k|v|gate|up)_proj\.weight", "column"),
    spec(r".*\.(o|down)_proj\.weight", "row"),
    spec(r".*embed_tokens\.weight", "row"),
    spec(r".*lm_head\.weight", "column", gather_output=True),
]
