"""A checkpoint as a directory: tensors through DCP under the unsharded names and shapes, all else in small files.

Here are its form and the reading; :mod:`lightning_autotp.checkpoint.saving` writes it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_autotp.checkpoint import keys, manifest
from lightning_autotp.checkpoint.manifest import SAVE_ID, contents_of, rest_of
from lightning_autotp.checkpoint.other_states import key_of, put_back, said
from lightning_autotp.checkpoint.places import AnyPath
from lightning_autotp.checkpoint.safe_load import DamagedError, Planner, Reader
from lightning_autotp.checkpoint.sharded_view import ShardedView
from lightning_autotp.checkpoint.state_dict import Placement, empty_part, map_optimizer_state
from lightning_autotp.checkpoint.whole_state import Held, as_held, as_part
from lightning_autotp.distributed.dp_shards import all_rows, as_rows, is_dp_sharded, local_rows, rows_of
from lightning_autotp.distributed.errors import raised_together
from lightning_autotp.layout.layout import Layout


def is_directory_checkpoint(path: AnyPath) -> bool:
    """Whether ``path`` is a checkpoint directory; what is in its files is looked at when it is loaded."""
    try:
        contents_of(path)
    except FileNotFoundError:
        return False
    except DamagedError:
        return True
    return True


def load_directory(
    path: AnyPath,
    placement: Placement,
    *,
    optimizers: bool = True,
    unsafe: bool = False,
    all_bytes: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint directory; tensors come as this rank's parts, on the CPU. Every process must call it.

    The state of optimizers has parameters by name, which :func:`of_this_run` numbers.

    Args:
        path: the directory.
        placement: where the parts lie in this run; the run that wrote it may have used any other.
        optimizers: whether to read the optimizers' state.
        unsafe: whether to load what is neither tensors nor plain containers.
        all_bytes: whether to compare all checksums.

    Raises:
        FileNotFoundError: if the directory is not a complete checkpoint.
        DamagedError: if a file is not what was written; a ValueError.
        RefusedError: if a file could run code; a ValueError.
    """
    inside, checkpoint = raised_together(lambda: _checked(path, unsafe, all_bytes))
    stored = Reader(inside, unsafe).read_metadata().state_dict_metadata
    key = {keys.called(key): key for key in stored}
    targets = {
        name: target_of(name.removeprefix(prefix), stored[key[name]], placement)
        for name in key
        if name.startswith(prefix := "state_dict.")
    }
    states = said(checkpoint)
    for of_path, names in states.items():
        for name, parameter in names.items():
            of_state = key_of(of_path, name)
            targets[of_state] = target_of(parameter, stored[key[of_state]], placement)
    skeletons = checkpoint.get("optimizer_states", []) if optimizers else []
    for at, skeleton in enumerate(skeletons):
        for name, entries in _states(skeleton).items():
            for of_entry in (f"optimizers.{at}.{name}.{entry}" for entry in entries):
                if of_entry in key and isinstance(stored[key[of_entry]], TensorStorageMetadata):
                    targets[of_entry] = target_of(name, stored[key[of_entry]], placement)
    read = {key[name]: view for name, (_, view) in targets.items()}
    read_into(read, inside, unsafe)
    found = {name: read[key[name]] if local is None else local for name, (local, _) in targets.items()}
    checkpoint["state_dict"] = {n.removeprefix(prefix): value for n, value in found.items() if n.startswith(prefix)}
    checkpoint = put_back(checkpoint, {p: {n: found[key_of(p, n)] for n in names} for p, names in states.items()})
    if skeletons:
        checkpoint["optimizer_states"] = with_tensors(skeletons, lambda key, _, value: found.get(key, value))
    return checkpoint


def with_tensors(skeletons: Sequence[Mapping[str, Any]], value: Callable[[str, str, Any], Any]) -> list[dict[str, Any]]:
    """The state of optimizers with ``value(key, name of the parameter, value)`` in place of every value of theirs."""
    return [
        {
            **skeleton,
            "state": {
                name: {entry: value(f"optimizers.{at}.{name}.{entry}", name, held) for entry, held in entries.items()}
                for name, entries in _states(skeleton).items()
            },
        }
        for at, skeleton in enumerate(skeletons)
    ]


