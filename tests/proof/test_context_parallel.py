"""What splits tokens is proved by values before it is trained: blocks that mix them otherwise are refuted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.proof.context import few_tokens, prove_small, shorter
from lightning_autotp.proof.prover import Look, Prover
from lightning_autotp.proof.step import loss_of_batch
from lightning_autotp.proof.values import NotRunError
from lightning_autotp.proof.verdict import Verdict

SIZE, HEADS = 32, 4


class Block(nn.Module):
    """Attention and an MLP; ``way``: what else it does with tokens."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)
        self.mlp, self.router = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 4)
        self.conv = nn.Conv1d(SIZE, SIZE, 3, groups=SIZE, padding=1)
        self.way, self.loss = way, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        if self.way == "convolution":
            x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        elif self.way == "own positions":
            x = x + torch.arange(tokens).to(x)[None, :, None] / 10
        elif self.way == "mean":
            x = x - x.mean(1, keepdim=True)
        elif self.way == "router loss":
            self.loss = self.router(x).softmax(-1).mean((0, 1)).square().sum()
        elif self.way == "sum of squares":
            self.loss = self.router(x).square().sum()
        q, k, v = (each.view(rows, tokens, HEADS, -1).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x).relu()


class Net(nn.Module):
    def __init__(self, way: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, SIZE), nn.Linear(SIZE, 64)
        self.blocks = nn.ModuleList(Block(way) for _ in range(2))
        self.way = way

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        loss = F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return loss + sum(getattr(block, "loss", 0) for block in self.blocks)


def proved(model: nn.Module, batch: Any, cp_size: int = 2, tp_size: int = 1) -> Verdict:
    switches = TPTrainingConfig(autotp_size=tp_size, context_parallel_size=cp_size)
    prover = Prover(model, make_plan(model, switches, tp_size, warn=False), switches)
    prover.sharded(model)
    return prover.prove(model, Look("training", (batch,), call=loss_of_batch)).verdict


def rows(tokens: int = 14) -> tuple[Tensor]:
    return (torch.randint(64, (4, tokens), generator=torch.Generator().manual_seed(0)),)


def test_a_step_is_proved_with_tokens_that_ranks_do_not_divide() -> None:
    verdict = proved(Net(), rows())
    assert verdict.kind == "proved", verdict


@pytest.mark.parametrize("way", ["convolution", "own positions", "mean", "router loss", "sum of squares"])
def test_blocks_that_mix_tokens_otherwise_are_refuted(way: str) -> None:
    verdict = proved(Net(way), rows())
    assert verdict.kind == "refuted" and "context_parallel_size" in str(verdict), verdict


def test_long_sequences_are_shortened_at_the_end_that_has_labels() -> None:
    """Prompts are often without labels, and their loss is not a number."""
    config = small_config("llama")
    tokens = torch.randint(60, (2, 4096))
    batch = {"input_ids": tokens, "labels": torch.where(torch.arange(4096) < 4000, -100, tokens)}
    lengths = [found["labels"].shape[1] for found in shorter(batch, few_tokens(2))]
    assert lengths == [17, 17, 4096]
    verdict = proved(small_model(config), batch)
    assert verdict.kind == "proved", verdict


LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def large(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**(LARGE | changes)))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_large_hugging_face_model_is_judged_by_a_small_one(tp_size: int) -> None:
    tokens = torch.randint(128256, (1, 8192))
    verdict = proved(large(), {"input_ids": tokens, "labels": tokens}, tp_size=tp_size)
    assert verdict.kind == "proved", verdict


@pytest.mark.long
@pytest.mark.parametrize("way", ["", "convolution"])
def test_a_large_model_of_ones_own_is_run_with_fewer_blocks(way: str) -> None:
    model = Net(way)
    model.embed, model.head = nn.Embedding(600_000, SIZE), nn.Linear(SIZE, 600_000)
    verdict = proved(model, rows(), tp_size=1)
    assert verdict.kind == ("refuted" if way else "proved"), verdict


def test_a_large_model_whose_blocks_hold_more_is_not_judged_by_its_config() -> None:
    model = large()
    model.model.layers[3].mlp.shift = nn.Conv1d(8, 8, 3)
    with pytest.raises(NotRunError, match=r"model\.layers\.3\.mlp\.shift"):
        prove_small(model, TPTrainingConfig(context_parallel_size=2))
    verdict = proved(model, {"input_ids": torch.zeros(1, 64, dtype=torch.int64)})
    assert verdict.kind == "refuted" and "proof='warn'" in str(verdict)


def test_adapters_on_a_large_model_are_known_to_work_on_each_token() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(large(), LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert prove_small(model, TPTrainingConfig(context_parallel_size=2)).kind == "proved"


@pytest.mark.parametrize("name", ["mamba2", "bloom", "recurrent_gemma", "lfm2_moe"])
def test_hugging_face_models_that_do_not_call_attention_are_refuted(name: str) -> None:
    model = small_model(small_config(name)).train()
    tokens = torch.randint(5, 60, (3, 18))
    verdict = proved(model, {"input_ids": tokens, "labels": tokens})
    assert verdict.kind == "refuted" and "context_parallel_size" in str(verdict), verdict
