"""A derived plan as rules: with them the planner makes the same plan, and the command prints them."""

from __future__ import annotations

import pytest
import yaml

from lightning_autotp.cli.main import main
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.derive import derive
from lightning_autotp.derivation.rules import rules_of
from lightning_autotp.model_sources.small import group_experts, small_batches, small_config, small_model
from lightning_autotp.planning.planner import propose_plan
from lightning_autotp.proof.prover import Look
from lightning_autotp.proof.step import loss_of_batch


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "bloom", "gpt_oss", "deepseek_v3"])
def test_the_rules_make_the_derived_plan(name: str) -> None:
    config = small_config(name)
    model = small_model(config)
    group_experts(model)
    look = Look("training", (small_batches(config, 1)[0],), call=loss_of_batch)
    plan = derive(model, look, TPTrainingConfig(autotp_size=2), 2).plan
    rules, lost = rules_of(model, plan)
    assert lost == []
    again = propose_plan(model, TPTrainingConfig(partition_config=rules), 2)
    assert again.layouts == plan.layouts
    assert [one.module for one in again.boundaries] == [one.module for one in plan.boundaries]
    assert any(not layout.is_replicated for layout in again.layouts.values())


def test_the_command_prints_rules_that_can_be_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--derive", "tests.derivation.test_rules:tiny", "--rules-only"])
    assert ended.value.code == 0
    rules = yaml.safe_load(capsys.readouterr().out)
    model, _ = tiny()
    plan = propose_plan(model, TPTrainingConfig(**rules), 2)
    assert not plan.layouts["model.layers.0.self_attn.q_proj.weight"].is_replicated


def test_a_model_that_cannot_be_built_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--derive", "no_such_type"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("plan: ")


def tiny():  # type: ignore[no-untyped-def]
    """A model and its batches, for the command."""
    config = small_config("llama")
    return small_model(config), small_batches(config, 1)
