"""Writing a checkpoint directory: prepared where the model is, and written by whoever calls what is returned."""

import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lightning_autotp.checkpoint import keys, manifest
from lightning_autotp.checkpoint.distributed import by_name, failures_of, skeleton_of, view_of, with_own
from lightning_autotp.checkpoint.manifest import SAVE_ID, Manifest, Written
from lightning_autotp.checkpoint.other_states import nested, said, taken_out
from lightning_autotp.checkpoint.places import AnyPath
from lightning_autotp.checkpoint.publish import beside, not_saved, put_in_place, remove, remove_leftovers, synchronize
from lightning_autotp.checkpoint.safe_load import Reader, name_what_is_refused, plain
from lightning_autotp.checkpoint.shard_files import ShardWriter
from lightning_autotp.checkpoint.state_dict import Placement
from lightning_autotp.compat import without_record_checksums
from lightning_autotp.distributed.errors import Explain, Processes

Write = Callable[[Processes], None]
"""Writes what has been prepared; each of the processes must call it."""


def prepare_directory(
    checkpoint: dict[str, Any],
    names: list[list[str]],
    placement: Placement,
    path: AnyPath,
    models: Sequence[Mapping[str, Any]] = (),
    module: str = "",
) -> Write:
    """Prepare to write ``checkpoint``, whose tensors are this rank's parts; every process must call it.

    It is written beside ``path`` and takes its place when all files are there and on the disk: a crash, a full disk or
    a disk of one node leaves what was there before.

    Args:
        checkpoint: what Lightning's ``dump_checkpoint`` gives; it must not change until it is written.
        names: for each optimizer, its parameters' names in ``state_dict`` order.
        placement: where the parts lie.
        path: the directory to make; that of the first process counts.
        models: what to record of the Hugging Face models in it.
        module: the class of the module, to be recorded.

    Returns:
        What writes it. It raises a RuntimeError on all processes alike, if one of them could not write, or the first
        one does not see its file.

    Raises:
        ValueError: if the state of an optimizer cannot be saved.
        RuntimeError: on all processes alike, if the checkpoint holds what cannot be pickled.
    """
    rest = dict(checkpoint)
    optimizers = rest.pop("optimizer_states", None)
    tensors: dict[str, Any] = {keys.MODEL: {n: view_of(n, t, placement) for n, t in rest.pop("state_dict").items()}}
    if optimizers is not None:
        rest["optimizer_states"] = [skeleton_of(s, names[at]) for at, s in enumerate(optimizers)]
    rest, others = taken_out(rest, states := said(rest))
    for of_path, held in others.items():
        nested(tensors, of_path).update({k: view_of(states[of_path][k], t, placement) for k, t in held.items()})
    rest = plain(rest)
    for at, skeleton in enumerate(rest.get("optimizer_states", [])):  # all, for those who do not know of `meta.pt`
        own = by_name(optimizers[at], names[at], placement)
        state = with_own(skeleton, optimizers[at], own, names[at])
        tensors[keys.optimizer(at)] = {**skeleton, "state": state}
    look_at_what_is_refused(rest, path, paths=True)
    return partial(_write, tensors, rest, path, {"autotp_size": placement.mesh.tp_size, "module": module}, models)


def save_directory(
    checkpoint: dict[str, Any],
    names: list[list[str]],
    placement: Placement,
    path: AnyPath,
    models: Sequence[Mapping[str, Any]] = (),
    module: str = "",
) -> None:
    """Write ``checkpoint`` at once; see :func:`prepare_directory`."""
    prepare_directory(checkpoint, names, placement, path, models, module)(Processes())


def look_at_what_is_refused(rest: Mapping[str, Any], path: AnyPath, *, paths: bool) -> None:
    """Warn on the first process of what a load will refuse; see :func:`name_what_is_refused`.

    Raises:
        RuntimeError: on all processes alike, if something cannot be pickled.
    """
    processes = Processes()
    look = partial(name_what_is_refused, rest, path, paths=paths)
    processes.raised_together(lambda: look() if processes.rank == 0 else None, partial(not_saved, path))


def _write(
    tensors: dict[str, Any],
    rest: Mapping[str, Any],
    path: AnyPath,
    by: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    processes: Processes,
) -> None:
    save_id = processes.first(uuid.uuid4().hex)
    # where nothing can be renamed, the files are in their place, and unknown until the manifest names their folder
    made = (
        path.parent / processes.first(beside(path).name)
        if isinstance(path, Path)
        else path / f"{manifest.FOLDER}{save_id}"
    )
    failed = partial(not_saved, path)
    try:
        processes.raised_together(lambda: made.mkdir(parents=True, exist_ok=True), failed)
        everyones = processes.gather(_write_tensors(tensors, ShardWriter(made, save_id), processes, failed))
    except BaseException:
        remove(made)  # on each process: the disk may be its node's own
        raise
    finish = partial(_finish, rest, made, path, save_id, everyones, {"processes": len(everyones), **by}, models)
    try:
        processes.raised_together(lambda: finish() if processes.rank == 0 else None, failed)
    except BaseException:
        if isinstance(path, Path):
            remove(made)
        raise  # afar the manifest may have arrived nevertheless: if not, the next save removes the folder


def _write_tensors(
    tensors: dict[str, Any], writer: ShardWriter, processes: Processes, failed: Explain
) -> dict[str, Written]:
    """This process's files, complete and on the disk."""
    with ExitStack() as stack:
        # the checksums of the files are enough: those that torch computes of each tensor take longer
        stack.enter_context(without_record_checksums())
        if processes.is_alone:  # a model that no run has begun with: DCP warns that it saves without processes
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        try:
            dcp.save(tensors, storage_writer=writer, process_group=processes.group)
        except CheckpointException as error:
            raise failed(failures_of(error)) from error
    return writer.written


def _finish(
    rest: Mapping[str, Any],
    made: AnyPath,
    path: AnyPath,
    save_id: str,
    everyones: Sequence[Mapping[str, Written]],
    by: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
) -> None:
    with (made / manifest.REST).open("wb") as stream:
        torch.save({**rest, SAVE_ID: save_id}, stream)
    if isinstance(made, Path):
        for small in (manifest.REST, manifest.METADATA):
            synchronize(made / small)
    files = {small: manifest.finished(made / small) for small in (manifest.REST, manifest.METADATA)}
    _require_all(made, everyones)
    for written in everyones:
        files |= written
    said = Manifest(save_id, files, manifest.writer(**by), models)
    if isinstance(made, Path) and isinstance(path, Path):
        said.write(made)
        synchronize(made)
        put_in_place(made, path)
        remove_leftovers(path)
    else:
        replace(said, folder=made.name).write(path)
        with suppress(Exception):  # what was saved stands
            for entry in [entry for entry in path.iterdir() if entry.name.startswith(manifest.FOLDER)]:
                if entry.name != made.name:
                    remove(entry)


def _require_all(made: AnyPath, everyones: Sequence[Mapping[str, Written]]) -> None:
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
        raise FileNotFoundError(
            f"rank 0 does not see {', '.join(lacking[:5])} of {len(lacking)} files in {made.parent}. Is it a disk of"
            " one node? Save to a file system that all nodes share, or with save_distributed_checkpoint=False"
        )
