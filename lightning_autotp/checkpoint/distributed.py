"""A checkpoint as a directory: tensors through DCP under the unsharded names and shapes, all else in small files."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_autotp.checkpoint import manifest
from lightning_autotp.checkpoint.manifest import SAVE_ID, Manifest, Written
from lightning_autotp.checkpoint.publish import beside, put_in_place, remove, remove_leftovers, synchronize
from lightning_autotp.checkpoint.safe_load import Planner, Reader, load_plain, name_what_is_refused, plain
from lightning_autotp.checkpoint.sharded_view import ShardedView
from lightning_autotp.checkpoint.state_dict import Placement, empty_part
from lightning_autotp.distributed.errors import raised_together


def is_directory_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint directory; what is in its files is looked at when it is loaded."""
    return (path / manifest.METADATA).is_file() and (path / manifest.REST).is_file()


def save_directory(
    checkpoint: dict[str, Any],
    names: list[list[str]],
    placement: Placement,
    path: Path,
    models: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write ``checkpoint``, whose tensors are this rank's parts; every process must call it with the same ``path``.

    It is written beside ``path`` and takes its place when all files are there and on the disk: a crash, a full disk or
    a disk of one node leaves what was there before.

    Args:
        checkpoint: what Lightning's ``dump_checkpoint`` gives.
        names: for each optimizer, its parameters' names in ``state_dict`` order.
        placement: where the parts lie.
        path: the directory to make.
        models: what to record of the Hugging Face models in it.

    Raises:
        RuntimeError: on all processes, if one of them could not write, or the first one does not see its file.
    """
    rest = dict(checkpoint)
    optimizers = rest.pop("optimizer_states", None)
    tensors: dict[str, Any] = {"state_dict": {n: view_of(n, t, placement) for n, t in rest.pop("state_dict").items()}}
    if optimizers is not None:
        tensors["optimizers"] = {str(at): by_name(s, names[at], placement) for at, s in enumerate(optimizers)}
        rest["optimizer_states"] = [skeleton_of(s, names[at]) for at, s in enumerate(optimizers)]
    shared = [beside(path).name, uuid.uuid4().hex]
    dist.broadcast_object_list(shared, src=0)
    made, save_id = path.parent / shared[0], shared[1]
    try:
        raised_together(lambda: made.mkdir(parents=True, exist_ok=True))
        dcp.save(tensors, storage_writer=_storage(made))
        written = raised_together(lambda: _sealed(made, save_id))
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, written)
        sizes = {"processes": len(everyones), "autotp_size": placement.mesh.tp_size}
        raised_together(lambda: _finish(plain(rest), made, path, save_id, everyones, sizes, models))
    except CheckpointException as error:
        remove(made)
        failed = "; ".join(f"rank {rank}: {_said(wrapped)}" for rank, wrapped in sorted(error.failures.items()))
        raise RuntimeError(f"{path} could not be written, and what was there before is as it was. {failed}.") from error
    except BaseException:
        remove(made)  # on each process: the disk may be its node's own
        raise


def load_directory(
    path: Path,
    names: list[list[str]],
    placement: Placement,
    *,
    unsafe: bool = False,
    all_bytes: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint directory; tensors come as this rank's parts, on the CPU. Every process must call it.

    Args:
        path: the directory.
        names: for each optimizer of this run, its parameters' names in ``state_dict`` order; empty to leave the
            optimizers' state unread.
        placement: where the parts lie in this run; the run that wrote it may have used any other.
        unsafe: whether to load what is neither tensors nor plain containers.
        all_bytes: whether to compare all checksums.

    Raises:
        FileNotFoundError: if the directory is not a complete checkpoint.
        DamagedError: if a file is not what was written; a ValueError.
        RefusedError: if a file could run code; a ValueError.
        ValueError: if its optimizers' parameters are not those of this run.
    """
    checkpoint: dict[str, Any] = raised_together(lambda: _checked(path, unsafe, all_bytes))
    stored = Reader(path, unsafe).read_metadata().state_dict_metadata
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
    read_into(wanted, path, unsafe)
    checkpoint["state_dict"] = {
        name: wanted["state_dict"][name] if local is None else local for name, (local, _) in model.items()
    }
    if names and "optimizer_states" in checkpoint:
        locals_ = [{n: {e: local for e, (local, _) in v.items()} for n, v in state.items()} for state in states]
        checkpoint["optimizer_states"] = by_number(skeletons, locals_, names)
    return checkpoint


def read_into(state: dict[str, Any], path: Path, unsafe: bool = False) -> None:
    """Read ``state``, whose tensors and views are overwritten; every process must call it.

    Raises:
        RuntimeError: on all processes, if one could not read its part; with what went wrong.
    """
    try:
        dcp.load(state, storage_reader=Reader(path, unsafe), planner=Planner(unsafe))
    except CheckpointException as error:
        failed = "; ".join(f"rank {rank}: {_said(wrapped)}" for rank, wrapped in sorted(error.failures.items()))
        raise RuntimeError(f"{path} could not be read. {failed}.") from error


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


def _said(wrapped: Any) -> str:
    return f"{type(wrapped[0]).__name__}: {str(wrapped[0]).rstrip('.')}"


def _storage(made: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(made, sync_files=False)  # they are synchronized when they are sealed


def _sealed(made: Path, save_id: str) -> dict[str, Written]:
    """The files that this process has written, complete and on the disk."""
    own = sorted(made.glob(f"__{dist.get_rank()}_*"))
    return {file.name: manifest.seal(file, save_id) for file in own}


def _finish(
    rest: dict[str, Any],
    made: Path,
    path: Path,
    save_id: str,
    everyones: Sequence[Mapping[str, Written]],
    sizes: Mapping[str, int],
    models: Sequence[Mapping[str, Any]],
) -> None:
    if dist.get_rank() != 0:
        return
    name_what_is_refused(rest, path, paths=True)
    torch.save({**rest, SAVE_ID: save_id}, made / manifest.REST)
    for small in (manifest.REST, manifest.METADATA):
        synchronize(made / small)
    files = {small: manifest.finished(made / small) for small in (manifest.REST, manifest.METADATA)}
    _require_all(made, path, everyones)
    for written in everyones:
        files |= written
    Manifest(save_id, files, manifest.writer(**sizes), models).write(made)
    synchronize(made)
    put_in_place(made, path)
    remove_leftovers(path)


def _require_all(made: Path, path: Path, everyones: Sequence[Mapping[str, Written]]) -> None:
    """Require all that was written, and all that the metadata names, to be where the first process sees it."""
    here = {entry.name: entry.stat().st_size for entry in made.iterdir()}
    lacking = [
        f"`{name}` of rank {rank}"
        for rank, written in enumerate(everyones)
        for name, found in written.items()
        if here.get(name) != found.size
    ]
    named = {info.relative_path for info in Reader(made).read_metadata().storage_data.values()}
    lacking += [f"`{name}`" for name in sorted(named - {name for written in everyones for name in written})]
    if lacking:
        raise RuntimeError(
            f"{path} was not written: rank 0 does not see {', '.join(lacking[:5])} of {len(lacking)} files in"
            f" {path.parent}. Is it a disk of one node? Save to a file system that all nodes share, or with"
            " save_distributed_checkpoint=False. What was there before is as it was."
        )


def _checked(path: Path, unsafe: bool, all_bytes: bool) -> dict[str, Any]:
    """All but the tensors, once the files of the directory are known to be those that were written."""
    if not is_directory_checkpoint(path):
        raise FileNotFoundError(
            f"{path} is not a complete checkpoint: it lacks `{manifest.METADATA}` or `{manifest.REST}`."
        )
    found = Manifest.read(path)
    if found is not None:
        found.check(path)
        if all_bytes:  # each process its share of the files
            found.check_bytes(path, sorted(found.files)[dist.get_rank() :: dist.get_world_size()])
    else:
        manifest.check_lengths(path, Reader(path, unsafe).read_metadata())
    checkpoint: dict[str, Any] = load_plain(path / manifest.REST, unsafe=unsafe)
    saved: Optional[str] = checkpoint.pop(SAVE_ID, None)
    if saved is not None and found is None:
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it lacks `{manifest.NAME}`.")
    return checkpoint
