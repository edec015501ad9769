"""Another's checkpoint as Lightning's Trainer takes it, with this rank's parts of the tensors."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_autotp.checkpoint.distributed import with_tensors
from lightning_autotp.checkpoint.foreign.names import prefix_for
from lightning_autotp.checkpoint.state_dict import Placement
from lightning_autotp.checkpoint.tensors import MODEL, Checkpoint, Tensors

VERSION = "pytorch-lightning_version"
"""The entry that every checkpoint of Lightning's has."""


def resumable(found: Checkpoint, placement: Placement, model: Collection[str], *, fitting: bool) -> dict[str, Any]:
    """``found`` with this rank's parts, read one tensor at a time; no process waits for another.

    Args:
        found: the opened checkpoint.
        placement: where the parts lie in this run.
        model: the names in this run's model.
        fitting: whether training goes on from it; the state of optimizers, of parameters by name, is read then.
    """
    prefix = prefix_for(found.model.shapes, model)
    moved = renamed(found, prefix or "")
    rest = with_lightnings_entries(moved, fitting=fitting)
    own, read, known = moved.model, moved.tensors.read, moved.tensors.shapes
    rest["state_dict"] = {name: placement.cut(name, own.read(name)) for name in own.shapes}
    states = rest.pop("optimizer_states")
    if fitting:
        rest["optimizer_states"] = with_tensors(
            states,  # off the files, which may be mapped
            lambda key, name, value: placement.cut(name, read(key)).clone() if key in known else value,
        )
    return rest


def renamed(found: Checkpoint, prefix: str) -> Checkpoint:
    """``found`` with ``prefix`` before all its parameters' names."""
    if not prefix:
        return found
    before: dict[str, str] = {}
    for name in found.tensors.shapes:
        kind = MODEL if name.startswith(MODEL) else ".".join(name.split(".")[:2]) + "."
        before[kind + prefix + name.removeprefix(kind)] = name
    rest = dict(found.rest)
    if "optimizer_states" in rest:
        rest["optimizer_states"] = [_with_prefix(skeleton, prefix) for skeleton in rest["optimizer_states"]]
    shapes = {name: found.tensors.shapes[old] for name, old in before.items()}
    return replace(found, rest=rest, tensors=Tensors(shapes, lambda name: found.tensors.read(before[name])))


def _with_prefix(skeleton: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        **skeleton,
        "state": {prefix + name: entries for name, entries in skeleton["state"].items()},
        "param_groups": [{**g, "params": [prefix + n for n in g["params"]]} for g in skeleton["param_groups"]],
    }


def with_lightnings_entries(found: Checkpoint, *, fitting: bool) -> dict[str, Any]:
    """What Lightning wants in a checkpoint beside the model, of one that it may not have written."""
    rest = dict(found.rest)
    said = list(found.notes)
    if VERSION not in rest:
        rest |= {VERSION: lightning.__version__, "epoch": 0, "global_step": rest.get("global_step", 0)}
        rest.setdefault("callbacks", {})
        said.append("it holds no state of Lightning's loops, callbacks and learning rates: they begin anew")
    if "optimizer_states" not in rest and fitting:
        said.append("it holds no optimizer's state: optimizers begin anew")
    for name in ("optimizer_states", "lr_schedulers"):
        rest.setdefault(name, [])
    if said:
        rank_zero_warn(f"{found.path} ({found.writer or 'unknown writer'}): {'; '.join(said)}.")
    return rest
