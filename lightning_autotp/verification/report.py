"""What verification found: one row a parameter, and how that reads."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Optional

from lightning_autotp.introspection.names import folded
from lightning_autotp.proof.error_metrics import Precision, comparable

Judgement = Literal["pass", "fail", "refused", "error"]


@dataclass(frozen=True)
class Row:
    """How one parameter fared.

    Args:
        name: its name.
        gradient: the largest error of its gradient, over steps and ranks.
        weight: the error of the weight after the last step.
        cut: ``column``, ``row``, ``vocabulary`` or ``whole``.
        rule: the pattern that decided, or ``""``.
        source: where the rule came from, or ``""``.
        bit_equal: whether ranks that hold the same values hold the same bits; None if none do.
        noise: the error of the unsharded fp32 run against fp64, if it is beyond a tenth of the bound; else 0.
        since: the first step (from 1) whose gradient failed, the number of steps if only the weight did, 0 for none.
    """

    name: str
    gradient: float
    weight: float
    cut: str = "whole"
    rule: str = ""
    source: str = ""
    bit_equal: Optional[bool] = None
    noise: float = 0.0
    since: int = 0

    @property
    def worst(self) -> float:
        """The larger error; infinite for NaN."""
        return max(comparable(self.gradient), comparable(self.weight))


@dataclass(frozen=True)
class Report:
    """What :func:`~lightning_autotp.verification.verify` found.

    Args:
        model: what was verified, as it was given.
        tp_size: on how many ranks.
        verdict: ``pass``; ``fail``: numbers differ; ``refused``: setup refuses the plan; ``error``: a run raised.
        loss: the largest relative error of the loss, over steps and ranks.
        rows: one a parameter, what failed first on top, then the largest error.
        share: the largest part of the parameters that a rank holds.
        forward: the module whose output differs first in the first step, if one does on a plan that fails.
        message: why a plan was refused, or the exception.
        details: the exception's traceback.
        unsharded: whether the exception is one of the unsharded run: nothing was found out about the plan.
        warnings: those of the plan.
        precision: what it was computed in; None if nothing could be compared.
        proof: what the proof of the first step says: ``proved``, ``refuted`` or ``unknown``.
        seconds: how long it took.
        repaired: what the first step showed that the plan lacks, and was made.
        findings: what the proof found first, of a plan that fails.
    """

    model: str
    tp_size: int
    verdict: Judgement
    loss: float = math.nan
    rows: tuple[Row, ...] = ()
    share: float = math.nan
    forward: str = ""
    message: str = ""
    details: str = ""
    unsharded: bool = False
    warnings: tuple[str, ...] = ()
    precision: Optional[Precision] = None
    proof: str = "unknown"
    seconds: float = 0.0
    repaired: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows of the parameters that differ."""
        return tuple(row for row in self.rows if row.since)

    @property
    def headline(self) -> str:
        """One line."""
        start = f"{self.model} TP={self.tp_size}: {self.verdict}"
        if not self.rows:
            where = "the unsharded run: " if self.unsharded else ""
            return f"{start} ({where}{self.message}; {self.seconds:.1f} s)"
        gradient, weight = (
            max(comparable(value) for value in of) for of in zip(*((r.gradient, r.weight) for r in self.rows))
        )
        return (
            f"{start} (in {self.precision}: loss {self.loss:.1e}, gradients {gradient:.1e}, weights {weight:.1e};"
            f" {len(self.failed)} of {len(self.rows)} parameters differ; {self.proof}; a rank holds {self.share:.0%};"
            f" {self.seconds:.1f} s)"
        )

    def __str__(self) -> str:
        lines = [self.headline, *(f"warning: {warning}" for warning in self.warnings)]
        lines += [f"repaired: {sentence}" for sentence in self.repaired] + list(self.findings)
        if self.forward:
            lines.append(f"the forward pass differs first in {self.forward}")
        groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[(folded(row.name), row.cut, row.source, row.rule, "differs" if row.since else "")].append(row)
        table = [("gradient", "weight", "parameter", "cut", "decided by", "")]
        for (name, cut, source, rule, _), rows in groups.items():
            gradient, weight = max(comparable(r.gradient) for r in rows), max(comparable(r.weight) for r in rows)
            name += f" x{len(rows)}" if len(rows) > 1 else ""
            decided = f"{source}: {rule}" if rule else source or "no rule"
            table.append((f"{gradient:.1e}", f"{weight:.1e}", name, cut, decided, _remark(rows)))
        if len(table) > 1:
            widths = [max(len(line[at]) for line in table) for at in range(5)]
            lines += ["  ".join((*(c.ljust(w) for c, w in zip(line, widths)), line[5])).rstrip() for line in table]
        return "\n".join(lines + ([self.details.rstrip()] if self.details else []))


def worst_first(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows in a report's order: what failed first, then the largest error."""
    return tuple(sorted(rows, key=lambda row: (row.since or math.inf, -row.worst)))


def _remark(rows: Sequence[Row]) -> str:
    remarks = [f"differs from step {min(row.since for row in rows)}"] if rows[0].since else []
    if any(row.bit_equal is False for row in rows):
        remarks.append("not bit-equal on all ranks")
    noise = max(row.noise for row in rows)
    if noise:
        remarks.append(f"rounding: fp32 itself misses fp64 by {noise:.1e}")
    return "; ".join(remarks)
