"""Reading files without running what is in them: tensors and plain containers, and names from a short list."""

import errno
import io
import pathlib
import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lightning_autotp.checkpoint.places import AnyPath, Files
from lightning_autotp.compat import layout_by_name, stored_piece

SWITCH = "unsafe_checkpoint_load"
"""The config's field that turns all of this off."""

_PATHS: list[Any] = [type(Path())]
"""What hyperparameters may hold beside what torch allows: making a path touches no file."""

_NAMES: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", name): vars(metadata)[name] for name in metadata.__all__},
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): vars(metadata)["_MEM_FORMAT_ENCODING"],
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): stored_piece,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): layout_by_name,
    **{
        (module, name): getattr(pathlib, f"Pure{name}")  # those of another system can be made, too
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}
"""All that may be called in ``.metadata``, beside dtypes."""


class RefusedError(ValueError):
    """A file names something that is neither a tensor nor a plain container, and could run code when it is read."""


class DamagedError(ValueError):
    """A checkpoint's file is not what was written."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is None and module == "torch":
            found = vars(torch).get(name)
            found = found if isinstance(found, torch.dtype) else None
        if found is None:
            raise RefusedError(f"{module}.{name}")
        return found


class Reader(FileSystemReader):
    """DCP's reader of a directory, for a ``.metadata`` that nobody has to trust.

    Args:
        path: the directory.
        unsafe: whether to read ``.metadata`` as torch does, which runs what it says.
    """

    def __init__(self, path: AnyPath, unsafe: bool = False) -> None:
        super().__init__(str(path))
        self.fs, self.path = Files(), path  # type: ignore[assignment]
        self._unsafe = unsafe

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``.

        Raises:
            RefusedError: if it names what is not DCP's, or files outside of the directory.
            DamagedError: if it cannot be read.
        """
        file: AnyPath = self.path / ".metadata"  # type: ignore[operator]
        if self._unsafe:
            return super().read_metadata(*args, **kwargs)
        with file.open("rb") as stream:
            found = _unpickled(stream, file)
        for info in found.storage_data.values():
            _require_inside(info.relative_path, file)
        if found.storage_meta is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def piece(self, index: MetadataIndex) -> Tensor:
        """Read one stored piece of a tensor, without processes; :meth:`set_up_storage_reader` comes before."""
        info = self.storage_data[index]
        file: AnyPath = self.path / info.relative_path
        with file.open("rb") as stream:
            part: Any = self._slice_file(stream, info)
            if info.transform_descriptors:
                item: Any = None  # of no meaning to a transform
                part = io.BytesIO(self.transforms.transform_load_stream(item, info.transform_descriptors, part).read())
            loaded: Tensor = load_plain(part, where=f"{index.fqn} in {file}")
        return loaded


def _unpickled(stream: IO[bytes], file: AnyPath) -> Metadata:
    try:
        found = _Restricted(stream).load()
    except RefusedError as error:
        raise RefusedError(
            f"{file} names {error}, which is no part of a checkpoint's metadata and could run code; nothing of it was"
            f" run. If you trust the file, set `{SWITCH}=True`."
        ) from None
    except Exception as error:  # damaged pickles raise anything
        raise DamagedError(f"{file} is damaged ({type(error).__name__}: {error}); load another checkpoint.") from error
    well_formed = (
        isinstance(found, Metadata)
        and isinstance(found.state_dict_metadata, dict)
        and isinstance(found.storage_data, dict)
        and all(isinstance(info, stored_piece) for info in found.storage_data.values())
    )
    if not well_formed:
        raise DamagedError(f"{file} holds no metadata of torch.distributed.checkpoint; load another checkpoint.")
    return found


def _require_inside(relative: Any, file: AnyPath) -> None:
    """Refuse the path of a shard that leaves the directory of ``file``."""
    path = PurePosixPath(relative) if isinstance(relative, str) else PurePosixPath("..")
    if path.is_absolute() or ".." in path.parts or "\\" in str(relative) or ":" in str(relative) or not path.parts:
        raise RefusedError(
            f"{file} names a file outside of its directory, {relative!r}; a checkpoint's files are all inside. Nothing"
            " was read; load another checkpoint."
        )


