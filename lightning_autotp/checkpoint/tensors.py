"""Full tensors, one at a time: of a checkpoint on disk, without processes, or of a model that runs sharded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from lightning_autotp.checkpoint import keys, manifest
from lightning_autotp.checkpoint.hf_record import Record
from lightning_autotp.checkpoint.manifest import Manifest, contents_of, rest_of
from lightning_autotp.checkpoint.other_states import key_of, said
from lightning_autotp.checkpoint.places import AnyPath
from lightning_autotp.checkpoint.safe_load import DamagedError, Reader, load_plain
from lightning_autotp.checkpoint.state_dict import Placement

MODEL = "state_dict."
RECORD = "autotp_models"
"""The entry of a one-file checkpoint with what a directory's manifest says of Hugging Face models."""


@dataclass(frozen=True)
class Tensors:
    """Tensors by name, whose values are read when they are asked for.

    Args:
        shapes: a tensor on the meta device for each name: its shape and dtype.
        read: the tensor of a name, full and on the CPU.
    """

    shapes: Mapping[str, Tensor]
    read: Callable[[str], Tensor]

    def under(self, prefix: str) -> "Tensors":
        """Those whose names begin with ``prefix``, without it."""
        own = {name.removeprefix(prefix): at for name, at in self.shapes.items() if name.startswith(prefix)}
        return Tensors(own, lambda name: self.read(prefix + name))


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Args:
        path: where it is.
        rest: what is no tensor of the model or an optimizer, as Lightning has it; the state of optimizers without
            tensors, its parameters by name in directories.
        tensors: those of the model and, as ``optimizers.AT.NAME.ENTRY``, of optimizers in directories.
        models: what it says of the Hugging Face models in it.
        manifest: what a directory says of itself; None for files, and for directories of version 0.1.0.
        writer: who wrote it, where that was somebody else.
        notes: what of it is not in ``rest`` and ``tensors``.
    """

    path: AnyPath
    rest: Mapping[str, Any]
    tensors: Tensors
    models: tuple[Record, ...]
    manifest: Optional[Manifest]
    writer: str = ""
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> Tensors:
        """The tensors of the model."""
        return self.tensors.under(MODEL)

    def state(self, key: str) -> Tensors:
        """The tensors of the mapping at ``key``, with dots between the keys on the way, as ``current_model_state``.

        Raises:
            ValueError: if there is none; naming those that there are.
        """
        others = {key_of(path)[:-1]: path for path in said(self.rest)}
        if key == MODEL[:-1]:
            return self.model
        if self.path.is_dir() and key in others:
            return self.tensors.under(key_of(others[key]))
        held: Any = self.rest
        for part in others.get(key, (key,)):
            held = held.get(part) if isinstance(held, Mapping) else None
        if not isinstance(held, Mapping) or not any(isinstance(value, Tensor) for value in held.values()):
            known = ", ".join(("state_dict", *others))
            raise ValueError(f"{self.path} has no weights called {key!r}; it has {known}.")
        tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        return Tensors({name: value.to("meta") for name, value in tensors.items()}, tensors.__getitem__)


def open_checkpoint(path: AnyPath, *, unsafe: bool = False, all_bytes: bool = False) -> Checkpoint:
    """Open a checkpoint, a directory or a file, without processes; tensors are read when they are asked for.

    Args:
        path: the checkpoint.
        unsafe: whether to load what is neither tensors nor plain containers.
        all_bytes: whether to compare all checksums first.

    Raises:
        FileNotFoundError: if there is none, or it is not complete.
        ValueError: if a file is damaged, or could run code.
    """
    if path.is_dir():
        return _directory(path, unsafe, all_bytes)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    if all_bytes:
        manifest.check_file(path)
    if isinstance(path, Path):
        held = load_plain(path, unsafe=unsafe, mmap=True)
    else:
        with path.open("rb") as stream:
            held = load_plain(stream, unsafe=unsafe, where=str(path))
    if not isinstance(held, dict) or not isinstance(held.get("state_dict"), dict):
        raise ValueError(f"{path} is not a checkpoint of Lightning: it has no `state_dict`.")
    values = {MODEL + name: value for name, value in held["state_dict"].items() if isinstance(value, Tensor)}
    shapes = {name: value.to("meta") for name, value in values.items()}
    return Checkpoint(path, held, Tensors(shapes, values.__getitem__), tuple(held.get(RECORD, ())), None)


def _directory(path: AnyPath, unsafe: bool, all_bytes: bool) -> Checkpoint:
    inside, found = contents_of(path)
    if found is not None:
        found.check(inside)
        if all_bytes:
            found.check_bytes(inside, found.files)
    reader = Reader(inside, unsafe)
    metadata = reader.read_metadata()
    if found is None:
        manifest.check_lengths(inside, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    known = {key: at for key, at in metadata.state_dict_metadata.items() if isinstance(at, TensorStorageMetadata)}
    key = {keys.called(key): key for key in known}
    stored = {name: known[key[name]] for name in key}
    shapes = {n: torch.empty(at.size, dtype=at.properties.dtype, device="meta") for n, at in stored.items()}
    rest = rest_of(inside, found, unsafe)
    tensors = Tensors(shapes, lambda name: joined(reader, key[name], stored[name]))
    return Checkpoint(path, rest, tensors, () if found is None else tuple(found.models), found)


def joined(reader: Reader, name: str, stored: TensorStorageMetadata) -> Tensor:
    """The full tensor from its pieces."""
    if sum(chunk.sizes.numel() for chunk in stored.chunks) < stored.size.numel():
        raise DamagedError(f"{reader.path}: pieces of {name} are missing; load another checkpoint.")
    if len(stored.chunks) == 1:
        return reader.piece(MetadataIndex(name, stored.chunks[0].offsets))
    full = torch.empty(stored.size, dtype=stored.properties.dtype)
    for chunk in stored.chunks:
        place = full
        for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes)):
            place = place.narrow(dim, start, size)
        place.copy_(reader.piece(MetadataIndex(name, chunk.offsets)))
    return full


def tensors_of(model: nn.Module, placement: Optional[Placement]) -> Tensors:
    """The full tensors of a model of which this rank holds its part; every rank must read the same ones in order.

    Args:
        model: the model.
        placement: where its parts lie; None for a model that is not sharded.
    """
    held = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if placement is None:
        return Tensors({n: t.to("meta") for n, t in held.items()}, lambda name: held[name].cpu())

    def shape_of(name: str, local: Tensor) -> Tensor:
        layout = placement.layout_of(name, local)
        return local.to("meta") if layout is None else torch.empty(layout.shape, dtype=local.dtype, device="meta")

    return Tensors({n: shape_of(n, t) for n, t in held.items()}, lambda name: placement.gather(name, held[name]))
