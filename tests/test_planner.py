"""From rules and a model to a plan: what is cut and how, what is refused, and in which words."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_autotp import (
    AutoTPPresets,
    PartitionType,
    ShardingPlan,
    TPConfig,
    TPLayerSpec,
    TPTrainingConfig,
    make_plan,
)
from lightning_autotp.plan import LocalAttribute, ParameterPlan
from lightning_autotp.planner import clean_name
from tests.models import packed_transformer, transformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 65,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
BLOOM = {"num_hidden_layers": None, "n_layer": 2, "num_attention_heads": None, "n_head": 8, "num_key_value_heads": None}
LATENT = {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}


def hf(family: str, **options: Any) -> PreTrainedModel:
    """A causal language model of transformers on the meta device; an option of None is left out of its config."""
    import transformers

    given = {name: value for name, value in (SMALL | options).items() if value is not None}
    config = getattr(transformers, f"{family}Config")(**given)
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config)
    return model


def rule(kind: str, *names: str, **options: Any) -> dict[str, Any]:
    return {"patterns": [rf"(?:.*\.)?{name}\.weight$" for name in names], "partition_type": kind, **options}


def column(*names: str, **options: Any) -> dict[str, Any]:
    return rule("column", *names, **options)


def row(*names: str, **options: Any) -> dict[str, Any]:
    return rule("row", *names, **options)


def skip(*names: str, **options: Any) -> dict[str, Any]:
    return rule("skip", *names, **options)


def plan(
    model: nn.Module, *rules: dict[str, Any], tp_size: int = 2, preset: str | None = None, **options: Any
) -> ShardingPlan:
    """The plan by the user's rules, its warnings kept off the screen (they are in the plan)."""
    config = TPTrainingConfig(
        autotp_size=tp_size,
        preset_model=preset,
        partition_config={"layer_specs": list(rules), **options} if rules or options else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_plan(model, config)


def module(**children: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(children)


def set_attributes(owner: nn.Module, **attributes: Any) -> None:
    """What a class would set in its __init__."""
    for name, value in attributes.items():
        setattr(owner, name, value)


def mlp(hidden: int = 8, width: int = 16, bias: bool = True) -> nn.ModuleDict:
    return module(fc1=nn.Linear(hidden, width, bias), fc2=nn.Linear(width, hidden, bias))


MLP_RULES = (column("fc1"), row("fc2"))


class Attention(nn.Module):
    """Projections to heads of 8 features; ``attributes`` are what the module keeps of its head structure."""

    def __init__(self, heads: int, kv_heads: int, bias: bool = False, **attributes: Any) -> None:
        super().__init__()
        hidden = heads * 8
        self.q_proj = nn.Linear(hidden, hidden, bias)
        self.k_proj = nn.Linear(hidden, kv_heads * 8, bias)
        self.v_proj = nn.Linear(hidden, kv_heads * 8, bias)
        self.o_proj = nn.Linear(hidden, hidden, bias)
        set_attributes(self, **attributes)


ATTENTION_RULES = (column("[qkv]_proj"), row("o_proj"))


def widths(sharding: ShardingPlan, *names: str) -> list[tuple[int, ...]]:
    return [sharding.parameters[name].layout.widths for name in names]


def cut_names(sharding: ShardingPlan) -> set[str]:
    """The weights that are cut, layer numbers folded."""
    return {r.name for r in sharding.explain() if r.cut != "whole" and not r.name.endswith("bias")}


def whole_names(sharding: ShardingPlan) -> set[str]:
    return {r.name for r in sharding.explain() if r.cut == "whole"}


def sources(sharding: ShardingPlan, names: Iterable[str]) -> list[str]:
    return [sharding.parameters[name].source for name in names]


# -- where rules come from, and which one decides ---------------------------------------------------------------------


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


def test_style_of_the_models_own_plan_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cuts 'model\.layers\.\*\.mlp\.experts\.gate_up_proj' in style") as caught:
        plan(hf("Qwen3Moe", num_experts=4, moe_intermediate_size=16, head_dim=8))
    assert "'packed_colwise'" in str(caught.value)
    assert "partition_config" in str(caught.value)


def test_error_says_what_was_tried_where_no_rules_are_found() -> None:
    with pytest.raises(ValueError, match="no rules to cut Transformer") as caught:
        plan(transformer())
    for part in ("no partition_config", "no preset_model", "no module has a model type", "no plan of its own"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="model types 'stablelm' have no preset"):
        plan(hf("StableLm"))


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
        ("database_layer.fc.weight", "database_layer.fc.weight"),
        ("net.my_orig_mod.fc.weight", "net.my_orig_mod.fc.weight"),
    ],
)
def test_clean_name_removes_whole_names_of_wrappers(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_bias_follows_its_weight() -> None:
    sharding = plan(mlp(width=5), *MLP_RULES)
    assert widths(sharding, "fc1.weight", "fc1.bias", "fc2.weight") == [(3, 2)] * 3
    row_bias = sharding.parameters["fc2.bias"]
    assert row_bias.layout.is_replicated and row_bias.layout.shape == (8,)
    assert "once" in row_bias.reason
    assert not row_bias.grad_allreduce, "every rank adds it to the sum and sees its whole gradient"


def test_bias_follows_its_weight_where_the_model_is_one_linear() -> None:
    sharding = plan(nn.Linear(4, 6), {"patterns": ["weight$"], "gather_output": True})
    assert widths(sharding, "weight", "bias") == [(3, 3), (3, 3)]


def test_bias_of_a_skipped_weight_stays_whole() -> None:
    sharding = plan(module(net=mlp(), out=nn.Linear(8, 8)), *MLP_RULES, skip("out", grad_allreduce=True))
    assert [sharding.parameters[f"out.{which}"].layout.is_replicated for which in ("weight", "bias")] == [True, True]
    assert [sharding.parameters[f"out.{which}"].grad_allreduce for which in ("weight", "bias")] == [True, True]


# -- geometry ---------------------------------------------------------------------------------------------------------


def test_vocabulary_that_does_not_divide_is_cut_unevenly() -> None:
    sharding = plan(hf("Llama"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert widths(sharding, name) == [(33, 32)]
        assert sharding.parameters[name].layout.dim == 0


HEAD_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": ("head_dim",),
    "number": ("num_heads",),
    "numbers": ("n_heads", "n_kv_heads"),
    "all": ("head_dim", "num_attention_heads", "num_key_value_heads"),
}


@pytest.mark.parametrize("kept", HEAD_ATTRIBUTES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size"),
    [(6, 6, 4), (5, 5, 2), (8, 4, 2), (8, 4, 3), (12, 4, 3), (9, 3, 2), (8, 8, 8), (8, 2, 2)],
)
def test_attention_is_cut_in_whole_heads_with_their_groups(heads: int, kv_heads: int, tp_size: int, kept: str) -> None:
    numbers = {name: kv_heads if "kv" in name or "key" in name else heads for name in HEAD_ATTRIBUTES[kept]}
    attention = Attention(heads, kv_heads, bias=True, **(numbers | ({"head_dim": 8} if "head_dim" in numbers else {})))
    sharding = plan(module(attn=attention), *ATTENTION_RULES, tp_size=tp_size)
    assert sharding.blockers == ()
    q, k, v, o = (sharding.parameters[f"attn.{name}_proj.weight"].layout for name in "qkvo")
    group = heads // kv_heads
    assert q.parts == o.parts
    assert k.parts == v.parts
    assert q.parts == tuple(tuple((s * group, n * group) for s, n in part) for part in k.parts)
    assert all(length % 8 == 0 for length in k.widths)
    assert max(k.widths) - min(k.widths) <= 8
    assert sharding.parameters["attn.q_proj.bias"].layout.parts == q.parts


def test_six_heads_over_four_ranks() -> None:
    sharding = plan(module(attn=Attention(6, 6, num_heads=6)), *ATTENTION_RULES, tp_size=4)
    names = [f"attn.{name}_proj.weight" for name in "qkvo"]
    assert widths(sharding, *names) == [(16, 16, 8, 8)] * 4


def test_heads_are_read_from_the_config_where_the_module_has_only_their_number() -> None:
    model = module(attn=Attention(6, 3, num_heads=6))
    numbers = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    set_attributes(model, config=SimpleNamespace(model_type="mine", **numbers))
    assert widths(plan(model, *ATTENTION_RULES), "attn.q_proj.weight", "attn.k_proj.weight") == [(32, 16), (16, 8)]


def test_linears_that_are_no_attention_are_cut_by_single_features() -> None:
    assert widths(plan(mlp(width=10), *MLP_RULES, tp_size=4), "fc1.weight", "fc2.weight") == [(3, 3, 2, 2)] * 2


@pytest.mark.parametrize("of", ["module", "config", "bloom"])
def test_interleaved_projection_is_cut_in_the_heads_of_the_row_that_closes_it(of: str) -> None:
    """A fused projection that keeps q, k and v of each head together, as Bloom's and GPT-NeoX's."""
    if of == "bloom":
        sharding = plan(hf("Bloom", **(BLOOM | {"hidden_size": 48, "n_head": 6})), tp_size=4)
        path = "transformer.h.0.self_attention"
    else:
        attention = module(query_key_value=nn.Linear(48, 3 * 48), dense=nn.Linear(48, 48))
        set_attributes(attention, num_heads=6, head_dim=8)
        if of == "config":
            set_attributes(attention, config=SimpleNamespace(model_type="x", hidden_size=48, num_attention_heads=6))
        sharding, path = (
            plan(module(attn=attention), column("query_key_value", shape=(-1, -1)), row("dense"), tp_size=4),
            "attn",
        )
    assert widths(sharding, f"{path}.dense.weight") == [(16, 16, 8, 8)]
    assert widths(sharding, f"{path}.query_key_value.weight") == [(48, 48, 24, 24)]


@pytest.mark.parametrize(("heads", "kv_heads", "tp_size"), [(8, 2, 4), (8, 1, 4), (12, 2, 4), (8, 4, 8), (8, 1, 8)])
def test_ranks_share_key_heads_where_they_outnumber_them(heads: int, kv_heads: int, tp_size: int) -> None:
    attention = Attention(heads, kv_heads, bias=True, num_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    sharding = plan(module(layers=nn.ModuleList([attention])), *ATTENTION_RULES, tp_size=tp_size)
    q, k, v = (sharding.parameters[f"layers.0.{name}_proj.weight"].layout for name in "qkv")
    assert k.overlaps and v.overlaps and not q.overlaps
    assert k.parts == v.parts
    assert q.widths == (heads // tp_size * 8,) * tp_size
    group = heads // kv_heads
    for rank in range(tp_size):
        (q_start, q_length), (k_start, k_length) = q.parts[rank][0], k.parts[rank][0]
        needed = {head // group for head in range(q_start // 8, (q_start + q_length) // 8)}
        assert needed == set(range(k_start // 8, (k_start + k_length) // 8)), "each rank holds the keys of its queries"
    blocked = " ".join(sharding.blockers)
    for name in ("layers.*.k_proj.weight", "layers.*.v_proj.weight"):
        assert name in blocked
    assert "q_proj" not in blocked
    assert f"at most {kv_heads}" in blocked
    assert any("shared by ranks" in str(r) for r in sharding.explain() if "k_proj" in r.name)


@pytest.mark.parametrize(("heads", "kv_heads", "tp_size"), [(6, 2, 4), (12, 4, 6), (9, 3, 6)])
def test_heads_that_ranks_cannot_share_alike_are_refused(heads: int, kv_heads: int, tp_size: int) -> None:
    attention = Attention(heads, kv_heads, num_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    with pytest.raises(ValueError, match=rf"cannot be shared by {tp_size} ranks") as caught:
        plan(module(attn=attention), *ATTENTION_RULES, tp_size=tp_size)
    assert "attn.q_proj.weight" in str(caught.value)
    assert f"at most {kv_heads}" in str(caught.value)


@pytest.mark.parametrize("width", [2, 3])
def test_rank_that_would_hold_nothing_is_refused_with_a_size_that_works(width: int) -> None:
    model = mlp(width=width)
    with pytest.raises(
        ValueError, match=f"{4 - width} of them would hold nothing .* size of at most {width}"
    ) as caught:
        plan(model, *MLP_RULES, tp_size=4)
    assert "fc1.weight" in str(caught.value)
    assert widths(plan(model, *MLP_RULES, tp_size=width), "fc1.weight") == [(1,) * width]


def parts_of(layout_owner: ParameterPlan, full: Tensor) -> list[Tensor]:
    return [layout_owner.layout.shard(full, rank) for rank in range(layout_owner.layout.tp_size)]


@pytest.mark.parametrize(
    ("shape", "options", "sizes"),
    [
        ((2, -1), {}, [12, 12]),
        ((3, -1), {}, [8, 8, 8]),
        (((16, 4, 4), -1), {}, [16, 4, 4]),
        ([[20, 4], -1], {}, [20, 4]),
        ((3, 2, -1), {"partition_dim": 1}, [4] * 6),
        ((2, (8, 4), -1), {"partition_dim": 1}, [8, 4, 8, 4]),
        ((2, 3, -1, 8), {"partition_dim": 2}, [4] * 6),
    ],
)
def test_parts_of_a_fused_weight_are_cut_one_by_one(shape: Any, options: dict[str, Any], sizes: list[int]) -> None:
    model = module(fused=nn.Linear(8, 24), out=nn.Linear(12, 8))
    sharding = plan(model, column("fused", shape=shape, **options), row("out"))
    for which in ("weight", "bias"):
        full = model["fused"].get_parameter(which).detach()
        have = parts_of(sharding.parameters[f"fused.{which}"], full)
        for rank in (0, 1):
            assert torch.equal(have[rank], torch.cat([part.chunk(2)[rank] for part in full.split(sizes)]))


def test_parts_of_a_fused_input_are_cut_one_by_one() -> None:
    model = module(a=nn.Linear(4, 24), out=nn.Linear(24, 8))
    sharding = plan(model, column("a", shape=(2, -1)), row("out", shape=(-1, (16, 8))))
    full = model["out"].get_parameter("weight").detach()
    have = parts_of(sharding.parameters["out.weight"], full)
    for rank in (0, 1):
        assert torch.equal(have[rank], torch.cat([p.chunk(2, 1)[rank] for p in full.split([16, 8], 1)], 1))
    assert sharding.parameters["out.bias"].layout.is_replicated


@pytest.mark.parametrize("shape", [(3, -1), ((48, 48, 48), -1)])
def test_equal_packed_projections_are_cut_in_whole_heads(shape: Any) -> None:
    sharding = plan(
        packed_transformer(heads=6, hidden=48),
        column("qkv_proj", shape=shape),
        row("o_proj"),
        column("gate_up_proj", shape=(2, -1)),
        row("down_proj"),
        tp_size=4,
    )
    qkv = sharding.parameters["layers.1.self_attn.qkv_proj.weight"].layout
    assert qkv.widths == (48, 48, 24, 24)
    assert qkv.parts[3] == ((40, 8), (88, 8), (136, 8))
    assert widths(sharding, "layers.1.self_attn.o_proj.weight") == [(16, 16, 8, 8)]


def test_unequal_packed_projections_are_cut_with_their_groups() -> None:
    sharding = plan(
        packed_transformer(heads=8, kv_heads=4), column("qkv_proj", shape=((64, 32, 32), -1)), row("o_proj"), tp_size=3
    )
    qkv, o = (sharding.parameters[f"layers.0.self_attn.{name}_proj.weight"].layout for name in ("qkv", "o"))
    assert o.widths == (32, 16, 16)
    assert qkv.parts == (((0, 32), (64, 16), (96, 16)), ((32, 16), (80, 8), (112, 8)), ((48, 16), (88, 8), (120, 8)))


def test_named_sizes_are_resolved_from_the_models_config() -> None:
    """Phi-3 packs q, k and v in one projection, and keeps the number of query heads in its config only."""
    sharding = plan(hf("Phi3"))
    qkv = sharding.parameters["model.layers.0.self_attn.qkv_proj.weight"].layout
    assert qkv.shape == (128, 64)
    assert qkv.parts == (((0, 32), (64, 16), (96, 16)), ((32, 32), (80, 16), (112, 16)))
    gate_up = sharding.parameters["model.layers.0.mlp.gate_up_proj.weight"].layout
    assert gate_up.parts == (((0, 48), (96, 48)), ((48, 48), (144, 48)))


def test_named_sizes_without_head_counts_are_refused() -> None:
    model = module(fused=nn.Linear(8, 24), out=nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"^fused\.weight .*shape: .* needs head counts"):
        plan(model, column("fused", shape=(("q", "kv", "kv"), -1)), row("out"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            column("fc1", shape=(3, -1)),
            r"^fc1\.weight \(rule .*, column, from user\): shape: 16 features do not divide",
        ),
        (column("fc1", shape=((8, 4), -1)), r"^fc1\.weight .*add up to 12, but the weight has 16"),
        (row("fc2", shape=(7, 2)), r"^fc2\.weight .*first entry .* not the weight's 8 output features"),
    ],
)
def test_shape_that_a_weight_does_not_have_is_refused_with_its_name(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(mlp(), spec, *MLP_RULES)


# -- embeddings, tied and shared parameters ---------------------------------------------------------------------------


def language_model(tied: bool = False, vocab: int = 65) -> nn.ModuleDict:
    model = module(embed=nn.Embedding(vocab, 8), net=mlp(), head=nn.Linear(8, vocab, bias=False))
    if tied:
        model["head"].weight = model["embed"].weight
    return model


def test_row_cuts_the_vocabulary_of_an_embedding() -> None:
    entry = plan(language_model(), row("embed"), *MLP_RULES).parameters["embed.weight"]
    assert (entry.kind, entry.layout.dim, entry.layout.widths) == ("vocabulary", 0, (33, 32))
    assert entry.communication == "forward: all-reduce of the output"


def test_column_with_gather_cuts_the_features_of_an_embedding() -> None:
    entry = plan(language_model(), column("embed", gather_output=True), *MLP_RULES).parameters["embed.weight"]
    assert (entry.kind, entry.layout.dim, entry.layout.widths, entry.gather_output) == ("column", 1, (4, 4), True)
    assert "forward: all-gather of the output" in entry.communication
    assert "backward" not in entry.communication, "token numbers have no gradient to reduce"


def test_column_without_gather_is_refused_for_an_embedding() -> None:
    with pytest.raises(ValueError, match=r"^embed\.weight .*gather_output: true.*'row'"):
        plan(language_model(), column("embed"), *MLP_RULES)


def test_shape_is_refused_for_an_embedding() -> None:
    with pytest.raises(ValueError, match=r"^embed\.weight .*no fused parts; leave out `shape`"):
        plan(language_model(), row("embed", shape=(-1, 2)), *MLP_RULES)


@pytest.mark.parametrize("rules", [(row("embed"), column("head", gather_output=True)), (skip("embed", "head"),), ()])
def test_tied_embedding_and_head_agree(rules: tuple[dict[str, Any], ...]) -> None:
    sharding = plan(language_model(tied=True), *rules, *MLP_RULES)
    assert sharding.layouts["embed.weight"] == sharding.layouts["head.weight"]
    assert sharding.layouts["embed.weight"].is_replicated == (len(rules) != 2)


@pytest.mark.parametrize(
    "rules",
    [
        (row("embed"),),
        (column("head", gather_output=True),),
        (column("embed", gather_output=True), column("head", gather_output=True)),
        (row("embed"), skip("head")),
    ],
)
def test_tied_embedding_and_head_that_disagree_are_refused_by_name(rules: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(ValueError, match="are one parameter, but") as caught:
        plan(language_model(tied=True), *rules, *MLP_RULES)
    for part in ("embed.weight", "head.weight", "gather_output"):
        assert part in str(caught.value)
    assert cut_names(plan(language_model(tied=False), *rules, *MLP_RULES)) >= {"net.fc1.weight", "net.fc2.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_llama_with_a_tied_head_is_planned(tied: bool) -> None:
    sharding = plan(hf("Llama", tie_word_embeddings=tied))
    assert sharding.layouts["lm_head.weight"] == sharding.layouts["model.embed_tokens.weight"]
    assert sharding.warnings == sharding.blockers == ()


def test_module_registered_twice_is_planned_under_both_names() -> None:
    shared = mlp()
    sharding = plan(module(first=shared, second=shared), *MLP_RULES)
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert sharding.layouts[f"first.{name}"] == sharding.layouts[f"second.{name}"]
    assert [len(group) for group in sharding.siblings] == [1], "one module, one group"


def test_module_registered_twice_and_cut_under_one_name_is_refused() -> None:
    shared = mlp()
    with pytest.raises(ValueError, match=r"first\.fc1\.weight and second\.fc1\.weight are one parameter, but"):
        plan(module(first=shared, second=shared), column(r"first\.fc1"), row(r"first\.fc2"))


# -- what is refused --------------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Plain(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class ScaledEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_linear_with_a_forward_of_its_own_is_refused_by_name() -> None:
    model = module(net=module(fc1=Doubled(8, 16), fc2=nn.Linear(16, 8)), other=mlp())
    with pytest.raises(ValueError, match=r"^net\.fc1\.weight \(rule .*\): Doubled has a forward of its own"):
        plan(model, *MLP_RULES)
    assert "net.fc1.weight" in whole_names(plan(model, skip(r"net\.fc."), *MLP_RULES)), "the fix of the message works"


def test_linear_whose_subclass_changes_nothing_is_cut() -> None:
    model = module(fc1=Plain(8, 16), fc2=nn.Linear(16, 8))
    assert cut_names(plan(model, *MLP_RULES)) == {"fc1.weight", "fc2.weight"}


def test_embedding_with_a_forward_of_its_own_is_refused_by_name() -> None:
    model = module(embed=ScaledEmbedding(65, 8), net=mlp())
    with pytest.raises(ValueError, match=r"^embed\.weight .*ScaledEmbedding has a forward of its own"):
        plan(model, row("embed"), *MLP_RULES)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_parametrized_weight_is_refused_by_name(parametrize: Any, bias: bool) -> None:
    model = module(net=mlp(bias=bias), other=mlp())
    parametrize(model.get_submodule("net.fc1"))
    with pytest.raises(ValueError, match=r"^net\.fc1\..*parametrized"):
        plan(model, *MLP_RULES)
    assert "other.fc1.weight" in cut_names(plan(model, skip(r"net\.fc.*"), *MLP_RULES))


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_whose_option_a_cut_would_change_is_refused(option: dict[str, Any]) -> None:
    model = module(embed=nn.Embedding(65, 8, **option), net=mlp())
    with pytest.raises(ValueError, match=rf"^embed\.weight .*`{next(iter(option))}` cannot be cut exactly"):
        plan(model, row("embed"), *MLP_RULES)
    assert "embed.weight" in whole_names(plan(model, skip("embed"), *MLP_RULES))


@pytest.mark.parametrize(
    "spec",
    [row(r"self_attn\.out_proj"), {"patterns": [r".*in_proj_weight$"]}, column(r"self_attn\.out_proj")],
    ids=["out row", "in column", "out column"],
)
def test_projection_inside_multihead_attention_is_refused_by_name(spec: dict[str, Any]) -> None:
    model = module(layer=nn.TransformerEncoderLayer(16, 2, 32))
    with pytest.raises(ValueError, match=r"^layer\.self_attn\.(?:out_proj\.|in_proj_)weight .*MultiheadAttention"):
        plan(model, spec, column("linear1"), row("linear2"))


def test_multihead_attention_that_no_rule_matches_stays_whole() -> None:
    sharding = plan(module(layer=nn.TransformerEncoderLayer(16, 2, 32)), column("linear1"), row("linear2"))
    assert cut_names(sharding) == {"layer.linear1.weight", "layer.linear2.weight"}


def test_pattern_that_matches_a_norm_is_refused() -> None:
    model = module(net=mlp(), norm=nn.LayerNorm(8))
    with pytest.raises(
        ValueError, match=r"^norm\.weight \(rule .*, column.*: this is a parameter of LayerNorm"
    ) as caught:
        plan(model, *MLP_RULES, {"patterns": [".*"]})
    assert "narrow the pattern, or add a skip rule" in str(caught.value)
    sharding = plan(model, *MLP_RULES, {"patterns": [".*norm"], "partition_type": "skip"})
    assert sharding.parameters["norm.bias"].reason == "a skip rule"


def test_layer_of_another_kind_is_refused() -> None:
    model = module(net=mlp(), conv=nn.Conv1d(8, 8, 1))
    with pytest.raises(ValueError, match=r"^conv\.weight .*a parameter of Conv1d, and only the weights of nn\.Linear"):
        plan(model, *MLP_RULES, column("conv"))


def test_layer_that_peft_has_wrapped_blocks_setup_but_not_the_plan() -> None:
    model = module(fc1=module(base_layer=nn.Linear(8, 16)), fc2=nn.Linear(16, 8))
    sharding = plan(model, *MLP_RULES)
    assert not sharding.layouts["fc1.base_layer.weight"].is_replicated
    assert any("fc1.base_layer.weight" in blocker and "PEFT" in blocker for blocker in sharding.blockers)


@pytest.mark.parametrize("rules", [(), (skip("fc1", "fc2"),), (column("fc9"),)])
def test_cutting_nothing_is_refused(rules: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(ValueError, match="^nothing of ModuleDict is cut") as caught:
        plan(mlp(), *rules, use_default_specs=True)
    assert ("an empty partition_config" in str(caught.value)) == (not rules)
    assert "'fc" in str(caught.value), "the message has an example of a name"


def test_preset_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing of ModuleDict is cut: no rule \(preset llama\)"):
        plan(mlp(), preset="llama")


@pytest.mark.parametrize("path", ["", "net"])
def test_column_that_no_row_closes_is_refused(path: str) -> None:
    model = module(net=mlp()) if path else mlp()
    with pytest.raises(ValueError, match=r"fc1\.weight: a column cut that no row cut closes") as caught:
        plan(model, column("fc1"))
    assert "partition_type 'row'" in str(caught.value)
    assert "gather_output: true" in str(caught.value)
    assert plan(model, column("fc1", gather_output=True)), "the fix of the message works"


def test_row_with_no_cut_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"net\.fc2\.weight: a row cut whose input no column cut makes") as caught:
        plan(module(net=mlp()), row("fc2"))
    assert "partition_type 'column'" in str(caught.value)


def test_gathered_column_opens_no_row() -> None:
    with pytest.raises(ValueError, match=r"fc2\.weight: a row cut whose input no column cut makes"):
        plan(mlp(), column("fc1", gather_output=True), row("fc2"))


def test_refusal_of_an_open_cut_folds_layer_numbers() -> None:
    with pytest.raises(ValueError, match=r"^layers\.\*\.self_attn\.q_proj\.weight: a column cut") as caught:
        plan(transformer(), column("q_proj"))
    assert "layers.0" not in str(caught.value)


def test_column_is_not_closed_by_a_row_of_another_branch() -> None:
    """q, k and v feed o_proj and gate and up feed down_proj: half of one and half of the other are two open cuts."""
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight.*a column cut that no row cut closes"):
        plan(transformer(), column("[qkv]_proj"), row("down_proj"))


def test_column_is_not_closed_by_a_row_of_another_layer() -> None:
    with pytest.raises(ValueError, match=r"a column cut that no row cut closes"):
        plan(transformer(), column(r"layers\.0\.self_attn\.[qkv]_proj"), row(r"layers\.1\.self_attn\.o_proj"))


def test_column_and_row_may_lie_in_submodules_of_one_module() -> None:
    model = module(up=module(fc1=nn.Linear(8, 16)), act=nn.GELU(), down=module(fc2=nn.Linear(16, 8)))
    assert cut_names(plan(model, *MLP_RULES)) == {"up.fc1.weight", "down.fc2.weight"}
    assert plan(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), column("0"), row("2"))


# -- warnings and strict mode -----------------------------------------------------------------------------------------

UNINTENDED = {
    "unmatched linear": (
        module(net=mlp(), extra=nn.Linear(2, 2)),
        MLP_RULES,
        r"no rule matches the linear layers extra\.weight; every rank holds them whole",
    ),
    "low coverage": (
        module(net=mlp(), embed=nn.Embedding(1000, 8)),
        MLP_RULES,
        r"only 3% of the model's weights is cut",
    ),
    "rule without a match": (
        mlp(),
        (*MLP_RULES, column("fc9")),
        r"partition_config: the rule \[.*fc9.*\] matches no parameter",
    ),
    "rule of other models": (
        mlp(),
        (*MLP_RULES, column("fc1", model_types=["llama"])),
        r"partition_config: the rule \[.*fc1.*\] matches no parameter",
    ),
}


@pytest.mark.parametrize("case", UNINTENDED)
def test_unintended_looking_plan_warns(case: str) -> None:
    model, rules, message = UNINTENDED[case]
    config = TPTrainingConfig(autotp_size=2, partition_config={"layer_specs": list(rules)})
    with pytest.warns(UserWarning, match=message) as caught:
        sharding = make_plan(model, config)
    assert [str(w.message) for w in caught] == list(sharding.warnings)
    assert len(sharding.warnings) == 1


@pytest.mark.parametrize("case", UNINTENDED)
def test_unintended_looking_plan_is_refused_in_strict_mode(case: str) -> None:
    model, rules, message = UNINTENDED[case]
    with pytest.raises(ValueError, match=f"^strict_mode: .*{message}"):
        plan(model, *rules, strict_mode=True)


def test_strict_mode_lists_everything_at_once() -> None:
    model = module(net=mlp(), extra=nn.Linear(100, 100))
    with pytest.raises(ValueError, match="^strict_mode: ") as caught:
        plan(model, *MLP_RULES, column("fc9"), strict_mode=True)
    for part in ("fc9", "extra.weight", "only 2% of the model's weights"):
        assert part in str(caught.value)


def test_plan_without_surprises_is_silent_and_passes_strict_mode() -> None:
    model = module(net=mlp(), extra=nn.Linear(2, 2), norm=nn.LayerNorm(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = TPTrainingConfig(
            autotp_size=2, partition_config={"layer_specs": [*MLP_RULES, skip("extra")], "strict_mode": True}
        )
        assert make_plan(model, config).warnings == ()


def test_rules_of_a_preset_may_match_nothing_in_strict_mode() -> None:
    sharding = plan(hf("DeepseekV2", **LATENT), preset="deepseek_v2", strict_mode=True)
    assert sharding.warnings == ()


def test_many_unmatched_layers_are_named_in_short() -> None:
    model = module(net=mlp(80, 160), **{f"extra{i}": nn.Linear(2, 2) for i in range(9)})
    assert any("extra5.weight and 3 more" in warning for warning in plan(model, *MLP_RULES).warnings)


# -- what the plan carries --------------------------------------------------------------------------------------------


def test_head_counts_that_modules_keep_become_local() -> None:
    attention = Attention(6, 3, n_heads=6, n_kv_heads=3, head_dim=8)
    sharding = plan(module(block=module(attn=attention)), *ATTENTION_RULES)
    assert set(sharding.attributes) == {
        LocalAttribute("block.attn", "n_heads", 6, (4, 2)),
        LocalAttribute("block.attn", "n_kv_heads", 3, (2, 1)),
    }


def test_head_count_of_uneven_heads() -> None:
    sharding = plan(module(attn=Attention(6, 6, n_heads=6)), *ATTENTION_RULES, tp_size=4)
    assert sharding.attributes == (LocalAttribute("attn", "n_heads", 6, (2, 2, 1, 1)),)


def test_head_count_of_shared_key_heads() -> None:
    attention = Attention(8, 2, num_heads=8, num_kv_heads=2, head_dim=8)
    sharding = plan(module(attn=attention), *ATTENTION_RULES, tp_size=4)
    assert LocalAttribute("attn", "num_kv_heads", 2, (1, 1, 1, 1)) in sharding.attributes


def test_head_count_of_a_fused_projection_becomes_local() -> None:
    sharding = plan(hf("Bloom", **BLOOM))
    path = "transformer.h.0.self_attention"
    assert LocalAttribute(path, "num_heads", 8, (4, 4)) in sharding.attributes


@pytest.mark.parametrize(
    "rules", [(skip("[qkv]_proj", "o_proj"),), (), (column("[qkv]_proj", gather_output=True), skip("o_proj"))]
)
def test_head_counts_of_modules_that_see_all_heads_stay(rules: tuple[dict[str, Any], ...]) -> None:
    model = module(attn=Attention(4, 4, n_heads=4), mlp=mlp())
    assert plan(model, *rules, *MLP_RULES).attributes == ()


def test_siblings_are_columns_that_may_read_one_input() -> None:
    sharding = plan(transformer(), *ATTENTION_RULES, column("gate_proj", "up_proj"), row("down_proj"))
    layer = [f"layers.{i}" for i in (0, 1)]
    attention = {tuple(f"{at}.self_attn.{name}_proj" for name in "qkv") for at in layer}
    assert set(sharding.siblings) == attention | {tuple(f"{at}.mlp.{n}_proj" for n in ("gate", "up")) for at in layer}


def test_columns_of_another_input_size_are_no_siblings() -> None:
    model = module(q=nn.Linear(8, 16), k=nn.Linear(4, 16), o=nn.Linear(16, 8))
    assert set(plan(model, column("q", "k"), row("o")).siblings) == {("q",), ("k",)}


def test_every_parameter_has_a_plan() -> None:
    model = transformer(bias=True, tied=True)
    sharding = plan(model, *ATTENTION_RULES)
    assert set(sharding.parameters) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert sharding.layouts == {name: entry.layout for name, entry in sharding.parameters.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert sharding.layouts[name].shape == tuple(parameter.shape)
        assert sharding.parameters[name].name == name
        assert model.get_submodule(sharding.parameters[name].module) is not None


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        path: (
            type(m),
            {key: id(value) for key, value in vars(m).items()},
            {n: id(p) for n, p in m._parameters.items()},
        )
        for path, m in model.named_modules()
    }


def test_planning_leaves_the_model_as_it_is() -> None:
    for model in (hf("Llama"), transformer(tied=True), module(attn=Attention(4, 2, n_heads=4))):
        before, state = snapshot(model), {n: p.clone() for n, p in model.named_parameters() if not p.is_meta}
        plan(model, *ATTENTION_RULES)
        assert snapshot(model) == before
        assert all(torch.equal(model.get_parameter(name), value) for name, value in state.items())


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_size_is_the_configs_where_none_is_given() -> None:
    config = TPTrainingConfig(tp=TPConfig(tp_size=4), partition_config={"layer_specs": list(MLP_RULES)})
    assert make_plan(mlp(), config).tp_size == 4
    assert make_plan(mlp(), config, tp_size=2).tp_size == 2
    assert make_plan(mlp(), config, 8).layouts["fc1.weight"].widths == (2,) * 8


def test_size_of_one_cuts_nothing_and_needs_no_rules() -> None:
    for config, size in ((TPTrainingConfig(), None), (TPTrainingConfig(autotp_size=4), 1)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sharding = make_plan(mlp(), config, size)
        assert sharding.tp_size == 1
        assert all(layout.is_replicated for layout in sharding.layouts.values())


@pytest.mark.parametrize("size", [0, -2])
def test_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"^tp_size: {size} is not a positive number of ranks"):
        make_plan(mlp(), TPTrainingConfig(autotp_size=2), size)


def llama_405b() -> PreTrainedModel:
    return hf(
        "Llama",
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    )


def test_a_model_of_405_billion_parameters_is_planned_in_seconds() -> None:
    model = llama_405b()
    started = time.monotonic()
    sharding = plan(model, tp_size=8)
    assert time.monotonic() - started < 10
    assert sharding.warnings == sharding.blockers == ()
    full = sum(prod(layout.shape) for layout in sharding.layouts.values())
    assert full == sum(p.numel() for p in model.parameters()) > 405e9
    for rank in (0, 7):
        local = sum(prod(layout.local_shape(rank)) for layout in sharding.layouts.values())
        assert local == pytest.approx(full / 8, rel=1e-3)
    assert len(sharding.explain()) == 12
    blocked = plan(model, tp_size=16).blockers
    assert len(blocked) == 2, "one for the keys and one for the values of all layers"


# -- the plan as people see it ----------------------------------------------------------------------------------------


def test_explain_has_one_row_per_pattern_of_names() -> None:
    sharding = plan(hf("Llama", num_hidden_layers=3))
    rows = {r.name: r for r in sharding.explain()}
    assert len(rows) == len(sharding.explain()) == 12
    q = rows["model.layers.*.self_attn.q_proj.weight"]
    assert (q.count, q.shape, q.local_shapes) == (3, (64, 64), ((32, 64),))
    assert (q.cut, q.source) == ("column, dim 0", "preset llama")
    assert "self_attn" in q.rule
    assert q.communication == "backward: all-reduce of the input's gradient"
    assert rows["model.layers.*.mlp.down_proj.weight"].communication == "forward: all-reduce of the output"
    head = rows["lm_head.weight"]
    assert (head.count, head.local_shapes) == (1, ((33, 64), (32, 64)))
    assert "forward: all-gather of the output" in head.communication
    norm = rows["model.norm.weight"]
    assert (norm.cut, norm.local_shapes, norm.rule, norm.communication) == ("whole", ((64,),), "", "")
    assert norm.reason == "not a matrix, no rule matches"


@pytest.mark.parametrize("names", [("blocks.*.fc1.weight", "blocks"), ("*.fc1.weight", "")])
def test_explain_folds_layer_numbers_wherever_the_layers_lie(names: tuple[str, str]) -> None:
    layers = nn.ModuleList(mlp() for _ in range(12))
    sharding = plan(module(**{names[1]: layers}) if names[1] else layers, *MLP_RULES)
    assert {r.name: r.count for r in sharding.explain()}[names[0]] == 12


def test_explain_keeps_layers_apart_that_are_cut_differently() -> None:
    model = module(layers=nn.ModuleList([mlp(), mlp(width=32), mlp()]))
    sharding = plan(model, skip(r"layers\.2\.fc."), *MLP_RULES)
    fc1 = [r for r in sharding.explain() if r.name == "layers.*.fc1.weight"]
    assert [(r.count, r.shape, r.local_shapes) for r in fc1] == [
        (1, (16, 8), ((8, 8),)),
        (1, (32, 8), ((16, 8),)),
        (1, (16, 8), ((16, 8),)),
    ]


def test_text_of_a_plan_has_names_counts_shapes_and_reasons() -> None:
    model = module(layers=nn.ModuleList([mlp(), mlp()]), norm=nn.LayerNorm(8), extra=nn.Linear(2, 2))
    sharding = plan(model, column("fc1", shape=(2, -1)), row("fc2"))
    lines = str(sharding).splitlines()
    assert lines == [str(r) for r in sharding.explain()]
    by_name = {line.split()[0]: line for line in lines}
    assert set(by_name) == {r.name for r in sharding.explain()}
    first = by_name["layers.*.fc1.weight"]
    for part in (" x2 ", "[16, 8] -> [8, 8]", "column, dim 0 in 2 parts", r"user: (?:.*\.)?fc1\.weight$", "backward: "):
        assert part in first
    assert " x" not in by_name["norm.weight"]
    assert "no rule matches" in by_name["extra.weight"]


def test_text_of_a_plan_shows_each_ranks_shape_where_they_differ() -> None:
    assert "[5, 8] -> [2, 8] | [2, 8] | [1, 8]" in str(plan(mlp(width=5), *MLP_RULES, tp_size=3))


# -- presets ----------------------------------------------------------------------------------------------------------

ATTENTION_CUT = {f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkvo"}
MLP_CUT = {f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
PACKED_MLP_CUT = {f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate_up", "down")}
ENDS_CUT = {"model.embed_tokens.weight", "lm_head.weight"}
BLOOM_CUT = {
    f"transformer.h.*.{name}.weight"
    for name in ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
}
LATENT_CUT = {f"model.layers.*.self_attn.{name}_proj.weight" for name in ("q_b", "kv_b", "o")}
SHARED_EXPERTS_CUT = {f"model.layers.*.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}
PRESETS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "Llama": ("llama", {}, ATTENTION_CUT | MLP_CUT | ENDS_CUT),
    "Mistral": ("llama", {}, ATTENTION_CUT | MLP_CUT | ENDS_CUT),
    "Qwen2": ("qwen2", {}, ATTENTION_CUT | MLP_CUT | ENDS_CUT),
    "Glm": ("chatglm", {"head_dim": 8}, ATTENTION_CUT | PACKED_MLP_CUT | ENDS_CUT),
    "Glm4": ("chatglm", {"head_dim": 8}, ATTENTION_CUT | PACKED_MLP_CUT | ENDS_CUT),
    "Mixtral": ("mixtral", {"num_local_experts": 4}, ATTENTION_CUT | ENDS_CUT),
    "Phi3": (
        "phi3",
        {},
        {"model.layers.*.self_attn.qkv_proj.weight", "model.layers.*.self_attn.o_proj.weight"}
        | PACKED_MLP_CUT
        | ENDS_CUT,
    ),
    "Bloom": (
        "bloom",
        BLOOM,
        BLOOM_CUT | {"transformer.word_embeddings.weight", "lm_head.weight"},
    ),
    "DeepseekV2": ("deepseek_v2", LATENT, LATENT_CUT | MLP_CUT | SHARED_EXPERTS_CUT | ENDS_CUT),
    "DeepseekV3": (
        "deepseek_v2",
        LATENT | {"n_group": 2, "topk_group": 1},
        LATENT_CUT | MLP_CUT | SHARED_EXPERTS_CUT | ENDS_CUT,
    ),
}
NOT_EXACT_YET = {"Bloom", "DeepseekV2", "DeepseekV3", "Phi3"}


@pytest.mark.parametrize("named", [False, True], ids=["detected", "named"])
@pytest.mark.parametrize("family", PRESETS)
def test_preset_cuts_its_transformers_class(family: str, named: bool) -> None:
    preset, options, cut = PRESETS[family]
    model = hf(family, **options)
    sharding = plan(model, preset=preset if named else None)
    assert cut_names(sharding) >= cut
    assert {entry.source for entry in sharding.parameters.values() if entry.rule} == {f"preset {preset}"}
    assert bool(sharding.blockers) == (family in NOT_EXACT_YET)
    assert all(repr(model.config.model_type) in blocker for blocker in sharding.blockers)


def test_every_preset_is_tried_on_a_class_of_transformers() -> None:
    assert {preset for preset, _, _ in PRESETS.values()} == set(AutoTPPresets.names())


def test_names_of_the_presets() -> None:
    assert set(AutoTPPresets.names()) == {"llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"}


@pytest.mark.parametrize("name", AutoTPPresets.names())
def test_preset_has_rules_without_a_config(name: str) -> None:
    rules = AutoTPPresets.get_preset(name)
    assert AutoTPPresets.get_preset(name.upper()) == rules
    kinds = {spec.partition_type for spec in rules.layer_specs}
    assert {PartitionType.COLUMN, PartitionType.ROW} <= kinds
    assert rules.use_default_specs and not rules.strict_mode


def shapes(specs: list[TPLayerSpec]) -> list[Any]:
    return [spec.shape for spec in specs if spec.shape is not None]


def test_shapes_of_a_preset_are_named_without_a_config_and_numbers_with_one() -> None:
    assert shapes(AutoTPPresets.get_preset("phi3").layer_specs) == [(("q", "kv", "kv"), -1), (2, -1)]
    config = SimpleNamespace(hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    assert shapes(AutoTPPresets.get_preset("phi3", config).layer_specs) == [((64, 16, 16), -1), (2, -1)]
    config = SimpleNamespace(hidden_size=64, num_attention_heads=8, head_dim=16)
    assert shapes(AutoTPPresets.get_preset("phi3", config).layer_specs) == [((128, 128, 128), -1), (2, -1)]


def test_preset_with_a_config_plans_as_without() -> None:
    model = hf("Phi3")
    rules = AutoTPPresets.get_preset("phi3", model.config)
    config = TPTrainingConfig(autotp_size=2, partition_config=rules)  # type: ignore[arg-type]
    assert make_plan(model, config).layouts == plan(model, preset="phi3").layouts


def test_preset_whose_shapes_need_head_counts_refuses_a_config_without() -> None:
    with pytest.raises(ValueError, match="needs head counts"):
        AutoTPPresets.get_preset("phi3", SimpleNamespace(hidden_size=64))
    assert AutoTPPresets.get_preset("llama", SimpleNamespace()) == AutoTPPresets.get_preset("llama")


@pytest.mark.parametrize("name", ["lama", "", None, 3])
def test_unknown_preset_is_refused_with_the_list(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^preset_model: there is no preset .* Presets: llama, bloom, chatglm"):
        AutoTPPresets.get_preset(name)


def test_a_fused_weight_without_a_shape_is_refused() -> None:
    mlp = module(gate_up=nn.Linear(8, 32), down=nn.Linear(16, 8))
    with pytest.raises(ValueError, match=r"32 output features are 2 times .* \(16\).*`shape: \[2, -1\]`"):
        plan(module(mlp=mlp), column("gate_up"), row("down"))
    assert widths(plan(module(mlp=mlp), column("gate_up", shape=(2, -1)), row("down")), "mlp.gate_up.weight") == [
        (16, 16)
    ]


@pytest.mark.parametrize("kinds", [("column", "row", "column"), ("row", "column")])
def test_the_order_of_a_sequential_counts(kinds: tuple[str, ...]) -> None:
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in kinds))
    rules = [(column if kind == "column" else row)(str(at)) for at, kind in enumerate(kinds)]
    with pytest.raises(ValueError, match="a column cut that no row|a row cut whose input no column"):
        plan(layers, *rules)


class CountsBySomeName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)
        self.many_heads = 4

    def forward(self, x: Any) -> Any:
        return self.o(self.q(x).view(*x.shape[:-1], self.many_heads, -1).flatten(-2))


def test_a_head_count_by_a_name_that_nobody_knows_blocks_setup() -> None:
    sharding = plan(module(attn=CountsBySomeName()), column("q"), row("o"))
    assert len(sharding.blockers) == 1 and "reads `self.many_heads` = 4" in sharding.blockers[0]
