"""The proof in a process that trains on a GPU: it looks on the CPU, and leaves the GPU as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.proof.prover import Look, Prover
from lightning_autotp.recipe.make_plan import make_plan
from tests.helpers.small_nets import RULES, Net, Regressor, Rows

pytestmark = pytest.mark.gpu


class OnItsDevice(Regressor):
    """Makes tensors where the module is."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.loss(batch) + torch.zeros((), device=self.device)
        return loss


class SoftmaxInside(Net):
    def between(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(self.norm(x)).softmax(-1))
        return out


@pytest.mark.parametrize(("make", "kind"), [(Net, "proved"), (SoftmaxInside, "refuted")])
def test_a_step_on_a_gpu_is_proved_for_four_ranks(make: Any, kind: str) -> None:
    config = TPTrainingConfig(partition_config=RULES)
    model = OnItsDevice(make).to("cuda")
    prover = Prover(model, make_plan(model, config, 4), config)
    prover.sharded(model)
    batch = Rows().rows[:5].to("cuda")
    random, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    verdict = prover.prove(model, Look("training", (batch, 0))).verdict
    assert verdict.kind == kind, verdict
    assert torch.equal(random, torch.cuda.get_rng_state())
    assert torch.cuda.memory_allocated() == allocated
    assert all(parameter.is_cuda and parameter.grad is None for parameter in model.parameters())
