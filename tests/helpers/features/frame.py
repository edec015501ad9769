"""A feature, what its run gives, and the same run by a plain Trainer."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_autotp.distributed.functions import gather_parts
from lightning_autotp.sharding.state import sharded
from tests.helpers.small_nets import Net, Regressor, Rows, alone, full_weights, strategy, trainer

STEPS, BATCH = 5, 4


def dealt(module: Any, rows: Rows, batch: int = BATCH) -> DataLoader[Tensor]:
    """A loader whose every batch is shared by the data parallel ranks, in order."""
    plugin = module.trainer.strategy
    rank, size = getattr(plugin, "dp_rank", 0), getattr(plugin, "dp_size", 1)
    own = [row for rows_of_batch in rows.rows.split(batch) for row in rows_of_batch.chunk(size)[rank]]
    return DataLoader(own, batch_size=batch // size)  # type: ignore[arg-type]


class Recorded(Regressor):
    """Writes down its losses, and logs what it trains and validates with."""

    net: Any

    def __init__(self, make: Callable[[], Any] = Net, steps: int = STEPS) -> None:
        super().__init__(make, BATCH, BATCH * steps)
        self.losses: list[Tensor] = []

    def keep(self, loss: Tensor) -> Tensor:
        """Write ``loss`` down."""
        self.losses.append(loss.detach().clone())
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.keep(self.loss(batch))
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def val_dataloader(self) -> DataLoader[Tensor]:
        return dealt(self, Rows(8, seed=2))

    def test_dataloader(self) -> DataLoader[Tensor]:
        return dealt(self, Rows(8, seed=3))

    def predict_dataloader(self) -> DataLoader[Tensor]:
        return dealt(self, Rows(8, seed=4))

    def error(self, batch: Tensor) -> Tensor:
        """The loss of a forward of one's own."""
        return functional.mse_loss(self.net(batch), batch.flip(-1))


def fit(run: Trainer, model: Recorded, directory: Path) -> Any:
    """Just train."""
    run.fit(model)


@dataclass(frozen=True)
class Feature:
    """Something that a user turns on.

    Args:
        make: the module.
        options: of the Trainer, made for each run in a directory of its own.
        strategy: options of the strategy.
        run: what is called; what it returns is compared, too.
        refused: what the error says where this cannot be exact; it is raised on all ranks.
        refused_by_replicas: the same where there is data parallelism.
        replicas: whether it is tried with data parallelism.
    """

    make: Callable[[], Recorded] = Recorded
    options: Callable[[Path], dict[str, Any]] = lambda directory: {}
    strategy: Mapping[str, Any] = field(default_factory=dict)
    run: Callable[[Trainer, Any, Path], Any] = fit
    refused: str = ""
    refused_by_replicas: str = ""
    replicas: bool = True


@dataclass
class Outcome:
    """What a run gave: tensors by name, and what must be the same to the letter."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def outcome_of(feature: Feature, plugin: Callable[[], Any], directory: Path, devices: int | None) -> Outcome:
    """Run the feature once; an error is part of the outcome."""
    torch.manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    only = {} if devices is None else {"devices": devices}
    try:
        run = trainer(plugin(), **(only | {"default_root_dir": directory} | feature.options(directory)))
        model = feature.make()
        result = feature.run(run, model, directory)
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    found = Outcome()
    if model.losses:
        found.tensors["losses"] = _over_replicas(model, torch.stack(model.losses).float())
    weights = full_weights(model)
    found.tensors |= {f"weight {name}": weight.detach().cpu() for name, weight in weights.items()}
    found.tensors |= {f"metric {name}": value for name, value in run.callback_metrics.items()}
    _take(result, "result", found)
    return found


def alone_outcome(feature: Feature, directory: Path) -> Outcome:
    """The outcome by a plain Trainer."""
    with alone():
        return outcome_of(feature, lambda: "auto", directory, 1)


def outcomes(features: Mapping[str, Feature], tp_size: int, directory: Path) -> dict[str, Outcome]:
    """The outcomes of some features, by this rank's account; called on every rank."""
    found = {}
    for name, feature in features.items():
        dist.barrier()
        where = directory / name
        found[name] = outcome_of(feature, lambda options=feature.strategy: strategy(tp_size, **options), where, None)  # type: ignore[misc]
    return found


def _over_replicas(model: Regressor, losses: Tensor) -> Tensor:
    found = sharded(model)
    if found is None or found.mesh.dp_size == 1:
        return losses
    losses = losses.clone()
    dist.all_reduce(losses, group=found.mesh.dp_group)
    return losses / found.mesh.dp_size


def gathered(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors of parts that go by names of parameters."""
    found = sharded(model)
    if found is None:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    layouts = found.plan.layouts
    return {n: gather_parts(t.detach(), layouts[n], found.mesh) if n in layouts else t for n, t in tensors.items()}


def _take(value: Any, name: str, into: Outcome) -> None:
    if isinstance(value, Tensor):
        into.tensors[name] = value.detach().cpu().clone()
    elif isinstance(value, float):
        into.tensors[name] = torch.tensor(value)
    elif isinstance(value, Mapping):
        into.exact[f"{name}'s names"] = sorted(map(str, value))
        for key, entry in value.items():
            _take(entry, f"{name}[{key!r}]", into)
    elif isinstance(value, (list, tuple)) and any(isinstance(one, (Tensor, float, Mapping, list)) for one in value):
        into.exact[f"{name}'s length"] = len(value)
        for at, entry in enumerate(value):
            _take(entry, f"{name}[{at}]", into)
    else:
        into.exact[name] = value
