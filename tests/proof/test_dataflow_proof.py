"""Right plans are proved and wrong ones refuted, by one step on the meta device."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp.dataflow.event import Event, Operand, RankCall, Wrong
from lightning_autotp.dataflow.placement import Placement, Shards
from lightning_autotp.layout.layout import Layout, even_widths
from lightning_autotp.model_sources.hf import causal_types
from lightning_autotp.model_sources.small import NOT_RUNNABLE, SWEEP
from lightning_autotp.plans.plan import ParameterPlan, ShardingPlan
from lightning_autotp.proof.dataflow_proof import prove_flow
from lightning_autotp.proof.entries import follow
from lightning_autotp.proof.verdict import Verdict
from tests.helpers.meta_models import small_step


def proof_of(model_type: str, tp_size: int, change: dict[str, ParameterPlan] | None = None) -> Verdict:
    model, plan, config, step = small_step(model_type, tp_size)
    return prove_flow(model, replace(plan, parameters={**plan.parameters, **(change or {})}), config, step)


@pytest.mark.parametrize(
    ("model_type", "tp_size"),
    [("llama", 4), ("gpt2", 2), ("bloom", 4), ("deepseek_v2", 2), ("gpt_oss", 2)],
)
def test_a_right_plan_is_proved(model_type: str, tp_size: int) -> None:
    verdict = proof_of(model_type, tp_size)
    assert verdict.kind == "proved", verdict
    assert not verdict.findings and not verdict.unproved


def test_a_gradient_that_is_partial_names_its_fix() -> None:
    model, plan, config, step = small_step("qwen3", 2)
    name = "model.layers.0.self_attn.q_norm.weight"
    entry = plan.parameters[name]
    assert entry.grad_allreduce
    without = replace(plan, parameters={**plan.parameters, name: replace(entry, grad_allreduce=False)})
    verdict = prove_flow(model, without, config, step)
    assert verdict.kind == "refuted"
    (finding,) = verdict.findings
    assert finding.where == name and "partial sum" in finding.message and "grad_allreduce" in finding.fix


def test_a_full_gradient_must_not_be_summed() -> None:
    model, plan, config, step = small_step("llama", 2)
    name = "model.norm.weight"
    summed = replace(plan.parameters[name], grad_allreduce=True)
    verdict = prove_flow(model, replace(plan, parameters={**plan.parameters, name: summed}), config, step)
    assert verdict.kind == "refuted"
    assert [finding.where for finding in verdict.findings] == [name]


def _relaid(plan: ShardingPlan, name: str, layout: Layout) -> ShardingPlan:
    return replace(plan, parameters={**plan.parameters, name: replace(plan.parameters[name], layout=layout)})


def test_heads_of_queries_and_keys_that_do_not_belong_together_are_refuted_where_they_meet() -> None:
    model, plan, config, step = small_step("llama", 2)
    name = "model.layers.1.self_attn.q_proj.weight"
    layout = plan.parameters[name].layout
    verdict = prove_flow(model, _relaid(plan, name, replace(layout, parts=layout.parts[::-1])), config, step)
    assert verdict.kind == "refuted"
    assert any("model.layers.1.self_attn" in finding.where and ".py:" in finding.where for finding in verdict.findings)


def test_packed_parameters_that_are_not_sharded_one_by_one_are_refuted() -> None:
    model, plan, config, step = small_step("mixtral", 2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    layout = plan.parameters[name].layout
    assert layout.dim is not None
    plain = Layout.cut(layout.shape, layout.dim, 2, [even_widths(layout.shape[layout.dim], 2)])
    verdict = prove_flow(model, _relaid(plan, name, plain), config, step)
    assert verdict.kind == "refuted"
    assert any("model.layers.0.mlp.experts" in finding.where for finding in verdict.findings)


def test_what_a_forward_of_a_layers_own_class_does_is_followed() -> None:
    model, plan, config, step = small_step("dory", 2)  # its head scales what the linear gives
    head, scale = (plan.parameters[f"lm_head.{name}"] for name in ("weight", "logit_scale"))
    assert head.kind == "column" and scale.layout.is_replicated
    assert prove_flow(model, plan, config, step).kind == "proved"
    twins = {
        "lm_head, transformers": replace(head, gather_output=False),
        "lm_head.logit_scale": replace(scale, grad_allreduce=True),
        "modeling_dory.py": replace(scale, layout=replace(head.layout, shape=scale.layout.shape)),
    }
    for where, entry in twins.items():
        wrong = replace(plan, parameters={**plan.parameters, entry.name: entry})
        verdict = prove_flow(model, wrong, config, step)
        assert verdict.kind == "refuted", entry
        assert where in verdict.findings[0].where, verdict


def test_a_softmax_in_a_heads_own_class_over_outputs_that_the_loss_keeps_sharded_is_refuted() -> None:
    class Likelihoods(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
            return super().forward(input).log_softmax(-1)

    for whole, kind in ((True, "proved"), (False, "refuted")):
        model, plan, config, step = small_step("llama", 2, loss_parallel=not whole)
        head: Any = model.lm_head
        head.__class__ = Likelihoods
        verdict = prove_flow(model, plan, config, step)
        assert verdict.kind == kind, verdict
    assert "log_softmax" in str(verdict) and "test_dataflow_proof.py" in str(verdict)


def test_a_head_count_that_stays_full_is_refuted() -> None:
    model, plan, config, step = small_step("bloom", 2)
    others = tuple(attribute for attribute in plan.attributes if attribute.name != "num_heads")
    assert len(others) < len(plan.attributes)
    verdict = prove_flow(model, replace(plan, attributes=others), config, step)
    assert verdict.kind == "refuted", verdict


class _Joined(nn.Module):
    """A row linear that reads two things side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        joined = torch.cat([self.a(x), self.b(x).relu()], -1)
        return (self.o(joined) * x).mean()


