"""Where in the code random numbers are drawn: modules and lines, the innermost first."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Optional

import lightning
import torch
from torch import nn

_PACKAGE = f"{Path(__file__).parents[1]}/"
_EXAMPLES = f"{_PACKAGE}examples/"
_TORCH, _LIGHTNING = f"{Path(torch.__file__).parent}/", f"{Path(lightning.__file__).parent}/"
_AROUND = tuple(f"{_PACKAGE}{room}/" for room in ("proof", "recipe", "strategies", "verification", "derivation"))


class Item(NamedTuple):
    """A call under way.

    Args:
        path: of the module whose code it is; None of a function that belongs to none.
        line: ``file:number``; empty of torch's own modules.
    """

    path: Optional[str]
    line: str


Chain = tuple[Item, ...]


@cache
def _kind(filename: str) -> str:
    if filename.startswith(_EXAMPLES):
        return "user"
    if filename.startswith(_AROUND) or filename.startswith(_LIGHTNING):
        return "end"
    if filename.startswith((_PACKAGE, "<")):
        return "skip"
    return "torch" if filename.startswith(_TORCH) else "user"


class Walk:
    """The calls that led to where this is made, the innermost first.

    Args:
        names: the paths of a model's modules, by their ids.
        depth: how many frames of the caller to leave out.
    """

    def __init__(self, names: Mapping[int, str], depth: int = 0) -> None:
        self._names = names
        self._frame: Optional[FrameType] = sys._getframe(depth + 1)
        self._last: Optional[str] = None
        self._begun = False

    def __iter__(self) -> Walk:
        return self

    def __next__(self) -> Item:
        while self._frame is not None:
            frame, self._frame = self._frame, self._frame.f_back
            kind = _kind(frame.f_code.co_filename)
            if kind == "end" and self._begun:
                self._frame = None
                break
            if kind in ("skip", "end"):
                continue
            self._begun = True
            path = self._path(frame)
            if kind == "torch":
                if path is None or path == self._last:
                    continue
                self._last = path
                return Item(path, "")
            self._last = path
            return Item(path, f"{frame.f_code.co_filename}:{frame.f_lineno}")
        raise StopIteration

    def _path(self, frame: FrameType) -> Optional[str]:
        """The path of the module that the function of ``frame`` is given first, as methods are."""
        code = frame.f_code
        if not code.co_argcount:
            return None
        first = frame.f_locals.get(code.co_varnames[0])
        return self._names.get(id(first)) if isinstance(first, nn.Module) else None


def names_of(model: nn.Module) -> dict[int, str]:
    """The paths of a model's modules by their ids; those of a shared one are its first."""
    return {id(module): path for path, module in model.named_modules()}


@cache
def starred(path: Optional[str]) -> Optional[str]:
    """A path with stars for numbers: that of all blocks that are alike."""
    return None if path is None else re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def shown(chain: Chain) -> str:
    """The line of a draw, for people: the innermost one, and its module."""
    line = next((item.line for item in chain if item.line), "")
    path = next((item.path for item in chain if item.path is not None), None)
    line = re.sub(r".*/site-packages/", "", line)
    return ", ".join(filter(None, (starred(path), line)))
