"""Which tensor of a rank's run is which of the full model's: by their places in the code, not by order."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple, Optional

import torch
from torch.utils._pytree import tree_leaves

from lightning_autotp.dataflow.event import Operand, RankCall
from lightning_autotp.dataflow.placement import Placement, Shape
from lightning_autotp.dataflow.view_dims import groups
from lightning_autotp.proof.recorded import HIDDEN, Leaf, Recorded, Ref, Trace, replaced


class NotMatched(Exception):
    """What the full model does has no counterpart in the rank's run; the message says what differs."""


class Differs(NotMatched):
    """The rank computes with other numbers than the full model, which no placement explains."""


class Held(NamedTuple):
    """What a rank has in the place of a full value: the number of its own value, and the shape in which it counts."""

    number: int
    shape: Shape


class Counterparts:
    """The counterparts of the full run's values in the run of one rank, found event by event in the full run's order.

    Args:
        full: the full model's run.
        rank: the rank's.
        only: whether all ranks do what this one does.
    """

    def __init__(self, full: Trace, rank: Trace, *, only: bool) -> None:
        self.full, self.rank, self.only = full, rank, only
        self.held: dict[int, Held] = {}
        self._made = {ref.number: event for event in rank.events for ref in event.outputs or ()}

    def of(self, event: Recorded) -> RankCall:
        """How the rank calls the operator of ``event``.

        Raises:
            NotMatched: if the rank does not, or with other tensors; what it makes is taken for the counterpart of what
                the full model makes even so.
        """
        outputs = event.outputs or ()
        if len(outputs) == 1 and outputs[0].number in self.full.terms:
            return self._sum(event, outputs[0])
        mine = self.rank.by_key.get(event.key)
        if mine is None:
            return self._followed(event)
        if mine.outputs is not None and len(mine.outputs) != len(outputs):
            raise NotMatched(f"it makes {len(mine.outputs)} tensors where the full model makes {len(outputs)}")
        for full, local in zip(outputs, mine.outputs or ()):
            self.held[full.number] = Held(local.number, local.shape)
        theirs, own = event.operands, mine.operands
        if len(theirs) != len(own):
            raise NotMatched(f"it computes with {len(own)} tensors where the full model has {len(theirs)}")
        shapes = {}
        for full, local in zip(theirs, own):
            self._check(full, local)
            shapes[local.number] = local.shape
        made = None if mine.outputs is None else tuple(ref.shape for ref in mine.outputs)
        return RankCall(replaced(mine.arguments, _operand), made)

    def _check(self, full: Ref, local: Ref) -> None:
        """Whether the rank's operand is the counterpart of the full model's."""
        held = self.held.get(full.number)
        if held is None and full.number in self.full.leaves and local.number in self.rank.leaves:
            self._match_leaves(self.full.leaves[full.number], self.rank.leaves[local.number])
            held = self.held[full.number] = Held(local.number, local.shape)
        if held is None or held.number == HIDDEN or held.number != local.number:
            self._check_not_less(full, held, local)
            raise NotMatched("it computes with another tensor")
        if full.dtype != local.dtype:
            raise NotMatched(f"it computes with {local.dtype} where the full model has {full.dtype}")

    def _check_not_less(self, full: Ref, held: Optional[Held], local: Ref) -> None:
        """Refuse ranks that all take the same beginning of what the full model takes all of."""
        made = self._made.get(local.number)
        if made is None or made.name != "slice" or made.key in self.full.by_key or not self.only:
            return
        source = made.arguments["self"]
        leaf, own = self.full.leaves.get(full.number), self.rank.leaves.get(source.number)
        known = leaf is not None and own is not None and leaf.name is not None and leaf.name == own.name
        if known or held is not None and held.number == source.number:
            said = f"every rank takes {list(local.shape)} of what the full model takes all of, {list(full.shape)}"
            raise Differs(said)

    def _match_leaves(self, full: Leaf, local: Leaf) -> None:
        theirs, own = set(tree_leaves(full.data)), set(tree_leaves(local.data))
        if full.name == local.name and full.tensor.is_floating_point() and (own - theirs or theirs - own and self.only):
            raise Differs(f"it computes with {local.data} where the full model has {full.data}")
        if full.name != local.name or full.data != local.data:
            mine = f"{local.name or local.data or 'another tensor'}"
            raise NotMatched(f"it computes with {mine} where the full model has {full.name or full.data or 'another'}")
        if full.tensor is local.tensor or full.name is not None:
            return
        if full.tensor.shape != local.tensor.shape:
            raise NotMatched(f"it is given {list(local.tensor.shape)}, the full model {list(full.tensor.shape)}")
        if full.tensor.is_meta != local.tensor.is_meta or (
            not full.tensor.is_meta and not torch.equal(full.tensor, local.tensor)
        ):
            raise NotMatched("it is given other numbers than the full model")

    def _sum(self, event: Recorded, made: Ref) -> RankCall:
        """A sum of gradients: the rank's of the same terms, whatever it added first."""
        terms = []
        shapes: list[Shape] = []
        for number in self.full.terms[made.number]:
            held = Held(HIDDEN, ()) if number == HIDDEN else self.held.get(number)
            if held is None:
                raise NotMatched("it has no such gradient to add")
            terms.append(held.number)
            shapes.append(held.shape)
        mine = self.rank.by_terms.get(tuple(sorted(terms)))
        shape = next((shape for number, shape in zip(terms, shapes) if number != HIDDEN), ())
        if mine is not None:
            self.held[made.number] = Held(mine, shape)
        local = replaced(event.arguments, lambda ref: _operand(ref._replace(shape=self._shape(ref))))
        return RankCall(local, (shape,))

    def _shape(self, ref: Ref) -> Shape:
        held = self.held.get(ref.number)
        return ref.shape if held is None else held.shape

    def _followed(self, event: Recorded) -> RankCall:
        """What the rank leaves out, because it changes nothing there: views, and copies of a single entry."""
        outputs, operands = event.outputs or (), event.operands
        if len(outputs) != 1 or len(operands) != 1:
            raise NotMatched("it does nothing of the kind there")
        held = self.held.get(operands[0].number)
        if held is None:
            raise NotMatched("it does nothing of the kind there")
        shape = _unchanged(event, operands[0].shape, outputs[0].shape, held.shape)
        if shape is None:
            raise NotMatched("it does nothing of the kind there")
        self.held[outputs[0].number] = Held(held.number, shape)
        local = replaced(event.arguments, lambda ref: _operand(ref._replace(shape=held.shape)))
        return RankCall(local, (shape,))


