"""A checkpoint as a directory: tensors through DCP under the unsharded names and shapes, all else in one small file."""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_autotp.checkpoint.sharded_view import ShardedView
from lightning_autotp.checkpoint.state_dict import Placement, empty_part
from lightning_autotp.distributed.errors import raised_together

_REST = "meta.pt"
"""The file for what is not a tensor of the model or an optimizer; the name is Lightning's for sharded checkpoints."""


def is_directory_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a complete checkpoint directory."""
    return (path / ".metadata").is_file() and (path / _REST).is_file()


def save_directory(checkpoint: dict[str, Any], names: list[list[str]], placement: Placement, path: Path) -> None:
    """Write ``checkpoint``, whose tensors are this rank's parts; every process must call it with the same ``path``.

    It is written beside ``path`` and renamed when complete: a crash leaves what was there before.

    Args:
        checkpoint: what Lightning's ``dump_checkpoint`` gives.
        names: for each optimizer, its parameters' names in ``state_dict`` order.
        placement: where the parts lie.
        path: the directory to make.
    """
    rest = dict(checkpoint)
    optimizers = rest.pop("optimizer_states", None)
    tensors: dict[str, Any] = {"state_dict": {n: view_of(n, t, placement) for n, t in rest.pop("state_dict").items()}}
    if optimizers is not None:
        tensors["optimizers"] = {str(at): by_name(s, names[at], placement) for at, s in enumerate(optimizers)}
        rest["optimizer_states"] = [skeleton_of(s, names[at]) for at, s in enumerate(optimizers)]
    # the name has no "ckpt_" in it: Lightning parses such names when it looks for SLURM checkpoints
    shared = [f".autotp-tmp-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(shared, src=0)
    partial = path.parent / shared[0]
    partial.mkdir(parents=True, exist_ok=True)
    dcp.save(tensors, checkpoint_id=partial)
    raised_together(lambda: _finish(rest, partial, path))


def load_directory(path: Path, names: list[list[str]], placement: Placement, weights_only: bool) -> dict[str, Any]:
    """Read a checkpoint directory; tensors come as this rank's parts, on the CPU. Every process must call it.

    Args:
        path: the directory.
        names: for each optimizer of this run, its parameters' names in ``state_dict`` order; empty to leave the
            optimizers' state unread.
        placement: where the parts lie in this run; the run that wrote it may have used any other.
        weights_only: passed to ``torch.load`` for the file with everything that is not a tensor of the state.

    Raises:
        FileNotFoundError: if the directory is not a complete checkpoint.
        ValueError: if its optimizers' parameters are not those of this run.
    """
    if not is_directory_checkpoint(path):
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it lacks `.metadata` or `{_REST}`.")
    checkpoint: dict[str, Any] = torch.load(path / _REST, map_location="cpu", weights_only=weights_only)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = "state_dict."
    model = {
        key.removeprefix(prefix): target_of(key.removeprefix(prefix), stored[key], placement)
        for key in stored
        if key.startswith(prefix)
    }
    wanted: dict[str, Any] = {"state_dict": {name: target for name, (_, target) in model.items()}}
    skeletons = checkpoint.get("optimizer_states", []) if names else []
    states = [
        {
            name: {
                entry: target_of(name, stored[f"optimizers.{at}.{name}.{entry}"], placement)
                for entry in entries
                if f"optimizers.{at}.{name}.{entry}" in stored
            }
            for name, entries in skeleton.get("state", {}).items()
        }
        for at, skeleton in enumerate(skeletons)
    ]
    if any(states):
        wanted["optimizers"] = {
            str(at): {name: {entry: view for entry, (_, view) in values.items()} for name, values in state.items()}
            for at, state in enumerate(states)
        }
    dcp.load(wanted, checkpoint_id=path)
    checkpoint["state_dict"] = {
        name: wanted["state_dict"][name] if local is None else local for name, (local, _) in model.items()
    }
    if names and "optimizer_states" in checkpoint:
        locals_ = [{n: {e: local for e, (local, _) in v.items()} for n, v in state.items()} for state in states]
        checkpoint["optimizer_states"] = by_number(skeletons, locals_, names)
    return checkpoint


def view_of(name: str, value: Any, placement: Placement) -> Any:
    if not isinstance(value, Tensor):
        return value
    layout = placement.layout_of(name, value)
    return value.detach() if layout is None else ShardedView(value.detach(), layout, placement.mesh.tp_rank)


def target_of(name: str, stored: Any, placement: Placement) -> tuple[Any, Any]:
    """A local tensor to read into, and what DCP is to be given for it; None and a placeholder for what is no tensor."""
    if not isinstance(stored, TensorStorageMetadata):
        return None, None
    layout = placement.layouts.get(name)
    if layout is None or layout.is_replicated or tuple(stored.size) != layout.shape:
        layout = None
    rank = placement.mesh.tp_rank
    local = empty_part(stored.size, stored.properties.dtype, layout, rank)
    return local, local if layout is None else ShardedView(local, layout, rank)


def by_name(state: Mapping[str, Any], names: list[str], placement: Placement) -> dict[str, Any]:
    """The tensors of an optimizer's ``state_dict``, by parameter name."""
    return {
        names[number]: {
            e: view_of(names[number], value, placement) for e, value in entries.items() if _is_tensor(value)
        }
        for number, entries in state.get("state", {}).items()
    }


