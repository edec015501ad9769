"""What cannot be sharded: layers whose computation a cut would change are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.plans import (
    MLP_RULES,
    column,
    cut_names,
    mlp,
    module,
    plan,
    row,
    skip,
    whole_names,
)


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
