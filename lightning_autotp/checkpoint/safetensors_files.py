"""Safetensors files written a tensor at a time, in any order, without holding more than one.

Source: the format's description at https://github.com/huggingface/safetensors (a length, a JSON header, the bytes).
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}


class SafetensorsFiles:
    """Files of at most ``shard_size`` bytes, unless a tensor alone is larger, whose tensors are written one by one.

    Args:
        directory: where to make them.
        shapes: the names of all tensors, with their shapes and dtypes as tensors on the meta device.
        shard_size: how many bytes of tensors go into one file.
        stem: what the files are called: ``model`` makes ``model.safetensors``, or ``model-00001-of-00002.safetensors``
            and so on with ``model.safetensors.index.json``.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, Tensor], shard_size: int, stem: str = "model") -> None:
        self._directory, self._shapes, self._index = directory, shapes, f"{stem}.safetensors.index.json"
        shards: list[list[str]] = [[]]
        filled = 0
        for name, shape in shapes.items():
            if shards[-1] and filled + shape.nbytes > shard_size:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += shape.nbytes
        count = len(shards)
        self.map: dict[str, str] = {}
        self._places: dict[str, int] = {}
        for number, names in enumerate(shards, 1):
            file = f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"
            self._begin(file, names)
        self.sharded = count > 1
        self._waiting = set(shapes)

    def _begin(self, file: str, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        # the widest first, so that each is aligned to its size
        for name in sorted(names, key=lambda name: (-self._shapes[name].element_size(), name)):
            shape = self._shapes[name]
            if shape.dtype not in _DTYPES:
                raise ValueError(f"{name}: safetensors has no dtype for {shape.dtype}.")
            offsets = [at, at + shape.nbytes]
            header[name] = {"dtype": _DTYPES[shape.dtype], "shape": list(shape.shape), "data_offsets": offsets}
            at += shape.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (self._directory / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + at)
        for name in names:
            self.map[name] = file
            self._places[name] = 8 + len(text) + header[name]["data_offsets"][0]

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the values of one tensor.

        Raises:
            ValueError: if it is not of the shape and dtype that were announced.
        """
        want = self._shapes[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, and {want.dtype} {list(want.shape)} was announced."
            )
        with (self._directory / self.map[name]).open("r+b") as stream:
            stream.seek(self._places[name])
            if tensor.numel():
                stream.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._waiting.discard(name)

    def finish(self) -> None:
        """Have all of it on the disk, with the index of several files.

        Raises:
            ValueError: if a tensor was not written.
        """
        if self._waiting:
            raise ValueError(f"these tensors were not written: {', '.join(sorted(self._waiting)[:5])}.")
        if self.sharded:
            numbers = sum(shape.numel() for shape in self._shapes.values())
            size = sum(shape.nbytes for shape in self._shapes.values())
            index = {"metadata": {"total_parameters": numbers, "total_size": size}, "weight_map": self.map}
            (self._directory / self._index).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for file in set(self.map.values()):
            with (self._directory / file).open("rb") as stream:
                os.fsync(stream.fileno())
