"""What changes on a model between the look at its copy and the next: flags and plain attributes, carried over to it."""

from __future__ import annotations

from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))

Attributes = dict[tuple[str, str], Any]


def attributes(model: nn.Module) -> Attributes:
    """The plain attributes (numbers, strings, None) of all modules, by module path and name."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and not name.startswith("_") and name != "training"
    }


def carry_over(live: nn.Module, before: Attributes, copy: nn.Module) -> None:
    """Give ``copy`` what has changed on ``live`` since ``before``, and which of its parameters and modules train."""
    modules = dict(copy.named_modules())
    for (path, name), value in attributes(live).items():
        if path in modules and ((path, name) not in before or before[(path, name)] != value):
            setattr(modules[path], name, value)
    for path, module in live.named_modules():
        if path in modules:
            modules[path].training = module.training
    trains = {name: parameter.requires_grad for name, parameter in live.named_parameters()}
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(trains.get(name, parameter.requires_grad))


def flags(model: nn.Module) -> int:
    """A number for which parameters train, and for all switches of modules; those that count are left out."""
    trains = tuple(parameter.requires_grad for parameter in model.parameters())
    switches = [
        (name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, str, type(None))) and not name.startswith("__")
    ]
    return hash((trains, tuple(switches)))
