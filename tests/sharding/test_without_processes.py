"""Models sharded where there are no processes: all ranks in lockstep, with real numbers; one rank alone, on meta."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_autotp import AutoTPStrategy, TPTrainingConfig, make_plan
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.recording import recording_mesh
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.model_sources.factory import loss_of
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.sharding.shard import shard
from lightning_autotp.training.consistency import FirstLook
from lightning_autotp.training.gradients import TPGradients
from tests.helpers.closeness import assert_close
from tests.helpers.models import LanguageModel, next_token_loss, quiet_trainer, token_batches, token_loader, transformer

Steps = tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]
"""The losses and gradients of each step, and the weights after the last."""

STEPS = 3
ROWS, TOKENS = 3, 8
"""Rows that no tensor parallel size here divides, and tokens that all of them divide."""

SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence+loss+overlap": {"sequence_parallel": True, "loss_parallel": True, "tp_overlap_comm": True},
    "fused": {"loss_parallel": "fused"},
}


def train(model: nn.Module, complete: Any = lambda: None, settle: Any = lambda: None) -> Steps:
    """A few steps of AdamW on random tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    losses, gradients = [], []
    for step in range(STEPS):
        ids = torch.randint(131, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
        loss = loss_of(model(input_ids=ids, labels=ids))
        loss.backward()
        complete()
        losses.append(float(loss.detach()))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        settle()
    return losses, gradients, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v2", "gpt2", "qwen3", "bloom"])
def test_lockstep_trains_as_the_unsharded_model_does(model_type: str, tp_size: int, switches: str) -> None:
    """In fp64, where a few ulps are far below what a mistake makes; key heads fewer than ranks at TP=4."""
    model = small_model(small_config(model_type)).double().train()
    config = TPTrainingConfig(autotp_size=tp_size, **SWITCHES[switches])
    losses, gradients, weights = train(deepcopy(model))

    def work(mesh: Mesh) -> None:
        copy = deepcopy(model)
        plan = make_plan(copy, config)
        found = shard(copy, plan, mesh, config, device=torch.device("cpu"))
        completed = TPGradients(copy, found)
        got = train(copy, completed.complete, found.settle)
        assert got[0] == pytest.approx(losses, rel=1e-6)  # transformers computes the loss of its logits in fp32
        for ours, theirs in [*zip(got[1], gradients), (got[2], weights)]:
            mine = {name: plan.layouts[name].shard(tensor, mesh.tp_rank) for name, tensor in theirs.items()}
            assert_close(ours, mine, 1e-5)

    Lockstep[None](tp_size).run(work)


def test_a_mistake_is_seen_in_lockstep_by_the_first_comparison() -> None:
    """A norm between columns and row whose gradient nobody sums."""
    model = small_model(small_config("qwen3")).double().train()
    config = TPTrainingConfig(
        autotp_size=2,
        preset_model="qwen3",
        partition_config={"layer_specs": [{"patterns": [r".*self_attn\.[qk]_norm"], "partition_type": "skip"}]},
    )

    def work(mesh: Mesh) -> None:
        copy = deepcopy(model)
        found = shard(copy, make_plan(copy, config), mesh, config, device=torch.device("cpu"))
        look, completed = FirstLook(mesh, True), TPGradients(copy, found)
        ids = torch.randint(131, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        loss = loss_of(copy(input_ids=ids, labels=ids))
        look.loss(loss)
        loss.backward()
        look.gradients(completed, None)

    with pytest.raises(RuntimeError, match=r"disagree on the gradient of .*self_attn\.[qk]_norm\.weight"):
        Lockstep[None](2).run(work)


def meta_step(tp_size: int, tp_rank: int, **switches: Any) -> tuple[dict[str, Any], Any]:
    """Shapes of a hand-written model's parameters and gradients on one rank, and what it sent."""
    config = TPTrainingConfig(autotp_size=tp_size, preset_model="llama", **switches)
    with torch.device("meta"):
        model = transformer(heads=8, kv_heads=2)
    mesh, recorder = recording_mesh(silent_mesh(tp_size, tp_rank))
    found = shard(model, make_plan(model, config), mesh, config, device=torch.device("meta"))
    recorder.counts.clear()
    tokens = torch.zeros(ROWS, TOKENS, dtype=torch.long, device="meta")
    next_token_loss(model(tokens), tokens).backward()
    TPGradients(model, found).complete()
    shapes = {
        name: (tuple(p.shape), p.grad is not None and p.grad.shape == p.shape) for name, p in model.named_parameters()
    }
    return shapes, recorder


@pytest.mark.parametrize("switches", [{}, {"sequence_parallel": True, "tp_overlap_comm": True}])
@pytest.mark.parametrize("tp_rank", range(4))
def test_any_rank_runs_alone_on_meta(tp_rank: int, switches: dict[str, Any]) -> None:
    shapes, recorder = meta_step(4, tp_rank, **switches)
    with torch.device("meta"):
        model = transformer(heads=8, kv_heads=2)
    plan = make_plan(model, TPTrainingConfig(autotp_size=4, preset_model="llama", **switches))
    assert shapes == {name: (plan.layouts[name].local_shape(tp_rank), True) for name, _ in model.named_parameters()}
    if switches:
        assert recorder.number("reduce-scatter") >= 4 and recorder.number("all-gather") >= 4
    else:  # two a block each way, and the embedding's; key heads that ranks share are summed once
        assert recorder.number("reduce-scatter") == 0 and recorder.number("all-reduce") >= 2 * 2 * 2 + 1


@pytest.mark.ranks(2)
def test_other_sizes_run_inside_a_live_job_that_then_trains() -> None:
    if dist.get_rank() == 0:
        shapes, _ = meta_step(4, 3, sequence_parallel=True)
        assert all(has_gradient for _, has_gradient in shapes.values())
        before = torch.get_rng_state()
        Lockstep[Tensor](4).run(lambda mesh: mesh.collectives.all_reduce(torch.rand(2)))
        assert torch.equal(torch.get_rng_state(), before)
        test_lockstep_trains_as_the_unsharded_model_does("llama", 4, "plain")
    model = LanguageModel(transformer)
    quiet_trainer(strategy=AutoTPStrategy(autotp_size=2, preset_model="llama"), max_steps=2).fit(model, token_loader())
    tokens = token_batches(n=1, batch=ROWS, seq=TOKENS)[0]
    assert torch.isfinite(next_token_loss(model(tokens), tokens))
