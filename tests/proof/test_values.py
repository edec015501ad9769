"""The proof by values: right plans are proved, wrong ones refuted with their line, what a plan lacks is repaired."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.model_sources.factory import loss_of
from lightning_autotp.model_sources.small import group_experts, small_batches, small_config, small_model
from lightning_autotp.proof.compared import Proof
from lightning_autotp.proof.copying import alias_copy
from lightning_autotp.proof.step import loss_step
from lightning_autotp.proof.values import prove_values
from lightning_autotp.recipe.make_plan import make_plan

WIDTH, HEADS, ROWS, TOKENS = 32, 4, 3, 6

RULES: Mapping[str, Any] = {
    "layer_specs": [
        {"patterns": [r".*(q|k|v|up)\.weight"], "partition_type": "column"},
        {"patterns": [r".*(out|down)\.weight"], "partition_type": "row"},
    ]
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: Tensor) -> list[Tensor]:
        rows, tokens, _ = x.shape
        split = (rows, tokens, self.num_heads, -1)
        return [linear(x).view(split).transpose(1, 2) for linear in (self.q, self.k, self.v)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attend(*self.heads(x))
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.attention = attention
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x)
        return x + self.drop(self.down(self.drop(F.gelu(self.up(x)))))


def squares(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    loss: Tensor = model(**batch).square().mean()
    return loss


def proof(model: nn.Module, tp: int = 2, loss: Any = squares, rules: Any = RULES, **switches: Any) -> Proof:
    config = TPTrainingConfig.load({"partition_config": dict(rules), **switches})
    draw = torch.Generator().manual_seed(0)
    batch = {"tokens": torch.randint(11, (ROWS, TOKENS), generator=draw)}
    return prove_values(model, make_plan(model, config, tp), config, loss_step(loss, batch))


@pytest.mark.parametrize("tp", [2, 4])
def test_a_right_plan_is_proved(tp: int) -> None:
    found = proof(Net(Attention()), tp)
    assert found.verdict.kind == "proved", found.verdict
    assert not found.repairs
    assert not found.verdict.random  # the ranks draw their parts of the unsharded numbers
    assert any("test_values.py" in item.line for one in found.sites.drawn for item in one.chain)


def test_the_model_is_what_it_was_but_for_noise() -> None:
    model = Net(Attention())
    before = {name: (id(p), tuple(p.shape)) for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    proof(model)
    assert before == {name: (id(p), tuple(p.shape)) for name, p in model.named_parameters()}
    assert torch.equal(random, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


class Constant(Attention):
    def heads(self, x: Tensor) -> list[Tensor]:
        rows, tokens, _ = x.shape
        return [f(x).view(rows, tokens, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v)]  # wrong


class SoftmaxOfFeatures(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = (q * k).transpose(1, 2).flatten(2).softmax(-1)  # wrong
        return both.view(*both.shape[:2], self.num_heads, -1).transpose(1, 2) * v


class LocalScale(Attention):
    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = super().heads(x)
        return [q / self.q.weight.shape[0], k, v]  # wrong


class FlippedHeads(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k.flip(1), v)  # wrong


@pytest.mark.parametrize("kind", [Constant, SoftmaxOfFeatures, LocalScale, FlippedHeads])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_wrong_plan_is_refuted_with_its_line(kind: type[Attention], tp: int) -> None:
    found = proof(Net(kind()), tp).verdict
    assert found.kind == "refuted"
    named = re.findall(r"test_values\.py:(\d+)", found.findings[0].message)
    lines = Path(__file__).read_text().splitlines()
    assert any("# wrong" in lines[int(number) - 1] for number in named), found


class OtherName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.amount = HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        split = (*x.shape[:2], self.amount, -1)
        q, k, v = (f(x).view(split).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("tp", [2, 4])
def test_heads_under_any_name_become_the_ranks_own(tp: int) -> None:
    found = proof(Net(OtherName()), tp)
    assert found.verdict.kind == "proved", found.verdict
    assert [(one.module, one.name, one.local) for one in found.repairs.local] == [
        ("attention", "amount", (HEADS // tp,) * tp)
    ]


class Normed(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH // HEADS)

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = super().heads(x)
        return [self.norm(q), k, v]


def test_partial_gradients_are_summed() -> None:
    found = proof(Net(Normed()))
    assert found.verdict.kind == "proved", found.verdict
    assert set(found.repairs.partial) == {"attention.norm.weight", "attention.norm.bias"}


@pytest.mark.parametrize("both", [True, False], ids=["with another mistake", "alone"])
def test_a_gradient_that_a_rule_sums_needlessly_is_refuted(both: bool) -> None:
    class Before(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    skip = {"patterns": [r".*norm\..*"], "partition_type": "skip", "grad_allreduce": True}
    found = proof(Net(Before()), rules={"layer_specs": [*RULES["layer_specs"], skip]}).verdict
    assert found.kind == "refuted"
    assert "attention.norm.weight" in str(found)
    assert "remove `grad_allreduce: true`" in str(found)


def penalized(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return squares(model, batch) + sum(p.norm() for p in model.parameters())  # wrong: norms of shards


def test_a_penalty_on_shards_is_refuted() -> None:
    found = proof(Net(Attention()), loss=penalized).verdict
    assert found.kind == "refuted"
    assert "`norm` in the step at" in str(found)


def test_a_zero_initialized_layer_hides_nothing() -> None:
    attention = Constant()
    nn.init.zeros_(attention.out.weight)
    assert proof(Net(attention)).verdict.kind == "refuted"


def test_a_step_that_does_not_run_is_unknown() -> None:
    def fails(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        raise RuntimeError("needs a GPU")

    found = proof(Net(Attention()), loss=fails).verdict
    assert found.kind == "unknown"
    assert "needs a GPU" in str(found)


def test_a_loss_that_is_not_finite_is_unknown() -> None:
    found = proof(Net(Attention()), loss=lambda model, batch: squares(model, batch) / 0).verdict
    assert found.kind == "unknown"
    assert "not finite" in str(found)


def test_a_model_that_does_not_run_in_fp64_is_proved_in_its_own_dtype() -> None:
    class Single(Attention):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise TypeError("no kernel for doubles")
            return super().forward(x)

    assert proof(Net(Single())).verdict.kind == "proved"


def test_ranks_that_would_wait_for_each_other_are_refuted() -> None:
    class Sometimes(Attention):
        def forward(self, x: Tensor) -> Tensor:
            if self.q.weight.sum() > 0 and self.q.weight.shape[0] < WIDTH:
                return x
            return super().forward(x)

    attention = Sometimes()
    with torch.no_grad():
        attention.q.weight[: WIDTH // 2].fill_(1)
        attention.q.weight[WIDTH // 2 :].fill_(-1)
    found = proof(Net(attention)).verdict
    assert found.kind == "refuted"
    assert "wait" in str(found)


class AlmostRight(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v) * (1 + 1e-5 * self.q.weight.shape[0])  # wrong


def test_a_small_mistake_is_seen_where_all_is_computed_in_fp64() -> None:
    assert proof(Net(AlmostRight())).verdict.kind == "refuted"


def test_parameters_without_a_gradient_are_named() -> None:
    model = Net(Attention())
    model.unused = nn.Linear(3, 3)
    assert set(proof(model).verdict.unproved) == {"unused.weight", "unused.bias"}


SWITCHES: list[dict[str, Any]] = [
    {"sequence_parallel": True},
    {"loss_parallel": True},
    {"loss_parallel": "fused"},
    {"tp_overlap_comm": True},
    {"sequence_parallel": True, "loss_parallel": "fused", "tp_overlap_comm": True},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(switches))
@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v2", "gpt2", "qwen3", "bloom"])
def test_switches_are_proved_with_the_real_layers(name: str, switches: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = small_config(name)
    model = small_model(settings)
    group_experts(model)
    config = TPTrainingConfig.load(switches)
    plan = make_plan(model, config, 2)
    batch = small_batches(settings, 1)[0]
    step = loss_step(lambda model, batch: loss_of(model(**batch)), batch)
    found = prove_values(alias_copy(model), plan, config, step)
    assert found.verdict.kind == "proved", found.verdict
    assert not found.repairs
