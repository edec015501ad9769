"""The events of a run: operators with the numbers of their tensors' values, and where in the code they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from lightning_autotp.dataflow.placement import Shape
from lightning_autotp.proof.places import Place

HIDDEN = -1
"""The number of all values that this package's layers make inside, which no rule follows."""

Key = tuple[Hashable, ...]
"""Where an event is in the code: alike in the full model's run and in a rank's."""


class Ref(NamedTuple):
    """A tensor in an event: the number of its value, its shape and dtype."""

    number: int
    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Recorded:
    """One operator that a run called; ``outputs`` None: it raised."""

    key: Key
    name: str
    arguments: dict[str, Any]
    outputs: Optional[tuple[Ref, ...]]
    place: Place
    random: bool = False
    reads: bool = False
    crossing: Optional[Crossing] = None

    @property
    def operands(self) -> list[Ref]:
        """The tensors among the arguments."""
        return [leaf for leaf in _leaves(self.arguments) if isinstance(leaf, Ref)]


@dataclass(frozen=True)
class Crossing:
    """A tensor that enters or leaves a module whose inside is sharded; ``calls`` are those that it belongs to.

    ``calls`` is shared and grows: column linears that read one tensor are given one crossing.
    """

    path: str
    leaves: bool
    backward: bool
    calls: list[Call]
    part: bool = False
    """Whether a head that gathers its output elsewhere keeps its part of it here."""
    made: list[int] = field(default_factory=list)
    """The numbers of what was made of it in the forward pass."""


@dataclass
class Call:
    """One call of a module whose inside is sharded, with the numbers of what crossed."""

    path: str
    entered: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    written: list[tuple[str, int]] = field(default_factory=list)
    """Its parameters that were written in this step, by name, with their values' numbers."""
    written_between: bool = False
    """Whether a parameter was written after a member of its group was called."""


@dataclass(frozen=True)
class Leaf:
    """A tensor that no operator made: its name in the model or the object, and its values where it has some."""

    name: Optional[str]
    tensor: Tensor
    data: Any = None


class Trace:
    """The events of one run of a step, in order."""

    def __init__(self) -> None:
        self.events: list[Recorded] = []
        self.by_key: dict[Key, Recorded] = {}
        self.leaves: dict[int, Leaf] = {}
        self.terms: dict[int, tuple[int, ...]] = {}
        self.by_terms: dict[tuple[int, ...], int] = {}
        self.calls: dict[str, list[Call]] = {}
        self.loss: Optional[Ref] = None
        self.gradients: dict[str, Optional[Ref]] = {}
        self.error: Optional[Exception] = None
        self.error_place = Place("", "")

    def add(self, event: Recorded) -> None:
        """Append an event."""
        self.events.append(event)
        self.by_key[event.key] = event


def _leaves(arguments: dict[str, Any]) -> Iterator[Any]:
    for value in arguments.values():
        if isinstance(value, list):
            yield from value
        else:
            yield value


def replaced(arguments: dict[str, Any], by: Callable[[Ref], Any]) -> dict[str, Any]:
    """``arguments`` with every tensor replaced."""
    return {
        name: by(value)
        if isinstance(value, Ref)
        else [by(one) if isinstance(one, Ref) else one for one in value]
        if isinstance(value, list)
        else value
        for name, value in arguments.items()
    }
