"""Tensors in files: a box of what operators make of them is what torch makes, and only what it needs is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_autotp.checkpoint.pretrained_files import Files
from lightning_autotp.checkpoint.pretrained_tensors import InFile, StoredTensor
from lightning_autotp.layout.layout import Box

TENSORS = {name: torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("abcd")}

OPERATORS: dict[str, Callable[..., Any]] = {
    "itself": lambda a, *_: a[...],
    "stack": lambda a, b, *_: torch.stack([a, b]),
    "stack behind": lambda a, b, *_: torch.stack([a, b], dim=-1),
    "experts": lambda a, b, c, d: torch.cat([torch.stack([a, b]), torch.stack([c, d])], dim=1),
    "cat behind": lambda a, b, *_: torch.cat([a, b], dim=-1),
    "chunk": lambda a, *_: torch.chunk(a, 3, dim=0)[1].contiguous(),
    "split": lambda a, *_: torch.split(a, [1, 3], dim=1)[1],
    "slice": lambda a, *_: a[1:5, ..., -3:],
    "slice with steps": lambda a, *_: a[::2],
    "transpose": lambda a, *_: a.t().contiguous(),
    "transpose of a stack": lambda a, b, *_: torch.stack([a, b]).transpose(1, 2),
    "cast": lambda a, *_: a.to(torch.bfloat16),
    "cast twice": lambda a, *_: a.to(torch.bfloat16).float(),
    "rotary": lambda a, *_: a.view(2, 3, 4).transpose(0, 1).reshape(6, 4),
    "cat of a rotary": lambda a, b, *_: torch.cat([a.view(2, 3, 4).transpose(0, 1).reshape(6, 4), b]),
    "unbind": lambda a, *_: torch.unbind(a)[2],
    "sum": lambda a, b, *_: a * 2 + b,
    "depends on values": lambda a, *_: a * a.max().item(),
    "with a tensor": lambda a, *_: torch.cat([a, torch.ones(1, 4)]),
    "into a tensor": lambda a, *_: torch.zeros(6, 4).copy_(a),
    "different dtypes": lambda a, b, *_: torch.cat([a, b.double()]),
}


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, StoredTensor]:
    save_file(TENSORS, tmp_path / "four.safetensors")
    files = Files([str(tmp_path / "four.safetensors")])
    found = files.tensors()
    return {key: StoredTensor(InFile(shape, dtype, files, path, key)) for path, key, shape, dtype in found}


def some_boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    yield Box.full(shape)
    for dim, length in enumerate(shape):
        for start, size in ((0, 1), (length - 1, 1), (length // 2, length - length // 2)):
            offset, sizes = [0] * len(shape), list(shape)
            offset[dim], sizes[dim] = start, size
            yield Box(tuple(offset), tuple(sizes))


@pytest.mark.parametrize("name", OPERATORS)
def test_boxes_of_what_operators_make_are_those_of_torch(name: str, stored: dict[str, StoredTensor]) -> None:
    want: Tensor = OPERATORS[name](*TENSORS.values())
    found: Any = OPERATORS[name](*stored.values())
    assert (found.shape, found.dtype) == (want.shape, want.dtype)
    if not isinstance(found, StoredTensor):
        assert torch.equal(found, want)
        return
    for dtype in (want.dtype, torch.float64):
        boxes = list(some_boxes(tuple(want.shape)))
        out = [torch.empty(box.size, dtype=dtype) for box in boxes]
        found.stored.read(boxes, out)
        for box, tensor in zip(boxes, out):
            assert torch.equal(tensor, box.view(want).to(dtype)), box


def test_only_the_boxes_that_are_asked_for_are_read(
    stored: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, Box]] = []
    view = Files.view

    def noted(files: Files, path: str, key: str, box: Box) -> Tensor:
        read.append((key, box))
        return view(files, path, key, box)

    monkeypatch.setattr(Files, "view", noted)
    fused: Any = OPERATORS["experts"](*stored.values())
    assert not read
    fused.stored.read([Box((0, 4, 0), (2, 4, 4))], [torch.empty(2, 4, 4)])
    assert read == [
        *(("a", Box((4, 0), (2, 4))), ("b", Box((4, 0), (2, 4)))),
        *(("c", Box((0, 0), (2, 4))), ("d", Box((0, 0), (2, 4)))),
    ]


def test_nothing_is_written_into_a_checkpoint(stored: dict[str, StoredTensor]) -> None:
    with pytest.raises(RuntimeError, match="would write into a tensor of a checkpoint"):
        stored["a"].mul_(2)