def _states(skeleton: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    state: Mapping[str, Mapping[str, Any]] = skeleton.get("state", {})
    return state


def read_into(state: dict[str, Any], path: AnyPath, unsafe: bool = False) -> None:
    """Read ``state``, whose tensors and views are overwritten; every process must call it.

    Raises:
        RuntimeError: on all processes, if one could not read its part; with what went wrong.
    """
    try:
        dcp.load(state, storage_reader=Reader(path, unsafe), planner=Planner(unsafe))
    except CheckpointException as error:
        failed = "; ".join(f"rank {rank}: {text}" for rank, text in sorted(failures_of(error).items()))
        raise RuntimeError(f"{path} could not be read. {failed}.") from error


def view_of(name: str, value: Any, placement: Placement) -> Any:
    if isinstance(value, Held):
        return None if value.tensor is None else as_held(value.tensor.detach())
    if not isinstance(value, Tensor):
        return value
    layout, rank = placement.layout_of(name, value), placement.mesh.tp_rank
    if is_dp_sharded(value) and layout is not None and layout.overlaps:
        value = all_rows(value)  # tensor parallel ranks hold the same heads in other rows, and files must not overlap
    if is_dp_sharded(value):
        layout = layout or Layout.replicated(value.shape, placement.mesh.tp_size)
        return ShardedView(local_rows(value.detach()), layout, rank, rows_of(value))
    return value.detach() if layout is None else ShardedView(value.detach(), layout, rank)


def target_of(name: str, stored: Any, placement: Placement) -> tuple[Any, Any]:
    """A local tensor to read into, and what DCP is to be given for it; None and a placeholder for what is no tensor."""
    if not isinstance(stored, TensorStorageMetadata):
        return None, None
    layout = placement.layouts.get(name)
    if layout is None or layout.is_replicated or tuple(stored.size) != layout.shape:
        layout = None
    rank, rows = placement.mesh.tp_rank, placement.rows.get(name)
    full = placement.layouts.get(name)
    if rows is not None and full is not None and tuple(stored.size) == full.shape:
        shape = (rows[1], *full.local_shape(rank)[1:])
        local = as_rows(as_part(torch.empty(shape, dtype=stored.properties.dtype)), rows)
        return local, ShardedView(local, full, rank, rows)
    local = empty_part(stored.size, stored.properties.dtype, layout, rank)
    return (local, local) if layout is None else (as_part(local), ShardedView(local, layout, rank))


def by_name(state: Mapping[str, Any], names: list[str], placement: Placement) -> dict[str, Any]:
    """The tensors of an optimizer's ``state_dict`` that this rank is to write, by parameter name."""
    return {
        names[number]: {e: view_of(names[number], value, placement) for e, value in entries.items() if _is_here(value)}
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


def by_number(states: Sequence[Mapping[str, Any]], names: list[list[str]]) -> list[dict[str, Any]]:
    """The ``state_dict`` of every optimizer, its parameters, which are by name, numbered as in this run.

    Args:
        states: those read.
        names: for each optimizer of this run, its parameters' names in ``state_dict`` order.

    Raises:
        ValueError: if the parameters are not those of this run, or in other groups.
    """
    if len(states) != len(names):
        raise ValueError(f"the checkpoint has {len(states)} optimizers, this run has {len(names)}.")
    numbered = []
    for found, ours in zip(states, names):
        theirs = [name for group in found.get("param_groups", []) for name in group["params"]]
        if set(theirs) != set(ours):
            differing = sorted(set(theirs) ^ set(ours))
            raise ValueError(
                f"the optimizer in the checkpoint and this run's have different parameters: {', '.join(differing[:5])}."
            )
        number = {name: at for at, name in enumerate(ours)}
        state = {number[name]: dict(entries) for name, entries in _states(found).items()}
        groups = [{**g, "params": sorted(number[name] for name in g["params"])} for g in found.get("param_groups", [])]
        if [n for group in groups for n in group["params"]] != list(range(len(ours))):
            raise ValueError(
                "the optimizer in the checkpoint groups its parameters in another way than this run's does."
            )
        numbered.append({**found, "state": state, "param_groups": groups})
    return numbered


def of_this_run(
    states: Sequence[Mapping[str, Any]], names: list[list[str]], placement: Placement
) -> Sequence[Mapping[str, Any]]:
    """The ``optimizer_states`` of a checkpoint, from a directory or an ordinary file, as this run's optimizers load it.

    Args:
        states: as they were read; those of a file have full tensors, and names of parameters where Lightning's
            ``consolidate_checkpoint`` has made it. None of them, or ready ones, stay as they are.
        names: for each optimizer of this run, its parameters' names in ``state_dict`` order.
        placement: where the parts lie.

    Raises:
        ValueError: if the parameters are not those of this run, as far as their names are known.
    """
    if any(isinstance(p, str) for state in states for group in state.get("param_groups", []) for p in group["params"]):
        states = by_number(states, names)
    elif len(states) != len(names):  # Lightning pairs what there is
        return states
    return [
        map_optimizer_state(state, names[at], lambda name, _, value: placement.cut(name, value))
        for at, state in enumerate(states)
    ]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, Held))


def _is_here(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, Held) and value.tensor is not None)


def with_own(skeleton: Mapping[str, Any], state: Mapping[str, Any], own: Mapping[str, Any], names: list[str]) -> Any:
    """The entries of ``skeleton`` by parameter, with what this rank writes, and without what only others have."""
    absent = {
        names[number]: {e for e, value in entries.items() if isinstance(value, Held) and value.tensor is None}
        for number, entries in state.get("state", {}).items()
    }
    return {
        name: {e: value for e, value in {**entries, **own[name]}.items() if e not in absent[name]}
        for name, entries in skeleton["state"].items()
    }


def failures_of(error: CheckpointException) -> dict[int, str]:
    """What each rank that failed says, by its number."""
    return {
        rank: f"{type(wrapped[0]).__name__}: {str(wrapped[0]).rstrip('.')}" for rank, wrapped in error.failures.items()
    }


def _checked(path: AnyPath, unsafe: bool, all_bytes: bool) -> tuple[AnyPath, dict[str, Any]]:
    """Where the files are, and all but the tensors, once the files are known to be those that were written."""
    inside, found = contents_of(path)
    if found is not None:
        found.check(inside)
        if all_bytes:  # each process its share of the files
            found.check_bytes(inside, sorted(found.files)[dist.get_rank() :: dist.get_world_size()])
    else:
        manifest.check_lengths(inside, Reader(inside, unsafe).read_metadata())
    checkpoint = rest_of(inside, found, unsafe)
    checkpoint.pop(SAVE_ID, None)
    return inside, checkpoint
