"""States of the model besides its own in a checkpoint, as averages of weights are: parts of full tensors, too.

They are told by their names: mappings whose entries are called as parameters are, in the shape of this rank's parts.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

from torch import Tensor

from lightning_autotp.checkpoint.state_dict import Placement
from lightning_autotp.layout.layout import Layout

STATES = "autotp_states"
"""The entry of a checkpoint that says where such states are, and which parameters their tensors belong to."""

Path = tuple[str, ...]
"""The keys that lead to a mapping."""

States = dict[Path, dict[str, str]]
"""By the path of a mapping, for each tensor in it the name of the parameter that it is a state of; else empty."""

_OWN = ("state_dict", "optimizer_states", STATES)
_WRAPPERS = ("", "module.", "_orig_mod.")


def states_in(checkpoint: Mapping[str, Any], placement: Placement) -> States:
    """Where ``checkpoint`` holds parts of full tensors, besides the model's and the optimizers' own states.

    Every tensor parallel rank must call it.
    """
    if placement.mesh.tp_size == 1:
        return {}
    rank = placement.mesh.tp_rank
    found: States = {}
    for path, held in _mappings(checkpoint):
        names = _names(held, placement, lambda layout: layout.local_shape(rank))
        if any(names.values()):
            found[path] = names
    everyones = placement.mesh.collectives.gather_objects(found)
    return {path: names for path, names in found.items() if all(theirs.get(path) == names for theirs in everyones)}


def full_states_in(checkpoint: Mapping[str, Any], placement: Placement) -> States:
    """Where ``checkpoint`` holds full tensors that are to be cut: as it says, or whole states of the model.

    Args:
        checkpoint: of an ordinary file; one that a plain Trainer wrote does not say.
        placement: where the parts lie.
    """
    if STATES in checkpoint:
        return said(checkpoint)
    cut = {name for name, layout in placement.layouts.items() if not layout.is_replicated}
    found: States = {}
    for path, held in _mappings(checkpoint) if cut else ():
        names = _names(held, placement, lambda layout: layout.shape)
        if cut <= set(names.values()):
            found[path] = names
    return found


def said(checkpoint: Mapping[str, Any]) -> States:
    """What a checkpoint says of such states."""
    return {tuple(path): dict(names) for path, names in checkpoint.get(STATES, ())}


def saying(checkpoint: dict[str, Any], states: States) -> dict[str, Any]:
    """``checkpoint``, which says where ``states`` are."""
    return {**checkpoint, STATES: _plain(states)} if states else checkpoint


def mapped(
    checkpoint: Mapping[str, Any], states: States, change: Callable[[str, Any], Any], *, say: bool = True
) -> dict[str, Any]:
    """``checkpoint`` with ``change(parameter name, tensor)`` in place of the tensors of ``states``.

    Args:
        checkpoint: the checkpoint.
        states: where they are.
        change: is called in order.
        say: whether the result says where they are.
    """
    made = {name: value for name, value in checkpoint.items() if name != STATES}
    for path, names in states.items():
        held = _at(made, path)
        if held is not None:
            _put(made, path, {k: change(names[k], v) if k in names else v for k, v in held.items()})
    return saying(made, states) if say else made


def taken_out(checkpoint: Mapping[str, Any], states: States) -> tuple[dict[str, Any], dict[Path, dict[str, Tensor]]]:
    """``checkpoint`` without the tensors of ``states``, which it says the places of; and these."""
    made, tensors = dict(checkpoint), {}
    for path, names in states.items():
        held = _at(made, path)
        assert held is not None
        tensors[path] = {key: held[key] for key in names}
        left = {key: value for key, value in held.items() if key not in names}
        if left or len(path) > 1:
            _put(made, path, left)
        else:
            del made[path[0]]
    return saying(made, states), tensors


def put_back(checkpoint: Mapping[str, Any], tensors: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """``checkpoint`` with tensors in their mappings again; it no longer says where they are."""
    made = {name: value for name, value in checkpoint.items() if name != STATES}
    for path, held in tensors.items():
        _put(made, path, {**(_at(made, path) or {}), **held})
    return made


def key_of(path: Path, name: str = "") -> str:
    """The key of a tensor in a directory, or what those of a mapping begin with."""
    return ".".join((*path, name))


def nested(tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    """The dict at ``path`` in a dict of dicts, made where there is none."""
    for key in path:
        tensors = tensors.setdefault(key, {})
    return tensors


def _plain(states: States) -> list[list[Any]]:
    return [[list(path), dict(names)] for path, names in states.items()]


def _mappings(value: Any, path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping) and isinstance(key, str) and (path or key not in _OWN):
            yield (*path, key), entry
            yield from _mappings(entry, (*path, key))


def _names(held: Mapping[Any, Any], placement: Placement, shape: Callable[[Layout], tuple[int, ...]]) -> dict[str, str]:
    """For each tensor of a mapping the cut parameter that it is a state of, by name and shape; else empty."""
    names = {}
    for key, value in held.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            name = _parameter(key, placement)
            fits = name is not None and tuple(value.shape) == shape(placement.layouts[name])
            names[key] = name if name is not None and fits else ""
    return names


def _parameter(key: str, placement: Placement) -> Optional[str]:
    """The cut parameter that ``key`` names, by its full name or one in a part of the model."""
    for wrapper in _WRAPPERS:
        name = key.removeprefix(wrapper)
        if name in placement.layouts:
            return None if placement.layouts[name].is_replicated else name
    for wrapper in _WRAPPERS:
        name = key.removeprefix(wrapper)
        inside = [n for n in placement.layouts if n.endswith(f".{name}")] if "." in name else []
        if inside and len({repr(placement.layouts[n]) for n in inside}) == 1:
            return None if placement.layouts[inside[0]].is_replicated else inside[0]
    return None


def _at(checkpoint: Mapping[str, Any], path: Path) -> Optional[Mapping[str, Any]]:
    value: Any = checkpoint
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value if isinstance(value, Mapping) else None


def _put(made: dict[str, Any], path: Path, value: Mapping[str, Any]) -> None:
    """Put a mapping into ``made``; the mappings on the way are copied."""
    for key in path[:-1]:
        made[key] = dict(made.get(key, {}))
        made = made[key]
    made[path[-1]] = dict(value)
