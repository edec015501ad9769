"""What a Lightning strategy does about checkpoints, for a model that tensor parallel ranks share."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from typing_extensions import override

from lightning_autotp.checkpoint.distributed import load_directory, of_this_run, save_directory
from lightning_autotp.checkpoint.hf_record import models_in
from lightning_autotp.checkpoint.manifest import check_file
from lightning_autotp.checkpoint.publish import not_saved, write_in_place
from lightning_autotp.checkpoint.safe_load import load_with, name_what_is_refused, plain
from lightning_autotp.checkpoint.state_dict import Placement, full_checkpoint, optimizer_names
from lightning_autotp.checkpoint.tensors import RECORD
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.errors import Processes, raised_together
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.sharding.state import sharded
from lightning_autotp.strategies.trainer_mesh import MeshStrategy
from lightning_autotp.training.consistency import require_alike


class CheckpointStrategy(MeshStrategy):
    """Saves and loads the unsharded model's checkpoints, as a directory or as one file.

    ``AutoTPStrategy`` is this and all the rest; it sets ``_save_distributed_checkpoint`` and
    ``_exclude_frozen_parameters``.
    """

    config: TPTrainingConfig
    _save_distributed_checkpoint: bool
    _exclude_frozen_parameters: bool
    _has_optimizers: bool = False
    """Whether those there are belong to the run that goes on, and not to an earlier fit."""

    @property
    def plan(self) -> Optional[ShardingPlan]:
        """What was cut, once setup has sharded the model."""
        found = None if self.lightning_module is None else sharded(self.lightning_module)
        return None if found is None else found.plan

    def _shard_for_this_run(self) -> None:
        """Shard the module, unless that is done: Lightning restores models and callbacks before it calls setup."""
        raise NotImplementedError

    @property
    def _placement(self) -> Placement:
        if self.plan is None:
            # before any run there is no mesh, and each process has the whole model
            return Placement({}, silent_mesh(1) if self._mesh is None else self.mesh)
        return Placement.of(self._module, self.plan.layouts, self.mesh)

    def _optimizer_names(self) -> list[list[str]]:
        return [optimizer_names(self._module, optimizer) for optimizer in self.optimizers]

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().lightning_module_state_dict()
        frozen = self._frozen()
        return {name: value for name, value in state.items() if name not in frozen}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not self._exclude_frozen_parameters:
            super().load_model_state_dict(checkpoint, strict=strict)
            return
        missing, unexpected = self._module.load_state_dict(checkpoint["state_dict"], strict=False)
        lacking = [name for name in missing if name not in self._frozen()]
        if strict and (lacking or unexpected):
            raise RuntimeError(
                f"the checkpoint lacks {', '.join(lacking[:5]) or 'nothing'}; tensors in it that the model does not"
                f" know: {', '.join(unexpected[:5]) or 'none'}."
            )

    def _frozen(self) -> set[str]:
        """The names, in a state dict, of the parameters that checkpoints leave out."""
        if not self._exclude_frozen_parameters:
            return set()
        stored = self._module.state_dict(keep_vars=True)
        return {name for name, p in stored.items() if isinstance(p, nn.Parameter) and not p.requires_grad}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        # only now are there the groups that the optimizers had when they were saved: callbacks rebuild them
        states = of_this_run(checkpoint["optimizer_states"], self._optimizer_names(), self._placement)
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Union[str, Path], storage_options: Optional[Any] = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        if "://" in str(filepath):
            raise ValueError(f"{filepath}: checkpoints are written to file systems that this machine has mounted.")
        if self._mesh is None and not dist.is_initialized() and not self.is_global_zero:
            return  # before any run processes do not know each other, and the first one has all
        names = self._optimizer_names() if "optimizer_states" in checkpoint else []
        placement = self._placement
        require_alike(checkpoint, placement.layouts.values(), placement.mesh)
        if self._save_distributed_checkpoint:
            if storage_options is not None:
                raise TypeError("storage_options: a sharded checkpoint is not written through a CheckpointIO.")
            save_directory(checkpoint, names, placement, path, models_in(self._module))
            return
        if self.broadcast(path.is_dir()):
            raise IsADirectoryError(f"{path} is a directory, and an ordinary checkpoint file cannot replace it.")
        full = full_checkpoint(checkpoint, names, placement)
        models = models_in(self._module)
        if models:
            full[RECORD] = models
        Processes().raised_together(lambda: self._write(full, path, storage_options), partial(not_saved, path))

    def _write(self, full: dict[str, Any], path: Path, storage_options: Optional[Any]) -> None:
        if not self.is_global_zero:
            return
        name_what_is_refused(full, path, paths=False)
        if type(self.checkpoint_io) is TorchCheckpointIO and storage_options is None:
            write_in_place(path, partial(torch.save, plain(full)))
        else:
            self.checkpoint_io.save_checkpoint(full, path, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Union[str, Path], weights_only: Optional[bool] = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        self._shard_for_this_run()
        fitting = self._module.trainer.state.fn == TrainerFn.FITTING
        unsafe = self.config.unsafe_checkpoint_load if weights_only is None else not weights_only
        if path.is_dir():
            all_bytes = self.config.verify_checksums
            found = load_directory(path, self._placement, optimizers=fitting, unsafe=unsafe, all_bytes=all_bytes)
        else:
            full = raised_together(lambda: self._read(path, unsafe))
            state = {name: self._placement.cut(name, value) for name, value in full.get("state_dict", {}).items()}
            found = {**full, "state_dict": state}
        if fitting and self._has_optimizers and "optimizer_states" in found:
            found["optimizer_states"] = of_this_run(found["optimizer_states"], self._optimizer_names(), self._placement)
        return found

    def _read(self, path: Path, unsafe: bool) -> dict[str, Any]:
        if not path.exists():
            raise FileNotFoundError(f"there is no checkpoint at {path}.")
        if self.config.verify_checksums and self.is_global_zero:
            check_file(path)
        return load_with(partial(self.checkpoint_io.load_checkpoint, path, weights_only=not unsafe), str(path))
