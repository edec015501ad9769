"""From rules and a model to a plan: what belongs together, what is refused, and in which words."""

from __future__ import annotations

import time
import warnings
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp import TPConfig, TPTrainingConfig, make_plan
from lightning_autotp.plans.plan import Boundary
from tests.helpers.models import transformer
from tests.helpers.plans import (
    ATTENTION_RULES,
    LATENT,
    MLP_RULES,
    Attention,
    column,
    cut_names,
    hf,
    language_model,
    mlp,
    module,
    plan,
    row,
    skip,
    widths,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


from lightning_autotp.model_sources.small import small_config, small_model
from tests.helpers.plans import config_plan

# -- tied and shared parameters ---------------------------------------------------------------------------------------


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


class Head(nn.Module):
    """Keeps the bias of its decoder a second time, as BERT's does."""

    def __init__(self, vocab: int = 65) -> None:
        super().__init__()
        self.decoder = nn.Linear(8, vocab)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(x)
        return out


class ReadingHead(Head):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.decoder.weight.t() + self.bias


def test_second_name_of_a_parameter_follows_the_cut_of_the_first() -> None:
    sharding = plan(module(net=mlp(), head=Head()), *MLP_RULES, column("decoder", gather_output=True))
    alias, bias = sharding.parameters["head.bias"], sharding.parameters["head.decoder.bias"]
    assert alias.layout == bias.layout and bias.layout.widths == (33, 32)
    assert (alias.name, alias.module, alias.rule, alias.features) == ("head.bias", "head", bias.rule, None)
    assert sharding.blockers == sharding.warnings == ()


def test_second_name_that_its_module_reads_must_be_decided_alike() -> None:
    with pytest.raises(ValueError, match=r"head\.bias and head\.decoder\.bias are one parameter, but"):
        plan(module(net=mlp(), head=ReadingHead()), *MLP_RULES, column("decoder", gather_output=True))


def test_second_name_of_a_whole_parameter_is_whole() -> None:
    sharding = plan(module(net=mlp(), head=Head()), *MLP_RULES, skip("decoder", grad_allreduce=True))
    names = ("head.bias", "head.decoder.bias")
    assert [sharding.parameters[name].grad_allreduce for name in names] == [True, True]
    assert all(sharding.layouts[name].is_replicated for name in names)


@pytest.mark.parametrize("tied", [False, True])
def test_bias_of_berts_head_is_cut_with_its_decoder(tied: bool) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
    }
    model = BertForMaskedLM(BertConfig(vocab_size=65, tie_word_embeddings=tied, **sizes))
    sharding = plan(model)
    names = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.predictions.bias")
    assert widths(sharding, *names) == [(33, 32), (33, 32), (33, 32) if tied else ()]
    same = model.get_parameter(names[1]) is model.get_parameter(names[2])
    assert same is tied, "untied, the second one is a parameter that nothing reads"


# -- modules whose output is summed -----------------------------------------------------------------------------------


