"""What the strategy refuses before anything is sharded."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_autotp.specs.layer_spec import nearest


def refuse_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that copied the model before it was sharded.

    Raises:
        ValueError: with the callback's name.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise ValueError(
                f"{type(callback).__name__} keeps a copy of the model from before it was sharded, which does not fit"
                " its parts; it does not work with tensor parallelism."
            )


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
