"""A network of a few hundred weights for tests of what the strategy does, and the same training without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lightning_autotp import AutoTPStrategy
from lightning_autotp.distributed.dp_shards import all_rows
from lightning_autotp.distributed.functions import gather_parts
from lightning_autotp.sharding.state import sharded
from tests.helpers.models import quiet_trainer

WIDTH = 8
RULES: dict[str, Any] = {
    "layer_specs": [
        {"patterns": [r".*\.up\.weight"], "partition_type": "column"},
        {"patterns": [r".*\.down\.weight"], "partition_type": "row"},
    ]
}


class Net(nn.Module):
    """A residual block ``[B, 8] -> [B, 8]``; with rules for ``up`` and ``down``, a norm and a bias stay whole."""

    def __init__(self, hidden: int = 10) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.between(x)

    def between(self, x: Tensor) -> Tensor:
        """What the block adds to its input."""
        out: Tensor = self.down(functional.gelu(self.up(self.norm(x))))
        return out


class Rows(Dataset[Tensor]):
    """``count`` rows ``[8]``, the same ones for the same seed."""

    def __init__(self, count: int = 16, seed: int = 1) -> None:
        self.rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


class Regressor(LightningModule):
    """Learns to reverse rows. Every batch of the loader is shared by the data parallel ranks, in order.

    Args:
        make: builds the network, from weights that depend on nothing drawn before.
        batch: rows a batch, over all data parallel ranks.
        count: rows an epoch.
    """

    def __init__(self, make: Callable[[], nn.Module] = Net, batch: int = 4, count: int = 16) -> None:
        super().__init__()
        self.batch, self.count = batch, count
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = make()

    def loss(self, batch: Tensor) -> Tensor:
        return functional.mse_loss(self.net(batch), batch.flip(-1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        out: Tensor = self.net(batch)
        return out

    def train_dataloader(self) -> DataLoader[Tensor]:
        rank, size = getattr(self.trainer.strategy, "dp_rank", 0), getattr(self.trainer.strategy, "dp_size", 1)
        own = [row for batch in Rows(self.count).rows.split(self.batch) for row in batch.chunk(size)[rank]]
        return DataLoader(own, batch_size=self.batch // size)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-5)


def strategy(size: int = 2, **options: Any) -> AutoTPStrategy:
    """The strategy that cuts ``Net``."""
    return AutoTPStrategy(autotp_size=size, **({"partition_config": RULES} | options))


def trainer(plugin: Any, **options: Any) -> Trainer:
    """A quiet Trainer that leaves the data as ``Regressor`` deals it out."""
    return quiet_trainer(strategy=plugin, **({"use_distributed_sampler": False} | options))


@contextmanager
def alone() -> Iterator[None]:
    """Inside it, a Trainer over one device takes this rank for the only process there is."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def unsharded(model: LightningModule, **options: Any) -> dict[str, Tensor]:
    """Train ``model`` with Lightning on this rank alone, and return its weights."""
    with alone():
        trainer("auto", devices=1, **options).fit(model)
    return weights(model)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, as they are on this rank; under ZeRO every data parallel rank must call it."""
    return {name: all_rows(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def parts_of(model: nn.Module, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts of full tensors, as the sharded ``model`` holds them."""
    found = sharded(model)
    assert found is not None
    return {name: found.plan.layouts[name].shard(tensor, found.mesh.tp_rank) for name, tensor in full.items()}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters as they are in the unsharded model, on every rank."""
    found = sharded(model)
    if found is None:
        return weights(model)
    layouts = found.plan.layouts
    return {name: gather_parts(tensor, layouts[name], found.mesh) for name, tensor in weights(model).items()}


def everyones(value: Any) -> list[Any]:
    """``value`` of every rank, by global rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def plugin_of(model: LightningModule) -> AutoTPStrategy:
    """The strategy that runs ``model``."""
    plugin = model.trainer.strategy
    assert isinstance(plugin, AutoTPStrategy)
    return plugin


def assert_replicas_equal(model: LightningModule) -> None:
    """What ranks hold alike is bit-equal: whole tensors on all, parts on those with the same tensor parallel rank."""
    found = sharded(model)
    assert found is not None
    for name, tensor in weights(model).items():
        source = 0 if found.plan.layouts[name].is_replicated else found.mesh.tp_rank
        assert torch.equal(everyones(tensor)[source], tensor), name
