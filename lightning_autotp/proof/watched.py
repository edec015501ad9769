"""Numbers that change from step to step, and the decisions that code takes by them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Decisions:
    """What code decided by watched numbers; ``flipped``: which of these decisions to answer the other way round."""

    flipped: frozenset[int] = frozenset()
    made: list[str] = field(default_factory=list)
    """A line for each decision, in order."""
    changed: list[tuple[str, str]] = field(default_factory=list)
    """The plain numbers that the step itself changed, by module path and name."""

    def decide(self, answer: bool, name: str) -> bool:
        """Note a decision, and answer it."""
        place = len(self.made)
        self.made.append(f"{_line()} decides by {name}")
        return not answer if place in self.flipped else answer


def _line() -> str:
    frame = sys._getframe(3)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class _Watched:
    """An int or a float, whose comparisons are noted; what is computed of it is watched, too."""

    decisions: Decisions
    name: str


def watch(value: Any, name: str, decisions: Decisions) -> Any:
    """A number that behaves as ``value`` and notes what is decided by it; anything else as it is."""
    if type(value) not in (int, float):
        return value
    made = (_WatchedInt if type(value) is int else _WatchedFloat)(value)
    made.decisions, made.name = decisions, name
    return made


def _arithmetic(function: Callable[[Any, Any], Any], reverse: bool) -> Callable[[Any, Any], Any]:
    def compute(self: Any, other: Any) -> Any:
        plain = _plain(self)
        try:
            result = function(_plain(other), plain) if reverse else function(plain, _plain(other))
        except TypeError:
            return NotImplemented
        return watch(result, self.name, self.decisions)

    return compute


def _comparison(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def compare(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self.decisions.decide(bool(function(_plain(self), _plain(other))), self.name)

    return compare


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, _WatchedInt) else float(value) if isinstance(value, _WatchedFloat) else value


def _truth(self: Any) -> bool:
    answer: bool = self.decisions.decide(_plain(self) != 0, self.name)
    return answer


_METHODS: dict[str, Any] = {
    **{f"__{name}__": _comparison(getattr(operator, name)) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **{
        f"__{'r' if reverse else ''}{name}__": _arithmetic(getattr(operator, name), reverse)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod")
        for reverse in (False, True)
    },
    "__bool__": _truth,
    # what is looked up in a dict or used as an index is not decided by
    "__hash__": lambda self: hash(_plain(self)),
}

_WatchedInt: Any = type("WatchedInt", (_Watched, int), _METHODS)
_WatchedFloat: Any = type("WatchedFloat", (_Watched, float), _METHODS)
