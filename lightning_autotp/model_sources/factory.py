"""Models and batches that a user's own function makes."""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def from_factory(source: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model and the batches that ``"module:factory"`` makes."""
    module, _, name = source.partition(":")
    factory = importlib.import_module(module)
    for attribute in name.split("."):
        factory = getattr(factory, attribute)
    model, batches = factory()  # type: ignore[operator]
    return model, list(batches)


def loss_of(output: Any) -> Tensor:
    """The loss in what a model returns: the output itself, or its ``loss``."""
    if isinstance(output, Tensor):
        return output
    loss: Tensor = output["loss"] if isinstance(output, Mapping) else output.loss
    return loss
