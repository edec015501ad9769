"""Models that are too large to be proved by values as they are: with fewer blocks, or by the dataflow of their step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.proof import prover as prover_module
from lightning_autotp.proof.compared import Proof
from lightning_autotp.proof.prover import Look, Prover
from lightning_autotp.proof.step import loss_of_batch
from lightning_autotp.recipe.make_plan import make_plan
from tests.helpers.hf_trials import proof_batch, trial_of, truth_of
from tests.helpers.small_nets import RULES, Net, Regressor, Rows
from tests.helpers.truth import judged


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


class Grouped(Net):
    """Features in groups, whose number has a name that no rule knows."""

    def __init__(self) -> None:
        super().__init__(12)
        self.amount = 6

    def between(self, x: Tensor) -> Tensor:
        groups = self.grouped(self.up(self.norm(x)).unflatten(-1, (self.amount, 2)))
        out: Tensor = self.down(groups.softmax(-1).flatten(-2))
        return out

    def grouped(self, groups: Tensor) -> Tensor:
        return groups


class ScaledByGroups(Grouped):
    def grouped(self, groups: Tensor) -> Tensor:
        return groups / self.amount  # all of them


class MeanOfGroups(Grouped):
    def grouped(self, groups: Tensor) -> Tensor:
        return groups - groups.mean(-2, keepdim=True)


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


def test_numbers_that_are_per_rank_are_found_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = proof(Regressor(stack(Grouped, Grouped, Grouped)), 0, monkeypatch)
    assert found.verdict.kind == "proved", found.verdict
    assert [(one.module, one.name, one.local) for one in found.repairs.local] == [
        (f"net.{at}", "amount", (3, 3)) for at in range(3)
    ]


@pytest.mark.parametrize("kind", [ScaledByGroups, MeanOfGroups])
def test_numbers_of_which_ranks_need_both_are_refuted_without_values(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = proof(Regressor(stack(kind, kind, kind)), 0, monkeypatch)
    assert found.verdict.kind == "refuted", found.verdict
    assert not found.repairs


@pytest.mark.parametrize("name", ["codegen", "sarvam_moe", "apertus1p5_text"])
def test_plans_that_are_wrong_are_made_right_without_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prover_module, "LARGEST", 0)
    trial = trial_of(name, 2)
    model = copy.deepcopy(trial.model)
    trial.ready(model)
    prover = Prover(model, trial.plan, trial.switches)
    prover.sharded(model)
    found = prover.prove(model, Look("training", (proof_batch(name),), call=loss_of_batch))
    assert judged(trial, truth_of(name), found) == "wrong, made right", found.verdict


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
