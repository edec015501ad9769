"""What is known of a plan, once a step of the model has been looked at."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightning_autotp.diagnostics import Diagnostic, listed

ORIGIN = "It comes of"
"""How a finding begins that says where a value comes from."""

Kind = Literal["proved", "unknown", "refuted"]

_OF_A_SWITCH = re.compile(r" ValueError: (loss_parallel|shard_saved_activations): ")

_ORDER: tuple[Kind, ...] = ("proved", "unknown", "refuted")


@dataclass(frozen=True)
class Verdict:
    """Whether the sharded step computes what the unsharded one does.

    Args:
        kind: *proved*; *refuted*, by a concrete difference; or *unknown*, where something could not be followed.
        findings: what refutes it, or what could not be followed.
        assumed: the lines of code that read values of replicated tensors, which were assumed.
        unproved: parameters that the step did not use, of which nothing is known.
        random: the lines of code that draw random numbers, up to which it is proved.
        compared: whether the step gave anything to compare.
        draws: whether the step draws random numbers.
    """

    kind: Kind
    findings: tuple[Diagnostic, ...] = ()
    assumed: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    compared: bool = True
    draws: bool = False

    @property
    def is_of_a_switch(self) -> bool:
        """Whether the sharded step was refused for a switch of the config, which no other plan changes."""
        return any(_OF_A_SWITCH.search(one.message) for one in self.findings)

    def __str__(self) -> str:
        """The verdict and its findings, one a line."""
        return "\n".join(filter(None, (self.kind, self.listed)))

    @property
    def reason(self) -> str:
        """The finding that says most, in one line: the first that is more than where a value comes from."""
        told = [one for one in self.findings if not one.message.startswith(ORIGIN)]
        return next((str(one) for one in (*told, *self.findings)), "")

    @property
    def listed(self) -> str:
        """The findings, one a line."""
        return listed(self.findings)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Join verdicts of different steps or ranks into one: the worst kind, and everything that was found."""
    found = list(verdicts)
    kinds: list[Kind] = [verdict.kind for verdict in found]
    kind: Kind = max(kinds, key=_ORDER.index, default="proved")

    def union(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line for verdict in found for line in getattr(verdict, name)))

    findings = tuple(dict.fromkeys(one for verdict in found if verdict.kind != "proved" for one in verdict.findings))
    draws = any(verdict.draws for verdict in found)
    return Verdict(kind, findings, union("assumed"), union("unproved"), union("random"), draws=draws)
