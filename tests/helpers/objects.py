"""An object store for tests, ``objects:///...``: files of this machine's, for fsspec a protocol like ``s3://``.

As in an object store an object is there when all of it is, folders are made by what is in them, and a name cannot be
changed: moving is copying.
"""

from __future__ import annotations

import os
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Objects(LocalFileSystem):  # type: ignore[misc]
    """Files under ``objects://``; a write to a path with "denied" in it is refused."""

    protocol = "objects"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "auto_mkdir": True})

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        stripped: str = LocalFileSystem._strip_protocol(os.fspath(path).removeprefix("objects://"))
        return stripped

    def unstrip_protocol(self, name: str) -> str:
        return f"objects://{self._strip_protocol(name)}"

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **options: Any) -> Any:
        if "w" in mode and "denied" in path:
            raise PermissionError(13, "Access Denied", path)
        options["autocommit"] = False if "w" in mode else options.get("autocommit", True)
        opened = super()._open(path, mode, block_size, **options)
        if "w" in mode and not self._intrans:
            opened = _Uploaded(opened)
        return opened

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self.cp_file(path1, path2)
        self.rm_file(path1)

    mv_file = rename = mv


class _Uploaded:
    """A file that is there once it is closed without an error."""

    def __init__(self, opened: Any) -> None:
        self.opened = opened

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opened, name)

    def __enter__(self) -> Any:
        self.opened.__enter__()
        return self

    def __exit__(self, kind: Any, *others: Any) -> None:
        self.opened.__exit__(kind, *others)
        if kind is None:
            self.opened.commit()
        else:
            self.opened.discard()


fsspec.register_implementation("objects", Objects, clobber=True)
