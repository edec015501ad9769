"""Copies of a model that may be run, sharded and thrown away: nothing of the original changes with them."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

Make = Callable[[Tensor], Tensor]
"""What a tensor of the original is in the copy."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def copied(module: nn.Module, parameter: Make, buffer: Make) -> nn.Module:
    """Copy ``module`` with other parameters and buffers, which are not copied on the way.

    Tied parameters stay tied. A Trainer is left out; data, and what refuses to be copied (locks, files, iterators), is
    the original's own. Hooks and other functions that refer to modules of the original refer to those of the copy.
    Everything else, tensors that are no buffers among it, is copied as :func:`copy.deepcopy` does it.

    Args:
        module: the original.
        parameter: makes a parameter's data out of the original's.
        buffer: makes a buffer out of the original's.
    """
    memo: dict[int, Any] = {}
    for own in module.parameters():
        # not detach(), which shares the count of in-place changes that autograd looks at
        memo[id(own)] = nn.Parameter(parameter(own.data), requires_grad=own.requires_grad)
    for held in module.buffers():
        memo[id(held)] = buffer(held.detach())
    for value in _attributes(module):
        if isinstance(value, (Dataset, DataLoader, Sampler)):
            memo[id(value)] = value
    with _without_trainer(module):
        try:
            attempt = dict(memo)
            made = copy.deepcopy(module, attempt)
        except Exception:  # an attribute refuses, for whatever reasons of its own
            _share_what_refuses(module, memo)
            attempt = dict(memo)
            made = copy.deepcopy(module, attempt)
    _rebind(made, attempt)
    return made


def empty_copy(module: nn.Module) -> nn.Module:
    """Copy ``module`` with its parameters on the meta device; buffers, which are small and hold indices, are real.

    What is on the meta device already stays there.
    """
    return copied(
        module,
        lambda t: torch.empty_like(t, device="meta"),
        lambda t: torch.empty_like(t) if t.is_meta else t.cpu().clone(),
    )


def alias_copy(module: nn.Module) -> nn.Module:
    """Copy ``module`` without copying parameters: they share the original's memory until somebody replaces it."""
    return copied(module, lambda t: t, lambda t: t.clone())


def own_copy(module: nn.Module) -> nn.Module:
    """Copy ``module``, parameters and all."""
    return copied(module, lambda t: t.clone(), lambda t: t.clone())


def fill(made: nn.Module, original: nn.Module) -> None:
    """Give the parameters of a copy the values that those of the same names have in the original."""
    values = dict(original.named_parameters(remove_duplicate=False))
    filled: dict[int, nn.Parameter] = {}
    for path, module in made.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in filled:  # tied ones stay tied
                value = values[f"{path}.{name}" if path else name].detach().cpu().clone()
                filled[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = filled[id(parameter)]


def _attributes(module: nn.Module) -> Iterator[Any]:
    """What modules hold besides parameters, buffers and modules, and what is directly in their containers."""
    for one in module.modules():
        for name, value in vars(one).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            if isinstance(value, Mapping):
                yield from value.values()
            elif isinstance(value, (list, tuple)):
                yield from value
            yield value


def _share_what_refuses(module: nn.Module, memo: dict[int, Any]) -> None:
    modules = {id(one): one for one in module.modules()}
    for value in _attributes(module):
        if isinstance(value, (int, float, str, bool, type(None), nn.Module)) or id(value) in memo:
            continue
        try:
            copy.deepcopy(value, {**memo, **modules})
        except Exception:
            memo[id(value)] = value


@contextmanager
def _without_trainer(module: nn.Module) -> Iterator[None]:
    """Inside, no LightningModule knows a Trainer or Fabric, which must not be copied."""
    names = ("_trainer", "_fabric")
    held = [(one, name, vars(one)[name]) for one in module.modules() for name in names if name in vars(one)]
    for one, name, _ in held:
        setattr(one, name, None)
    try:
        yield
    finally:
        for one, name, value in held:
            setattr(one, name, value)


def _rebind(made: nn.Module, memo: Mapping[int, Any]) -> None:
    """Let functions, which deepcopy does not copy, act on the copies of the modules in their closures."""
    for module in made.modules():
        for name in _HOOKS:
            hooks = vars(module).get(name) or {}
            for key, hook in list(hooks.items()):
                hooks[key] = _rebound(hook, memo)
        for name, value in list(vars(module).items()):
            if isinstance(value, (types.FunctionType, partial)):
                vars(module)[name] = _rebound(value, memo)


def _rebound(function: Any, memo: Mapping[int, Any], depth: int = 0) -> Any:
    if isinstance(function, partial):
        args = [_rebound(_in_copy(value, memo), memo, depth + 1) for value in function.args]
        inner = _rebound(function.func, memo, depth + 1)
        return partial(inner, *args, **{k: _in_copy(v, memo) for k, v in function.keywords.items()})
    if not isinstance(function, types.FunctionType) or not function.__closure__ or depth > 4:
        return function
    cells = [_cell(cell, memo, depth) for cell in function.__closure__]
    if all(new is old for new, old in zip(cells, function.__closure__)):
        return function
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made


def _cell(cell: types.CellType, memo: Mapping[int, Any], depth: int) -> types.CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # not assigned yet
        return cell
    new = _rebound(_in_copy(held, memo), memo, depth + 1)
    return cell if new is held else types.CellType(new)


def _in_copy(value: Any, memo: Mapping[int, Any]) -> Any:
    """The copy of ``value``, of the object whose bound method it is, or itself if it was not copied."""
    if isinstance(value, types.MethodType):
        owner: Optional[Any] = memo.get(id(value.__self__))
        return value if owner is None else types.MethodType(value.__func__, owner)
    return memo.get(id(value), value)
