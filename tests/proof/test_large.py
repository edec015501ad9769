"""Models that are too large to be proved by values as they are: with fewer blocks, or by the dataflow of their step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.proof import prover as prover_module
from lightning_autotp.proof.prover import Look, Prover
from lightning_autotp.proof.values import Proof
from lightning_autotp.recipe.make_plan import make_plan
from tests.helpers.small_nets import RULES, Net, Regressor, Rows


class Scaled(Net):
    """A parameter between the sharded layers, whose gradient is a partial sum on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def between(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(self.norm(x))) * self.scale)
        return out


class SoftmaxInside(Net):
    def between(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(self.norm(x)).softmax(-1))
        return out


class Manual(Regressor):
    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.log("loss", loss.item())


def stack(*kinds: Any) -> Any:
    return lambda: nn.Sequential(*(kind() for kind in kinds))


def proof(model: Any, largest: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Proof, Prover]:
    monkeypatch.setattr(prover_module, "LARGEST", largest)
    config = TPTrainingConfig(partition_config=RULES)
    prover = Prover(model, make_plan(model, config, 2), config)
    prover.sharded(model)
    return prover.prove(model, Look("training", (Rows().rows, 0))), prover


@pytest.mark.parametrize("kind", [Regressor, Manual])
def test_a_right_step_is_proved_without_values(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = proof(kind(Net), 0, monkeypatch)
    assert found.verdict.kind == "proved", found.verdict
    assert not found.repairs


@pytest.mark.parametrize("kind", [Regressor, Manual])
def test_a_wrong_step_is_refuted_without_values(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = proof(kind(SoftmaxInside), 0, monkeypatch)
    assert found.verdict.kind == "refuted", found.verdict
    assert "softmax" in str(found.verdict)
    assert "test_large.py" in str(found.verdict)


def test_partial_gradients_are_found_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = proof(Regressor(Scaled), 0, monkeypatch)
    assert found.verdict.kind == "proved", found.verdict
    assert found.repairs.partial == ("net.scale",)


def test_an_evaluation_of_a_large_model_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    _, prover = proof(Regressor(Net), 0, monkeypatch)
    verdict = prover.prove(Regressor(Net), Look("validation", (Rows().rows, 0))).verdict
    assert verdict.kind == "unknown"
    assert not verdict.findings


def test_fewer_blocks_are_proved_by_values_and_repaired_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Regressor(stack(*[Scaled] * 6))
    size = sum(parameter.numel() for parameter in model.parameters())
    found, prover = proof(model, size // 2, monkeypatch)
    assert found.verdict.kind == "proved", found.verdict
    entries = found.repairs.plan(prover.plan).parameters
    assert all(entries[f"net.{at}.scale"].grad_allreduce for at in range(6))


def test_a_last_block_of_another_kind_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Regressor(stack(*[Net] * 5, SoftmaxInside))
    found, _ = proof(model, 0, monkeypatch)
    assert found.verdict.kind == "refuted", found.verdict


def test_a_model_on_the_meta_device_is_proved_by_dataflow(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        right, wrong = Regressor(Net), Regressor(SoftmaxInside)
    found, _ = proof(right, 10**9, monkeypatch)
    assert found.verdict.kind == "proved", found.verdict
    found, _ = proof(wrong, 10**9, monkeypatch)
    assert found.verdict.kind == "refuted", found.verdict