def _operand(ref: Ref) -> Operand:
    return Operand(ref.shape, Placement.replicated(len(ref.shape)), ref.dtype)


def _unchanged(event: Recorded, full: Shape, made: Shape, local: Shape) -> Optional[Shape]:
    """The shape of what a rank has of the output, if the operator changes nothing of its ``local``; None if it does."""
    given: dict[str, Any] = event.arguments
    if event.name == "unsqueeze":
        at = given["dim"] % len(made)
        return (*local[:at], 1, *local[at:])
    if event.name == "expand":
        more = len(made) - len(full)
        return (*made[:more], *local) if not any(size != 1 for size in made[:more]) else None
    if event.name in ("view", "squeeze"):
        return _merged(full, made, local)
    if event.name == "sum" and given.get("dim"):
        over = {dim % len(full) for dim in given["dim"]}
        if any(local[dim] != 1 for dim in over):
            return None
        return local if given.get("keepdim") else tuple(size for at, size in enumerate(local) if at not in over)
    return None


def _merged(full: Shape, made: Shape, local: Shape) -> Optional[Shape]:
    found: list[int] = [1] * len(made)
    for before, after in groups(full, made):
        mine = prod(local[at] for at in before)
        if len(after) == 1:
            found[after[0]] = mine
        elif mine == prod(full[at] for at in before):
            for at in after:
                found[at] = made[at]
        elif len(after) > 1:
            return None
    return tuple(found)
