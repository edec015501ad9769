"""How parameters are cut: kinds of layers, whole heads, fused parts; what is refused, and in which words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp.layout.heads import share_heads
from lightning_autotp.layout.layout import Layout
from tests.helpers.models import packed_transformer
from tests.helpers.plans import (
    ATTENTION_RULES,
    BLOOM,
    MLP_RULES,
    Attention,
    column,
    conv1d,
    gpt2_attention,
    hf,
    language_model,
    latent_attention,
    latent_rules,
    mlp,
    module,
    parts_of,
    plan,
    row,
    set_attributes,
    skip,
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


def test_runs_that_heads_would_cut_across_are_refused() -> None:
    """Two heads of three features, and runs of two that must stay together."""
    attention = module(q=nn.Linear(6, 6), o=nn.Linear(6, 6))
    set_attributes(attention, num_heads=2, head_dim=3)
    message = r"attn\.q\.weight .*runs of 2 features do not fit into the 3 features of a head"
    with pytest.raises(ValueError, match=message):
        plan(module(attn=attention), column("q", shape=(-1, 2, -1), partition_dim=0), row("o"))
