"""Modes that are on again while a block that was checkpointed under them is computed again (torch 2.5 to 2.13).

Autograd takes all modes off the stack, and a recompute calls functions that no hook of a module sees.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch.utils.checkpoint as checkpoints
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack


class FollowingMode(TorchFunctionMode):
    """A mode that is on in recomputes of what was checkpointed inside of it, be they after it has ended."""

    def __enter__(self) -> Any:
        _install()
        return super().__enter__()


def modes_on() -> list[FollowingMode]:
    """The modes of this kind that are on in this thread."""
    return [mode for mode in _get_current_function_mode_stack() if isinstance(mode, FollowingMode)]


def _following(function: Callable[..., Any]) -> Callable[..., Any]:
    modes = modes_on()
    if not modes:
        return function

    @wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        on = {id(mode) for mode in modes_on()}
        with ExitStack() as entered:
            for mode in modes:
                if id(mode) not in on:
                    entered.enter_context(mode)
            return function(*args, **kwargs)

    return run


def _install() -> None:
    """Let torch's checkpoint give the modes to what it calls again; ``checkpoint`` itself may have been imported."""
    if hasattr(checkpoints, "_autotp_follows"):
        return
    checkpoints._autotp_follows = True  # type: ignore[attr-defined]
    begin, reentrant = checkpoints._checkpoint_without_reentrant_generator, checkpoints.CheckpointFunction

    @wraps(begin)
    def followed(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return begin(_following(fn), *args, **kwargs)

    class Followed(reentrant):  # type: ignore[misc,valid-type]
        @staticmethod
        def forward(ctx: Any, run_function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return reentrant.forward(ctx, _following(run_function), preserve, *args)

    checkpoints._checkpoint_without_reentrant_generator = followed
    checkpoints.CheckpointFunction = Followed  # type: ignore[misc]
