"""torch.compile of sharded models: whole graphs, blocks, checkpointed regions, changing lengths; exact, no breaks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.model_sources.small import group_experts, small_config, small_model
from lightning_autotp.parallel.linear import ColumnParallelLinear
from lightning_autotp.sharding.shard import shard as shard_by_plan
from lightning_autotp.sharding.state import sharded
from tests.helpers.closeness import assert_close
from tests.helpers.corners import corners_of
from tests.helpers.models import Block, Transformer, next_token_loss, token_batches, transformer
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharded_layers import LLAMA_SPECS, MLP, MLP_SPECS, assert_same, inputs, seeded, shard, spec


def build() -> Transformer:
    return transformer(kv_heads=4, layers=2, bias=True, vocab=65).to(rank_device())


def tokens(seq: int = 12) -> Tensor:
    return token_batches(n=1, seq=seq, vocab=65)[0].to(rank_device())


def assert_exact(model: nn.Module, call: Callable[[Tensor], Tensor], length: int = 12) -> None:
    """Loss and gradients of ``call`` on the sharded ``model`` are the unsharded model's."""
    want = build()
    want_loss = next_token_loss(want(tokens(length)), tokens(length))
    want_loss.backward()
    model.zero_grad()
    loss = next_token_loss(call(tokens(length)), tokens(length))
    loss.backward()
    found = sharded(model)
    assert found is not None
    layouts, rank = found.plan.layouts, found.mesh.tp_rank
    assert_close({"loss": loss}, {"loss": want_loss}, 1e-5, "loss")
    grads = {n: layouts[n].shard(p.grad, rank) for n, p in want.named_parameters() if p.grad is not None}
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    zero = [n for n in grads if n.endswith("k_proj.bias")]  # truly zero: rounding noise on both sides
    assert_close({n: g for n, g in got.items() if n not in zero}, {n: g for n, g in grads.items() if n not in zero})


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.ranks(2, timeout=240)
def test_whole_model_in_one_graph(backend: str) -> None:
    model = shard(build(), *LLAMA_SPECS, overlap=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        assert_exact(model, compiled)


@pytest.mark.ranks(2, timeout=240)
def test_block_by_block_and_with_changing_lengths() -> None:
    model = shard(build(), *LLAMA_SPECS)
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for length in (12, 9, 14):
        assert_exact(model, model, length)


class CheckpointedBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self._checkpoint_wrapped_module, x, use_reentrant=False)
        return out


@pytest.mark.long
@pytest.mark.parametrize("inside", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.ranks(2, timeout=240)
def test_checkpointing_inside_one_graph_and_around_compiled_blocks(inside: bool) -> None:
    model = shard(build(), *LLAMA_SPECS)
    for number, layer in enumerate(model.layers):
        if not inside:
            layer.compile(backend="aot_eager", fullgraph=True)
        model.layers[number] = CheckpointedBlock(layer)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if inside else model
    want = build()
    for _ in range(2):
        model.zero_grad()
        want.zero_grad()
        loss, want_loss = (next_token_loss(run(tokens()), tokens()) for run in (call, want))
        loss.backward()
        want_loss.backward()
        got = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}
        found = sharded(model)
        assert found is not None
        layouts = found.plan.layouts
        rank = dist.get_rank()
        assert_close({"loss": loss}, {"loss": want_loss}, 1e-5, "loss")
        grads = {n: layouts[n].shard(p.grad, rank) for n, p in want.named_parameters() if p.grad is not None}
        keep = [n for n in grads if not n.endswith("k_proj.bias")]
        assert_close({n: got[n] for n in keep}, {n: grads[n] for n in keep})


@pytest.mark.ranks(2, timeout=240)
def test_a_compiled_regions_input_keeps_nothing() -> None:
    """The siblings' input is the graph's own: results ride on it while tracing, and must not stay."""
    model = shard(seeded(MLP), *MLP_SPECS)
    assert isinstance(model.up, ColumnParallelLinear)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = inputs(3, 5, 16).requires_grad_()
    for _ in range(2):
        compiled(x).sum().backward()
    assert not any(vars(x).values()) and model.up.group.input is None
    want = seeded(MLP)
    y = inputs(3, 5, 16).requires_grad_()
    want(y).sum().backward()
    assert x.grad is not None and y.grad is not None
    assert_close({"input": x.grad / 2}, {"input": y.grad})


class ParallelBlock(nn.Module):
    """Two MLPs that read one input, so that two groups of siblings do."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = MLP(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.left.gate(x)), torch.tanh(self.right.gate(x))
        out: Tensor = x + self.left.down(gates[0] * self.left.up(x)) + self.right.down(gates[1] * self.right.up(x))
        return out


PARALLEL_SPECS = [spec(r".*\.(up|gate)\.", "column"), spec(r".*\.down\.", "row")]


@pytest.mark.ranks(2, timeout=240)
def test_two_groups_on_one_input_do_not_take_each_others_results() -> None:
    x = inputs(3, 5, 16)
    assert_same(ParallelBlock, PARALLEL_SPECS, x)

    def compiled(model: Any, x: Tensor) -> Tensor:
        out: Tensor = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        return out

    assert_same(ParallelBlock, PARALLEL_SPECS, x, compiled)


@pytest.mark.ranks(2, timeout=240)
def test_blocks_share_one_compiled_graph() -> None:
    torch._dynamo.utils.counters.clear()
    model = shard(seeded(lambda: nn.Sequential(*(MLP() for _ in range(5)))), *PARALLEL_SPECS)
    for layer in model:
        layer.compile(backend="aot_eager", fullgraph=True)
    x = inputs(3, 5, 16).requires_grad_() * 1
    model(x).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.ranks(2, timeout=240)
def test_autocast_in_a_graph() -> None:
    model = shard(seeded(MLP), *MLP_SPECS)
    x = inputs(6, 16).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        eager = model(x)
        traced = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert traced.dtype == torch.bfloat16
    assert_close({"output": traced.float()}, {"output": eager.float()}, 1e-2)


@pytest.mark.parametrize(
    ("sequence_parallel", "model_type"),
    corners_of(product([False, True], ["llama", "mixtral"]), [(True, "mixtral")]),
)
@pytest.mark.ranks(2, timeout=240)
def test_compiled_blocks_of_a_model_break_no_graph(model_type: str, sequence_parallel: bool) -> None:
    config = TPTrainingConfig(
        autotp_size=2, sequence_parallel=sequence_parallel, loss_parallel=True, tp_overlap_comm=True
    )
    model: Any = small_model(small_config(model_type)).train()
    group_experts(model)
    plan = make_plan(model, config)
    shard_by_plan(model, plan, build_mesh(2, config.tensor_parallel), config, device=rank_device())
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ids = torch.randint(131, (2, 8), generator=torch.Generator().manual_seed(0)).to(rank_device())
    model(input_ids=ids, labels=ids).loss.backward()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"], dict(counters["graph_break"])
