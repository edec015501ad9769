"""What callbacks hold of a model that ranks share: copies of it are sharded as it is, predictions are written once."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.dp_shards import all_rows
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.plans.part import part_of
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.sharding.shard import shard
from lightning_autotp.sharding.state import sharded
from lightning_autotp.sharding.zero import zero_of

_WRITES = ("write_on_batch_end", "write_on_epoch_end")


def average_later(trainer: Trainer) -> None:
    """Let Lightning's averages of a model on the meta device (``from_pretrained``) wait until it has its values."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and "setup" not in vars(callback):
            vars(callback)["setup"] = partial(_set_up, callback.setup)


def _set_up(own: Callable[..., None], trainer: Trainer, module: LightningModule, stage: str) -> None:
    try:
        own(trainer, module, stage)
    except NotImplementedError:  # a copy has no values to move to a device; `share_copies` makes it
        if not any(parameter.is_meta for parameter in module.parameters()):
            raise


@torch.no_grad()
def share_copies(
    trainer: Trainer, module: LightningModule, mesh: Mesh, config: TPTrainingConfig, device: torch.device
) -> None:
    """Shard the copies of ``module`` that callbacks made of it before it was sharded; every process must call it.

    Averages of weights (Lightning's ``WeightAveraging``, ``EMAWeightAveraging``, ``StochasticWeightAveraging``, any of
    one's own) are kept as such copies. They are told by the names and full shapes of their parameters. A copy of a part
    of the module counts if it has the module's values, on the first process; one that is no copy may stay whole.

    Args:
        trainer: the Trainer, whose callbacks' attributes are looked at, and what is directly in containers there.
        module: the sharded module.
        mesh: this process's place.
        config: the config.
        device: where collectives run.
    """
    found = sharded(module)
    assert found is not None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is None and trainer.state.fn == "fit":
            own: dict[str, Any] = {"device": callback._device or module.device, "use_buffers": callback._use_buffers}
            callback._average_model = AveragedModel(module, **own, **callback._kwargs)
        if mesh.tp_size == 1 and zero_of(module) is None:
            continue
        for held in list(_modules_in(vars(callback))):
            for parent, name, copied in list(_inside(held)):
                path = _original(copied, module, found.plan, mesh)
                if path is None:
                    continue
                if zero_of(module) is not None:
                    raise ValueError(
                        f"zero_stage: {type(callback).__name__} holds a copy of the model, of whose parameters a rank"
                        " holds rows: leave it out, or use zero_stage=0."
                    )
                if any(p.is_meta for p in copied.parameters()):  # its values are the module's, which are made only now
                    original = module.get_submodule(path)
                    if parent is None:
                        _replace(callback, copied, deepcopy(original))
                    else:
                        setattr(parent, name, deepcopy(original))
                    break
                where = next(copied.parameters()).device
                whole = replace(mesh, cp_rank=0, cp_size=1)  # nobody trains it, and it may be no list of blocks
                shard(copied, part_of(found.plan, path), whole, config, device=device, training=False)
                copied.to(where)
                break  # the outermost one


def _modules_in(held: Mapping[str, Any]) -> Iterator[nn.Module]:
    for value in held.values():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for one in inner:
            if isinstance(one, nn.Module):
                yield one


def _inside(held: nn.Module) -> Iterator[tuple[Optional[nn.Module], str, nn.Module]]:
    """A module of a callback's and all in it, outermost first, each with where it is held."""
    yield None, "", held
    for path, module in held.named_modules():
        for name, child in module.named_children():
            yield module, name, child
        del path


def _original(copied: nn.Module, module: LightningModule, plan: ShardingPlan, mesh: Mesh) -> Optional[str]:
    """The path in ``module`` of what ``copied`` is an unsharded copy of; None if it is none."""
    if sharded(copied) is not None or copied is module:
        return None
    own = {name: tuple(p.shape) for name, p in copied.named_parameters()}
    if not own:
        return None
    for path, original in module.named_modules():
        prefix = f"{path}." if path else ""
        layouts = {name: plan.layouts[prefix + name] for name, _ in original.named_parameters()}
        if not isinstance(original, type(copied)) or {n: layout.shape for n, layout in layouts.items()} != own:
            continue
        replicated = zero_of(module) is None and all(layout.is_replicated for layout in layouts.values())
        if original is copied or replicated:
            return None
        if path:
            parts = dict(original.named_parameters())
            held = {n: all_rows(parts[n].detach()) for n, _ in copied.named_parameters()}
            same = all(
                not p.is_meta and torch.equal(layouts[n].shard(p, mesh.tp_rank).to(held[n]), held[n])
                for n, p in copied.named_parameters()
            )
            if not all(mesh.collectives.gather_objects(same)):
                continue
        return path
    return None


def _replace(callback: Any, old: nn.Module, new: nn.Module) -> None:
    for name, value in vars(callback).items():
        if value is old:
            setattr(callback, name, new)


def write_once(trainer: Trainer, mesh: Mesh) -> Callable[[], None]:
    """Let prediction writers write on the first of the ranks that share a model only: the others predict the same.

    Returns:
        What lets them write again.
    """
    quiet: list[tuple[Any, str]] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BasePredictionWriter) and not mesh.is_first:
            for name in _WRITES:
                vars(callback)[name] = _nothing
                quiet.append((callback, name))

    def again() -> None:
        while quiet:
            callback, name = quiet.pop()
            vars(callback).pop(name, None)

    return again


def _nothing(*_: Any, **__: Any) -> None:
    pass
