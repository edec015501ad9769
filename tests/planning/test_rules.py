"""Which rules a model gets, and which of them decides about a parameter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_autotp.introspection.names import clean_name
from tests.helpers.models import transformer
from tests.helpers.plans import (
    ATTENTION_RULES,
    MLP_RULES,
    Attention,
    column,
    cut_names,
    hf,
    mlp,
    module,
    plan,
    row,
    set_attributes,
    skip,
    sources,
)


def test_user_rules_come_before_the_presets() -> None:
    sharding = plan(hf("Llama"), skip("lm_head", "embed_tokens"), preset="llama")
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert sources(sharding, names) == ["user", "user", "preset llama"]
    assert [sharding.parameters[name].layout.is_replicated for name in names] == [True, True, False]


def test_first_rule_that_matches_decides() -> None:
    gathered, plain, whole = column("fc1", gather_output=True), column("fc1"), skip("fc.")
    for rules, kinds in [
        ((gathered, plain, skip("fc2")), ["column", "whole"]),
        ((plain, gathered, row("fc2")), ["column", "row"]),
        ((gathered, whole, row("fc2")), ["column", "whole"]),
        ((plain, row("fc2"), whole), ["column", "row"]),
    ]:
        sharding = plan(mlp(), *rules)
        assert [sharding.parameters[f"fc{i}.weight"].kind for i in (1, 2)] == kinds
        assert sharding.parameters["fc1.weight"].gather_output is (rules[0] is gathered)


def test_plan_names_the_pattern_that_matched() -> None:
    patterns = ["nothing", r"fc1\.weight$", ".*weight"]
    sharding = plan(mlp(), {"patterns": patterns, "gather_output": True})
    assert [sharding.parameters[f"fc{i}.weight"].rule for i in (1, 2)] == [r"fc1\.weight$", ".*weight"]


@pytest.mark.parametrize("with_defaults", [True, False])
def test_use_default_specs_decides_whether_the_preset_fills_the_gaps(with_defaults: bool) -> None:
    sharding = plan(
        hf("Llama"), column("gate_proj", "up_proj"), row("down_proj"), preset="llama", use_default_specs=with_defaults
    )
    mlp_only = {f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert (cut_names(sharding) == mlp_only) is not with_defaults
    assert mlp_only <= cut_names(sharding)
    assert sharding.parameters["lm_head.weight"].source == ("preset llama" if with_defaults else "")


def test_user_rules_without_a_preset_stand_alone() -> None:
    """Also where the model's type has a preset, and whatever use_default_specs says."""
    for with_defaults in (True, False):
        sharding = plan(hf("Llama"), *ATTENTION_RULES, use_default_specs=with_defaults)
        assert {entry.source for entry in sharding.parameters.values()} == {"user", ""}