class Planner(DefaultLoadPlanner):
    """DCP's planner of a load, for values that are no tensors.

    Args:
        unsafe: whether such values may be any object.
    """

    def __init__(self, unsafe: bool = False) -> None:
        super().__init__()
        self._unsafe = unsafe

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value that is no tensor into the state to load."""
        name = read_item.dest_index.fqn
        loaded = load_plain(value, unsafe=self._unsafe, where=f"{name} in the checkpoint")
        plain = io.BytesIO()
        torch.save(loaded, plain)  # what has been found harmless, for a base class that asks nobody
        plain.seek(0)
        super().load_bytes(read_item, plain)


def load_plain(file: Any, *, unsafe: bool = False, where: str = "", mmap: bool = False) -> Any:
    """What ``torch.save`` has written, on the CPU, if it is tensors, plain containers and paths.

    Args:
        file: a path or a stream.
        unsafe: whether it may be any object, and run what it likes.
        where: what to call the file in messages.
        mmap: whether to map tensors instead of reading them.

    Raises:
        RefusedError: if it names anything else; with the name and the ways to load it.
        DamagedError: if it cannot be read.
    """
    return load_with(
        partial(torch.load, file, map_location="cpu", weights_only=not unsafe, mmap=mmap), where or str(file)
    )


def load_with(load: Callable[[], Any], where: str) -> Any:
    """What ``load`` returns, a call that ends in ``torch.load``, with paths allowed and errors explained.

    Raises:
        RefusedError: if torch refused a name; with the name and the ways to load it.
        DamagedError: if it failed in another way.
    """
    try:
        with safe_globals(_PATHS):
            return load()
    except Exception as error:  # damaged files raise anything; invalid arguments come of offsets before their start
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise _explained(error, where) from None


def _explained(error: Exception, where: str) -> Exception:
    """An error of ``torch.load`` in a sentence that names the file and what to do."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"add_safe_globals\(\[([\w.]+)\]\)", str(error))
    if isinstance(error, pickle.UnpicklingError) and found is not None:
        name = found[1]
        return RefusedError(
            f"{where} holds {name}, which is neither a tensor nor a plain container and could run code; nothing of it"
            f" was run. If you trust the file, allow the class with `torch.serialization.add_safe_globals([{name}])`,"
            f" or everything in it with `{SWITCH}=True` (an argument of AutoTPStrategy)."
        )
    # torch begins with advice to load it in the unsafe way
    text = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
    text = (text.splitlines() or [""])[0].rstrip(". ")
    return DamagedError(
        f"{where} is truncated or damaged ({type(error).__name__}: {text}); load another checkpoint, or copy the file"
        " again."
    )


def plain(value: Any) -> Any:
    """``value`` with plain types in place of their look-alikes: NumPy's numbers, Lightning's dicts."""
    if isinstance(value, Mapping):
        if type(value) is not dict and not type(value).__module__.startswith("lightning."):
            return value  # its class may mean something
        return {plain(key): plain(of_key) for key, of_key in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return value


_named: set[str] = set()


def name_what_is_refused(checkpoint: Mapping[str, Any], path: AnyPath, *, paths: bool) -> None:
    """Warn, once, of what in ``checkpoint`` will be refused when it is loaded; called before it is written.

    Args:
        checkpoint: what is about to be written; its tensors are not looked at.
        path: where to.
        paths: whether the reader knows paths (:func:`load_plain` does, a plain Trainer does not).
    """
    buffer = io.BytesIO()
    torch.save(_without_tensors(dict(checkpoint)), buffer)
    buffer.seek(0)
    with safe_globals(_PATHS if paths else []):
        refused = sorted(set(get_unsafe_globals_in_checkpoint(buffer)) - _named)
    if refused:
        _named.update(refused)
        rank_zero_warn(
            f"{path}: this checkpoint holds {', '.join(refused)}, which loading refuses unless told otherwise, because"
            " such things could run code. Keep tensors, numbers, strings, lists and dicts in hyperparameters and in the"
            " state of callbacks; or load it with"
            f" `torch.serialization.add_safe_globals([{refused[0]}])`, or with `{SWITCH}=True`."
        )


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None
    if type(value) is dict:
        return {key: _without_tensors(of_key) for key, of_key in value.items()}
    if type(value) in (list, tuple):
        return [_without_tensors(entry) for entry in value]
    return value
