"""A Hugging Face directory (config, safetensors, adapters) from full tensors that come one at a time."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from lightning_autotp.checkpoint.hf_record import Record
from lightning_autotp.checkpoint.hf_twin import Piece, adapted_twin, adapter_names, merged, pieces_of, twin_of
from lightning_autotp.checkpoint.publish import beside, put_in_place, remove, remove_leftovers, synchronize
from lightning_autotp.checkpoint.safetensors_files import SafetensorsFiles
from lightning_autotp.checkpoint.tensors import Tensors

SHARD_SIZE = 5 * 10**9
"""Bytes a file, unless the user says otherwise."""

_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json"),
)

Progress = Callable[[int], None]
"""Called with the bytes that were written since the last call."""


def chosen(records: Sequence[Record], submodule: Optional[str], where: str) -> Record:
    """The one model to write.

    Raises:
        ValueError: if there is none, or none of that name, or several and none was named.
    """
    paths = ", ".join(repr(record["path"]) for record in records)
    if not records:
        raise ValueError(
            f"{where} says nothing of a Hugging Face model: its module has none, or it was written by version 0.1.0;"
            " give the directory of the model's config.json (`--config`) and where it is in the module"
            " (`--submodule`)."
        )
    if submodule is not None:
        records = [record for record in records if record["path"] == submodule]
        if not records:
            raise ValueError(f"{where} has no Hugging Face model at {submodule!r}; there are {paths}.")
    if len(records) > 1:
        raise ValueError(f"{where} has several Hugging Face models, at {paths}; choose one (`--submodule`).")
    return records[0]


def write_model(
    record: Record,
    tensors: Tensors,
    directory: Path,
    *,
    merge: bool = False,
    shard_size: int = SHARD_SIZE,
    tokenizer: Iterable[Path] = (),
    writes: bool = True,
    progress: Progress = lambda count: None,
) -> None:
    """Write one model as its own ``save_pretrained`` does: an adapter alone, unless it is to be merged.

    Nothing is at ``directory`` before all of it is written; files of the same names that are there are replaced.

    Args:
        record: what is known of the model.
        tensors: those of the whole module that ``record["path"]`` is a path in.
        directory: where to write.
        merge: whether to merge a PEFT model's adapter into its base, and write that.
        shard_size: bytes a file.
        tokenizer: directories in which tokenizer files may lie; the first that has some gives them.
        writes: whether this process writes; others only read along.
        progress: hears of the bytes written.

    Raises:
        ValueError: if the checkpoint lacks weights of the model.
    """
    own = tensors.under(f"{record['path']}." if record["path"] else "")
    made = beside(directory)
    try:
        if writes:
            made.mkdir(parents=True)
        if record["adapters"] and not merge:
            _write_adapters(record, own, made, writes, progress)
        else:
            _write_full(record, own, made, merge, shard_size, writes, progress)
        if writes:
            _copy_tokenizer(tokenizer, made)
            _publish(made, directory)
            remove_leftovers(directory)
    except BaseException:
        if writes:
            remove(made)
        raise


def total_bytes(record: Record, tensors: Tensors) -> int:
    """The bytes of a model's tensors, for a progress bar."""
    return sum(shape.nbytes for shape in tensors.under(f"{record['path']}." if record["path"] else "").shapes.values())


def _write_full(
    record: Record, own: Tensors, made: Path, merge: bool, shard_size: int, writes: bool, progress: Progress
) -> None:
    twin = twin_of(record)
    if record["adapters"]:
        base = twin_of(record)
        if base is None:
            raise ValueError(f"{record['class']} is no class of transformers: its adapters cannot be merged from here.")
        adapted = adapted_twin(record, base)
        own = merged(adapted, record["inner"], own)
    names = _saved_names(record, own, twin)
    pieces: list[tuple[Piece, dict[str, Tensor]]] = []
    for piece in pieces_of(twin, names):
        pieces.append((piece, piece.make({name: own.shapes[name] for name in piece.names})))
    shapes = {name: shape for _, out in pieces for name, shape in out.items()}
    if writes:
        _write_configs(record, shapes, made)
    files = SafetensorsFiles(made, shapes, shard_size) if writes else None
    _stream([piece for piece, _ in pieces], own, files, progress)


