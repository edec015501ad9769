"""What a preset leaves replicated is sharded where that is proved, and nothing that its rules decide is changed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp import parallelize
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.derive import derive
from lightning_autotp.derivation.fill import filled, gaps
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.model_sources.small import small_batches, small_config, small_model
from lightning_autotp.planning.planner import propose_plan
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.prover import Look
from lightning_autotp.proof.step import loss_of_batch
from lightning_autotp.recipe.engine import plan_once
from lightning_autotp.sharding.state import sharded
from tests.helpers.hf_trials import trial_of, truth_of
from tests.helpers.truth import RIGHT, error_of

CONFIG = TPTrainingConfig(autotp_size=2)


def share(model: nn.Module, plan: ShardingPlan) -> float:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    held = sum(torch.Size(plan.layouts[name].local_shape(0)).numel() for name in sizes)
    return held / sum(sizes.values())


def filled_plan(name: str) -> tuple[nn.Module, ShardingPlan, ShardingPlan]:
    config = small_config(name)
    model = small_model(config)
    plan = propose_plan(model, CONFIG)
    look = Look("training", (small_batches(config, 1)[0],), call=loss_of_batch)
    return model, plan, filled(model, plan, derive(model, look, CONFIG, 2))


def test_an_attention_that_no_rule_knows_is_sharded_beside_the_rest() -> None:
    model, plan, found = filled_plan("diffllama")
    assert any("self_attn" in name for name in gaps(model, plan))
    assert share(model, plan) > 0.85
    assert share(model, found) < 0.6
    decided = [name for name, entry in plan.parameters.items() if entry.rule]
    assert decided
    assert all(found.parameters[name] == plan.parameters[name] for name in decided)


def test_a_full_plan_has_no_gaps() -> None:
    model = small_model(small_config("llama"))
    assert gaps(model, propose_plan(model, CONFIG)) == ()


class Beside(nn.Module):
    """A small Llama and another network on top, of which its preset knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.config = small_config("llama")
        self.language = small_model(self.config)
        self.widen, self.narrow = nn.Linear(131, 512), nn.Linear(512, 131)

    def forward(self, **batch: Tensor) -> Tensor:
        output: Any = self.language(**batch)
        return output.loss + self.narrow(self.widen(output.logits).relu()).square().mean()


@pytest.mark.parametrize("proof", ["on", "off"])
@pytest.mark.ranks(2)
def test_it_is_done_at_setup_with_a_sample_and_a_proof(proof: Any) -> None:
    torch.manual_seed(0)
    model = Beside()
    batch = small_batches(model.config, 1)[0]
    parallelize(model, autotp_size=2, device="cpu", sample_batch=batch, loss_fn=loss_of_batch, proof=proof)
    found = sharded(model)
    assert found is not None
    assert found.plan.layouts["widen.weight"].is_replicated == (proof == "off")
    assert not found.plan.layouts["language.lm_head.weight"].is_replicated


def test_what_is_sharded_is_told_after_gaps_are_filled() -> None:
    config = small_config("diffllama")
    look = Look("training", (small_batches(config, 1)[0],), call=loss_of_batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        planned = plan_once(small_model(config), CONFIG, silent_mesh(2), lambda: look)
    (said,) = planned.plan.warnings
    assert "k_proj" in said and "q_proj" not in said and "mlp" not in said
    assert [str(one.message) for one in caught if one.category is UserWarning] == [said]


@pytest.mark.long
@pytest.mark.parametrize("name", ["diffllama", "hunyuan_v1_dense", "lfm2", "lfm3", "bamba", "dory", "lara_mini"])
def test_filled_plans_are_right(name: str) -> None:
    model, _, plan = filled_plan(name)
    assert share(model, plan) < 0.65
    assert error_of(replace(trial_of(name, 2), plan=plan), truth_of(name)) < RIGHT
