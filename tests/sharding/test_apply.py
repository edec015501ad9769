"""A model that is sharded in place: shared modules, seeds, two models in one process, what stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPConfig
from lightning_autotp.distributed.mesh import Mesh, build_mesh
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.plans.plan import ShardingPlan
from tests.helpers import models
from tests.helpers.closeness import assert_close
from tests.helpers.models import next_token_loss, token_batches
from tests.helpers.plans import config_plan
from tests.helpers.sharding import apply_plan

CPU = torch.device("cpu")


def mesh_of(tp_size: int) -> Mesh:
    return build_mesh(tp_size, TPConfig())


def shard(model: nn.Module, tp_size: int = 2, **config: Any) -> ShardingPlan:
    plan = config_plan(model, tp_size, **config)
    apply_plan(model, plan, mesh_of(tp_size), CPU, overlap=False)
    return plan


class Twice(nn.Module):
    """One block under two names, as ALBERT shares its layers."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.first, self.second = block, block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


@pytest.mark.ranks(2)
def test_a_module_under_two_names_is_sharded_once_and_right_at_both() -> None:
    torch.manual_seed(0)
    whole = Twice()
    cut = Twice()
    cut.load_state_dict(whole.state_dict())
    rules = [
        {"patterns": [r".*\.0\.weight"], "partition_type": "column"},
        {"patterns": [r".*\.2\.weight"], "partition_type": "row"},
    ]
    plan = shard(cut, partition_config={"layer_specs": rules})
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    for net in (whole, cut):
        net(x).square().sum().backward()
    assert torch.allclose(whole(x), cut(x), atol=1e-6)
    rank = mesh_of(2).tp_rank
    want = {n: plan.layouts[n].shard(p.grad, rank) for n, p in whole.named_parameters() if p.grad is not None}
    assert_close({n: p.grad for n, p in cut.named_parameters() if p.grad is not None}, want, 1e-5)


@pytest.mark.ranks(2)
def test_ranks_that_were_seeded_apart_start_from_one_model() -> None:
    torch.manual_seed(dist.get_rank())
    model = small_model(small_config("llama"), seed=dist.get_rank())
    shard(model)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            first = parameter.detach().clone()
            dist.broadcast(first, src=0)
            assert torch.equal(first, parameter), name


@pytest.mark.ranks(4)
def test_two_models_of_different_sizes_live_in_one_process() -> None:
    tokens = token_batches(n=1)[0]
    factories: list[tuple[int, Callable[..., nn.Module]]] = [(2, models.tiny_llama), (4, models.tiny_llama)]
    losses: list[float] = []
    nets: list[Any] = []
    for size, factory in factories:
        nets.append(factory())
        shard(nets[-1], size)
    for net in (*nets, models.tiny_llama()):
        losses.append(float(next_token_loss(net(tokens).logits, tokens)))
    assert losses[0] == pytest.approx(losses[2], rel=1e-5) and losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert (
        nets[0].model.layers[0].mlp.up_proj.weight.shape[0] == 2 * nets[1].model.layers[0].mlp.up_proj.weight.shape[0]
    )


@pytest.mark.ranks(2)
def test_modules_and_parameters_stay_the_same_objects() -> None:
    model: Any = models.tiny_llama()
    layer, embedding = model.model.layers[0].self_attn.q_proj, model.model.embed_tokens
    called: list[str] = []
    layer.register_forward_hook(lambda *_: called.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {id(p) for p in model.parameters()}
    shard(model)
    assert model.model.layers[0].self_attn.q_proj is layer and isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 64) and embedding.num_embeddings == 128
    assert {id(p) for p in model.parameters()} == before
    tokens = token_batches(n=1)[0]
    next_token_loss(model(tokens).logits, tokens).backward()
    kept = layer.weight.detach().clone()
    optimizer.step()
    assert called == ["hook"] and not torch.equal(kept, layer.weight)