def skeleton_of(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` without its tensors, its parameters by name."""
    return {
        **state,
        "state": {
            names[number]: {entry: None if _is_tensor(value) else value for entry, value in entries.items()}
            for number, entries in state.get("state", {}).items()
        },
        "param_groups": [
            {**g, "params": [names[number] for number in g["params"]]} for g in state.get("param_groups", [])
        ],
    }


def by_number(
    skeletons: list[dict[str, Any]], tensors: list[dict[str, dict[str, Tensor]]], names: list[list[str]]
) -> list[dict[str, Any]]:
    """The ``state_dict`` of every optimizer, its parameters numbered as this run's optimizers number them."""
    if len(skeletons) != len(names):
        raise ValueError(f"the checkpoint has {len(skeletons)} optimizers, this run has {len(names)}.")
    numbered = []
    for skeleton, found, ours in zip(skeletons, tensors, names):
        theirs = [name for group in skeleton.get("param_groups", []) for name in group["params"]]
        if set(theirs) != set(ours):
            differing = sorted(set(theirs) ^ set(ours))
            raise ValueError(
                f"the optimizer in the checkpoint and this run's have different parameters: {', '.join(differing[:5])}."
            )
        number = {name: at for at, name in enumerate(ours)}
        state = {
            number[name]: {entry: found[name].get(entry, value) for entry, value in entries.items()}
            for name, entries in skeleton.get("state", {}).items()
        }
        groups = [
            {**g, "params": sorted(number[name] for name in g["params"])} for g in skeleton.get("param_groups", [])
        ]
        if [n for group in groups for n in group["params"]] != list(range(len(ours))):
            raise ValueError(
                "the optimizer in the checkpoint groups its parameters in another way than this run's does."
            )
        numbered.append({**skeleton, "state": state, "param_groups": groups})
    return numbered


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _finish(rest: dict[str, Any], partial: Path, path: Path) -> None:
    if dist.get_rank() == 0:
        torch.save(rest, partial / _REST)
        _put_in_place(partial, path)


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename ``partial`` to ``path``; what was there before goes only when the new one stands."""
    old = partial.with_name(partial.name.replace("tmp", "old"))
    if path.exists() or path.is_symlink():
        os.replace(path, old)
    os.replace(partial, path)
    if old.is_symlink() or old.is_file():
        old.unlink()
    elif old.exists():
        shutil.rmtree(old)
