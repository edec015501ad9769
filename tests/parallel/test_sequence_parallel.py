"""Sequence parallelism: the unsharded run's numbers, whatever the batch, and less held between the cut modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_autotp import AutoTPStrategy, TPTrainingConfig, make_plan
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh, build_mesh
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.proof.copying import alias_copy
from lightning_autotp.sharding.shard import shard
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.gradients import TPGradients
from lightning_autotp.verification import verify
from tests.helpers import models
from tests.helpers.closeness import assert_close
from tests.helpers.models import next_token_loss, token_batches
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharded_runs import assert_parity, batches_for, reference_run, sharded_run
from tests.helpers.sharding import apply_plan

ALIKE = [
    "llama",
    "qwen3",
    "gemma2",
    "phi3",
    "olmo2",
    "gpt_neox",
    "falcon",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "jamba",
    "gemma4_text",
    "sarvam_mla",
]
"""The last two: blocks are given more features of each token; an attention that is not sharded."""


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("model_type", ALIKE)
def test_an_architecture_is_the_unsharded_run(model_type: str, tp_size: int) -> None:
    report = verify(model_type, tp_size, sequence_parallel=True)
    assert report.verdict == "pass", report
    assert all(row.bit_equal is not False for row in report.rows)


def fit(tp_size: int, **more: Any) -> None:
    options: dict[str, Any] = {"kv_heads": 2, "tied": True}
    batches = batches_for(128)
    strategy = AutoTPStrategy(autotp_size=tp_size, sequence_parallel=True, tp_overlap_comm=True, **more)
    model = sharded_run(strategy, models.tiny_llama, batches, **options)
    assert strategy.plan is not None and strategy.plan.sequence is not None
    assert_parity(model, partial(reference_run, models.tiny_llama, batches, **options))


@pytest.mark.ranks(2)
def test_fit_at_tp2() -> None:
    fit(2)


@pytest.mark.ranks(4)
def test_fit_at_tp4_with_shared_key_heads() -> None:
    fit(4)


@pytest.mark.ranks(4)
def test_fit_at_tp2_dp2() -> None:
    fit(2)


def run(net: Any, batches: list[Tensor], gradients: TPGradients | None = None) -> dict[str, Tensor]:
    """Gradients of several batches together, all forward passes before all backward passes."""
    batches = [batch.to(rank_device()) for batch in batches]
    for loss in [next_token_loss(net(batch).logits, batch) for batch in batches]:
        loss.backward()
    if gradients is not None:
        gradients.complete()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def sharded_llama(tp_size: int, prepare: Any = lambda net: None) -> tuple[Any, Any]:
    both: list[Any] = [models.tiny_llama(kv_heads=4) for _ in range(2)]
    whole, net = (model.to(rank_device()) for model in both)
    prepare(net)
    plan = parallel_sequence(net, make_plan(net, TPTrainingConfig(autotp_size=tp_size)))
    apply_plan(net, plan, build_mesh(tp_size, TPTrainingConfig().tensor_parallel), rank_device(), overlap=False)
    return whole, net


def compare(whole: nn.Module, net: nn.Module, batches: list[Tensor]) -> None:
    found = sharded(net)
    assert found is not None
    gradients = TPGradients(net, found)
    want, got = run(whole, batches), run(net, batches, gradients)
    gradients.remove()
    assert_close(got, {n: found.plan.layouts[n].shard(t, found.mesh.tp_rank) for n, t in want.items()})


@pytest.mark.parametrize(("batch", "length"), [(1, 8), (3, 5), (1, 7), (2, 3)])
@pytest.mark.ranks(4)
def test_token_counts_that_ranks_do_not_divide(batch: int, length: int) -> None:
    whole, net = sharded_llama(4)
    compare(whole, net, token_batches(n=2, batch=batch, seq=length))


@pytest.mark.ranks(4)
def test_sequences_shorter_than_the_padding() -> None:
    whole, net = sharded_llama(4)
    compare(whole, net, token_batches(n=2, batch=5, seq=2))
    torch._dynamo.reset()
    for layer in net.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    whole.zero_grad()
    net.zero_grad()
    compare(whole, net, token_batches(n=1, batch=5, seq=2))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.ranks(2)
def test_checkpointed_blocks_and_two_batches_of_different_shape(reentrant: bool) -> None:
    def prepare(net: Any) -> None:
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        net.train()

    whole, net = sharded_llama(2, prepare)
    compare(whole, net, [*token_batches(n=1, batch=2, seq=6), *token_batches(n=1, batch=4, seq=3)])


@pytest.mark.ranks(2)
def test_packed_sequences_by_position_ids_and_a_mask() -> None:
    whole, net = sharded_llama(2)
    tokens = token_batches(n=1, batch=2, seq=8)[0].to(rank_device())
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]], device=rank_device())
    mask = torch.ones(2, 8, dtype=torch.long, device=rank_device())
    mask[1, :2] = 0
    for more in ({"position_ids": positions}, {"attention_mask": mask}):
        assert torch.allclose(whole(tokens, **more).logits, net(tokens, **more).logits, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.ranks(2, timeout=240)
def test_compiled_blocks(backend: str) -> None:
    torch._dynamo.reset()
    whole, net = sharded_llama(2)
    for layer in net.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    for length in (6, 9, 7) if backend == "aot_eager" else (6,):
        compare(whole, net, token_batches(n=2, batch=2, seq=length))
        whole.zero_grad()
        net.zero_grad()


@pytest.mark.ranks(2)
def test_a_block_costs_two_gathers_and_two_scatters_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, net = sharded_llama(2)
    del whole
    counts = {"all_reduce": 0}
    original = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts["all_reduce"] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", counted)
    tokens = token_batches(n=1, batch=2, seq=6)[0].to(rank_device())
    next_token_loss(net(tokens).logits, tokens).backward()
    # the embedding's forward and the head's backward are all that is left of them
    assert counts["all_reduce"] == 2


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_tokens_are_generated_one_at_a_time_from_padded_prompts(model_type: str) -> None:
    model: Any = small_model(small_config(model_type)).eval()
    config = TPTrainingConfig.load({"sequence_parallel": True})
    plan = make_plan(model, config, 4)
    prompts, mask = torch.randint(5, 50, (3, 5), generator=torch.Generator().manual_seed(0)), torch.ones(3, 5).long()
    mask[1, :2] = 0

    def generated(model: Any) -> Tensor:
        tokens: Tensor = model.generate(prompts, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return tokens

    def of_rank(mesh: Mesh) -> Tensor:
        copy: Any = alias_copy(model)
        shard(copy, plan, mesh, config, device=torch.device("cpu"), training=False)
        return generated(copy.eval())

    assert all(torch.equal(tokens, generated(model)) for tokens in Lockstep[Tensor](4).run(of_rank))


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("t5", r"one list of blocks .*encoder\.block, decoder\.block"),
        ("opt", r"model\.decoder\.layers\.0\.fc1 is a cut layer directly in its block"),
        ("bert", r"intermediate opens or closes a cut"),
    ],
)
def test_blocks_that_are_not_known_are_refused(model_type: str, named: str) -> None:
    net = small_model(small_config(model_type))
    with pytest.raises(ValueError, match=rf"^sequence_parallel: .*{named}"):
        parallel_sequence(net, make_plan(net, TPTrainingConfig(autotp_size=2)))


def test_the_plan_says_what_gathers_and_scatters() -> None:
    net = small_model(small_config("llama"))
    rows = {
        row.name: row.communication
        for row in parallel_sequence(net, make_plan(net, TPTrainingConfig(autotp_size=2))).explain()
    }
    gathers = "backward: reduce-scatter of the input's gradient; forward: all-gather of the input's tokens"
    scatters = "backward: all-gather of the output's gradient; forward: reduce-scatter of the output's tokens"
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        assert rows[f"model.layers.*.{name}.weight"] == gathers
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert rows[f"model.layers.*.{name}.weight"] == scatters
    assert rows["model.layers.*.input_layernorm.weight"] == "step: all-reduce of the gradient"
    assert rows["model.norm.weight"] == ""
