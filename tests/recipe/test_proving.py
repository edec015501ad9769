"""Proofs in a loop of one's own: of a sample before anything is sharded, and of a step before it is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp import parallelize
from lightning_autotp.recipe.proving import PlanRefutedError
from lightning_autotp.sharding.state import sharded
from tests.helpers.small_nets import RULES, Net, Rows


class SoftmaxInside(Net):
    def between(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(self.norm(x)).softmax(-1))
        return out


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def between(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(self.norm(x))) * self.scale)
        return out


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def penalized(model: nn.Module, batch: Tensor) -> Tensor:
    return squares(model, batch) + sum(p.norm() for p in model.parameters())


def made(make: Any, **options: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(make())
    return parallelize(model, {"partition_config": RULES}, autotp_size=2, device="cpu", **options), model


@pytest.mark.ranks(2)
def test_a_sample_is_proved_before_anything_is_sharded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SoftmaxInside())
    with pytest.raises(PlanRefutedError, match=r"`softmax` in 0 at .*test_proving\.py"):
        parallelize(
            model, {"partition_config": RULES}, autotp_size=2, device="cpu", sample_batch=Rows().rows, loss_fn=squares
        )
    assert sharded(model) is None
    assert model.get_parameter("0.up.weight").shape[0] == 10


@pytest.mark.parametrize("when", ["before", "later"])
@pytest.mark.ranks(2)
def test_partial_gradients_that_a_proof_finds_are_summed(when: str) -> None:
    batch = Rows().rows
    options = {"sample_batch": batch, "loss_fn": squares} if when == "before" else {}
    parallel, model = made(Scaled, **options)
    if when == "later":
        parallel.prove(squares, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    squares(parallel.model, batch).backward()
    parallel.step(optimizer)
    torch.manual_seed(0)
    want = nn.Sequential(Scaled())
    squares(want, batch).backward()
    gradient, got = want.get_parameter("0.scale").grad, model.get_parameter("0.scale").grad
    assert gradient is not None and got is not None
    torch.testing.assert_close(got, gradient)


@pytest.mark.ranks(2)
def test_a_step_of_the_loop_is_refuted_before_it_is_taken() -> None:
    parallel, _ = made(Net)
    parallel.prove(squares, Rows().rows)
    with pytest.raises(PlanRefutedError, match=r"`norm` in the step at .*test_proving\.py"):
        parallel.prove(penalized, Rows().rows)
