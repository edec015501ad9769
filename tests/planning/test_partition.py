"""How parameters are cut: kinds of layers, whole heads, fused parts; what is refused, and in which words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_autotp.layout.heads import share_heads
from lightning_autotp.layout.layout import Layout, even_widths
from lightning_autotp.plans.plan import Boundary
from tests.helpers.models import packed_transformer
from tests.helpers.plans import (
    ATTENTION_RULES,
    BLOOM,
    MLP_RULES,
    Attention,
    column,
    cut_names,
    hf,
    language_model,
    mlp,
    module,
    parts_of,
    plan,
    row,
    set_attributes,
    skip,
    whole_names,
    widths,
)


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


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size"),
    [(8, 2, 4), (8, 1, 4), (12, 2, 4), (8, 4, 8), (8, 1, 8), (6, 2, 4), (12, 4, 6), (9, 3, 6), (12, 3, 4)],
)
def test_ranks_share_key_heads_where_they_outnumber_them(heads: int, kv_heads: int, tp_size: int) -> None:
    attention = Attention(heads, kv_heads, bias=True, num_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    sharding = plan(module(layers=nn.ModuleList([attention])), *ATTENTION_RULES, tp_size=tp_size)
    q, k, v = (sharding.parameters[f"layers.0.{name}_proj.weight"].layout for name in "qkv")
    assert k.overlaps and v.overlaps and not q.overlaps
    assert k.parts == v.parts
    assert sum(q.widths) == heads * 8
    group = heads // kv_heads
    for rank in range(tp_size):
        (q_start, q_length), (k_start, k_length) = q.parts[rank][0], k.parts[rank][0]
        needed = {head // group for head in range(q_start // 8, (q_start + q_length) // 8)}
        assert needed == set(range(k_start // 8, (k_start + k_length) // 8)), "each rank holds the keys of its queries"
    assert sharding.blockers == ()
    rows = {r.name: r for r in sharding.explain()}
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        assert "shared by ranks" in rows[f"layers.*.{name}"].cut
        assert "step: all-reduce of the gradient among ranks that share heads" in rows[f"layers.*.{name}"].communication
    assert "share" not in str(rows["layers.*.q_proj.weight"])


@pytest.mark.parametrize(("heads", "kv_heads", "tp_size"), [(6, 2, 8), (4, 4, 5), (3, 1, 4)])
def test_more_ranks_than_query_heads_are_refused(heads: int, kv_heads: int, tp_size: int) -> None:
    attention = Attention(heads, kv_heads, num_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    with pytest.raises(ValueError, match=rf"cannot be shared by {tp_size} ranks") as caught:
        plan(module(attn=attention), *ATTENTION_RULES, tp_size=tp_size)
    assert "attn.q_proj.weight" in str(caught.value)
    assert f"at most {heads}" in str(caught.value)
    sharding = plan(module(attn=attention), *ATTENTION_RULES, tp_size=heads)
    assert widths(sharding, "attn.q_proj.weight") == [(8,) * heads], "the fix of the message works"


@pytest.mark.parametrize("width", [2, 3])
def test_rank_that_would_hold_nothing_is_refused_with_a_size_that_works(width: int) -> None:
    model = mlp(width=width)
    with pytest.raises(
        ValueError, match=f"{4 - width} of them would hold nothing .* size of at most {width}"
    ) as caught:
        plan(model, *MLP_RULES, tp_size=4)
    assert "fc1.weight" in str(caught.value)
    assert widths(plan(model, *MLP_RULES, tp_size=width), "fc1.weight") == [(1,) * width]


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


# -- layers that cannot be cut ----------------------------------------------------------------------------------------


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


def test_embedding_that_scales_what_its_base_looks_up_is_cut_along_the_vocabulary() -> None:
    """As Gemma's and BART's are; the sum over the ranks is inside what it scales."""
    model = module(embed=ScaledEmbedding(65, 8), net=mlp())
    assert plan(model, row("embed"), *MLP_RULES).parameters["embed.weight"].kind == "vocabulary"
    gathered = plan(model, column("embed", gather_output=True), *MLP_RULES).parameters["embed.weight"]
    assert gathered.layout.widths == (4, 4)


class OwnLookup(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return functional.embedding(x, self.weight * 3)


def test_embedding_with_a_lookup_of_its_own_is_refused_by_name() -> None:
    model = module(embed=OwnLookup(65, 8), net=mlp())
    with pytest.raises(ValueError, match=r"^embed\.weight .*OwnLookup has a forward of its own"):
        plan(model, row("embed"), *MLP_RULES)
    assert "embed.weight" in whole_names(plan(model, skip("embed"), *MLP_RULES)), "the fix of the message works"


class OwnProduct(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


@pytest.mark.parametrize(
    ("layer", "options", "refused"),
    [
        (Doubled, {}, True),
        (Doubled, {"gather_output": True}, False),
        (OwnProduct, {}, True),
        (OwnProduct, {"gather_output": True}, True),
    ],
)
def test_layer_that_works_on_its_output_is_cut_where_that_is_whole(
    layer: type[nn.Linear], options: dict[str, Any], refused: bool
) -> None:
    model = module(first=layer(8, 16), net=mlp())
    if refused:
        with pytest.raises(ValueError, match=rf"^first\.weight .*{layer.__name__} has a forward of its own"):
            plan(model, column("first", **options), *MLP_RULES)
    else:
        assert "first.weight" in cut_names(plan(model, column("first", **options), *MLP_RULES))


@pytest.mark.parametrize(("layer", "refused"), [(Doubled, False), (OwnProduct, True)])
def test_row_that_works_on_its_sum_is_cut(layer: type[nn.Linear], refused: bool) -> None:
    model = module(fc1=nn.Linear(8, 16), fc2=layer(16, 8))
    if refused:
        with pytest.raises(ValueError, match=r"^fc2\.weight .*OwnProduct has a forward of its own"):
            plan(model, *MLP_RULES)
    else:
        assert cut_names(plan(model, *MLP_RULES)) == {"fc1.weight", "fc2.weight"}


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
    with pytest.raises(ValueError, match=r"^conv\.weight .*a parameter of Conv1d, and nothing sums the output"):
        plan(model, *MLP_RULES, column("conv"))
    assert "conv.weight" in whole_names(plan(model, *MLP_RULES, skip("conv"))), "the fix of the message works"


def test_layer_that_peft_has_wrapped_blocks_setup_but_not_the_plan() -> None:
    model = module(fc1=module(base_layer=nn.Linear(8, 16)), fc2=nn.Linear(16, 8))
    sharding = plan(model, *MLP_RULES)
    assert not sharding.layouts["fc1.base_layer.weight"].is_replicated
    assert any("fc1.base_layer.weight" in blocker and "PEFT" in blocker for blocker in sharding.blockers)


# -- linears that store their weight the other way round --------------------------------------------------------------


def conv1d(inputs: int, outputs: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(outputs, inputs)
    return layer


def gpt2_attention(heads: int, hidden: int) -> nn.ModuleDict:
    attention = module(c_attn=conv1d(hidden, 3 * hidden), c_proj=conv1d(hidden, hidden))
    set_attributes(attention, num_heads=heads, head_dim=hidden // heads)
    return attention


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_fused_conv1d_is_cut_along_its_last_dim_in_whole_heads(tp_size: int) -> None:
    model = module(attn=gpt2_attention(6, 48))
    sharding = plan(model, column("c_attn", shape=(3, -1)), row("c_proj"), tp_size=tp_size)
    entry = sharding.parameters["attn.c_attn.weight"]
    assert (entry.kind, entry.layout.dim, entry.features) == ("column", 1, (144, 48))
    queries, _ = share_heads(6, 6, tp_size)
    for which, full in model.get_submodule("attn.c_attn").named_parameters():
        for rank, have in enumerate(parts_of(sharding.parameters[f"attn.c_attn.{which}"], full.detach())):
            start, length = queries[rank]
            parts = full.detach().split(48, dim=-1)
            assert torch.equal(have, torch.cat([part.narrow(-1, 8 * start, 8 * length) for part in parts], -1))
    assert sharding.layouts["attn.c_proj.weight"] == Layout.cut(
        (48, 48), 0, tp_size, [[(8 * start, 8 * length) for start, length in queries]]
    )
    bias = sharding.parameters["attn.c_proj.bias"]
    assert bias.layout.is_replicated and "once" in bias.reason


def test_conv1d_is_planned_as_the_linear_that_computes_the_same() -> None:
    fused = ((24, 8, 8), -1)
    rules = column("a", shape=fused), row("b", shape=(-1, (24, 8)))
    turned = plan(module(a=conv1d(8, 40), b=conv1d(32, 8)), *rules)
    usual = plan(module(a=nn.Linear(8, 40), b=nn.Linear(32, 8)), *rules)
    for name in ("a.weight", "b.weight"):
        mine, theirs = turned.layouts[name], usual.layouts[name]
        assert mine.parts == theirs.parts
        assert mine.shape == theirs.shape[::-1] and mine.dim == 1 - (theirs.dim or 0)
        assert turned.parameters[name].features == usual.parameters[name].features
    assert turned.layouts["a.bias"] == usual.layouts["a.bias"]


# -- parameters that are no layer's: experts, sinks -------------------------------------------------------------------


def named(kind: str, *names: str, **options: Any) -> dict[str, Any]:
    """A rule for parameters or modules by their own names."""
    return {"patterns": [rf"(?:.*\.)?{name}$" for name in names], "partition_type": kind, **options}


class Experts(nn.Module):
    """``[T, H]`` through all of E gated experts, weights stored as ``[E, out, in]``."""

    def __init__(self, experts: int = 3, hidden: int = 8, width: int = 6) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("th,eoh->eto", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("eto,eho->th", gate.sigmoid() * up, self.down_proj)


class InterleavedExperts(nn.Module):
    """The same with biases, weights stored as ``[E, in, out]``, and gate and up of each feature side by side."""

    def __init__(self, experts: int = 3, hidden: int = 8, width: int = 5) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, hidden, 2 * width))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(experts, 2 * width))
        self.down_proj = nn.Parameter(torch.randn(experts, width, hidden))
        self.down_proj_bias = nn.Parameter(torch.randn(experts, hidden))

    def forward(self, x: Tensor) -> Tensor:
        both = x @ self.gate_up_proj + self.gate_up_proj_bias[:, None]
        out = both[..., ::2].sigmoid() * both[..., 1::2] @ self.down_proj + self.down_proj_bias[:, None]
        return out.sum(0)


GATE_UP = named("column", "gate_up_proj", shape=(-1, 2, -1), partition_dim=1)
DOWN = named("row", "down_proj")
EXPERTS = named("skip", "experts", boundary=True)
INTERLEAVED = (
    named("column", "gate_up_proj", shape=(-1, -1, -1, 2), partition_dim=2),
    named("column", "gate_up_proj_bias", shape=(-1, -1, 2), partition_dim=1),
    named("row", "down_proj", shape=(-1, -1, -1), partition_dim=1),
    named("row", "down_proj_bias"),
    EXPERTS,
)


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_experts_are_cut_inside_each(tp_size: int) -> None:
    model = module(layers=nn.ModuleList([module(experts=Experts())]))
    sharding = plan(model, GATE_UP, DOWN, EXPERTS, tp_size=tp_size)
    assert sharding.boundaries == (Boundary("layers.0.experts"),)
    assert sharding.blockers == sharding.warnings == ()
    prefix = "layers.0.experts"
    up, down = (sharding.parameters[f"{prefix}.{name}_proj"] for name in ("gate_up", "down"))
    assert (up.kind, up.layout.dim, down.kind, down.layout.dim) == ("column", 1, "row", 2)
    assert up.features is None and up.communication == "" == down.communication
    full_up = model.get_parameter(f"{prefix}.gate_up_proj").detach()
    full_down = model.get_parameter(f"{prefix}.down_proj").detach()
    for rank, (start, length) in enumerate(even_widths(6, tp_size)):
        gate_and_up = torch.cat([half.narrow(1, start, length) for half in full_up.chunk(2, 1)], 1)
        assert torch.equal(parts_of(up, full_up)[rank], gate_and_up)
        assert torch.equal(parts_of(down, full_down)[rank], full_down.narrow(2, start, length))


def test_experts_with_separate_gates_need_no_shape() -> None:
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3 = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 6, 8))
            self.w2 = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.w1 + self.w3).mT @ self.w2.mT

    sharding = plan(module(experts=Separate()), named("column", "w1", "w3"), named("row", "w2"), EXPERTS)
    assert [sharding.layouts[f"experts.{name}"].dim for name in ("w1", "w3", "w2")] == [1, 1, 2]
    assert widths(sharding, "experts.w1", "experts.w3", "experts.w2") == [(3, 3)] * 3
    assert sharding.blockers == ()


@pytest.mark.parametrize("tp_size", [2, 3, 5])
def test_interleaved_experts_are_cut_in_whole_pairs(tp_size: int) -> None:
    model = module(experts=InterleavedExperts())
    sharding = plan(model, *INTERLEAVED, tp_size=tp_size)
    assert sharding.boundaries == (Boundary("experts", once=("down_proj_bias",)),)
    assert sharding.blockers == ()
    up, up_bias, down, down_bias = (
        sharding.parameters[f"experts.{name}"]
        for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    )
    assert down_bias.layout.is_replicated and down_bias.kind == "row" and "once" in down_bias.reason
    for entry, dim, unit in ((up, 2, 2), (up_bias, 1, 2), (down, 1, 1)):
        full = model.get_parameter(entry.name).detach()
        for (start, length), have in zip(even_widths(5, tp_size), parts_of(entry, full)):
            assert torch.equal(have, full.narrow(dim, unit * start, unit * length)), entry.name


def test_parameter_without_a_boundary_is_refused_by_name() -> None:
    model = module(net=mlp(), moe=module(experts=Experts()))
    with pytest.raises(ValueError, match=r"^moe\.experts\.gate_up_proj \(rule .*, column\): .*nothing sums") as caught:
        plan(model, *MLP_RULES, GATE_UP, DOWN)
    assert "boundary: true" in str(caught.value)
    assert plan(model, *MLP_RULES, GATE_UP, DOWN, EXPERTS).boundaries, "the fix of the message works"


def test_experts_whose_forward_was_replaced_are_refused_by_name() -> None:
    experts = Experts()
    model = module(experts=experts)
    experts.forward = experts.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"^experts \(Experts\): its forward was replaced on the object, and nothing"):
        plan(model, GATE_UP, DOWN, EXPERTS)
    del experts.forward
    assert plan(model, GATE_UP, DOWN, EXPERTS).boundaries, "the fix of the message works"


class ExpertsOfLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x))
        return out


def test_cut_linear_inside_a_boundary_is_refused_by_name() -> None:
    model = module(net=mlp(), experts=ExpertsOfLayers())
    with pytest.raises(ValueError, match=r"^experts\.fc1\.weight .*inside a module with a boundary rule"):
        plan(model, *MLP_RULES, EXPERTS)
    assert plan(model, *MLP_RULES).boundaries == (), "the fix of the message works"


@pytest.mark.parametrize(("rules", "cut"), [((GATE_UP,), "column"), ((DOWN,), "row")])
def test_boundary_whose_inside_is_not_cut_through_blocks_setup(rules: tuple[dict[str, Any], ...], cut: str) -> None:
    sharding = plan(module(net=mlp(), experts=Experts()), *MLP_RULES, *rules, EXPERTS)
    assert len(sharding.blockers) == 1
    assert sharding.blockers[0].startswith("experts (Experts): a boundary rule sums its outputs")
    assert f"here are {cut} cuts only" in sharding.blockers[0]


def test_plain_cut_of_fused_experts_blocks_setup() -> None:
    model = module(experts=Experts())
    sharding = plan(model, named("column", "gate_up_proj"), DOWN, EXPERTS)
    assert len(sharding.blockers) == 1
    assert sharding.blockers[0].startswith("experts.gate_up_proj (rule ")
    assert "12 features are a multiple of the 6 that the row cut behind it reads" in sharding.blockers[0]
    assert plan(model, GATE_UP, DOWN, EXPERTS).blockers == (), "the fix of the message works"


def test_boundary_of_experts_that_stay_whole_is_none() -> None:
    sharding = plan(
        module(net=mlp(), experts=Experts()), *MLP_RULES, EXPERTS, named("skip", "gate_up_proj", "down_proj")
    )
    assert sharding.boundaries == () and sharding.blockers == ()


@pytest.mark.parametrize("flag", [{"gather_output": True}, {"split_input": True}])
def test_flag_that_a_parameter_without_a_layer_cannot_have_is_refused(flag: dict[str, Any]) -> None:
    kind = "row" if "split_input" in flag else "column"
    with pytest.raises(ValueError, match=r"^experts\.gate_up_proj .*Experts has no input or output of its own"):
        plan(module(experts=Experts()), named(kind, "gate_up_proj", **flag), DOWN, EXPERTS)


def test_shape_that_a_parameter_does_not_have_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"^experts\.gate_up_proj .*shape: 12 features do not divide into 5"):
        plan(module(experts=Experts()), named("column", "gate_up_proj", shape=(-1, 5, -1), partition_dim=1), EXPERTS)


class SinkAttention(Attention):
    """Attention with one more number for each head."""

    def __init__(self, heads: int, kv_heads: int, **attributes: Any) -> None:
        super().__init__(heads, kv_heads, **attributes)
        self.sinks = nn.Parameter(torch.randn(heads))

    def forward(self, x: Tensor) -> Tensor:
        return self.sinks * x


@pytest.mark.parametrize(("heads", "kv_heads", "tp_size"), [(6, 6, 4), (8, 2, 2), (16, 2, 4), (12, 3, 4)])
def test_number_for_each_head_is_cut_as_the_query_heads(heads: int, kv_heads: int, tp_size: int) -> None:
    model = module(attn=SinkAttention(heads, kv_heads, head_dim=8))
    sharding = plan(model, *ATTENTION_RULES, named("column", "sinks"), tp_size=tp_size)
    queries, _ = share_heads(heads, kv_heads, tp_size)
    entry = sharding.parameters["attn.sinks"]
    assert (entry.kind, entry.layout.widths) == ("column", tuple(length for _, length in queries))
    assert not entry.layout.overlaps
    assert sharding.boundaries == () and sharding.blockers == ()


def test_number_for_each_head_where_all_keys_have_as_many_features() -> None:
    """Eight query heads, and one key head of eight features: the sinks are still the query heads'."""
    model = module(attn=SinkAttention(8, 1, head_dim=8))
    sharding = plan(model, *ATTENTION_RULES, named("column", "sinks"), tp_size=4)
    assert widths(sharding, "attn.sinks", "attn.q_proj.weight") == [(2,) * 4, (16,) * 4]


