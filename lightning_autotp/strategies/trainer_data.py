"""What a Lightning strategy does about data: ranks that share a model see the same batches, in the same order."""

import os
from functools import partial
from typing import Any, Optional

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.recipe.engine import Engine
from lightning_autotp.strategies.loaders import shared_loader
from lightning_autotp.strategies.trainer_facts import require_one_job
from lightning_autotp.strategies.trainer_mesh import MeshStrategy


class DataStrategy(MeshStrategy):
    """Hands out loaders whose order, batches, ends and errors are the same on all ranks that share a model."""

    config: TPTrainingConfig
    _engine: Optional[Engine] = None

    def _require_one_job(self) -> None:
        """Compare what the run was started with; every process must call it, before the groups are made."""
        module: Optional[LightningModule] = self.lightning_module
        require_one_job(self.config, module)
        trainer = None if module is None else module._trainer
        if trainer is not None and self.world_size == self.config.size * self.config.context_parallel_size:
            # one replica sees all data: in the order of the loader's own sampler, as in the unsharded run
            trainer._accelerator_connector.use_distributed_sampler = False

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        if self.mesh.batch_ranks == 1:
            return dataloader
        stage: Any = self._module.trainer.state.stage
        dataloader = shared_loader(dataloader, self.mesh, self.config, f"the {stage.dataloader_prefix} dataloader")
        # Lightning seeds workers by global rank; ranks that share a model must draw the same augmentations
        seeds_workers = os.environ.get("PL_SEED_WORKERS", "0") == "1"
        if seeds_workers and isinstance(dataloader, DataLoader) and dataloader.worker_init_fn is None:
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=self.dp_rank)
        return dataloader

    @override
    def batch_to_device(self, batch: Any, device: Optional[torch.device] = None, dataloader_idx: int = 0) -> Any:
        if self._engine is None:
            return super().batch_to_device(batch, device, dataloader_idx)
        stage = self._module.trainer.state.stage
        self._engine.batch(batch, loader=(stage, dataloader_idx))
        batch = super().batch_to_device(batch, device, dataloader_idx)
        self._engine.look.each.batch(batch, self._place(stage))
        return batch

    def _place(self, stage: Any) -> str:
        """Which batch this is, in words."""
        trainer = self._module.trainer
        loop = trainer._active_loop
        progress = getattr(getattr(loop, "epoch_loop", loop), "batch_progress", None)
        number = "" if progress is None else f" {progress.current.ready}"
        return f"{getattr(stage, 'value', stage)} batch{number} of epoch {trainer.current_epoch}"

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._last_look()

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._last_look()

    @override
    def on_test_end(self) -> None:
        super().on_test_end()
        self._last_look()

    @override
    def on_predict_end(self) -> None:
        super().on_predict_end()
        self._last_look()

    def _last_look(self) -> None:
        if self._engine is not None:
            self._engine.look.each.last()
