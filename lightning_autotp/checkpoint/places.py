"""Where a checkpoint lies: a path of this machine's, or a place that fsspec knows (``s3://...``, ``gs://...``)."""

import io
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Union

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from torch.distributed.checkpoint.filesystem import FileSystem


@dataclass(frozen=True)
class Status:
    """What is asked of a file: its length."""

    st_size: int


class RemotePath:
    """A place on a file system of fsspec's, with those of :class:`pathlib.Path`'s methods that checkpoints need.

    Args:
        fs: the file system.
        path: the path there.
    """

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self.fs, self._path = fs, path.rstrip("/")

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self._path).name

    @property
    def suffix(self) -> str:
        """The last part's ending, with its dot."""
        return PurePosixPath(self._path).suffix

    @property
    def parent(self) -> "RemotePath":
        """The place that this one is in."""
        return RemotePath(self.fs, self._path.rpartition("/")[0])

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.fs, f"{self._path}/{name}")

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self._path))

    def exists(self) -> bool:
        """Whether there is anything; others' writing is seen."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self._path))

    def is_file(self) -> bool:
        """Whether it is a file."""
        self.fs.invalidate_cache()
        return bool(self.fs.isfile(self._path))

    def is_dir(self) -> bool:
        """Whether there are files in it."""
        self.fs.invalidate_cache()
        return bool(self.fs.isdir(self._path))

    def stat(self) -> Status:
        """The length of a file."""
        return Status(int(self.fs.size(self._path)))

    def iterdir(self) -> "Iterator[RemotePath]":
        """What is in it."""
        self.fs.invalidate_cache()
        for entry in self.fs.ls(self._path, detail=False):
            yield RemotePath(self.fs, entry)

    def open(self, mode: str = "rb") -> IO[Any]:
        """Open a file."""
        stream: IO[Any] = self.fs.open(self._path, mode)
        return stream

    def read_bytes(self) -> bytes:
        """All of a file."""
        content: bytes = self.fs.cat_file(self._path)
        return content

    def write_text(self, text: str) -> None:
        """Make a file, all of it at once."""
        self.fs.pipe_file(self._path, text.encode())

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Make a directory, where there are any."""
        self.fs.makedirs(self._path, exist_ok=exist_ok)

    def rename(self, other: "RemotePath") -> None:
        """Give a file another name; file systems without names that can change copy it."""
        self.fs.mv(self._path, other._path)

    def unlink(self) -> None:
        """Remove a file."""
        self.fs.rm_file(self._path)

    def remove(self) -> None:
        """Remove it and all that is in it, if it is there."""
        with suppress(FileNotFoundError):
            if self.exists():
                self.fs.rm(self._path, recursive=True)


AnyPath = Union[Path, RemotePath]


class Files(FileSystem):
    """What DCP asks of a file system, of places of any kind."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with path.open(mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        path.rename(new_path)

    def mkdir(self, path: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rm_file(self, path: Any) -> None:
        path.unlink()


def place_of(path: Union[str, "os.PathLike[str]", RemotePath]) -> AnyPath:
    """The place that ``path``, a path or a URL, names.

    Raises:
        ValueError: if it is a URL that ``pathlib`` has broken, or of a protocol that fsspec does not know.
        ImportError: if the package for its protocol is missing; with its name.
    """
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    if not isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", text):
        raise ValueError(f"{text} was a URL before pathlib.Path took it for a path; give it as a string.")
    if "://" not in text:
        return Path(text)
    fs, inside = url_to_fs(text)
    return Path(inside) if type(fs) is LocalFileSystem else RemotePath(fs, inside)


def try_to_write(path: Union[str, "os.PathLike[str]"], processes: int) -> None:
    """Find out whether checkpoints can be written in a place that is not this machine's; local ones are not looked at.

    Raises:
        ValueError: if not; with the place and the reason.
    """
    try:
        place = place_of(path)
        if isinstance(place, Path):
            return
        probe = place / f".autotp-tmp-{uuid.uuid4().hex}"
        place.mkdir()
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # each file system has its own
        raise ValueError(
            f"{path}: checkpoints cannot be written there ({type(error).__name__}: {error}). Give ModelCheckpoint a"
            " `dirpath`, or the Trainer a `default_root_dir`, that this process may write to."
        ) from error
    if isinstance(place.fs, MemoryFileSystem) and processes > 1:
        raise ValueError(
            f"{path}: this is the memory of each process by itself, and the {processes} processes of this run could not"
            " read one another's files; write checkpoints to a place that all of them see."
        )
