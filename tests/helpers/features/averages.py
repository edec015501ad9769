"""Features that keep averages of weights beside the model, in runs and in checkpoints."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn

from tests.helpers.features.frame import Feature, gathered
from tests.helpers.small_nets import WIDTH, Net


class Normed(Net):
    """With a batch norm, whose buffers are averaged, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)  # type: ignore[assignment]


class OwnAverage(Callback):
    """An average as people write it: a copy of a part of the module, made before it is sharded."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.average = copy.deepcopy(module.net)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        for mine, theirs in zip(self.average.parameters(), module.net.parameters()):
            mine.lerp_(theirs, 0.3)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])


def _callback(run: Trainer) -> Any:
    kinds = (WeightAveraging, StochasticWeightAveraging, OwnAverage)
    return next(one for one in run.callbacks if isinstance(one, kinds))  # type: ignore[attr-defined]


def averages(run: Trainer, model: Any) -> Any:
    """The averages that the callback holds, in full."""
    callback = _callback(run)
    if isinstance(callback, OwnAverage):
        named = {f"net.{name}": p for name, p in callback.average.named_parameters()}
    else:
        average = callback._average_model
        named = dict(getattr(average, "module", average).named_parameters())
    return gathered(model, named)


def _averaged(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    return averages(run, model)


AVERAGES: dict[str, Feature] = {}
KINDS: dict[str, Any] = {
    "averaging": WeightAveraging,
    "ema": partial(EMAWeightAveraging, decay=0.7, update_every_n_steps=1),
    "swa": partial(StochasticWeightAveraging, swa_lrs=0.01, swa_epoch_start=1),
    "own-average": OwnAverage,
}


for _name, _make in KINDS.items():
    AVERAGES[_name] = Feature(
        options=lambda d, make=_make: {"max_epochs": 3, "callbacks": [make()]},  # type: ignore[misc]
        run=_averaged,
    )
