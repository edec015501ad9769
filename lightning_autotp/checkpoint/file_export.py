"""One ordinary Lightning file from a checkpoint directory, for a plain Trainer to resume."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_autotp.checkpoint.manifest import SAVE_ID
from lightning_autotp.checkpoint.other_states import key_of, put_back, said, saying
from lightning_autotp.checkpoint.publish import beside, remove, write_in_place
from lightning_autotp.checkpoint.safe_load import plain
from lightning_autotp.checkpoint.tensors import MODEL, RECORD, Checkpoint

_SMALL = 1 << 20


def write_file(found: Checkpoint, file: Path, progress: Callable[[int], None] = lambda count: None) -> None:
    """Write what a plain Trainer would have saved, the optimizers' state with it.

    Tensors wait in files beside ``file``, so that no more than one is in memory and twice the space is needed.

    Raises:
        ValueError: if ``found`` is a file already.
    """
    if found.path.is_file():
        raise ValueError(f"{found.path} is an ordinary file already.")
    folder = beside(file)
    folder.mkdir(parents=True)

    def read(name: str) -> Tensor:
        kept = _kept(found.tensors.read(name), folder)
        progress(kept.nbytes)
        return kept

    try:
        rest = {name: value for name, value in found.rest.items() if name != SAVE_ID}
        state = {name.removeprefix(MODEL): read(name) for name in found.tensors.shapes if name.startswith(MODEL)}
        made: dict[str, Any] = {**rest, "state_dict": state}
        if "optimizer_states" in rest:
            made["optimizer_states"] = [
                _numbered(skeleton, partial(_entry, f"optimizers.{at}.", found.tensors.shapes, read))
                for at, skeleton in enumerate(rest["optimizer_states"])
            ]
        others = {path: {name: read(key_of(path, name)) for name in names} for path, names in said(rest).items()}
        made = saying(put_back(made, others), said(rest))
        if found.models:
            made[RECORD] = list(found.models)
        write_in_place(file, partial(torch.save, plain(made)))
    finally:
        remove(folder)


def _entry(prefix: str, known: Mapping[str, Any], read: Callable[[str], Tensor], name: str, value: Any) -> Any:
    return read(prefix + name) if prefix + name in known else value


def _numbered(skeleton: Mapping[str, Any], entry: Callable[[str, Any], Any]) -> dict[str, Any]:
    """An optimizer's ``state_dict``, its parameters numbered in the order of its groups."""
    if "state" not in skeleton:
        return dict(skeleton)
    names = [name for group in skeleton["param_groups"] for name in group["params"]]
    number = {name: at for at, name in enumerate(names)}
    return {
        **skeleton,
        "state": {
            number[name]: {key: entry(f"{name}.{key}", value) for key, value in entries.items()}
            for name, entries in skeleton["state"].items()
        },
        "param_groups": [{**g, "params": [number[name] for name in g["params"]]} for g in skeleton["param_groups"]],
    }


def _kept(tensor: Tensor, folder: Path) -> Tensor:
    """A large tensor's values in a file of its own, mapped."""
    if tensor.nbytes < _SMALL:
        return tensor
    file = folder / str(len(list(folder.iterdir())))
    mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)
