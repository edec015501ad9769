"""What the strategy refuses before anything is sharded."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_autotp.checkpoint.places import try_to_write
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.specs.layer_spec import nearest


def refuse_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that rank the elements of whole tensors.

    Raises:
        ValueError: with the callback's name.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            raise ValueError(
                f"{type(callback).__name__} ranks the elements of whole tensors, of which a rank holds a part: it does"
                " not work with tensor parallelism. Prune the model before, in a run of autotp_size=1, or afterwards."
            )


def refuse_for_zero(trainer: Trainer, module: nn.Module, comm_hook: Any) -> None:
    """Refuse what looks at whole parameters, or at how torch's DDP reduces gradients, with ``zero_stage``.

    Raises:
        ValueError: with what it is and the fix.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging, ModelPruning)):
            raise ValueError(
                f"zero_stage: {type(callback).__name__} copies or ranks whole parameters, of which a rank holds rows:"
                " leave it out, or use zero_stage=0."
            )
    if comm_hook is not None:
        raise ValueError("zero_stage: ddp_comm_hook is DistributedDataParallel's; leave it out, or use zero_stage=0.")
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train.")


def refuse_links(trainer: Trainer) -> None:
    """Refuse links to checkpoints that are still being written.

    Raises:
        ValueError: with the fix.
    """
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "save_last", None) == "link":
            raise ValueError(
                "async_checkpoint: ModelCheckpoint(save_last='link') makes a link before there is what it links to;"
                " write save_last=True."
            )


def refuse_places(trainer: Trainer) -> None:
    """Refuse remote directories that checkpoints could not be written to, before there is one to write.

    Raises:
        ValueError: with the directory and the reason.
    """
    for callback in trainer.checkpoint_callbacks:
        directory = getattr(callback, "dirpath", None)
        if directory is not None:
            try_to_write(directory, trainer.world_size)


def known_arguments(ours: Iterable[str], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``kwargs`` for the base class of a strategy that takes ``ours`` itself.

    Raises:
        ValueError: if it takes one of them neither itself nor on behalf of ``DistributedDataParallel``.
    """
    lightnings = [n for n in inspect.signature(DDPStrategy.__init__).parameters if n not in ("self", "kwargs")]
    torchs = inspect.signature(DistributedDataParallel.__init__).parameters
    known = [*ours, *lightnings, *(n for n in torchs if n not in ("self", "module", "device_ids"))]
    for name in kwargs:
        if name not in known:
            raise ValueError(f"AutoTPStrategy: unknown argument {name!r}.{nearest(name, known)}")
    if kwargs.get("model_averaging_period") is not None:
        raise ValueError("AutoTPStrategy: model_averaging_period: replicas are kept alike in every step; leave it out.")
    for name in ("process_group", "device_mesh"):
        if kwargs.get(name) is not None:
            raise ValueError(f"AutoTPStrategy: {name}: the groups are made here; give yours as `tensor_parallel.mpu`.")
    return dict(kwargs)


def check_processes(
    world_size: int,
    num_nodes: int,
    devices: int,
    config: TPTrainingConfig,
    cluster: Optional[ClusterEnvironment],
) -> None:
    """Refuse another number of processes than the Trainer's ``num_nodes`` x ``devices``.

    Raises:
        ValueError: with both numbers.
    """
    expected = num_nodes * devices
    if world_size != expected:
        started = "SLURM started" if isinstance(cluster, SLURMEnvironment) else "there are"
        raise ValueError(
            f"{started} {world_size} processes, but the Trainer is set to {num_nodes} nodes x {devices} devices ="
            f" {expected}; make `num_nodes` and `devices` (and SLURM's --nodes and --ntasks-per-node) agree."
        )
    if num_nodes > 1 and devices % config.size and config.tensor_parallel.mpu is None:
        rank_zero_warn(
            f"autotp_size: {config.size} does not divide the {devices} devices of a node, so some ranks that share a"
            " model are on different nodes, with the network between them."
        )


def apply_dtype(module: nn.Module, config: TPTrainingConfig, precision: str) -> None:
    """Give ``module`` the dtype that the config names, if it names one.

    Raises:
        ValueError: if the Trainer's precision says another.
    """
    if "dtype" not in config.model_fields_set:
        return
    if precision == "32-true":
        module.to(config.dtype)
        return
    in_force = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    parameters = in_force.get(precision, torch.float32)
    if config.dtype != parameters:
        raise ValueError(
            f"dtype: {config.dtype} contradicts Trainer(precision={precision!r}), under which parameters are"
            f" {parameters}; leave `dtype` out, or set the precision that goes with it."
        )
