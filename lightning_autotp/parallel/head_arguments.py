"""Arguments with an entry for each head of the full model: a module whose heads are shared out takes its own."""

import inspect
from typing import Any

from torch import Tensor, nn

from lightning_autotp.plans.plan import HeadInput


def take_own_heads(module: nn.Module, given: HeadInput, rank: int) -> None:
    """From now on ``module`` sees only this rank's heads of the argument ``given`` names."""
    start, length = given.parts[rank]
    place = list(inspect.signature(type(module).forward).parameters).index(given.argument) - 1  # without self

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not given.batched or value.ndim == 4:
            dim = given.dim + given.batched
            return value.narrow(dim, start, length) if value.shape[dim] == given.heads else value
        split = value.unflatten(given.dim, (-1, given.heads))
        return split.narrow(given.dim + 1, start, length).flatten(given.dim, given.dim + 1)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if given.argument in kwargs:
            return args, kwargs | {given.argument: own(kwargs[given.argument])}
        return tuple(own(value) if at == place else value for at, value in enumerate(args)), kwargs

    module.register_forward_pre_hook(before, with_kwargs=True)
