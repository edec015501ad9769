"""Directories of others in the form of ``torch.distributed.checkpoint``: Lightning's strategies, loops of one's own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from lightning_autotp.checkpoint import manifest
from lightning_autotp.checkpoint.foreign.names import listed
from lightning_autotp.checkpoint.manifest import rest_of
from lightning_autotp.checkpoint.places import AnyPath
from lightning_autotp.checkpoint.safe_load import Reader
from lightning_autotp.checkpoint.tensors import MODEL, Checkpoint, Tensors, joined

Path_ = tuple[Any, ...]
"""Where a value lies in the nested state that was saved."""

_STATE, _GROUPS = "state", "param_groups"
_MODEL_NAMES = ("model", "state_dict", "model_state_dict", "module")


@dataclass
class _Optimizer:
    """Where an optimizer's values are: keys by entry, of parameters by name and of groups by number."""

    state: dict[str, dict[str, str]] = field(default_factory=dict)
    groups: dict[int, dict[str, str]] = field(default_factory=dict)


def is_dcp(path: AnyPath) -> bool:
    """Whether ``path`` is a directory of torch's distributed checkpoint."""
    return (path / manifest.METADATA).is_file()


def is_ours(path: AnyPath, unsafe: bool = False) -> bool:
    """Whether this package wrote the directory, complete or not; or Lightning did, as version 0.1.0 would have."""
    if (path / manifest.NAME).is_file():
        return True
    if not is_dcp(path):
        has_folders = any(entry.name.startswith(manifest.FOLDER) for entry in path.iterdir())
        return has_folders or (path / manifest.REST).is_file()
    if not (path / manifest.REST).is_file():
        return False
    keys = Reader(path, unsafe).read_metadata().state_dict_metadata
    return all(key.startswith((MODEL, "optimizers.")) for key in keys)


def open_dcp(path: AnyPath, *, unsafe: bool = False) -> Checkpoint:
    """Open such a directory, without processes; tensors are read when they are asked for.

    Raises:
        FileNotFoundError: if a file that it names is missing.
        ValueError: if a file is damaged or could run code, or if nobody can tell the model in it from other things.
    """
    reader = Reader(path, unsafe)
    metadata = reader.read_metadata()
    manifest.check_lengths(path, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    stored, where = metadata.state_dict_metadata, _where(metadata)
    optimizers, others = _optimizers(where)
    pieces = {key: at for key, at in stored.items() if isinstance(at, TensorStorageMetadata)}
    tensors = {key: at for key, at in others.items() if key in pieces}
    root = _model_root(tensors, path)
    keys = {MODEL + _name(at[len(root) :]): key for key, at in tensors.items() if at[: len(root)] == root}
    skeletons, notes = [_skeleton(found, reader, stored) for found in optimizers], []
    if any(isinstance(p, int) for s in skeletons for group in s["param_groups"] for p in group.get("params", ())):
        skeletons, optimizers = [], []
        notes.append("the optimizer's state is left out: it numbers parameters, and no names were recorded")
    for at, found in enumerate(optimizers):
        for name, entries in found.state.items():
            keys |= {f"optimizers.{at}.{name}.{entry}": key for entry, key in entries.items() if key in pieces}
    rest: dict[str, Any] = {}
    if (path / manifest.REST).is_file():
        rest |= rest_of(path, None, unsafe)
    if skeletons:
        rest["optimizer_states"] = skeletons
    left = sorted(set(others) - set(keys.values()))
    if left:
        notes.append(f"left out, being neither the model's nor an optimizer's: {listed(left)}")
    shapes = {name: _shape(pieces[key]) for name, key in keys.items()}
    return Checkpoint(
        path,
        rest,
        Tensors(shapes, lambda name: joined(reader, keys[name], pieces[keys[name]])),
        (),
        None,
        writer=_writer(path, root, optimizers),
        notes=tuple(notes),
    )


def _where(metadata: Metadata) -> dict[str, Path_]:
    """Each key's place in the state that was saved; of writers that do not say so, the key itself."""
    places: Mapping[str, Any] = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    return {key: tuple(places.get(key, (key,))) for key in metadata.state_dict_metadata}


def _optimizers(where: Mapping[str, Path_]) -> tuple[list[_Optimizer], dict[str, Path_]]:
    """The optimizers, in the order of their names, and what belongs to none of them."""
    roots = sorted({at[: at.index(_GROUPS)] for at in where.values() if _GROUPS in at[1:]}, key=_natural)
    found = {root: _Optimizer() for root in roots}
    others = {}
    for key, at in where.items():
        root = next((root for root in roots if at[: len(root)] == root), None)
        own = at[len(root or ()) :]
        if root is None:
            others[key] = at
        elif own[0] == _STATE and len(own) > 2:
            found[root].state.setdefault(str(own[1]), {})[_name(own[2:])] = key
        elif own[0] == _GROUPS and len(own) > 2:
            found[root].groups.setdefault(int(own[1]), {})[_name(own[2:])] = key
    return list(found.values()), others


def _skeleton(found: _Optimizer, reader: Reader, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's ``state_dict`` with None for tensors of parameters, which are by name."""

    def value(key: str) -> Any:
        at = stored[key]
        return reader.piece(MetadataIndex(key)) if isinstance(at, BytesStorageMetadata) else joined(reader, key, at)

    def entry(key: str) -> Any:
        return None if isinstance(stored[key], TensorStorageMetadata) else value(key)

    return {
        "state": {name: {e: entry(key) for e, key in entries.items()} for name, entries in found.state.items()},
        "param_groups": [{e: value(key) for e, key in found.groups[n].items()} for n in sorted(found.groups)],
    }


def _model_root(tensors: Mapping[str, Path_], path: AnyPath) -> Path_:
    """The place under which the model is."""
    if not tensors:
        raise ValueError(f"{path} holds no tensors of a model.")
    firsts = {at[:1] for at in tensors.values()}
    if any(len(at) == 1 for at in tensors.values()) and len(firsts) > 1:
        return ()  # the model's own names, with nothing around them
    if len(firsts) > 1:
        known = [first for first in sorted(firsts, key=_natural) if first[0] in _MODEL_NAMES]
        if len(known) != 1:
            raise ValueError(
                f"{path} holds tensors under {listed([str(first[0]) for first in sorted(firsts, key=_natural)])}, and"
                f" does not say which of them are the model. Save it again with the model under {_MODEL_NAMES[0]!r}."
            )
        firsts = set(known)
    (root,) = firsts
    inside = {at[1:2] for at in tensors.values() if at[:1] == root}
    # an application's own object around model and optimizer, as {"app": {"model": ..., "optim": ...}}
    named = [name for (name,) in (first for first in inside if first) if name in _MODEL_NAMES]
    return (*root, named[0]) if len(named) == 1 and len(inside) == 1 else root


def _shape(stored: TensorStorageMetadata) -> Tensor:
    return torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")


def _name(place: Iterable[Any]) -> str:
    return ".".join(map(str, place))


def _natural(place: Path_) -> tuple[Any, ...]:
    """Sorts ``optimizer_10`` behind ``optimizer_9``."""
    return tuple((len(str(part)), str(part)) for part in place)


def _writer(path: AnyPath, root: Path_, optimizers: list[_Optimizer]) -> str:
    if not (path / manifest.REST).is_file():
        return "torch.distributed.checkpoint"
    return "Lightning's FSDPStrategy" if root == ("model",) else "Lightning's ModelParallelStrategy"