def _joined_plan(row: dict[str, object]) -> tuple[nn.Module, ShardingPlan]:
    from lightning_autotp.config.training_config import TPTrainingConfig
    from lightning_autotp.recipe.make_plan import make_plan

    specs = [
        {"patterns": [r".*\b(a|b)\.weight"], "partition_type": "column"},
        {"patterns": [r".*\bo\.weight"], "partition_type": "row", **row},
    ]
    model = _Joined().to("meta")
    config = TPTrainingConfig(autotp_size=2, partition_config={"layer_specs": specs})
    return model, make_plan(model, config, 2)


def test_a_row_that_reads_a_concatenation_names_the_shape_that_is_right() -> None:
    from lightning_autotp.config.training_config import TPTrainingConfig

    def step(run: nn.Module) -> Tensor:
        loss: Tensor = run(torch.zeros(3, 5, dtype=torch.long, device="meta"))
        return loss

    model, plan = _joined_plan({})
    verdict = prove_flow(model, plan, TPTrainingConfig(autotp_size=2), step)
    assert verdict.kind == "refuted"
    (finding,) = verdict.findings
    assert finding.where == "o" and "shape=(-1, (8, 8))" in finding.message
    model, plan = _joined_plan({"shape": [-1, [8, 8]], "partition_dim": 1})
    assert prove_flow(model, plan, TPTrainingConfig(autotp_size=2), step).kind == "proved"


def _entries(partial: bool) -> tuple[Operand, Operand]:
    """Six features of which ranks hold the first four in halves and the last two both; and the gradient of these."""
    parts = (((0, 2), (4, 2)), ((2, 2), (4, 2)))
    of = Operand((3, 6), Placement((None, Shards(6, parts))), torch.float32)
    return of, Operand((3, 1), Placement((None, None), partial), torch.float32)


def test_the_gradient_of_an_entry_that_ranks_share_is_a_partial_sum_as_it_is() -> None:
    for partial in (True, False):
        of, grad = _entries(partial)
        arguments = {"of": of, "grad": grad, "dim": 1, "entries": [-2]}
        ranks = (RankCall({"entries": [-2]}, ((3, 4),)),) * 2
        (made,) = follow(Event("entries_gradient", arguments, ((3, 6),), ranks))
        assert made == Placement(of.placement.dims, partial)
    (taken,) = follow(Event("index_entries", {"self": of, "dim": 1, "entries": [-2]}, ((3, 1),), ranks_of(ranks)))
    assert taken.is_replicated
    with pytest.raises(Wrong, match="takes index"):
        follow(Event("index_entries", {"self": of, "dim": 1, "entries": [-3]}, ((3, 1),), ranks_of(ranks, [-3])))


