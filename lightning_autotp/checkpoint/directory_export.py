"""A checkpoint directory of ours from any checkpoint that can be opened, without processes."""

import pickle
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_autotp.checkpoint import keys, manifest
from lightning_autotp.checkpoint.hf_record import Record
from lightning_autotp.checkpoint.manifest import SAVE_ID, Manifest
from lightning_autotp.checkpoint.publish import beside, put_in_place, remove, remove_leftovers, synchronize
from lightning_autotp.checkpoint.safe_load import plain
from lightning_autotp.checkpoint.shard_files import ShardWriter
from lightning_autotp.checkpoint.tensors import Checkpoint
from lightning_autotp.compat import stored_piece

_SHARD = "__0_0.distcp"


def write_directory(
    found: Checkpoint,
    path: Path,
    models: Sequence[Record] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write ``found`` as a run would save it; one tensor is in memory at a time.

    It is written beside ``path`` and takes its place when it is whole.

    Args:
        found: an opened checkpoint whose optimizers' parameters are by name.
        path: the directory to make.
        models: what to record of the Hugging Face models in it.
        progress: called with the number of bytes after each tensor.
    """
    made, save_id = beside(path), uuid.uuid4().hex
    made.mkdir(parents=True)
    try:
        writer = ShardWriter(made, save_id)
        with writer.fs.create_stream(made / _SHARD, "wb") as stream:
            metadata = _written(found, stream, progress)
        (made / manifest.METADATA).write_bytes(pickle.dumps(metadata))
        torch.save({**plain(dict(found.rest)), SAVE_ID: save_id}, made / manifest.REST)
        files = writer.written
        for small in (manifest.REST, manifest.METADATA):
            synchronize(made / small)
            files[small] = manifest.finished(made / small)
        imported = f"{found.path.name} of {found.writer}" if found.writer else found.path.name
        written_by = manifest.writer(processes=1, autotp_size=1, imported_from=imported)
        Manifest(save_id, files, written_by, list(models)).write(made)
        synchronize(made)
        put_in_place(made, path)
    except BaseException:
        remove(made)
        raise
    remove_leftovers(path)


def _written(found: Checkpoint, stream: Any, progress: Callable[[int], None]) -> Metadata:
    """DCP's metadata of what is now in ``stream``, in the form of its ``FileSystemWriter``."""
    stored: dict[str, Any] = {}
    pieces: dict[MetadataIndex, Any] = {}
    places: dict[str, tuple[Any, ...]] = {}

    def write(place: tuple[Any, ...], value: Any) -> None:
        key, offset = ".".join(map(str, place)), None
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            if value.untyped_storage().nbytes() != value.nbytes:
                value = value.clone()  # or all of what it is a view of would be written
            offset, properties = torch.Size([0] * value.ndim), TensorProperties.create_from_tensor(value)
            stored[key] = TensorStorageMetadata(properties, value.size(), [ChunkStorageMetadata(offset, value.size())])
            progress(value.nbytes)
        else:
            stored[key] = BytesStorageMetadata()
        start = stream.tell()
        torch.save(value, stream)
        pieces[MetadataIndex(key, offset)] = stored_piece(_SHARD, start, stream.tell() - start)
        places[key] = place

    model, read = found.model, found.tensors.read
    for name in model.shapes:
        write((keys.MODEL, name), model.read(name))
    for at, skeleton in enumerate(found.rest.get("optimizer_states", [])):
        for name, entries in skeleton.get("state", {}).items():
            for entry, value in entries.items():
                of_entry = f"optimizers.{at}.{name}.{entry}"
                write(
                    (keys.optimizer(at), "state", name, entry),
                    read(of_entry) if of_entry in found.tensors.shapes else value,
                )
        write((keys.optimizer(at), keys.GROUPS), skeleton.get("param_groups", []))
    return Metadata(stored, places, pieces)
