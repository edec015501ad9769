"""Head counts, widths and arguments of attention modules become local ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.plans.plan import HeadInput, LocalAttribute
from tests.helpers.plans import (
    ATTENTION_RULES,
    BLOOM,
    MLP_RULES,
    Attention,
    column,
    config_plan,
    hf,
    mlp,
    module,
    plan,
    row,
    skip,
)


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


class CountsFromConfig(Attention):
    """Asks its config for its number of heads where it needs it."""

    def __init__(self, config: Any) -> None:
        super().__init__(6, 3, head_dim=8)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x).view(*x.shape[:-1], self.config.num_attention_heads, -1)


class KeepsConfig(Attention):
    """Has its number of heads in its config, and does not read it."""

    def __init__(self, config: Any) -> None:
        super().__init__(6, 3, head_dim=8)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.config.scale


@pytest.mark.parametrize(("kind", "read"), [(CountsFromConfig, True), (KeepsConfig, False)])
def test_head_count_that_the_config_is_asked_for_becomes_local(kind: Any, read: bool) -> None:
    config = SimpleNamespace(model_type="mine", hidden_size=48, num_attention_heads=6, num_key_value_heads=3, scale=1)
    sharding = plan(module(attn=kind(config)), *ATTENTION_RULES, tp_size=3)
    want = LocalAttribute("attn", "config.num_attention_heads", 6, (2, 2, 2))
    assert sharding.attributes == ((want,) if read else ())


class CountsInAMethod(Attention):
    """Reads what it needs in a method that its forward pass calls."""

    split_size: int
    embed_dim: int

    def __init__(self, **attributes: Any) -> None:
        super().__init__(6, 3, head_dim=8, **attributes)

    def forward(self, x: Tensor) -> Tensor:
        return self.parted(self.q_proj(x))

    def parted(self, x: Tensor) -> Tensor:
        return x.split(self.split_size, -1)[0]

    def elsewhere(self, x: Tensor) -> Tensor:
        return x.view(-1, self.embed_dim)


def test_width_of_the_heads_becomes_local_where_the_forward_pass_reads_it() -> None:
    """Another 48 of the module's, that of the residual stream, must stay."""
    attention = CountsInAMethod(split_size=48, embed_dim=48, hidden_size=48)
    sharding = plan(module(attn=attention), *ATTENTION_RULES)
    assert sharding.attributes == (LocalAttribute("attn", "split_size", 48, (32, 16)),)


def test_width_of_another_size_stays() -> None:
    sharding = plan(module(attn=CountsInAMethod(split_size=24)), *ATTENTION_RULES)
    assert sharding.attributes == ()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size", "groups"),
    [
        (8, 2, 4, (2, 2, 2, 2)),
        (6, 2, 4, (2, 1, 2, 1)),
        (12, 3, 4, (2, 2, 4, 4)),
        (8, 1, 3, (3, 3, 2)),
        (8, 4, 2, (2, 2)),
    ],
)
def test_group_size_is_that_of_the_ranks_own_keys(
    heads: int, kv_heads: int, tp_size: int, groups: tuple[int, ...]
) -> None:
    """Ranks that share a key head have only a part of its queries."""
    attention = Attention(heads, kv_heads, head_dim=8, num_key_value_groups=heads // kv_heads)
    sharding = plan(module(attn=attention), *ATTENTION_RULES, tp_size=tp_size)
    assert sharding.attributes == (LocalAttribute("attn", "num_key_value_groups", heads // kv_heads, groups),)


def test_alibi_of_all_heads_is_taken_by_heads() -> None:
    sharding = plan(hf("Bloom", **(BLOOM | {"hidden_size": 48, "n_head": 6})), tp_size=4)
    parts = ((0, 2), (2, 2), (4, 1), (5, 1))
    assert sharding.head_inputs == tuple(
        HeadInput(f"transformer.h.{at}.self_attention", "alibi", 0, 6, parts, batched=True) for at in (0, 1)
    )


def test_arguments_of_models_without_such_a_preset_stay() -> None:
    assert plan(hf("Llama")).head_inputs == ()
    assert plan(hf("Bloom", **BLOOM), *MLP_RULES, column("dense_h_to_4h"), row("dense_4h_to_h")).head_inputs == ()


@pytest.mark.parametrize("model_type", ["bloom", "phi3"])
def test_head_counts_stay_where_the_attention_is_not_sharded(model_type: str) -> None:
    only_mlp: list[dict[str, Any]] = [
        {"patterns": [r".*mlp\.(dense_h_to_4h|gate_up_proj)\.weight"], "partition_type": "column", "shape": [-1, -1]},
        {"patterns": [r".*mlp\.(dense_4h_to_h|down_proj)\.weight"], "partition_type": "row"},
    ]
    if model_type == "phi3":
        only_mlp[0]["shape"] = [2, -1]
    plan = config_plan(small_model(small_config(model_type)), partition_config={"layer_specs": only_mlp})
    assert not plan.attributes and not plan.head_inputs and not plan.blockers
