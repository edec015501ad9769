"""A step to derive a plan from, before any data is loaded: of a given batch, or of the first items of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_autotp.compat import collect_random_state, set_random_state, tree_map
from lightning_autotp.proof.prover import Look

ROWS = 3
"""Items of a sample: few, and a number that most sizes do not divide."""

_STAGES = {
    TrainerFn.FITTING: ("training", "fit_loop"),
    TrainerFn.VALIDATING: ("validation", "validate_loop"),
    TrainerFn.TESTING: ("test", "test_loop"),
    TrainerFn.PREDICTING: ("predict", "predict_loop"),
}


def sample_of(module: LightningModule, trainer: Trainer, given: Any = None) -> Optional[Look]:
    """The step of the run's stage with a sample; None if none can be made.

    The sample is ``given``; else ``module.sample_batch``, called if it can be; else what the loader's ``collate_fn``
    makes of the first items of its dataset, by place, whatever sampler or workers the loader has; else, for the model's
    forward alone, ``module.example_input_array``. Random numbers are as before.
    """
    stage, loop = _STAGES.get(trainer.state.fn, ("", ""))  # type: ignore[arg-type]
    with _same_random_numbers():
        batch = given if given is not None else getattr(module, "sample_batch", None)
        batch = batch() if callable(batch) and not isinstance(batch, Tensor) else batch
        if batch is None and stage:
            batch = _of_data(getattr(trainer, loop)._data_source)
            if batch is not None:
                batch = module._apply_batch_transfer_handler(batch, device=torch.device("cpu"))
    if batch is not None and stage:
        return Look(stage, (batch, 0), trainer)
    example = module.example_input_array
    return None if example is None else Look("training", (example,), call=_sum_of_outputs, own=False)


def _of_data(source: Any) -> Any:
    """A batch of the first items of what the loaders read; None if they cannot be read by place."""
    if not source.is_defined():
        return None
    loaders = source.dataloader()
    loaders = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
    found: list[Any] = []

    def batch_of(loader: Any) -> Any:
        found.append(_of_loader(loader))
        return found[-1]

    batches = tree_map(batch_of, loaders)
    return None if not found or any(one is None for one in found) else batches


def _of_loader(loader: Any) -> Any:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    dataset: Any = loader.dataset
    count = min(ROWS, len(dataset)) if isinstance(dataset, Sized) else 0
    if not count:
        return None
    if loader.batch_size is None and loader.batch_sampler is None:
        return loader.collate_fn(dataset[0])
    return loader.collate_fn([dataset[at] for at in range(count)])


def _sum_of_outputs(model: Any, example: Any) -> Tensor:
    """A loss of a model's outputs, of which there is no other."""
    if isinstance(example, dict):
        output = model(**example)
    else:
        output = model(*example) if isinstance(example, tuple) else model(example)
    terms: list[Tensor] = []

    def add(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            terms.append((value * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)).sum())
        return value

    tree_map(add, output)
    return torch.stack(terms).sum()


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    before = collect_random_state(include_cuda=True)
    try:
        yield
    finally:
        set_random_state(before)
