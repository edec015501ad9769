"""Parameters on the meta device whose values lie in files, and who reads them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from lightning_autotp.layout.layout import Box

_SOURCES = "_autotp_sources"


class Source(Protocol):
    """Who reads one full tensor, a few boxes at a time."""

    @property
    def origin(self) -> str:
        """The same on two ranks if they read the same files."""

    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        """Copy each of ``boxes`` into the tensor of its size in ``out``, whatever its strides, dtype and device."""


def set_source(module: nn.Module, name: str, tensor: Tensor, source: Source) -> None:
    """Note that ``tensor``, on the meta device and called ``name`` in ``module``, is to be read from ``source``.

    It is forgotten when the module gets another tensor of that name.
    """
    vars(module).setdefault(_SOURCES, {})[name] = (tensor, source)


def sources_of(model: nn.Module) -> dict[int, Source]:
    """The sources of the parameters and buffers in ``model`` that are still on the meta device, by id."""
    found = {}
    for module in model.modules():
        for name, (tensor, source) in vars(module).get(_SOURCES, {}).items():
            if tensor.is_meta and module._parameters.get(name) is tensor:
                found[id(tensor)] = source
            buffer = module._buffers.get(name)  # another object after each conversion of the module
            if buffer is not None and buffer.is_meta and buffer.shape == tensor.shape:
                found[id(buffer)] = source
    return found


def forget_sources(model: nn.Module) -> None:
    """Drop all sources in ``model``, once everything is read."""
    for module in model.modules():
        vars(module).pop(_SOURCES, None)
