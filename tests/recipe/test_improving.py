"""A preset's plan that a step refutes is replaced by a derived one; the user's own rules never are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_autotp import AutoTPStrategy, parallelize
from lightning_autotp.proof import prover
from lightning_autotp.recipe.proving import PlanRefutedError
from lightning_autotp.sharding.state import sharded
from tests.helpers.closeness import assert_close
from tests.helpers.small_nets import WIDTH, Regressor, Rows, parts_of, trainer, unsharded, weights

HEADS = 4


class Attention(nn.Module):
    """Attention over four tokens made of a row; heads are what it computes with, and lie innermost if it says so."""

    def __init__(self, innermost: bool) -> None:
        super().__init__()
        self.innermost = innermost
        self.places = nn.Parameter(torch.randn(4, WIDTH))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] + self.places
        q, k, v = (self.split(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        seen = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        out: Tensor = self.o_proj(self.merge(seen))
        return out.mean(1)

    def split(self, x: Tensor) -> Tensor:
        if self.innermost:
            return x.unflatten(-1, (WIDTH // HEADS, -1)).permute(0, 3, 1, 2)
        return x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1) if self.innermost else x.transpose(1, 2)).flatten(2)


class Layer(nn.Module):
    def __init__(self, innermost: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="llama", num_attention_heads=HEADS)
        self.self_attn = Attention(innermost)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.self_attn(x)
        return out


class Usual(Layer):
    def __init__(self) -> None:
        super().__init__(innermost=False)


class Innermost(Layer):
    def __init__(self) -> None:
        super().__init__(innermost=True)


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - batch.flip(-1)).square().mean()
    return loss


class Streamed(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(Rows(16).rows)


class OfAStream(Regressor):
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Streamed(), batch_size=4)


def sources(model: nn.Module) -> set[str]:
    found = sharded(model)
    assert found is not None
    return {entry.source for entry in found.plan.parameters.values() if not entry.layout.is_replicated}


@pytest.mark.ranks(2)
def test_a_preset_that_is_wrong_is_replaced_and_trains_as_unsharded(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("lightning_autotp.recipe.engine.rank_zero_warn", told.append)
    model = Regressor(Innermost)
    trainer(AutoTPStrategy(autotp_size=2)).fit(model)
    assert sources(model) == {"derived"}
    (said,) = [one for one in told if "is replaced" in one]
    assert "the plan of preset llama is not right here" in said
    assert "test_improving.py" in said
    found = sharded(model)
    assert found is not None and found.plan.warnings == (said,)
    assert_close(weights(model), parts_of(model, unsharded(Regressor(Innermost))), 1e-4, "weight")


@pytest.mark.ranks(2)
def test_a_preset_that_is_right_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[Any] = []
    real = prover.Prover._prove

    def counted(self: Any, *args: Any) -> Any:
        proofs.append(args)
        return real(self, *args)

    monkeypatch.setattr(prover.Prover, "_prove", counted)
    model = Regressor(Usual)
    trainer(AutoTPStrategy(autotp_size=2)).fit(model)
    assert sources(model) == {"preset llama"}
    assert len(proofs) == (model.global_rank == 0)
    assert_close(weights(model), parts_of(model, unsharded(Regressor(Usual))), 1e-4, "weight")


class Turned(Regressor):
    """Is another model once it trains."""

    def on_train_start(self) -> None:
        net: Any = self.net
        net.self_attn.innermost = True


@pytest.mark.ranks(2)
def test_what_changes_after_the_first_look_is_looked_at_again() -> None:
    with pytest.raises(PlanRefutedError, match="the training step of the sharded model"):
        trainer(AutoTPStrategy(autotp_size=2)).fit(Turned(Usual))


@pytest.mark.ranks(2)
def test_without_a_sample_the_error_says_what_one_would_do() -> None:
    with pytest.raises(PlanRefutedError, match="With a `sample_batch` .* would be derived in place of this one"):
        trainer(AutoTPStrategy(autotp_size=2)).fit(OfAStream(Innermost))


@pytest.mark.ranks(2)
def test_rules_of_the_user_are_never_replaced() -> None:
    specs = [
        {"patterns": [r".*(q|k|v)_proj\.weight"], "partition_type": "column"},
        {"patterns": [r".*o_proj\.weight"], "partition_type": "row"},
    ]
    for preset in (None, "llama"):
        rules = {"layer_specs": specs, "use_default_specs": True}
        plugin = AutoTPStrategy(autotp_size=2, partition_config=rules, preset_model=preset)
        with pytest.raises(PlanRefutedError, match="Mend the rules"):
            trainer(plugin).fit(Regressor(Innermost))


@pytest.mark.ranks(2)
def test_a_loop_of_ones_own_gets_it_with_its_sample() -> None:
    torch.manual_seed(0)
    model = Innermost()
    parallelize(model, autotp_size=2, device="cpu", sample_batch=Rows(6).rows, loss_fn=squares)
    assert sources(model) == {"derived"}


class OneHead(Innermost):
    """Features that all meet: nothing of it can be sharded but by gathers, and a count is asked for besides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(self.self_attn.q_proj.weight.shape[0] == WIDTH)


@pytest.mark.ranks(2)
def test_where_none_can_be_derived_the_error_has_the_presets_findings_on_all_ranks() -> None:
    with pytest.raises(
        PlanRefutedError, match=r"test_improving.*(\n.*)*In place of the plan of preset llama"
    ) as raised:
        trainer(AutoTPStrategy(autotp_size=2)).fit(Regressor(OneHead))
    assert "training step" in str(raised.value)