def test_queries_where_all_values_have_as_many_features() -> None:
    """Eight queries of 8 features and four values of 16: both projections are 64 wide, and cut differently."""
    attention = module(q=nn.Linear(64, 64), k=nn.Linear(64, 32), v=nn.Linear(64, 64), o=nn.Linear(128, 64))
    set_attributes(attention, num_heads=8, num_kv_heads=4, head_dim=8, v_head_dim=16)
    sharding = plan(module(attn=attention), column("q", "k", "v"), row("o"), tp_size=8)
    want = [(8,) * 8, (8,) * 8, (16,) * 8, (16,) * 8]
    assert widths(sharding, *(f"attn.{name}.weight" for name in "qkvo")) == want


def test_number_for_each_head_of_an_attention_that_is_not_cut_is_refused() -> None:
    model = module(net=mlp(), attn=SinkAttention(4, 4, head_dim=8))
    with pytest.raises(ValueError, match=r"^attn\.sinks .*nothing sums the output of that module"):
        plan(model, *MLP_RULES, named("column", "sinks"))


# -- one projection that holds group behind group ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size"),
    [(6, 6, 4), (4, 4, 2), (8, 1, 4), (8, 1, 3), (8, 2, 4), (12, 3, 4), (6, 2, 4), (8, 4, 2), (8, 4, 3), (8, 2, 8)],
)
def test_grouped_projection_gives_each_rank_its_heads_and_their_keys(heads: int, kv_heads: int, tp_size: int) -> None:
    """Falcon's: for each key head its query heads, the key and the value, compared with that taken head by head."""
    dim, group = 4, heads // kv_heads
    attention = module(query_key_value=nn.Linear(24, (heads + 2 * kv_heads) * dim), dense=nn.Linear(heads * dim, 24))
    set_attributes(attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    model = module(attn=attention)
    sharding = plan(model, column("query_key_value", shape=(-1, -1)), row("dense"), tp_size=tp_size)
    queries, keys = share_heads(heads, kv_heads, tp_size)
    for which, full in attention["query_key_value"].named_parameters():
        groups = full.detach().unflatten(0, (kv_heads, group + 2, dim))
        for rank, have in enumerate(parts_of(sharding.parameters[f"attn.query_key_value.{which}"], full.detach())):
            mine = range(queries[rank][0], sum(queries[rank]))
            want: list[Tensor] = []
            for key in range(keys[rank][0], sum(keys[rank])):
                want += [groups[key, head - key * group] for head in mine if head // group == key]
                want += [groups[key, -2], groups[key, -1]]
            assert torch.equal(have, torch.cat(want))
    assert widths(sharding, "attn.dense.weight") == [tuple(length * dim for _, length in queries)]
    assert sharding.layouts["attn.query_key_value.weight"].overlaps == (tp_size > kv_heads)


# -- latent attention -------------------------------------------------------------------------------------------------


def latent_attention(heads: int = 4, **attributes: Any) -> nn.ModuleDict:
    """Queries and keys of 4 + 2 features, values of 6; 2 rotary features straight out of ``kv_a``."""
    attention = module(
        q_proj=nn.Linear(16, heads * 6),
        kv_a=nn.Linear(16, 8 + 2),
        kv_b=nn.Linear(8, heads * (4 + 6)),
        o_proj=nn.Linear(heads * 6, 16),
    )
    set_attributes(attention, num_heads=heads, qk_head_dim=6, v_head_dim=6, kv_lora_rank=8, **attributes)
    return attention


def latent_rules(partial: Any = "rope") -> tuple[dict[str, Any], ...]:
    return skip("kv_a", partial_outputs=partial), column("q_proj", "kv_b"), row("o_proj")


@pytest.mark.parametrize("where", ["rule", "module", "its config", "model config"])
def test_partial_outputs_are_known_from_the_rule_the_module_or_a_config(where: str) -> None:
    attention = latent_attention(**({"rope": 2} if where == "module" else {}))
    model = module(attn=attention)
    if where.endswith("config"):
        config = SimpleNamespace(model_type="mine", rope=2, hidden_size=16, num_attention_heads=4)
        set_attributes(attention if where == "its config" else model, config=config)
    sharding = plan(model, *latent_rules(2 if where == "rule" else "rope"))
    entry = sharding.parameters["attn.kv_a.weight"]
    assert (entry.partial_outputs, entry.layout.is_replicated, entry.grad_allreduce) == (2, True, False)
    assert entry.communication == "backward: all-reduce of the gradient of the last 2 outputs"
    assert sharding.parameters["attn.kv_a.bias"].partial_outputs == 0, "one for the layer"


def test_latent_attention_is_cut_in_whole_heads() -> None:
    sharding = plan(module(attn=latent_attention(6)), *latent_rules(2), tp_size=4)
    names = ["attn.q_proj.weight", "attn.kv_b.weight", "attn.o_proj.weight"]
    assert widths(sharding, *names) == [(12, 12, 6, 6), (20, 20, 10, 10), (12, 12, 6, 6)]


def test_partial_outputs_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^attn\.kv_a\.weight .*neither the module around nor its config .* 'rope'"):
        plan(module(attn=latent_attention()), *latent_rules())
    with pytest.raises(ValueError, match=r"^attn\.kv_a\.weight .*partial_outputs: .* 'rope'"):
        plan(module(attn=latent_attention(rope="two")), *latent_rules())
    with pytest.raises(ValueError, match=r"^attn\.kv_a\.weight .*partial_outputs: 11 is more than the 10 outputs"):
        plan(module(attn=latent_attention()), *latent_rules(11))
    model = module(net=mlp(), norm=nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r"^norm\.weight .*partial_outputs needs an nn\.Linear, this is LayerNorm"):
        plan(model, *MLP_RULES, skip("norm", partial_outputs=2))


# -- embeddings with a number for each head ---------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "tp_size", "want"), [(6, 4, (2, 2, 1, 1)), (8, 2, (4, 4)), (5, 2, (3, 2))])
def test_embedding_with_a_number_for_each_head_is_cut_by_heads(heads: int, tp_size: int, want: tuple[int, ...]) -> None:
    """T5's relative position bias."""
    attention = Attention(heads, heads, n_heads=heads)
    attention.bias = nn.Embedding(32, heads)
    sharding = plan(module(attn=attention), *ATTENTION_RULES, column("bias"), tp_size=tp_size)
    entry = sharding.parameters["attn.bias.weight"]
    assert (entry.kind, entry.layout.dim, entry.layout.widths) == ("heads", 1, want)
    assert entry.communication == "" and not entry.gather_output
    assert sharding.blockers == ()


# -- low-rank adapters ------------------------------------------------------------------------------------------------


def adapted(*targets: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Two layers with PEFT's adapters in them."""
    peft = pytest.importorskip("peft")
    model = module(attn=Attention(6, 3, num_heads=6, head_dim=8), mlp=mlp(48, 16)) if model is None else model
    config = peft.LoraConfig(target_modules=list(targets), r=4, **options)
    wrapped: nn.Module = peft.inject_adapter_in_model(config, model)
    return wrapped


LORA_RULES = (*ATTENTION_RULES, *MLP_RULES)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", ["attn.q_proj", "attn.k_proj", "mlp.fc1"])
def test_adapter_of_a_column_is_cut_where_it_makes_the_output(name: str, tp_size: int) -> None:
    sharding = plan(adapted("q_proj", "k_proj", "fc1"), *LORA_RULES, tp_size=tp_size)
    a, b = (sharding.parameters[f"{name}.lora_{half}.default.weight"] for half in "AB")
    base = sharding.parameters[f"{name}.base_layer.weight"]
    assert (a.kind, a.layout.is_replicated) == ("whole", True) and "lora_B" in a.reason
    assert (b.kind, b.layout.dim, b.layout.parts) == ("column", 0, base.layout.parts)
    assert (a.rule, b.rule) == (base.rule, base.rule)
    assert sharding.blockers == sharding.warnings == ()


@pytest.mark.parametrize("name", ["attn.o_proj", "mlp.fc2"])
def test_adapter_of_a_row_is_cut_where_it_reads_the_input(name: str) -> None:
    sharding = plan(adapted("o_proj", "fc2"), *LORA_RULES, tp_size=3)
    a, b = (sharding.parameters[f"{name}.lora_{half}.default.weight"] for half in "AB")
    assert (a.kind, a.layout.dim) == ("row", 1)
    assert a.layout.parts == sharding.layouts[f"{name}.base_layer.weight"].parts
    assert (b.kind, b.layout.is_replicated) == ("whole", True) and "lora_A" in b.reason
    assert sharding.blockers == sharding.warnings == ()


def test_adapter_of_a_fused_weight_is_cut_part_by_part() -> None:
    model = adapted("c_attn", model=module(attn=gpt2_attention(6, 48)))
    sharding = plan(model, column("c_attn", shape=(3, -1)), row("c_proj"), tp_size=4)
    b = sharding.layouts["attn.c_attn.lora_B.default.weight"]
    assert (b.shape, b.dim) == ((144, 4), 0)
    assert b.parts == sharding.layouts["attn.c_attn.base_layer.weight"].parts
    assert len(b.parts[0]) == 3


def test_adapter_of_a_whole_layer_is_whole() -> None:
    rules = skip("fc1", "fc2"), *ATTENTION_RULES
    sharding = plan(adapted("fc1", "fc2"), *rules)
    adapters = [entry for name, entry in sharding.parameters.items() if ".lora_" in name]
    assert len(adapters) == 4
    assert all(e.layout.is_replicated and e.reason == "its layer is whole" for e in adapters)


def test_adapter_of_a_whole_layer_whose_gradient_is_partial_has_a_partial_gradient() -> None:
    """It sees what its layer sees."""
    rules = skip("extra", grad_allreduce=True), *MLP_RULES
    model = adapted("extra", model=module(net=mlp(), extra=nn.Linear(4, 4)))
    sharding = plan(model, *rules)
    summed = {name for name, entry in sharding.parameters.items() if entry.grad_allreduce}
    adapters = {f"extra.lora_{half}.default.weight" for half in "AB"}
    assert adapters <= summed


def test_adapter_beside_partial_outputs_is_not_left_out_of_their_sum() -> None:
    """Its output is added to the layer's: the gradient of the last features is partial there, too."""
    sharding = plan(adapted("kv_a", model=module(attn=latent_attention())), *latent_rules(2))
    b = sharding.parameters["attn.kv_a.lora_B.default.weight"]
    assert b.partial_outputs == 2


@pytest.mark.parametrize("targets", [("q_proj",), ("fc2",), ("q_proj", "fc2")])
def test_adapter_that_reads_the_weight_itself_blocks_setup(targets: tuple[str, ...]) -> None:
    sharding = plan(adapted(*targets, use_dora=True), *LORA_RULES)
    for target in targets:
        assert any(f"{target}.base_layer.weight" in text and "DoRA" in text for text in sharding.blockers)
    named = [text.split(" ")[0] for text in sharding.blockers]
    assert all(any(target in name for target in targets) for name in named), "and no other layer"


def test_rank_stabilized_adapter_is_planned_as_a_plain_one() -> None:
    plain, stable = (plan(adapted("q_proj", "o_proj", use_rslora=on), *LORA_RULES) for on in (False, True))
    assert plain.layouts == stable.layouts and stable.blockers == ()


def test_adapter_of_experts_blocks_setup() -> None:
    """PEFT adds it to the whole parameter, of which a rank has a part."""
    peft = pytest.importorskip("peft")
    model = module(experts=Experts())
    config = peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"], r=2)
    peft.inject_adapter_in_model(config, model)
    assert plan(model, GATE_UP, DOWN, EXPERTS).blockers


def test_runs_that_heads_would_cut_across_are_refused() -> None:
    """Two heads of three features, and runs of two that must stay together."""
    attention = module(q=nn.Linear(6, 6), o=nn.Linear(6, 6))
    set_attributes(attention, num_heads=2, head_dim=3)
    message = r"attn\.q\.weight .*runs of 2 features do not fit into the 3 features of a head"
    with pytest.raises(ValueError, match=message):
        plan(module(attn=attention), column("q", shape=(-1, 2, -1), partition_dim=0), row("o"))
