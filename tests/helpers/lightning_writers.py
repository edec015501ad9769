"""Lightning's own sharded strategies, as they write checkpoints: on CPU processes, of the model of ``Scheduled``."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import _init_utils
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from tests.helpers.checkpoints import Scheduled
from tests.helpers.small_nets import Rows, trainer


class Whole(Scheduled):
    """``Scheduled``, with every process seeing all data."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(list(Rows(self.count).rows), batch_size=self.batch)  # type: ignore[arg-type]


class Tensors(Whole):
    """With PyTorch's own tensor parallelism."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["tensor_parallel"]  # type: ignore[index]
        parallelize_module(self.net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


class Flat(Whole):
    """With the same groups where parameters are flat while it trains, as FSDP has them."""

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        net: Any = self.net
        matrices = {net.up.weight, net.down.weight}
        for group, among in zip(made["optimizer"].param_groups, (True, False)):
            group["params"] = [p for p in self.parameters() if (p in matrices) is among]
        return made


class OnCPU(FSDPStrategy):
    """``Trainer`` refuses Lightning's own class where there is no GPU."""


def write_with_model_parallel(path: Path) -> None:
    """Train one epoch and save, with ``ModelParallelStrategy``."""
    run = trainer(ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2), max_epochs=1)
    run.fit(Tensors())
    run.save_checkpoint(path)


def write_with_fsdp(path: Path) -> None:
    """Train one epoch and save, with ``FSDPStrategy``."""
    target = "torch.distributed.fsdp.fully_sharded_data_parallel._init_device_handle"
    on_cpu = lambda state, module, ignored, device: _init_utils._init_device_handle(  # noqa: E731
        state, module, ignored, torch.device("cpu")
    )
    with mock.patch(target, on_cpu):
        run = trainer(OnCPU(state_dict_type="sharded", auto_wrap_policy={nn.Linear}), max_epochs=1)
        run.fit(Flat())
        run.save_checkpoint(path)
