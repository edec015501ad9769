"""Random numbers are left out of a proof: on sharded tensors each rank draws its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DROPS = {
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("native_dropout", "feature_dropout"),
}
_DRAWS = {"rand", "randn", "rand_like", "randn_like", "normal_", "uniform_"}
_DRAWN = 0.5
"""What every draw of an element gives: no sharded one then differs from the full one."""


@contextmanager
def without_randomness(lines: list[str]) -> Iterator[None]:
    """Inside, dropout drops nothing and draws of single elements are all alike; ``lines`` gets where they were made."""
    with _Settled(lines):
        yield


class _Settled(TorchFunctionMode):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _DROPS and _drops(name, args, kwargs):
            self._note()
            given = args[0] if args else kwargs["input"]
            return (given * 1, torch.ones_like(given, dtype=torch.bool)) if name == "native_dropout" else given * 1
        if name == "scaled_dot_product_attention":
            _require_heads(*args[:3])
            if len(args) > 4 and args[4]:
                self._note()
                args = (*args[:4], 0.0, *args[5:])
            if kwargs.get("dropout_p"):
                self._note()
                kwargs = {**kwargs, "dropout_p": 0.0}
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if name in _DRAWS and isinstance(out, Tensor) and kwargs.get("generator") is None:
            self._note()
            with torch.no_grad():
                out.fill_(_DRAWN)
        return out

    def _note(self) -> None:
        frame = sys._getframe(2)
        while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        self.lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")


def _require_heads(*given: Tensor) -> None:
    """Refuse attention without any heads, as a rank of a wrong plan may ask for: torch divides by their number.

    It does so in C++, and the process ends (seen with torch 2.11).
    """
    if any(tensor.ndim > 2 and tensor.shape[-3] == 0 for tensor in given):
        raise ValueError(f"attention without heads: {', '.join(str(list(tensor.shape)) for tensor in given)}")


def _drops(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a call of dropout would drop something."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    # F.dropout(input, p, training, inplace) and torch.dropout(input, p, train)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(p) and bool(training)
