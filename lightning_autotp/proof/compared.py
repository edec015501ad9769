"""What came of running a step unsharded and on every rank, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from torch import nn

from lightning_autotp.proof.error_metrics import BOUNDS, Bounds, Precision
from lightning_autotp.proof.events import Events
from lightning_autotp.proof.repair import Repairs
from lightning_autotp.proof.step import Seen
from lightning_autotp.proof.verdict import Verdict
from lightning_autotp.randomness.sites import Sites

WRONG: dict[Precision, float] = {"fp64": 1e-3, "fp32": 3e-2}
"""The smallest error of a gradient that is surely wrong; between it and the largest of what is right, rounding may be
the reason. A loss or an output is held to as much less as the bounds of right ones are.
"""

DOUBLE = Bounds(1e-9, 1e-7)
"""What is right where all is computed in fp64: nets are right to 1e-10 there, and a mistake may be small."""

DOUBLE_WRONG = 1e-6


@dataclass(frozen=True)
class Compared:
    """A step, unsharded and on every rank.

    Args:
        model: the model that was sharded for each rank.
        precision: what was computed in.
        full: the unsharded run.
        ranks: by rank; empty if one failed.
        error: what the first rank that failed raised.
        random: the lines that draw random numbers.
        events: of the unsharded run and of the ranks as far as they came, if they were to be watched.
        double: whether all of the unsharded run was computed in fp64.
        sites: how what is drawn is sharded; None if ranks draw in other places.
    """

    model: nn.Module
    precision: Precision
    full: Seen
    ranks: tuple[Seen, ...]
    error: Optional[BaseException]
    random: tuple[str, ...]
    events: tuple[Events, ...] = ()
    double: bool = False
    sites: Optional[Sites] = None

    @property
    def bounds(self) -> tuple[Bounds, float]:
        """How large errors of what is right may be, and from where on they are surely wrong."""
        return (DOUBLE, DOUBLE_WRONG) if self.double else (BOUNDS[self.precision], WRONG[self.precision])


@dataclass(frozen=True)
class Proof:
    """A verdict, the repairs of the plan with which it holds, and how what is drawn is sharded."""

    verdict: Verdict
    repairs: Repairs = Repairs()
    sites: Sites = Sites()
