"""Models whose numbers a cut would change on all ranks alike, which no comparison of ranks sees: refused at setup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional

from lightning_autotp import AutoTPStrategy, TPTrainingConfig, make_plan
from lightning_autotp.model_sources.small import small_config, small_model
from tests.helpers.plans import column, module, plan, row, rule, skip
from tests.helpers.rank_pool import run_ranks
from tests.helpers.sharded_runs import batches_for, sharded_run

RULES = column("q", "k", "v"), row("o")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.embed_size = 8, 8, 64
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def scores(self, x: Tensor) -> Tensor:
        q, k = (p(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for p in (self.q, self.k))
        return q @ k.transpose(-1, -2)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        out: Tensor = self.o((self.scores(x).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


class Scaled(Attention):
    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
        weights = (self.scores(x) / (self.embed_size**0.5)).softmax(-1)
        out: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return out


class Sloped(Attention):
    def scores(self, x: Tensor) -> Tensor:
        slopes = 2.0 ** (-8 * torch.arange(1, self.num_heads + 1) / self.num_heads)
        return super().scores(x) * slopes[:, None, None]


class OddlyNamed(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.h = 8

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).view(x.shape[0], x.shape[1], self.h, -1)
        out: Tensor = self.o(v.flatten(2))
        return out


class Settings:
    n_heads = 8


class Configured(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.cfg = Settings()

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).reshape((x.shape[0], x.shape[1], self.cfg.n_heads, -1))
        out: Tensor = self.o(v.flatten(2))
        return out


class NormPerHead(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(8))


@pytest.mark.parametrize(
    ("attention", "named"),
    [
        (Scaled, r"attn computes with `self\.embed_size` = 64"),
        (Sloped, r"attn computes with `self\.num_heads` = 8"),
        (OddlyNamed, r"attn reads `self\.h` = 8"),
        (Configured, r"attn reads `self\.cfg\.n_heads` = 8"),
        (NormPerHead, r"attn\.norms holds 8 parts, as many as attn has heads"),
    ],
)
def test_head_counts_used_otherwise_than_as_sizes(attention: type[Attention], named: str) -> None:
    blockers = " ".join(plan(module(attn=attention()), *RULES).blockers)
    assert blockers and re.search(named, blockers), blockers


def test_an_attention_that_views_by_its_head_size_is_fine() -> None:
    assert not plan(module(attn=Attention()), *RULES).blockers


def test_stablelm_with_a_norm_for_each_head_is_refused() -> None:
    config = small_config("stablelm")
    config.qk_layernorm = True
    assert "norms" in " ".join(make_plan(small_model(config), TPTrainingConfig(autotp_size=2)).blockers)


class NormLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.layer_norm(x, x.shape[-1:]))


def test_a_row_cut_layer_that_works_on_its_input_is_refused() -> None:
    attention = Attention()
    attention.o = NormLinear(64, 64)
    with pytest.raises(ValueError, match=r"attn\.o\.weight .*NormLinear has a forward of its own"):
        plan(module(attn=attention), *RULES)


def test_a_layer_whose_forward_was_replaced_is_refused() -> None:
    attention: Any = Attention()
    attention.q.forward = attention.q.forward
    with pytest.raises(ValueError, match=r"attn\.q\.weight .*was replaced on the object"):
        plan(module(attn=attention), *RULES)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 16, 8)), nn.Parameter(torch.randn(2, 8, 16))
        self.down_bias = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", torch.einsum("bi,eoi->beo", x, self.up).sum(1), self.down).sum(1)


EXPERT_RULES = rule("column", "up"), rule("row", "down")


def test_what_is_whole_inside_a_boundary_is_refused() -> None:
    block = module(experts=Experts(), shared=nn.Linear(8, 8))
    rules: list[dict[str, Any]] = [
        {"patterns": [r".*experts\.up$"], "partition_type": "column"},
        {"patterns": [r".*experts\.down(_bias)?$"], "partition_type": "row"},
        {"patterns": [r"block$"], "partition_type": "skip", "boundary": True},
    ]
    blockers = " ".join(plan(module(block=block), *rules, skip("shared")).blockers)
    assert "block.experts.down_bias: it is whole" in blockers and "block.shared.weight: it is whole" in blockers


def test_cut_parameters_in_a_list_need_a_boundary() -> None:
    holder = module(parts=nn.ParameterList([torch.randn(16, 8), torch.randn(8, 16)]), mlp_up=nn.Linear(8, 16))
    rules: list[dict[str, Any]] = [
        {"patterns": [r".*parts\.0"], "partition_type": "column"},
        {"patterns": [r".*parts\.1"]},
    ]
    with pytest.raises(ValueError, match=r"parts\.0 .*nothing sums the output"):
        plan(module(net=holder), *rules)


def test_a_config_of_ones_own_follows_its_original() -> None:
    from lightning_autotp.sharding.local_config import LocalConfig

    config = small_config("phi3")
    local = LocalConfig(config)
    vars(local)["num_attention_heads"] = 4
    config._attn_implementation = "eager"
    assert (local.num_attention_heads, local._attn_implementation) == (4, "eager")
    assert config.num_attention_heads == 8 and local.hidden_size == config.hidden_size


def tiny(model_type: str) -> nn.Module:
    return small_model(small_config(model_type))


def _save(directory: str, model_type: str, distributed: bool) -> dict[str, Tensor]:
    saver = ModelCheckpoint(directory, filename="model", save_top_k=-1)
    strategy = AutoTPStrategy(autotp_size=4, save_distributed_checkpoint=distributed)
    trainer = {"callbacks": [saver], "enable_checkpointing": True}
    model = sharded_run(strategy, tiny, batches_for(131, steps=1), trainer=trainer, model_type=model_type)
    placement = strategy._placement
    return {name: placement.gather(name, p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "falcon", "phi3", "qwen2"])
def test_fused_weights_with_shared_key_heads_are_saved_once(model_type: str, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    weights = run_ranks(4, _save, str(tmp_path), model_type, True)[0]
    path = tmp_path / "model.ckpt"
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    loaded = {f"model.{name}": torch.empty_like(tensor) for name, tensor in weights.items()}
    assert loaded.keys() <= stored.keys()
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    assert all(torch.equal(loaded[f"model.{name}"], tensor) for name, tensor in weights.items())
