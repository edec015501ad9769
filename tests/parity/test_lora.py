"""LoRA through PEFT: the adapters of a sharded model train as those of the unsharded one, and only they are saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_autotp import AutoTPStrategy, TPTrainingConfig
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.recipe.make_plan import make_plan
from tests.helpers.corners import corners_of
from tests.helpers.models import LanguageModel
from tests.helpers.rank_pool import run_ranks
from tests.helpers.sharded_runs import Record, RecordedModel, assert_parity, batches_for, reference_run, sharded_run

VOCABULARY = 131
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model_type: str = "llama", targets: list[str] | None = None, **lora: Any) -> nn.Module:
    """A small model with adapters whose every weight is drawn: PEFT's zeros would leave half of them no gradient."""
    from peft import LoraConfig, get_peft_model

    base: Any = small_model(small_config(model_type))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": targets or ALL_LINEAR,
        } | lora
        model = get_peft_model(base, LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-rslora-rank-bias": {"use_rslora": True, "bias": "lora_only"},
    "llama-head-and-embedding": {"targets": ["q_proj", "v_proj", "lm_head", "embed_tokens"]},
    "llama-modules-to-save": {"targets": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"]},
    "mixtral": {"model_type": "mixtral", "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "phi3-packed": {"model_type": "phi3", "targets": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "gpt2-conv1d": {"model_type": "gpt2", "targets": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "olmo2-gathered": {"model_type": "olmo2", "targets": ["q_proj", "o_proj"]},
}


def check(case: str, tp_size: int, **strategy: Any) -> None:
    batches = batches_for(VOCABULARY)
    model = sharded_run(AutoTPStrategy(autotp_size=tp_size, **strategy), adapted, batches, **CASES[case])
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(model.record.gradients[0]) == adapters
    assert any("lora_A" in name for name in adapters) and any("lora_B" in name for name in adapters)
    assert_parity(model, partial(_double_safe, batches, CASES[case]))


def _double_safe(batches: list[Any], options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Record:
    return reference_run(adapted, batches, dtype, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(2)
def test_adapters_train_as_unsharded_at_tp2(case: str) -> None:
    check(case, 2, tp_overlap_comm=True)


@pytest.mark.parametrize("case", corners_of(["llama", "mixtral"], ["llama"]))
@pytest.mark.ranks(4)
def test_adapters_train_as_unsharded_at_tp4_with_shared_key_heads(case: str) -> None:
    check(case, 4)


@pytest.mark.ranks(4)
def test_adapters_train_as_unsharded_at_tp2_dp2() -> None:
    check("llama", 2)


def test_half_of_each_adapter_follows_its_layer() -> None:
    plan = make_plan(adapted(), TPTrainingConfig(autotp_size=2))
    layer = "base_model.model.model.layers.0."
    cuts = {
        name.removeprefix(layer): entry.layout.dim
        for name, entry in plan.parameters.items()
        if name.startswith(layer) and "lora_" in name
    }
    assert cuts["self_attn.q_proj.lora_A.default.weight"] is None
    assert cuts["self_attn.q_proj.lora_B.default.weight"] == 0
    assert cuts["self_attn.o_proj.lora_A.default.weight"] == 1
    assert cuts["self_attn.o_proj.lora_B.default.weight"] is None
    assert not plan.blockers


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_parameters": ["mlp.experts.down_proj"], "model_type": "mixtral"}, "target"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    model = adapted(**({"targets": ["q_proj"]} | wrong))
    try:
        found = " ".join(make_plan(model, TPTrainingConfig(autotp_size=2)).blockers)
    except ValueError as error:
        found = str(error)
    assert named in found and ("q_proj" in found or "experts" in found)


def _train_and_save(directory: str, distributed: bool) -> dict[str, torch.Tensor]:
    saver = ModelCheckpoint(directory, filename="adapters", save_top_k=-1)
    strategy = AutoTPStrategy(autotp_size=2, save_distributed_checkpoint=distributed, exclude_frozen_parameters=True)
    model = sharded_run(
        strategy, adapted, batches_for(VOCABULARY), trainer={"callbacks": [saver], "enable_checkpointing": True}
    )
    return model.record.weights


def _resume(directory: str) -> dict[str, torch.Tensor]:
    model = RecordedModel(batches_for(VOCABULARY), adapted)
    from tests.helpers.models import quiet_trainer

    strategy = AutoTPStrategy(autotp_size=2, exclude_frozen_parameters=True)
    trainer = quiet_trainer(strategy=strategy, use_distributed_sampler=False, max_epochs=1)
    trainer.fit(model, ckpt_path=str(Path(directory) / "adapters.ckpt"))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_an_adapter_checkpoint_loads_into_the_unsharded_model(tmp_path: Path) -> None:
    parts = run_ranks(2, _train_and_save, str(tmp_path), False)
    state = torch.load(tmp_path / "adapters.ckpt", weights_only=False)["state_dict"]
    assert state and all("lora_" in name for name in state)
    model = LanguageModel(adapted)
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    names = dict(model.named_parameters())
    assert {name for name, p in names.items() if p.requires_grad} == set(state)
    whole = "model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    cut = "model.base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert torch.equal(state[whole], parts[0][whole])
    assert torch.equal(state[cut], torch.cat([parts[0][cut], parts[1][cut]]))
    # and PEFT's own reader takes it, its names without the adapter's
    from peft import set_peft_model_state_dict

    peft_names = {n.removeprefix("model.").replace(".default", ""): v for n, v in state.items()}
    fresh: Any = adapted()
    outcome: Any = set_peft_model_state_dict(fresh, peft_names)
    assert not outcome.unexpected_keys
    assert torch.equal(fresh.get_parameter(cut.removeprefix("model.")), state[cut])


@pytest.mark.parametrize("distributed", [True, False], ids=["directory", "file"])
def test_a_run_resumes_from_its_adapters(tmp_path: Path, distributed: bool) -> None:
    before = run_ranks(2, _train_and_save, str(tmp_path), distributed)
    after = run_ranks(2, _resume, str(tmp_path))
    for then, now in zip(before, after):
        assert all(torch.equal(then[name], now[name]) for name in now)
