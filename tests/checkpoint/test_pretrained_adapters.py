"""LoRA on a model that is not read yet: base weights from the files, adapters begun by PEFT or loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_autotp import TPTrainingConfig, from_pretrained, make_plan
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.sharding.shard import shard

TOKENS = torch.arange(10).view(2, 5)
SWITCHES = TPTrainingConfig(autotp_size=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model: Any = small_model(small_config("llama"))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def sharded(model: nn.Module, mesh: Mesh) -> nn.Module:
    shard(model, make_plan(model, SWITCHES), mesh, SWITCHES, device=torch.device("cpu"))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": False},
    ],
    ids=["all-linear", "embedding-and-head", "drawn"],
)
def test_adapters_begin_as_peft_begins_them_on_weights_from_the_files(options: dict[str, Any], folder: Path) -> None:
    config = LoraConfig(r=8, **options)
    want = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    full = dict(want.named_parameters())

    def rank(mesh: Mesh) -> dict[str, Tensor]:
        torch.manual_seed(mesh.tp_rank)
        model = get_peft_model(from_pretrained(AutoModelForCausalLM, folder), config)
        layouts = make_plan(model, SWITCHES).layouts
        sharded(model, mesh)
        parts = dict(model.named_parameters())
        assert parts.keys() == full.keys()
        for name, part in parts.items():
            assert part.requires_grad == full[name].requires_grad and part.dtype == full[name].dtype
            like = layouts[name].shard(full[name].detach(), mesh.tp_rank)
            if "lora_" not in name or not like.any():  # as in the files, or zeros
                assert torch.equal(part, like), name
            else:
                assert 0.6 < float(part.detach().std() / like.std()) < 1.6, name
        return {name: part.detach() for name, part in parts.items() if layouts[name].is_replicated}

    first, second = Lockstep[Any](2).run(rank)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("way", ["on top", "by the folder"])
def test_saved_adapters_are_loaded(way: str, folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    want = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    want.save_pretrained(str(tmp_path / "adapter"))
    ways: dict[str, Callable[[], Any]] = {
        "on top": lambda: PeftModel.from_pretrained(
            from_pretrained(AutoModelForCausalLM, folder), str(tmp_path / "adapter")
        ),
        "by the folder": lambda: from_pretrained(AutoModelForCausalLM, tmp_path / "adapter"),
    }
    for found in Lockstep[Any](2).run(lambda mesh: logits(sharded(ways[way](), mesh))):
        assert torch.allclose(found, logits(want), atol=1e-5)


def test_adapters_of_a_model_without_weights_begin_at_zero_too() -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(small_config("llama"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    sharded(model, silent_mesh(2, 1))
    halves = {half: [p for name, p in model.named_parameters() if half in name] for half in ("lora_A", "lora_B")}
    assert all(bool(p.any()) for p in halves["lora_A"]) and not any(bool(p.any()) for p in halves["lora_B"])


def test_adapters_that_begin_from_the_weights_are_refused(folder: Path) -> None:
    base = from_pretrained(AutoModelForCausalLM, folder)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    model.peft_config["default"].init_lora_weights = "olora"
    with pytest.raises(ValueError, match=r"q_proj: init_lora_weights='olora' computes adapters from the values"):
        sharded(model, silent_mesh(2))