def test_preset_that_is_named_wins_over_detection() -> None:
    assert "preset qwen2" in sources(plan(hf("Llama"), preset="qwen2"), ["lm_head.weight"])


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Granite"])
def test_preset_is_detected_by_the_model_type_inside_a_lightning_module(family: str) -> None:
    class Wrapper(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = module(inner=hf(family), probe=nn.Linear(64, 3))

    sharding = plan(Wrapper())
    name = "net.inner.model.layers.1.mlp.down_proj.weight"
    assert sharding.parameters[name].source == "preset llama"
    assert sharding.parameters[name].kind == "row"
    assert sharding.parameters["net.probe.weight"].layout.is_replicated


def test_preset_is_detected_for_a_model_that_is_not_of_transformers() -> None:
    model = transformer()
    set_attributes(model.layers, config=SimpleNamespace(model_type="llama"))
    sharding = plan(model)
    assert sharding.parameters["layers.0.self_attn.q_proj.weight"].source == "preset llama"
    assert sharding.parameters["lm_head.weight"].source == "", "the head lies outside the module that has the config"


def test_detected_preset_is_for_the_models_of_its_type_alone() -> None:
    sharding = plan(module(text=hf("Llama"), other=hf("Cohere")))
    assert {entry.source for name, entry in sharding.parameters.items() if name.startswith("other.")} == {""}
    assert "text.model.layers.*.mlp.up_proj.weight" in cut_names(sharding)


def test_two_models_get_the_presets_of_their_types() -> None:
    sharding = plan(module(a=hf("Llama"), b=hf("Qwen2")))
    names = ["a.lm_head.weight", "b.lm_head.weight", "b.model.layers.0.self_attn.q_proj.bias"]
    assert sources(sharding, names) == ["preset llama", "preset qwen2", "preset qwen2"]


@pytest.mark.parametrize(
    ("model_types", "applies"), [(["llama"], True), (["LLAMA", "x"], True), (["lla"], False), (["qwen2"], False)]
)
def test_model_types_limit_a_rule_to_models_of_these_types(model_types: list[str], applies: bool) -> None:
    model = module(text=hf("Llama"))
    rules = [column("gate_proj", "up_proj", model_types=model_types), row("down_proj", model_types=model_types)]
    sharding = plan(model, *rules, *ATTENTION_RULES)
    assert ("text.model.layers.*.mlp.up_proj.weight" in cut_names(sharding)) is applies


@pytest.mark.parametrize(("model_types", "applies"), [(["Attention"], True), (["atten"], True), (["tention"], False)])
def test_model_types_are_matched_with_class_names_where_there_is_no_config(
    model_types: list[str], applies: bool
) -> None:
    model = module(attn=Attention(4, 4), mlp=mlp())
    only = [spec | {"model_types": model_types} for spec in ATTENTION_RULES]
    assert ("attn.q_proj.weight" in cut_names(plan(model, *only, *MLP_RULES))) is applies


def test_innermost_config_says_the_model_type() -> None:
    outer = module(inner=mlp(), fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 8))
    set_attributes(outer, config=SimpleNamespace(model_type="outer"))
    set_attributes(outer["inner"], config=SimpleNamespace(model_type="inner"))
    sharding = plan(outer, *(spec | {"model_types": ["inner"]} for spec in MLP_RULES))
    assert cut_names(sharding) == {"inner.fc1.weight", "inner.fc2.weight"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_models_own_plan_is_the_last_resort(wrapped: bool) -> None:
    model = module(net=hf("Cohere")) if wrapped else hf("Cohere")
    prefix = "net." if wrapped else ""
    sharding = plan(model)
    layer = f"{prefix}model.layers.1"
    kinds = {
        f"{prefix}model.embed_tokens": "vocabulary",
        f"{layer}.self_attn.q_proj": "column",
        f"{layer}.self_attn.o_proj": "row",
        f"{layer}.mlp.gate_proj": "column",
        f"{layer}.mlp.down_proj": "row",
        f"{prefix}lm_head": "column",
    }
    assert {path: sharding.parameters[f"{path}.weight"].kind for path in kinds} == kinds
    assert set(sources(sharding, [f"{path}.weight" for path in kinds])) == {"model plan"}
    assert sharding.parameters[f"{prefix}lm_head.weight"].gather_output
    assert sharding.blockers == () and sharding.warnings == ()


def test_models_own_plan_names_the_norms_whose_gradients_are_summed() -> None:
    sharding = plan(hf("Qwen3", head_dim=8))
    summed = {name for name, entry in sharding.parameters.items() if entry.grad_allreduce}
    assert summed == {f"model.layers.{i}.self_attn.{which}_norm.weight" for i in (0, 1) for which in "qk"}
    assert {sharding.parameters[name].communication for name in summed} == {"step: all-reduce of the gradient"}


def test_error_says_what_was_tried_where_no_rules_are_found() -> None:
    with pytest.raises(ValueError, match="no rules to cut Transformer") as caught:
        plan(transformer())
    for part in ("no partition_config", "no preset_model", "no module has a model type", "no plan of its own"):
        assert part in str(caught.value)
    model = transformer()
    set_attributes(model, config=SimpleNamespace(model_type="nobody's"))
    with pytest.raises(ValueError, match='model types "nobody\'s" have no preset'):
        plan(model)


# -- patterns and names -----------------------------------------------------------------------------------------------


def test_patterns_are_matched_from_the_start_of_the_name() -> None:
    model = module(net=mlp())
    with pytest.raises(ValueError, match=r"matched from the start of the name") as caught:
        plan(model, {"patterns": ["fc1.weight"]}, {"patterns": ["fc2.weight"], "partition_type": "row"})
    assert "net.fc" in str(caught.value), "the message has an example of a name"


def test_wrappers_are_not_part_of_the_name() -> None:
    patterns = [r"^net\.fc1\.weight$", r"^net\.fc2\.weight$"]
    rules: list[dict[str, Any]] = [{"patterns": patterns[:1]}, {"patterns": patterns[1:], "partition_type": "row"}]
    wrapped = {
        "net._orig_mod.": torch.compile(mlp()),
        "net._checkpoint_wrapped_module.": checkpoint_wrapper(mlp()),
        "net._orig_mod._checkpoint_wrapped_module.": torch.compile(checkpoint_wrapper(mlp())),
        "net.": mlp(),
    }
    for prefix, net in wrapped.items():
        assert isinstance(net, nn.Module)
        sharding = plan(module(net=net), *rules)
        assert {n for n, e in sharding.parameters.items() if not e.layout.is_replicated} == {
            f"{prefix}{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight")
        }


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("_orig_mod.fc.weight", "fc.weight"),
        ("net._orig_mod.layers.0._checkpoint_wrapped_module.fc.weight", "net.layers.0.fc.weight"),
        ("net.q_proj.base_layer.weight", "net.q_proj.weight"),
        ("net.fc.weight", "net.fc.weight"),
        ("net.q_proj.base_layer.bias", "net.q_proj.bias"),
        ("net.score.original_module.weight", "net.score.weight"),
        ("net.score.modules_to_save.default.weight", "net.score.weight"),
        ("net.q_proj.base_layer", "net.q_proj"),
        ("database_layer.fc.weight", "database_layer.fc.weight"),
        ("net.my_orig_mod.fc.weight", "net.my_orig_mod.fc.weight"),
    ],
)
def test_clean_name_removes_whole_names_of_wrappers(name: str, clean: str) -> None:
    assert clean_name(name) == clean
