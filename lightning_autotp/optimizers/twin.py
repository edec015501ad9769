"""Copies of an optimizer that hold other tensors: what is tried on them changes neither the optimizer nor the model."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

WHOLE = "_autotp_whole"
"""Where an optimizer keeps what makes its steps those of whole tensors."""


def family(optimizer: Any) -> list[Any]:
    """``optimizer`` and the optimizers that it keeps in its attributes and steps, as Lookahead does; itself first."""
    found = [optimizer]
    for member in found:
        for value in vars(member).values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(inner, Optimizer) and not any(inner is known for known in found):
                    found.append(inner)
    return found


def parameter_lists(optimizer: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The param groups of an optimizer and of those that it steps, each once, with its place among its optimizer's."""
    seen: set[int] = set()
    for member in family(optimizer):
        for at, group in enumerate(member.param_groups):
            if id(group) not in seen:
                seen.add(id(group))
                yield at, group


def per_parameter(group: dict[str, Any]) -> list[str]:
    """The keys of a param group whose lists have an entry for each parameter, ``params`` first."""
    count = len(group["params"])
    others = [key for key, value in group.items() if key != "params" and type(value) is list and len(value) == count]
    return ["params", *others]


class CopyError(Exception):
    """An optimizer cannot be copied to be tried; says why."""


def twin(optimizer: Any, params: Sequence[Sequence[tuple[nn.Parameter, int]]], *, with_state: bool = True) -> Any:
    """A copy of ``optimizer`` with other parameters.

    Args:
        optimizer: what to copy; hooks are left out.
        params: for each param group the copy's parameters, each with the place of the one in the group that it stands
            for, whose options and state it takes.
        with_state: whether to take state.

    Raises:
        CopyError: if there is state that belongs to the shape of its parameters, or groups are not alike.
    """
    memo: dict[int, Any] = {}
    for _, group in parameter_lists(optimizer):
        for parameter in group["params"]:  # what refers to them elsewhere must not change them
            memo.setdefault(id(parameter), nn.Parameter(torch.empty(0), requires_grad=False))
    made = _copied(optimizer, memo)
    for at, group in parameter_lists(made):
        if at >= len(params):
            raise CopyError("the optimizers that it steps have other param groups than it has itself")
        for held in [group[key] for key in per_parameter(group)[1:]]:
            held[:] = [held[place] for _, place in params[at]]
        group["params"][:] = [parameter for parameter, _ in params[at]]
    for own, theirs in zip(family(optimizer), family(made)):
        for at, group in enumerate(own.param_groups):
            for parameter, place in params[at]:
                state = own.state.get(group["params"][place])
                if state and with_state:
                    theirs.state[parameter] = _state_for(parameter, state, group["params"][place])
    return made


def _copied(optimizer: Any, memo: dict[int, Any]) -> Any:
    made = object.__new__(type(optimizer))
    memo[id(optimizer)] = made
    # torch's own way to copy one keeps the param groups and leaves out all that subclasses have added
    for name, value in vars(optimizer).items():
        # methods of its own lead back to the live one: schedulers put a ``step`` there
        if name in ("step", "state", WHOLE) or getattr(value, "__self__", None) is optimizer:
            continue
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            made.__dict__[name] = OrderedDict()
        elif isinstance(value, Optimizer):
            made.__dict__[name] = memo[id(value)] if id(value) in memo else _copied(value, memo)
        else:
            made.__dict__[name] = _deep(value, memo)
    # two that share their state share that of their copies
    if "state" in vars(optimizer):
        made.__dict__["state"] = memo.setdefault(id(optimizer.state), defaultdict(dict))
    return made


def _deep(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (list, tuple)) and any(isinstance(entry, Optimizer) for entry in value):
        return type(value)(memo[id(o)] if id(o) in memo else _copied(o, memo) for o in value)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a lock, a file, a process group
        return value


def _state_for(parameter: Tensor, state: Any, of: Tensor) -> dict[str, Any]:
    """State that an optimizer has begun with, for a parameter of another shape."""
    made = {}
    for entry, value in state.items():
        if not isinstance(value, Tensor) or value.numel() <= 1:
            made[entry] = copy.deepcopy(value)
        elif value.shape == of.shape:
            flat = value.detach().reshape(-1)
            repeated = flat.repeat(-(-parameter.numel() // flat.numel()))[: parameter.numel()]
            made[entry] = repeated.reshape(parameter.shape).clone()
        else:
            raise CopyError(f"its state {entry!r} is there before the first step, of shape {list(value.shape)}")
    return made
