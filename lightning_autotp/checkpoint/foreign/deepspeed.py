"""Checkpoints of DeepSpeed: AutoTP's, ZeRO's and universal ones, opened as if they were ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from lightning_autotp.checkpoint.foreign.deepspeed_files import ZERO, Files, files_of, load, load_dict
from lightning_autotp.checkpoint.foreign.deepspeed_zero import Fragments, fragments_of
from lightning_autotp.checkpoint.foreign.merge import Merge, MergeError, Merger
from lightning_autotp.checkpoint.places import AnyPath
from lightning_autotp.checkpoint.tensors import MODEL, Checkpoint, Tensors
from lightning_autotp.layout.layout import Layout

LayoutsFor = Callable[[int, Sequence[str]], Mapping[str, Layout]]
"""How the target model's plan cuts for so many ranks, by DeepSpeed's names, which it is given."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LIGHTNINGS = ("epoch", "global_step", "loops", "callbacks", "lr_schedulers", "hyper_parameters", "hparams_name")
_VERSION = "pytorch-lightning_version"


@dataclass(frozen=True)
class _Parts:
    """One tensor as its ranks hold it: shapes of the parts, and how to read them."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    read: Callable[[], list[Tensor]]


def open_deepspeed(
    path: AnyPath, *, unsafe: bool = False, layouts_for: Optional[LayoutsFor] = None, first_replica: bool = False
) -> Checkpoint:
    """Open a directory that DeepSpeed's ``engine.save_checkpoint`` or its ``ds_to_universal.py`` has written.

    Tensors are merged when they are asked for, those of one name at a time.

    Args:
        path: the directory, or that of one save in it.
        unsafe: whether to load what is neither tensors nor plain containers.
        layouts_for: the plan of the target model, for what does not say how it was cut.
        first_replica: whether to take the first rank's where ranks should hold alike and do not.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged or could run code, or if nobody can say how a parameter is merged.
    """
    files = files_of(path)
    held = {pair: load_dict(file, unsafe, "module") for pair, file in files.models.items()}
    first, tp = held[0, 0], files.tp_size
    names = [name for name, value in first["module"].items() if isinstance(value, Tensor)]
    info = first.get("universal_checkpoint_info") or {}
    layouts = layouts_for(tp, names) if layouts_for is not None and tp > 1 else {}
    merger = Merger(info, layouts, first_replica)
    weights, states, notes = _sources(files, held, unsafe)
    shared = first.get("shared_params") or {}
    merged: dict[str, tuple[_Parts, Merge, str]] = {}

    def add(key: str, name: str, parts: _Parts, entry: str, is_buffer: bool) -> None:
        try:
            merge = merger.buffer(parts.shapes) if is_buffer else merger.merge(name, parts.shapes)
        except MergeError as error:
            raise _explained(files.folder, name, first, error) from None
        merged[key] = parts, merge, entry

    buffers = set(first.get("buffer_names") or ())
    for name in names:
        parts = weights.get(name) or weights.get(shared.get(name, name)) or _of_module(held, name, tp)
        add(MODEL + name, shared.get(name, name), parts, "", name in buffers)
    for name, entries in states.items():
        for entry, parts in entries.items():
            add(f"optimizers.0.{name}.{entry}", name, parts, entry, not parts.shapes[0])

    def read(key: str) -> Tensor:
        parts, merge, entry = merged[key]
        try:
            return merge.join(parts.read(), entry)
        except MergeError as error:
            raise _explained(files.folder, key, first, error) from None

    shapes = {key: torch.empty(m.shape, dtype=p.dtype, device="meta") for key, (p, m, _) in merged.items()}
    rest = _rest(first)
    if states:
        groups = _groups(files, first, unsafe)
        rest["optimizer_states"] = [
            {"state": {n: dict.fromkeys(entries) for n, entries in states.items()}, "param_groups": groups}
        ]
    return Checkpoint(path, rest, Tensors(shapes, read), (), None, _writer(first, files), tuple(notes))


_Found = tuple[dict[str, _Parts], dict[str, dict[str, _Parts]], list[str]]


def _sources(files: Files, held: Mapping[tuple[int, int], Mapping[str, Any]], unsafe: bool) -> _Found:
    """fp32 weights and optimizer states by name, as far as they lie in other files than the model's; and notes."""
    if (files.folder / ZERO).is_dir():
        return _universal(files.folder / ZERO, held, unsafe)
    if files.optimizers:
        found = fragments_of(files, held, unsafe)
        weights = {name: _of_fragments(found, name, "fp32", files.tp_size) for name in found.names}
        kept = [entry for entry in (*_MOMENTS, "step") if entry in found.entries]
        states = {n: {e: _of_fragments(found, n, e, files.tp_size) for e in kept} for n in found.names}
        return weights, states, []
    if held[0, 0].get("optimizer"):
        return {}, {}, ["the optimizer's state is left out: it numbers parameters, and DeepSpeed recorded no names"]
    return {}, {}, []


