"""One operator, as the full model and as each rank calls it, and what can be found about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch.utils._pytree import tree_leaves

from lightning_autotp.dataflow.placement import Placement, Shape


class Wrong(Exception):
    """The ranks' results are not what the full model computes, in no placement; the message says why."""


class Unknown(Exception):
    """No rule follows this operator with these placements; the message names what is missing."""


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator gets: the full one's shape, its dtype, and what each rank holds of it.

    ``strides`` and ``offset`` are those of the full tensor's memory, or in a :class:`RankCall` of the rank's own; only
    as_strided asks for them, and does not know what it makes without.
    """

    shape: Shape
    placement: Placement
    dtype: torch.dtype
    strides: Optional[Shape] = None
    offset: int = 0


@dataclass(frozen=True)
class RankCall:
    """How one rank calls the operator: its arguments by name, and its outputs' shapes (None: it fails)."""

    arguments: Mapping[str, Any]
    outputs: Optional[tuple[Shape, ...]]


@dataclass(frozen=True)
class Event:
    """A call of the operator ``name``: the full model's arguments by name, tensors as operands, and each rank's."""

    name: str
    arguments: Mapping[str, Any]
    outputs: tuple[Shape, ...]
    ranks: tuple[RankCall, ...]

    def __getitem__(self, argument: str) -> Any:
        """The full model's argument."""
        return self.arguments[argument]

    def tensor(self, argument: str) -> Operand:
        """The tensor that is given as ``argument``; Unknown if none is."""
        found = self.arguments.get(argument)
        if not isinstance(found, Operand):
            raise Unknown(f"{self.name} without a tensor as {argument!r} has no rule.")
        return found

    def dim(self, argument: str = "dim", of: str = "self", more: int = 0) -> int:
        """The dim that is given as ``argument``, counted from the front of the tensor ``of`` (and ``more`` dims)."""
        return int(self[argument]) % max(len(self.tensor(of).shape) + more, 1)

    @property
    def operands(self) -> list[Operand]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves(dict(self.arguments)) if isinstance(leaf, Operand)]

    def local_outputs(self, at: int) -> list[Shape]:
        """Each rank's shape of output ``at``; Wrong if a rank fails."""
        found = []
        for rank, call in enumerate(self.ranks):
            if call.outputs is None:
                raise Wrong(f"rank {rank} cannot compute it: its local shapes or sizes do not fit.")
            if len(call.outputs) != len(self.outputs):
                raise Wrong(f"rank {rank} makes {len(call.outputs)} tensors, the full model {len(self.outputs)}.")
            found.append(call.outputs[at])
        return found


def bound(operator: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the operator's schema, defaults included."""
    schema = operator._schema.arguments
    found = {argument.name: argument.default_value for argument in schema}
    found.update(zip((argument.name for argument in schema), args))
    found.update(kwargs)
    return found
