"""Where in the code an operator is called: the module that computes, and the line of the user's or a library's code."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Owner = Literal["torch", "layers", "prover", "user"]
"""Whose code a file is: torch's, this package's, what looks at the model, or anybody else's."""

_TORCH = f"{Path(torch.__file__).parent}/"
_PACKAGE = f"{Path(__file__).parents[1]}/"
_PROVER, _EXAMPLES = f"{_PACKAGE}proof/", f"{_PACKAGE}examples/"
_AROUND = tuple(f"{_PROVER}{name}.py" for name in ("trace", "memory", "markers"))
"""What stands between torch and who calls it."""


class Place(NamedTuple):
    """A module's path and a line of code; ``backward``: of what is differentiated there."""

    path: str
    line: str
    backward: bool = False

    def __str__(self) -> str:
        """The place in words: path, file and line."""
        return ("the gradient of " if self.backward else "") + ", ".join(filter(None, (self.path, self.line)))


@cache
def _owner(filename: str) -> Owner:
    if filename.startswith(("<", _TORCH)) or filename in _AROUND:
        return "torch"
    if not filename.startswith(_PACKAGE) or filename.startswith(_EXAMPLES):
        return "user"
    return "prover" if filename.startswith(_PROVER) else "layers"


@cache
def _short(filename: str) -> str:
    return filename.rpartition("/site-packages/")[2]


def calling_line(depth: int) -> tuple[Owner, str]:
    """Whose code called the operator under way, and the line, from ``depth`` frames above the caller on."""
    frame = sys._getframe(depth + 1)
    while frame is not None:
        owner = _owner(frame.f_code.co_filename)
        if owner != "torch":
            return owner, f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch", ""