class Routed(nn.Module):
    """Experts that may pass their input on as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 6, 8)), nn.Parameter(torch.randn(2, 8, 6))
        self.identity, self.other = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x @ self.up.mT @ self.down.mT).sum(0) + self.identity(x)
        return out


def exact(kind: str, name: str, **options: Any) -> dict[str, Any]:
    return {"patterns": [rf"(?:.*\.)?{name}$"], "partition_type": kind, **options}


ROUTED = exact("column", "up"), exact("row", "down"), exact("skip", "moe", boundary=True)


def test_boundary_knows_what_passes_its_input_on() -> None:
    model = module(net=module(moe=Routed()))
    assert plan(model, *ROUTED, exact("row", "identity")).boundaries == (Boundary("net.moe", passing=("identity",)),)
    assert plan(model, *ROUTED).boundaries == (Boundary("net.moe"),)


def test_boundary_rule_decides_about_no_parameter() -> None:
    """Whatever its pattern: it names modules."""
    rules = exact("skip", ".*", boundary=True), *ROUTED
    sharding = plan(module(moe=Routed()), *rules)
    assert widths(sharding, "moe.up", "moe.down") == [(3, 3)] * 2
    assert sharding.parameters["moe.up"].rule == rules[1]["patterns"][0]


def test_boundary_that_matches_no_module_is_warned_of() -> None:
    sharding = plan(mlp(), *MLP_RULES, exact("skip", "moe", boundary=True))
    assert len(sharding.warnings) == 1 and "matches no parameter" in sharding.warnings[0]


# -- cuts that nothing closes or opens --------------------------------------------------------------------------------


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


def test_siblings_are_columns_that_may_read_one_input() -> None:
    sharding = plan(transformer(), *ATTENTION_RULES, column("gate_proj", "up_proj"), row("down_proj"))
    layer = [f"layers.{i}" for i in (0, 1)]
    attention = {tuple(f"{at}.self_attn.{name}_proj" for name in "qkv") for at in layer}
    assert set(sharding.siblings) == attention | {tuple(f"{at}.mlp.{n}_proj" for n in ("gate", "up")) for at in layer}


def test_plan_has_the_features_of_linears_and_of_nothing_else() -> None:
    from transformers.pytorch_utils import Conv1D

    conv: nn.Module = Conv1D(6, 8)
    model = module(net=mlp(), conv=conv, embed=nn.Embedding(9, 8), norm=nn.LayerNorm(8))
    entries = plan(model, *MLP_RULES).parameters
    known = {name: entry.features for name, entry in entries.items() if entry.features is not None}
    assert known == {"net.fc1.weight": (16, 8), "net.fc2.weight": (8, 16), "conv.weight": (6, 8)}


def test_row_that_splits_its_input_needs_no_column_before_it() -> None:
    sharding = plan(mlp(), skip("fc1"), row("fc2", split_input=True))
    entry = sharding.parameters["fc2.weight"]
    assert entry.split_input and entry.layout.widths == (8, 8)
    assert "forward: all-reduce of the output" in entry.communication
    assert "backward: all-gather of the input's gradient" in entry.communication


def test_attention_that_every_rank_computes_whole_is_cut_by_features() -> None:
    """Gathered columns and a row that splits: no heads are shared out, so none must stay together."""
    rules = column("[qkv]_proj", gather_output=True), row("o_proj", split_input=True)
    sharding = plan(module(attn=Attention(6, 2, num_heads=6, head_dim=8)), *rules, tp_size=4)
    names = (f"attn.{name}_proj.weight" for name in "qkvo")
    assert widths(sharding, *names) == [(12,) * 4, (4,) * 4, (4,) * 4, (12,) * 4]
    assert sharding.attributes == () and sharding.blockers == ()


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
    shared = plan(model, tp_size=16)
    assert shared.blockers == ()
    held = [shared.layouts[f"model.layers.125.self_attn.{name}_proj.weight"].widths for name in "kv"]
    assert held == [(128,) * 16] * 2, "each key head on two ranks"


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


def test_a_plan_that_shards_little_is_refused_in_strict_mode() -> None:
    only_head = [{"patterns": [r".*lm_head\.weight"], "partition_type": "column", "gather_output": True}]
    rules = {"layer_specs": only_head, "strict_mode": True}
    with pytest.raises(ValueError, match=r"only \d+% of the model's weights is cut"):
        config_plan(small_model(small_config("gpt_oss")), partition_config=rules)


@pytest.mark.parametrize(("kind", "layer"), [("column", "up_proj"), ("row", "down_proj")])
def test_a_cut_without_its_partner_is_refused_by_name(kind: str, layer: str) -> None:
    lone = [{"patterns": [rf".*mlp\.{layer}\.weight"], "partition_type": kind}]
    with pytest.raises(ValueError, match=rf"{layer}\.weight: a {kind} cut"):
        config_plan(small_model(small_config("llama")), partition_config={"layer_specs": lone})


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"preset_model": "bloom"}),
        ("llama", {"partition_config": {"layer_specs": [{"patterns": [r"q_proj\.weight"]}]}}),
    ],
    ids=["preset of another family", "pattern without .*"],
)
def test_rules_that_match_nothing_are_an_error(model_type: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nothing of LlamaForCausalLM (is cut|but lm_head.weight)"):
        config_plan(small_model(small_config(model_type)), **config)
