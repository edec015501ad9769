"""What changes on a model between the look at its copy and the next: flags and plain attributes, carried over to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def as_live(live: nn.Module, before: Attributes, copy: nn.Module) -> Iterator[None]:
    """Inside, ``copy`` has what has changed on ``live`` since ``before``, and as many parameters and modules train."""
    modules, held = dict(copy.named_modules()), attributes(copy)
    flags = {path: module.training for path, module in modules.items()}
    trained = {name: parameter.requires_grad for name, parameter in copy.named_parameters()}
    changed = {
        place: value
        for place, value in attributes(live).items()
        if place[0] in modules and (place not in before or before[place] != value)
    }
    trains = {name: parameter.requires_grad for name, parameter in live.named_parameters()}
    try:
        for (path, name), value in changed.items():
            setattr(modules[path], name, value)
        _set_flags(copy, {path: module.training for path, module in live.named_modules()}, trains)
        yield
    finally:
        for path, name in changed:
            if (path, name) in held:
                setattr(modules[path], name, held[path, name])
            else:
                delattr(modules[path], name)
        _set_flags(copy, flags, trained)


def _set_flags(model: nn.Module, training: Mapping[str, bool], trained: Mapping[str, bool]) -> None:
    for path, module in model.named_modules():
        module.training = training.get(path, module.training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name, parameter.requires_grad))


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
