"""The state of optimizers that step whole tensors, where it goes into a checkpoint and where it comes out of one.

It lies whole on the rank that owns a parameter, so that a checkpoint of any form has it as the unsharded run would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from torch import Tensor

from lightning_autotp.optimizers.whole import whole_steps

_PART, _HELD = "_autotp_part", "_autotp_held"


@dataclass(frozen=True)
class Held:
    """A whole tensor that the tensor parallel rank ``owner`` has in its state; ``tensor`` is None on others."""

    owner: int
    tensor: Optional[Tensor]


def as_held(tensor: Tensor) -> Tensor:
    """``tensor``, known from now on as a whole one that this rank owns."""
    setattr(tensor, _HELD, True)
    return tensor


def is_held(value: Any) -> bool:
    """Whether it is a whole tensor that this rank owns."""
    return hasattr(value, _HELD)


def as_part(tensor: Tensor) -> Tensor:
    """``tensor``, known from now on as this rank's part of one that was saved."""
    setattr(tensor, _PART, True)
    return tensor


def with_everyones(state: Mapping[str, Any], optimizer: Any) -> Mapping[str, Any]:
    """An optimizer's ``state_dict`` with the state of all parameters; every tensor parallel rank must call it.

    Tensors of parameters that ranks own are :class:`Held`, all else of them is everywhere.
    """
    steps = whole_steps(optimizer)
    if steps is None or not steps.owned or "state" not in state:
        return state
    rank, gather = steps.mesh.tp_rank, steps.mesh.collectives.gather_objects
    params = [p for group in optimizer.param_groups for p in group["params"]]
    owner = {at: steps.owned[p].owner or 0 for at, p in enumerate(params) if p in steps.owned}
    own = {at: entries for at, entries in state["state"].items() if owner.get(at) == rank}
    # tensors stay where they are; what holds them in lists is small or rare, and travels
    known = {at: {e: None if isinstance(v, Tensor) else (v,) for e, v in of_one.items()} for at, of_one in own.items()}
    everyones = {at: entries for theirs in gather(known) for at, entries in theirs.items()}
    made = {at: entries for at, entries in state["state"].items() if at not in owner}
    for at, entries in everyones.items():
        mine = own.get(at, {})
        made[at] = {e: Held(owner[at], mine.get(e)) if v is None else v[0] for e, v in entries.items()}
    return {**state, "state": dict(sorted(made.items()))}


def everyones(checkpoint: Mapping[str, Any], optimizers: Sequence[Any]) -> dict[str, Any]:
    """A checkpoint whose optimizers are :func:`with_everyones`; every tensor parallel rank must call it."""
    if "optimizer_states" not in checkpoint:
        return dict(checkpoint)
    states = checkpoint["optimizer_states"]
    if len(states) != len(optimizers):
        return dict(checkpoint)
    return {**checkpoint, "optimizer_states": [with_everyones(s, o) for s, o in zip(states, optimizers)]}


def for_owners(states: Sequence[Mapping[str, Any]], optimizers: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
    """What optimizers load of ``states``, which hold parts; every tensor parallel rank must call it."""
    if len(states) != len(optimizers):
        return states
    return [_for_owners(state, optimizer) for state, optimizer in zip(states, optimizers)]


def _for_owners(state: Mapping[str, Any], optimizer: Any) -> Mapping[str, Any]:
    steps = whole_steps(optimizer)
    if steps is None or not steps.owned or "state" not in state:
        return state
    params = [p for group in optimizer.param_groups for p in group["params"]]
    made = {}
    for at, entries in sorted(state["state"].items()):
        owned = steps.owned.get(params[at])
        whole = entries if owned is None else steps.own_state(owned, entries, lambda t: hasattr(t, _PART))
        if whole is not None:
            made[at] = whole
    return {**state, "state": made}
