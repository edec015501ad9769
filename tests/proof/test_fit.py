"""The proof before a Trainer's steps: what it refuses, on every rank; what it repairs; and nothing else changes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.model_sources.small import small_batches, small_config, small_model
from lightning_autotp.proof.step import loss_of_batch, loss_step
from lightning_autotp.proof.values import prove_values
from lightning_autotp.recipe.make_plan import make_plan
from lightning_autotp.recipe.proving import PlanRefutedError
from tests.helpers.closeness import assert_close
from tests.helpers.small_nets import (
    WIDTH,
    Net,
    Regressor,
    Rows,
    parts_of,
    strategy,
    trainer,
    unsharded,
    weights,
)


class Scaled(Net):
    """A parameter between the sharded layers, whose gradient is a partial sum on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def between(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(self.norm(x))) * self.scale)
        return out


class SoftmaxInside(Net):
    """Normalizes over features of which a rank has its part."""

    def between(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(self.norm(x)).softmax(-1))
        return out


@pytest.mark.ranks(2)
def test_a_wrong_model_is_an_error_on_every_rank_before_its_first_step() -> None:
    model = Regressor(SoftmaxInside)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanRefutedError, match=r"training step(.|\n)*`softmax` in net at .*test_fit\.py") as raised:
        trainer(strategy(2, proof="on")).fit(model)
    said: list[Any] = [None] * 2
    dist.all_gather_object(said, str(raised.value))
    assert said[0] == said[1]
    assert model.trainer.global_step == 0
    assert torch.equal(model.state_dict()["net.down.bias"], before["net.down.bias"])


@pytest.mark.ranks(2)
def test_a_warning_lets_it_train() -> None:
    model = Regressor(SoftmaxInside)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(strategy(2, proof="warn", check_agreement=False)).fit(model)
    assert model.trainer.global_step == 4
    told = [str(one.message) for one in caught if "does not compute" in str(one.message)]
    assert len(told) == (1 if dist.get_rank() == 0 else 0)


@pytest.mark.ranks(2)
def test_off_looks_at_nothing() -> None:
    model = Regressor(SoftmaxInside)
    trainer(strategy(2, proof="off", check_agreement=False)).fit(model)
    assert model.trainer.global_step == 4


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.ranks(4)
def test_partial_gradients_need_no_rule(size: int) -> None:
    model = Regressor(Scaled)
    trainer(strategy(size)).fit(model)
    assert_close(weights(model), parts_of(model, unsharded(Regressor(Scaled))), 1e-4, "weight")


@pytest.mark.ranks(2)
def test_weights_are_bit_equal_with_and_without() -> None:
    ran = []
    for proof in ("on", "off"):
        model = Regressor()
        trainer(strategy(2, proof=proof)).fit(model, val_dataloaders=DataLoader(Rows(4), batch_size=2))
        ran.append(weights(model))
    assert ran[0].keys() == ran[1].keys()
    assert all(torch.equal(tensor, ran[1][name]) for name, tensor in ran[0].items())


class Unreadable(Regressor):
    """Cannot be run twice."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.trainer.strategy.__class__.__name__ == "SimpleNamespace":
            raise RuntimeError("only in a real Trainer")
        loss: Tensor = self.loss(batch)
        return loss


@pytest.mark.ranks(2)
def test_what_could_not_be_looked_at_is_an_error_where_a_proof_is_required() -> None:
    with pytest.raises(PlanRefutedError, match=r"not proved(.|\n)*only in a real Trainer(.|\n)*proof='require'"):
        trainer(strategy(2, proof="require")).fit(Unreadable())
    model = Unreadable()
    trainer(strategy(2, proof="on")).fit(model)
    assert model.trainer.global_step == 4


class Later(Regressor):
    """Is wrong from its second step on."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.loss(batch)
        if self.global_step >= 1:
            loss = loss + self.net.get_parameter("up.weight").norm()
        return loss


@pytest.mark.ranks(2)
def test_what_a_later_step_would_do_is_looked_at_before_the_first() -> None:
    model = Later()
    with pytest.raises(PlanRefutedError, match=r"decides by trainer\.global_step(.|\n)*`norm` in the step"):
        trainer(strategy(2)).fit(model)
    assert model.trainer.global_step == 0


class Thaws(Callback):
    """Lets a parameter train from the second step on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.net.get_parameter("up.bias").requires_grad_(batch_idx > 0)


class OwnClipping(Regressor):
    """Clips by what this rank has, once a parameter has thawed."""

    def on_after_backward(self) -> None:
        if self.net.get_parameter("up.bias").requires_grad:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1e-3)


@pytest.mark.ranks(2)
def test_a_step_of_another_kind_is_looked_at_before_it_is_taken() -> None:
    model = OwnClipping()
    with pytest.raises(PlanRefutedError, match="gradient differs"):
        trainer(strategy(2), callbacks=[Thaws()]).fit(model)
    assert model.trainer.global_step == 1


class ByKeys(Regressor):
    """Takes batches of several kinds."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(next(iter(batch.values())))


class Named(Rows):
    """Rows under a name that differs from replica to replica."""

    def __init__(self, name: str) -> None:
        super().__init__(8)
        self.name = name

    def __getitem__(self, index: int) -> Any:
        return {self.name: super().__getitem__(index)}


@pytest.mark.ranks(4)
def test_first_batches_that_differ_in_keys_are_one_error_on_all_ranks() -> None:
    model = ByKeys()
    plugin = strategy(2)
    run = trainer(plugin)
    loader = DataLoader(Named("ab"[dist.get_rank() // 2]), batch_size=2)
    with pytest.raises(PlanRefutedError, match=r"differ in their keys(.|\n)*'a'(.|\n)*'b'"):
        run.fit(model, loader)


class ProvesAnother(Regressor):
    """Proves a plan of four ranks for another model in the middle of a job of two."""

    def on_train_start(self) -> None:
        settings = small_config("llama")
        model, batch = small_model(settings), small_batches(settings, 1)[0]
        switches = TPTrainingConfig(proof="off")
        plan = make_plan(model, switches, 4)
        step = loss_step(loss_of_batch, batch)
        self.other = prove_values(model, plan, switches, step).verdict.kind


@pytest.mark.ranks(2)
def test_a_job_of_two_ranks_can_prove_for_four() -> None:
    model = ProvesAnother()
    trainer(strategy(2)).fit(model)
    assert model.other == "proved"
    assert_close(weights(model), parts_of(model, unsharded(Regressor())), 1e-4, "weight")


class Logs(LightningModule):
    """Validates by a number of its shards, which it only logs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)
        self.log("size", self.net.up.weight.abs().max())


@pytest.mark.ranks(2)
def test_a_logged_number_that_is_a_ranks_own_is_refuted() -> None:
    with pytest.raises(PlanRefutedError, match=r"validation step(.|\n)*the logged 'size'"):
        trainer(strategy(2)).validate(Logs(), DataLoader(Rows(4), batch_size=2), verbose=False)


@pytest.mark.ranks(2)
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    class Counts(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[int] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.steps.append(batch_idx)
            self.log("loss", 1.0)
            loss: Tensor = self.loss(batch)
            return loss

    model = Counts()
    trainer(strategy(2)).fit(model)
    assert model.steps == [0, 1, 2, 3]
    assert isinstance(model.log, type(Regressor().log))
    assert WIDTH == 8
