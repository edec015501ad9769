"""Random numbers are left out when a step is first looked at, and noted: where they are drawn, and for what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Optional

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_autotp.compat.recompute import FollowingMode
from lightning_autotp.proof.draws import Draws
from lightning_autotp.randomness.functions import ATTENTION, DROPOUTS, draws, name_if_random
from lightning_autotp.randomness.places import Walk

_FILLED = {
    **dict.fromkeys(("rand", "randn", "rand_like", "randn_like", "normal_", "uniform_", "normal"), 0.5),
    **dict.fromkeys(("exponential_", "log_normal_", "cauchy_"), 0.5),
    **dict.fromkeys(("bernoulli", "bernoulli_", "geometric_"), 1.0),
}
"""What every draw of an element gives: no sharded one then differs from the full one."""

_WITHOUT_VALUES = {
    "bernoulli_",
    "normal_",
    "uniform_",
    "exponential_",
    "log_normal_",
    "cauchy_",
    "geometric_",
    "random_",
}
"""What writes over whatever was there."""


@contextmanager
def without_randomness(lines: list[str], noting: Optional[Draws] = None) -> Iterator[None]:
    """Inside, dropout drops nothing and draws of single elements are all alike.

    Args:
        lines: gets the lines of code that draw.
        noting: notes what is drawn.
    """
    with nullcontext() if noting is None else noting.watching(), _Settled(lines, noting):
        yield


@contextmanager
def attention_guarded() -> Iterator[None]:
    """Inside, attention without heads is an error; random numbers are drawn."""
    with _Guarded():
        yield


class _Guarded(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == ATTENTION:
            _require_heads(*args[:3])
        return func(*args, **(kwargs or {}))


class _Settled(FollowingMode):
    def __init__(self, lines: list[str], noting: Optional[Draws]) -> None:
        super().__init__()
        self.lines, self.noting = lines, noting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_if_random(func)
        if name == ATTENTION:
            _require_heads(*args[:3])
        if not name or not draws(name, args, kwargs) or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        given: Any = args[0] if args and isinstance(args[0], Tensor) else None
        given = next((kwargs[n] for n in ("input", "query", "logits") if n in kwargs), None) if given is None else given
        if name in DROPOUTS:
            self._note(name, given)
            return (given * 1, torch.ones_like(given, dtype=torch.bool)) if name == "native_dropout" else given * 1
        if name == ATTENTION:
            self._note(name, given)
            return func(*_without_dropout(args), **({**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs))
        if given is not None:
            self._note(name, given)
        out = func(*args, **kwargs)
        if given is None and isinstance(out, Tensor):
            self._note(name, out, has_values=False)
        if name in _FILLED and isinstance(out, Tensor):
            with torch.no_grad():
                out.fill_(_FILLED[name])
        return out

    def _note(self, name: str, tensor: Optional[Tensor], *, has_values: bool = True) -> None:
        line = next((item.line for item in Walk({}) if item.line), "")
        self.lines.append(line)
        if self.noting is not None and tensor is not None:
            self.noting.note(name, tensor, has_values=has_values and name not in _WITHOUT_VALUES)


def _without_dropout(args: Sequence[Any]) -> Sequence[Any]:
    return (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args


def _require_heads(*given: Tensor) -> None:
    """Refuse attention without any heads, as a rank of a wrong plan may ask for: torch divides by their number.

    It does so in C++, and the process ends (seen with torch 2.11).
    """
    if any(tensor.ndim > 2 and tensor.shape[-3] == 0 for tensor in given):
        raise ValueError(f"attention without heads: {', '.join(str(list(tensor.shape)) for tensor in given)}")
