"""Rules, models and short ways of asking for a plan, for the tests of what is decided."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_autotp import ShardingPlan, TPTrainingConfig, make_plan
from lightning_autotp.plans.plan import ParameterPlan

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


def language_model(tied: bool = False, vocab: int = 65) -> nn.ModuleDict:
    model = module(embed=nn.Embedding(vocab, 8), net=mlp(), head=nn.Linear(8, vocab, bias=False))
    if tied:
        model["head"].weight = model["embed"].weight
    return model


def parts_of(layout_owner: ParameterPlan, full: Tensor) -> list[Tensor]:
    return [layout_owner.layout.shard(full, rank) for rank in range(layout_owner.layout.tp_size)]


def config_plan(model: nn.Module, tp_size: int = 2, **config: Any) -> ShardingPlan:
    """The plan for ``config``, the fields of a TPTrainingConfig; its warnings are given."""
    return make_plan(model, TPTrainingConfig(autotp_size=tp_size, **config))


def conv1d(inputs: int, outputs: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(outputs, inputs)
    return layer


def gpt2_attention(heads: int, hidden: int) -> nn.ModuleDict:
    attention = module(c_attn=conv1d(hidden, 3 * hidden), c_proj=conv1d(hidden, hidden))
    set_attributes(attention, num_heads=heads, head_dim=hidden // heads)
    return attention


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


class Experts(nn.Module):
    """``[T, H]`` through all of E gated experts, weights stored as ``[E, out, in]``."""

    def __init__(self, experts: int = 3, hidden: int = 8, width: int = 6) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("th,eoh->eto", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("eto,eho->th", gate.sigmoid() * up, self.down_proj)


def named(kind: str, *names: str, **options: Any) -> dict[str, Any]:
    """A rule for parameters or modules by their own names."""
    return {"patterns": [rf"(?:.*\.)?{name}$" for name in names], "partition_type": kind, **options}


GATE_UP = named("column", "gate_up_proj", shape=(-1, 2, -1), partition_dim=1)
DOWN = named("row", "down_proj")
EXPERTS = named("skip", "experts", boundary=True)