def _universal(folder: AnyPath, held: Mapping[tuple[int, int], Mapping[str, Any]], unsafe: bool) -> _Found:
    """What ``ds_to_universal.py`` has merged already."""
    shapes = {n: tuple(s) for group in held[0, 0].get("param_shapes") or () for n, s in group.items()}
    whole = len({tp for tp, _ in held}) == 1
    weights: dict[str, _Parts] = {}
    states: dict[str, dict[str, _Parts]] = {}
    for entry in sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=str):
        for file in sorted((file for file in entry.iterdir() if file.suffix == ".pt"), key=str):
            name = file.name.removesuffix(".pt")
            value = _parameter(file, unsafe)
            is_flat = whole and value.ndim == 1 and entry.name in shapes  # of ZeRO 3
            shape = shapes[entry.name] if is_flat else tuple(value.shape)
            parts = _Parts((shape,), value.dtype, partial(_read_one, file, unsafe, shape))
            if name == "fp32":
                weights[entry.name] = parts
            else:
                states.setdefault(entry.name, {})[name] = parts
    for name, step in _steps(folder, held[0, 0], unsafe).items():
        if name in states:
            states[name].setdefault("step", _Parts(((),), step.dtype, partial(_copies, step)))
    return weights, states, []


def _steps(folder: AnyPath, first: Mapping[str, Any], unsafe: bool) -> dict[str, Tensor]:
    """The number of steps of each parameter, which ZeRO 3's universal checkpoints have for groups only."""
    inner = _settings(folder.parent, unsafe)[1]
    found: dict[str, Tensor] = {}
    for at, group in enumerate(first.get("param_shapes") or ()):
        step = (inner.get("state") or {}).get(at, {}).get("step")
        if step is not None:
            found |= dict.fromkeys(group, torch.as_tensor(step, dtype=torch.float32).reshape(()))
    return found


def _copies(value: Tensor) -> list[Tensor]:
    return [value.clone()]  # optimizers count in place


def _parameter(file: AnyPath, unsafe: bool) -> Tensor:
    held: Any = load(file, unsafe)
    value: Any = held.get("param") if isinstance(held, dict) else held
    return value if isinstance(value, Tensor) else torch.tensor(float(value))


def _read_one(file: AnyPath, unsafe: bool, shape: tuple[int, ...]) -> list[Tensor]:
    return [_parameter(file, unsafe).reshape(shape)]


def _of_fragments(found: Fragments, name: str, entry: str, tp: int) -> _Parts:
    shapes = tuple(() if entry == "step" else found.shape(name, rank) for rank in range(tp))
    return _Parts(shapes, found.dtype(name, entry), lambda: [found.read(name, entry, rank) for rank in range(tp)])


def _of_module(held: Mapping[tuple[int, int], Mapping[str, Any]], name: str, tp: int) -> _Parts:
    values = [held[rank, 0]["module"][name] for rank in range(tp)]
    return _Parts(tuple(tuple(value.shape) for value in values), values[0].dtype, lambda: values)


def _groups(files: Files, first: Mapping[str, Any], unsafe: bool) -> list[dict[str, Any]]:
    """The optimizer's groups, parameters by name: which ones is in the model's file, their settings elsewhere."""
    if (files.folder / ZERO).is_dir():
        held, inner = _settings(files.folder, unsafe)
    else:
        held, inner = _inner(load(files.optimizers[0, 0], unsafe)["optimizer_state_dict"])
    settings = held.get("param_groups") or inner["param_groups"]
    return [{**s, "params": list(shapes)} for s, shapes in zip(settings, first.get("param_shapes") or ())]


def _settings(folder: AnyPath, unsafe: bool) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What a universal checkpoint keeps of the optimizer as a whole."""
    file = folder / ZERO / "optimizer_state.pt"
    return _inner(load(file, unsafe)) if file.is_file() else ({}, {"param_groups": []})


def _inner(held: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The state of ZeRO, and of the optimizer that it is around."""
    return held, held.get("base_optimizer_state") or held.get("optimizer_state_dict") or held


def _rest(first: Mapping[str, Any]) -> dict[str, Any]:
    if _VERSION in first:  # Lightning's DeepSpeedStrategy puts all of its own into the file
        return {name: first[name] for name in (_VERSION, *_LIGHTNINGS) if name in first}
    return {"global_step": int(first.get("global_steps", 0))}


def _writer(first: Mapping[str, Any], files: Files) -> str:
    kind = "universal, " if (files.folder / ZERO).is_dir() else ""
    return f"DeepSpeed {first.get('ds_version', '')} ({kind}tp {files.tp_size}, dp {first.get('dp_world_size', 1)})"


def _explained(folder: AnyPath, name: str, first: Mapping[str, Any], error: MergeError) -> ValueError:
    return ValueError(
        f"{folder}: {name} cannot be merged: {error}. It was written by DeepSpeed {first.get('ds_version', '')}. Ways"
        " out: `lightning-autotp import --model CONFIG`, with `--rules` if it ran with a `partition_config`, takes the"
        " target model's plan; DeepSpeed's `engine.save_16bit_model` writes whole weights."
    )