def _stream(pieces: Iterable[Piece], own: Tensors, files: Optional[SafetensorsFiles], progress: Progress) -> None:
    """Read all pieces, as all processes do in one order, and write them where there are files to write to."""
    failed: Optional[Exception] = None
    for piece in pieces:
        read = {name: own.read(name) for name in piece.names}
        if files is None or failed is not None:
            continue
        try:
            for name, tensor in piece.make(read).items():
                files.write(name, tensor)
                progress(tensor.nbytes)
        except Exception as error:  # the others wait for this process to read along
            failed = error
    if failed is not None:
        raise failed
    if files is not None:
        files.finish()


def _saved_names(record: Record, own: Tensors, twin: Any) -> list[str]:
    """The names to write: one for tied weights, as transformers chooses it, and none that it never saves."""
    inner = f"{record['inner']}." if record["inner"] else ""
    group_of: dict[str, str] = {}
    for later, first in record["tied"].items():
        later, first = later.removeprefix(inner), first.removeprefix(inner)
        group_of |= {later: first, first: first}
    targets = getattr(twin, "all_tied_weights_keys", None) or {}
    dropped = {t for t, s in targets.items() if t in group_of and group_of.get(s) == group_of[t]}
    dropped |= {name for name, first in group_of.items() if name != first and first not in dropped}
    ignored = set(getattr(twin, "_keys_to_ignore_on_save", None) or ())
    if twin is not None:
        wanted = [n for n in twin.state_dict() if n not in ignored]
        lacking = [n for n in wanted if n not in own.shapes and n not in targets]
        if lacking:
            raise ValueError(
                f"the checkpoint lacks {len(lacking)} weights of {record['class']}, {', '.join(lacking[:3])} among"
                " them. Was it saved with exclude_frozen_parameters? Then it holds what was trained only."
            )
    return [name for name in own.shapes if name not in dropped and name not in ignored]


def _write_configs(record: Record, shapes: Mapping[str, Tensor], made: Path) -> None:
    floating = next((shape.dtype for shape in shapes.values() if shape.is_floating_point()), torch.float32)
    config = {**record["config"], "model_type": record["model_type"], "architectures": [record["class"]]}
    config["dtype"] = str(floating).removeprefix("torch.")
    _write_json(config, made / "config.json")
    if record["generation_config"] is not None:
        _write_json(record["generation_config"], made / "generation_config.json")


def _write_adapters(record: Record, own: Tensors, made: Path, writes: bool, progress: Progress) -> None:
    base = twin_of(record)
    if base is None:
        raise ValueError(f"{record['class']} is no class of transformers: its adapters cannot be written from here.")
    for adapter in record["adapters"]:
        if Path(adapter).name != adapter:
            raise ValueError(f"{adapter!r} is no name of an adapter: it would be written outside of the directory.")
    twin = adapted_twin(record, base)
    for adapter, settings in record["adapters"].items():
        written = adapter_names(twin, adapter, own.shapes)
        folder = made if adapter == "default" else made / adapter
        if writes:
            folder.mkdir(exist_ok=True)
            _write_json({**settings, "inference_mode": True}, folder / "adapter_config.json")
        shapes = {name: own.shapes[source] for name, source in written.items()}
        files = SafetensorsFiles(folder, shapes, 1 << 62, "adapter_model") if writes else None
        pieces = [Piece((source,), partial(_renamed, name)) for name, source in written.items()]
        _stream(pieces, own, files, progress)


def _renamed(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    (tensor,) = tensors.values()
    return {name: tensor}


def _write_json(value: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    synchronize(path)


def _copy_tokenizer(folders: Iterable[Path], made: Path) -> None:
    for folder in folders:
        found = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
        if found:
            for file in found:
                shutil.copyfile(file, made / file.name)
            return


def _publish(made: Path, directory: Path) -> None:
    synchronize(made)
    if not directory.is_dir() or directory.is_symlink() or not any(directory.iterdir()):
        put_in_place(made, directory)
        return
    old = [*directory.glob("model*.safetensors"), *directory.glob("model.safetensors.index.json")]
    if (made / "config.json").exists():
        for file in old:  # or an index of an earlier model would be read with the files of this one
            file.unlink()
    for entry in made.iterdir():
        if entry.is_dir():
            remove(directory / entry.name)
        entry.replace(directory / entry.name)
    synchronize(directory)
    remove(made)