def ranks_of(calls: tuple[RankCall, ...], entries: list[int] | None = None) -> tuple[RankCall, ...]:
    return tuple(RankCall({"entries": entries or [-2]}, ((3, 1),)) for _ in calls)


def test_gradients_of_a_grouped_product_are_those_of_each_group() -> None:
    halves = Shards(8, (((0, 4),), ((4, 4),)))
    rows = Operand((6, 8), Placement((None, halves)), torch.float32)
    weight = Operand((2, 8, 5), Placement((None, halves, None)), torch.float32)
    grad = Operand((6, 5), Placement((None, None)), torch.float32)
    offs = Operand((2,), Placement((None,)), torch.int32)
    arguments = {"input": rows, "weight": weight, "offs": offs, "grad_output": grad}
    ranks = (RankCall({}, ((6, 4), (2, 4, 5))),) * 2
    made = follow(Event("grouped_mm_fallback_backward", arguments, ((6, 8), (2, 8, 5)), ranks))
    assert made == [rows.placement, weight.placement]


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v3"])
def test_sequence_and_loss_parallelism_are_followed(model_type: str) -> None:
    model, plan, config, step = small_step(model_type, 2, sequence_parallel=True, loss_parallel=True)
    assert plan.sequence is not None
    assert model_type == "llama" or not all(region.reduces for region in plan.sequence.regions)
    verdict = prove_flow(model, plan, config, step)
    assert verdict.kind == "proved", verdict


@pytest.mark.parametrize("name", ["input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"])
def test_gradients_of_own_tokens_are_summed_and_those_of_all_are_not(name: str) -> None:
    model, plan, config, step = small_step("mixtral", 2, sequence_parallel=True)
    entry = plan.parameters[f"model.layers.0.{name}"]
    assert entry.grad_allreduce == name.endswith("norm.weight")
    other = replace(entry, grad_allreduce=not entry.grad_allreduce)
    verdict = prove_flow(model, replace(plan, parameters={**plan.parameters, entry.name: other}), config, step)
    assert verdict.kind == "refuted"
    assert [finding.where for finding in verdict.findings] == [entry.name]


def test_a_region_that_would_sum_what_experts_sum_is_refuted() -> None:
    model, plan, config, step = small_step("mixtral", 2, sequence_parallel=True)
    assert plan.sequence is not None
    regions = tuple(replace(region, reduces=True) for region in plan.sequence.regions)
    wrong = replace(plan, sequence=replace(plan.sequence, regions=regions))
    verdict = prove_flow(model, wrong, config, step)
    assert verdict.kind == "refuted", verdict


def test_what_raises_is_unknown() -> None:
    model, plan, config, _ = small_step("llama", 2)

    def step(run: nn.Module) -> Tensor:
        raise KeyError("labels")

    verdict = prove_flow(model, plan, config, step)
    assert verdict.kind == "unknown"
    assert "KeyError" in verdict.findings[0].message


def test_nothing_is_left_on_the_batch_or_the_model() -> None:
    model, plan, config, _ = small_step("llama", 2)
    tokens = torch.zeros(3, 12, dtype=torch.long, device="meta")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    verdict = prove_flow(model, plan, config, lambda run: run(input_ids=tokens, labels=tokens).loss)
    assert verdict.kind == "proved", verdict
    assert not vars(tokens)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


RIGHT_BUT_FOR = {"apertus1p5_text", "codegen", "sarvam_moe"}
"""Types whose plans are wrong by numbers."""


@pytest.mark.long
@pytest.mark.parametrize("tp_size", [2, 4])
def test_all_types(tp_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Verdict] = {}
    for name in dict.fromkeys([*causal_types(), *SWEEP]):
        if name in NOT_RUNNABLE:
            continue
        try:
            model, plan, config, step = small_step(name, tp_size)
        except ValueError:
            continue
        if not plan.blockers:
            found[name] = prove_flow(model, plan, config, step)
    with capsys.disabled():
        print(f"TP={tp_size}: {dict(Counter(verdict.kind for verdict in found.values()))}")
        for name, verdict in found.items():
            if verdict.kind != "proved":
                print(name, verdict)
    assert {name for name, verdict in found.items() if verdict.kind == "refuted"} == RIGHT_BUT_FOR & found.keys()
    assert sum(verdict.kind == "unknown" for verdict in found.values()) <= 2
