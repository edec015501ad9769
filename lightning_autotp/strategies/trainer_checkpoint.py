"""What a Lightning strategy does about checkpoints, for a model that tensor parallel ranks share."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from typing_extensions import override

from lightning_autotp.checkpoint.background import Background
from lightning_autotp.checkpoint.distributed import load_directory, of_this_run
from lightning_autotp.checkpoint.foreign.doors import is_foreign, open_any
from lightning_autotp.checkpoint.foreign.resume import resumable
from lightning_autotp.checkpoint.hf_record import models_in
from lightning_autotp.checkpoint.host_copies import HostCopies
from lightning_autotp.checkpoint.manifest import check_file
from lightning_autotp.checkpoint.other_model import class_name, other_model
from lightning_autotp.checkpoint.other_states import full_states_in, mapped, said, saying, states_in, taken_out
from lightning_autotp.checkpoint.places import AnyPath, place_of
from lightning_autotp.checkpoint.publish import not_saved, write_in_place, write_remotely
from lightning_autotp.checkpoint.safe_load import load_with, plain
from lightning_autotp.checkpoint.saving import Write, look_at_what_is_refused, prepare_directory
from lightning_autotp.checkpoint.state_dict import (
    Placement,
    full_checkpoint,
    of_first_rank,
    optimizer_names,
    placed_state,
)
from lightning_autotp.checkpoint.tensors import RECORD, tensors_of
from lightning_autotp.checkpoint.whole_state import everyones, for_owners
from lightning_autotp.compat import begin_data_of_next_epoch
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.dp_shards import placed_as
from lightning_autotp.distributed.errors import Processes, raised_together
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.randomness.saved import RANDOM, random_states, set_random_states
from lightning_autotp.sharding.state import sharded
from lightning_autotp.strategies.trainer_data import DataStrategy
from lightning_autotp.training.consistency import require_alike


class CheckpointStrategy(DataStrategy):
    """Saves and loads the unsharded model's checkpoints, as a directory or as one file.

    ``AutoTPStrategy`` is this and all the rest; it sets ``_save_distributed_checkpoint`` and
    ``_exclude_frozen_parameters``.
    """

    config: TPTrainingConfig
    _save_distributed_checkpoint: bool
    _exclude_frozen_parameters: bool
    _has_optimizers: bool = False
    """Whether those there are belong to the run that goes on, and not to an earlier fit."""

    _loaded_from: Optional[AnyPath] = None
    _random_states: Optional[list[Mapping[str, Any]]] = None
    """Those of the checkpoint that is resumed from, until training starts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trains = False
        self._background, self._host_copies = Background(), HostCopies()

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
        try:
            self._load_model(checkpoint, strict)
        except RuntimeError as error:
            raise self._other_model(error, checkpoint["state_dict"]) from None

    def _load_model(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        held = self._module.state_dict(keep_vars=True)
        placed = {name: placed_as(held.get(name), value) for name, value in checkpoint["state_dict"].items()}
        checkpoint = {**checkpoint, "state_dict": placed}
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
        states = [placed_state(o, s) for o, s in zip(self.optimizers, for_owners(states, self.optimizers))]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    # -- saving -------------------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Union[str, Path], storage_options: Optional[Any] = None
    ) -> None:
        self._background.wait()
        path = self._place_of(filepath)
        if self._mesh is None and not dist.is_initialized() and not self.is_global_zero:
            return  # before any run processes do not know each other, and the first one has all
        placement = self._placement
        checkpoint = saying(checkpoint, states := states_in(checkpoint, placement))
        if "optimizer_states" in checkpoint and self._mesh is not None:
            checkpoint = {**checkpoint, RANDOM: random_states(self.mesh, self.root_device)}
        require_alike(taken_out(checkpoint, states)[0], placement.layouts.values(), placement.mesh)
        # Slurm may end this process as soon as Lightning has saved for it
        beside = self._trains and self.config.async_checkpoint and not path.name.startswith("hpc_ckpt_")
        prepare = self._prepare_directory if self._save_distributed_checkpoint else self._prepare_file
        write = prepare(checkpoint, path, placement, storage_options, beside)
        if beside:
            self._background.start(write)
        else:
            write(Processes())

    def _place_of(self, path: Union[str, Path]) -> AnyPath:
        """The place that the first process means."""
        processes = Processes()
        shared = processes.first(path)
        return processes.raised_together(lambda: place_of(shared))

    def _prepare_directory(
        self, checkpoint: dict[str, Any], path: AnyPath, placement: Placement, options: Optional[Any], beside: bool
    ) -> Write:
        if options is not None:
            raise TypeError("storage_options: a sharded checkpoint is not written through a CheckpointIO.")
        names = self._optimizer_names() if "optimizer_states" in checkpoint else []
        still = everyones(self._host_copies.of(checkpoint) if beside else checkpoint, self.optimizers)
        return prepare_directory(still, names, placement, path, models_in(self._module), class_name(self._module))

    def _prepare_file(
        self, checkpoint: dict[str, Any], path: AnyPath, placement: Placement, options: Optional[Any], beside: bool
    ) -> Write:
        if self.broadcast(path.is_dir()):
            raise IsADirectoryError(f"{path} is a directory, and an ordinary checkpoint file cannot replace it.")
        names = self._optimizer_names() if "optimizer_states" in checkpoint else []
        gather = partial(of_first_rank, placement)
        full = plain(
            mapped(full_checkpoint(everyones(checkpoint, self.optimizers), names, placement), said(checkpoint), gather)
        )
        models = models_in(self._module)
        if models:
            full[RECORD] = models
        look_at_what_is_refused(full, path, paths=False)
        if beside and self.is_global_zero:
            full = self._host_copies.of(full, live=checkpoint)
        work = partial(self._write, full, path, options) if self.is_global_zero else _nothing
        return lambda processes: processes.raised_together(work, partial(not_saved, path))

    def _write(self, full: dict[str, Any], path: AnyPath, storage_options: Optional[Any]) -> None:
        if type(self.checkpoint_io) is not TorchCheckpointIO or storage_options is not None:
            self.checkpoint_io.save_checkpoint(full, _for_lightning(path), storage_options=storage_options)
        elif isinstance(path, Path):
            write_in_place(path, partial(torch.save, full))
        else:
            write_remotely(path, partial(torch.save, full))

    @override
    def remove_checkpoint(self, filepath: Union[str, Path]) -> None:
        if self._background.is_saving:  # what is to take its place does not stand yet
            self._background.then(partial(super().remove_checkpoint, filepath))
        else:
            super().remove_checkpoint(filepath)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._trains = True
        if self._random_states is not None:  # now: loaders and the first look have drawn what they draw
            set_random_states(self._random_states, self.mesh, self.root_device)
            begin_data_of_next_epoch(self._module.trainer)
            self._random_states = None
        if self.config.async_checkpoint:
            self._background.open(self._timeout)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self.finish_saving()

    @override
    def on_exception(self, exception: BaseException) -> None:
        try:
            self.finish_saving()
        except Exception as error:  # the first one is told
            rank_zero_warn(str(error))

    def finish_saving(self) -> None:
        """Wait for the save that goes on beside training (``async_checkpoint``), if there is one.

        Raises:
            RuntimeError: if it failed; on all processes alike.
        """
        self._trains = False
        self._background.wait()

    # -- loading ------------------------------------------------------------------------------------------------------

    @override
    def load_checkpoint(self, checkpoint_path: Union[str, Path], weights_only: Optional[bool] = None) -> dict[str, Any]:
        self._background.wait()
        self._loaded_from = path = self._place_of(checkpoint_path)
        self._shard_for_this_run()
        try:
            return self._load(path, weights_only)
        except (ValueError, IndexError) as error:  # of optimizers that have other parameters
            raise self._other_model(error) from None

    def _load(self, path: AnyPath, weights_only: Optional[bool]) -> dict[str, Any]:
        fitting = self._module.trainer.state.fn == TrainerFn.FITTING
        unsafe = self.config.unsafe_checkpoint_load if weights_only is None else not weights_only
        if raised_together(lambda: is_foreign(path, unsafe)):
            found = raised_together(partial(self._of_others, path, unsafe, fitting=fitting))
        else:
            found = self._of_ours(path, unsafe, fitting=fitting)
            if fitting and found.get("optimizer_states") == []:
                rank_zero_warn(f"{path} holds no optimizer's state: optimizers begin anew.")
        self._random_states = found.get(RANDOM) if fitting else None
        if fitting and self._has_optimizers and "optimizer_states" in found:
            found["optimizer_states"] = of_this_run(found["optimizer_states"], self._optimizer_names(), self._placement)
        return found

    def _of_ours(self, path: AnyPath, unsafe: bool, *, fitting: bool) -> dict[str, Any]:
        if path.is_dir():
            all_bytes = self.config.verify_checksums
            return load_directory(path, self._placement, optimizers=fitting, unsafe=unsafe, all_bytes=all_bytes)
        raised_together(lambda: self._check_file(path))
        full = raised_together(lambda: self._read(path, unsafe))
        state = {name: self._placement.cut(name, value) for name, value in full.get("state_dict", {}).items()}
        others = mapped(full, full_states_in(full, self._placement), self._placement.cut, say=False)
        return {**others, "state_dict": state}

    def _of_others(self, path: AnyPath, unsafe: bool, *, fitting: bool) -> dict[str, Any]:
        found = open_any(path, unsafe=unsafe)
        return resumable(found, self._placement, self._module.state_dict().keys(), fitting=fitting)

    def _other_model(self, error: Exception, loaded: Optional[Mapping[str, Any]] = None) -> Exception:
        """That the checkpoint is of another model, where this is what ``error`` came of; else ``error``."""
        if self._loaded_from is None:
            return error
        try:
            found = open_any(self._loaded_from, unsafe=self.config.unsafe_checkpoint_load)
        except Exception:  # it cannot be opened: `error` says so
            return error
        frozen, local = self._frozen(), self._module.state_dict()
        full = {name: tuple(shape.shape) for name, shape in tensors_of(self._module, self._placement).shapes.items()}
        theirs = {name: tuple(shape.shape) for name, shape in found.model.shapes.items()}
        if loaded is not None:  # as hooks of the module have renamed it
            tensors = {n: value for n, value in loaded.items() if isinstance(value, torch.Tensor)}
            fits = {n for n, value in tensors.items() if n in full and value.shape == local[n].shape}
            theirs = {n: full[n] if n in fits else theirs.get(n, tuple(value.shape)) for n, value in tensors.items()}
        ours = {name: shape for name, shape in full.items() if name not in frozen}
        return other_model(found, theirs, ours, class_name(self._module)) or error

    def _check_file(self, path: AnyPath) -> None:
        if not path.exists():
            raise FileNotFoundError(f"there is no checkpoint at {path}.")
        if self.config.verify_checksums and self.is_global_zero:
            check_file(path)

    def _read(self, path: AnyPath, unsafe: bool) -> dict[str, Any]:
        load = partial(self.checkpoint_io.load_checkpoint, _for_lightning(path), weights_only=not unsafe)
        return load_with(load, str(path))


def _for_lightning(path: AnyPath) -> Union[str, Path]:
    return path if isinstance(path, Path) else str(path)


def _nothing() -> None:
    pass
