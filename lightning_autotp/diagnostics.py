"""Something that is wrong or to be known: what, where, what to do about it. Collected, shown together, raised once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Diagnostic:
    """One finding.

    Args:
        level: whether it is wrong, or only to be known.
        where: the module, parameter, rule or line of code.
        message: a sentence that says what is so.
        fix: a sentence that says what to do; empty where nothing is known to help.
    """

    level: Level
    where: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        """The finding in one line, as ``where: message fix``."""
        return " ".join(filter(None, (f"{self.where}:" if self.where else "", self.message, self.fix)))


def listed(diagnostics: Iterable[Diagnostic]) -> str:
    """Write each diagnostic once, one a line, errors first."""
    unique = dict.fromkeys(diagnostics)
    return "\n".join(f"- {one}" for one in sorted(unique, key=lambda one: one.level != "error"))
