"""Sharded layers whose class has a forward of its own, which calls that of the layer and does something with it."""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn

from lightning_autotp.introspection.forward_source import delegates


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a sharded layer itself computes with; others are those of a forward of its own class."""
    return {name: parameter for name, parameter in module.named_parameters() if name in ("weight", "bias")}


def layer_below(own: type) -> Optional[type]:
    """The class whose forward is the layer's, where those of subclasses only call it; None if ``own`` has that one."""
    classes = [one for one in own.__mro__ if "forward" in vars(one)]
    at = next(at for at, one in enumerate(classes) if _is_ours(one) or not delegates(one))
    return classes[at] if at else None


def _is_ours(own: type) -> bool:
    return own.__module__.partition(".")[0] == __name__.partition(".")[0]
