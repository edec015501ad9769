"""The files of a pretrained model: what they hold, and views of boxes of it."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_autotp.layout.layout import Box

_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16},
    **{"I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
}
"""By safetensors' name for them."""


class Files:
    """The safetensors files of one checkpoint, which stay mapped while they are :meth:`open`."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self.origin = "; ".join(_mark(Path(path)) for path in paths)
        """The same for two copies of the same files, by their names, sizes and headers."""
        self._opened: dict[str, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Files":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": {}}

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...], torch.dtype]]:
        """File, key, shape and dtype of all that the files hold."""
        for path in self.paths:
            opened = self._file(path)
            for key in opened.keys():  # noqa: SIM118 - no mapping
                found = opened.get_slice(key)
                if found.get_dtype() not in _DTYPES:
                    raise ValueError(f"{path}: {key} has dtype {found.get_dtype()}, which cannot be read in parts.")
                yield path, key, tuple(found.get_shape()), _DTYPES[found.get_dtype()]

    def view(self, path: str, key: str, box: Box) -> Tensor:
        """A view of the file that must not be written to."""
        stored = self._file(path).get_slice(key)
        found: Tensor = stored[tuple(slice(start, start + size) for start, size in zip(box.offset, box.size)) or ...]
        return found

    def _file(self, path: str) -> Any:
        from safetensors import safe_open

        if path not in self._opened:
            self._opened[path] = safe_open(path, framework="pt", device="cpu")
        return self._opened[path]

    def close(self) -> None:
        """Let go of the mappings; they come back when something is read."""
        self._opened.clear()


def _mark(path: Path) -> str:
    """What two copies of a file have in common: its name, its size, and what its first MiB (names, shapes) says."""
    with path.open("rb") as file:
        return f"{path.name} {path.stat().st_size} {zlib.crc32(file.read(2**20)):08x}"
