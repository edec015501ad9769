"""Full tensors that every rank holds: are they the same everywhere, and if not, rank 0's, a piece at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.compat import FakeTensor
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Box, Layout
from lightning_autotp.sharding.sources import Source

LARGEST_PIECE = 2**26
"""Bytes that travel at once: 64 MiB."""

_CHUNK = 2**20
_PRIME = 0x100000001B3


def agreed_tensors(model: nn.Module, sources: Mapping[int, Source], mesh: Mesh) -> set[int]:
    """The ids of the parameters and buffers that have the same values on all ranks; every rank must call it."""
    tensors = list(_once(model))
    if mesh.tp_size * mesh.replicas == 1 or any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return {id(tensor) for tensor in tensors}
    marks = [_mark(tensor, sources.get(id(tensor))) for tensor in tensors]
    everyones = mesh.collectives.gather_objects(marks, "world")
    if len({len(theirs) for theirs in everyones}) > 1:
        raise ValueError(
            "the ranks built different models: they have"
            f" {sorted({len(theirs) for theirs in everyones})} parameters and buffers. Build the same one on all ranks."
        )
    alike = (set(theirs) for theirs in zip(*everyones))
    return {id(tensor) for tensor, theirs in zip(tensors, alike) if len(theirs) == 1 and None not in theirs}


def _once(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _mark(tensor: Tensor, source: Optional[Source]) -> Optional[str]:
    """What two ranks have in common if their tensors are equal; None if that is not known."""
    if source is not None:
        return source.origin
    return None if tensor.is_meta else f"{tuple(tensor.shape)} {tensor.dtype} {digest(tensor)}"


@torch.no_grad()
def digest(tensor: Tensor) -> int:
    """A number that tells tensors of one size apart: their 64 bit words times fixed random odd numbers, summed."""
    # the generators of hashlib read a fraction of a GB a second, and a model has many
    data = tensor.detach().reshape(-1).view(torch.uint8)
    found = 0
    for chunk in data.split(8 * _CHUNK):
        if chunk.numel() % 8:
            chunk = torch.nn.functional.pad(chunk, (0, -chunk.numel() % 8))
        elif chunk.storage_offset() % 8:
            chunk = chunk.clone()
        words = chunk.view(torch.int64)
        weights = _weights(words.device)[: words.numel()]
        value = torch.dot(words, weights) if words.device.type == "cpu" else (words * weights).sum()
        found = (found * _PRIME + int(value)) % 2**64
    return found


@torch.no_grad()
def mark_on_device(tensor: Tensor) -> Tensor:
    """Like :func:`digest`, an int64 on the tensor's device, which nobody waits for; shapes are left to others."""
    if tensor.is_nested and tensor.layout is torch.jagged:
        jagged: Any = tensor
        return mark_on_device(jagged.values()) * 3 + mark_on_device(jagged.offsets())
    if tensor.is_meta or isinstance(tensor, FakeTensor) or not tensor.numel():
        return torch.zeros((), dtype=torch.int64, device="cpu" if tensor.is_meta else tensor.device)
    data = tensor.detach()
    data = data.to_dense() if data.layout is not torch.strided else data
    data = (data.int_repr() if data.is_quantized else data.resolve_conj()).resolve_neg()
    data = data.contiguous().view(-1).view(torch.uint8)
    if data.numel() % 8:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 8))
    elif data.storage_offset() % 8:
        data = data.clone()
    marks = torch.zeros((), dtype=torch.int64, device=data.device)
    for words in data.view(torch.int64).split(_CHUNK):
        weights = _weights(words.device)[: words.numel()]
        marks = marks * _PRIME + (torch.dot(words, weights) if words.device.type == "cpu" else (words * weights).sum())
    return marks


@cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_CHUNK,), generator=generator) * 2 + 1).to(device)


def from_rank_zero(
    read: Callable[[Box, Tensor], None], dtype: torch.dtype, layout: Layout, mesh: Mesh, device: torch.device
) -> Tensor:
    """This rank's part of a full tensor, as global rank 0 has it; every rank must call it.

    Args:
        read: copies a box of this rank's own full tensor into one of its size.
        dtype: of the tensor, the same on all ranks.
        layout: where the parts of it lie.
        mesh: this process's place.
        device: where the part is to be.
    """
    local = torch.empty(layout.local_shape(mesh.tp_rank), dtype=dtype, device=device)
    own = list(zip(layout.boxes(mesh.tp_rank), layout.split(local, mesh.tp_rank)))
    full = Box.full(layout.shape)
    for piece in full.pieces(max(1, LARGEST_PIECE // dtype.itemsize)) if 0 not in full.size else ():
        buffer = torch.empty(piece.size, dtype=dtype, device=device)
        read(piece, buffer)
        mesh.collectives.broadcast(buffer.view(-1).view(torch.uint8))  # bytes: backends know few dtypes
        copy_overlaps(piece, buffer, own)
    return local


def copy_overlaps(held: Box, tensor: Tensor, wanted: Sequence[tuple[Box, Tensor]]) -> None:
    """Copy what ``tensor``, the box ``held`` of a full one, has of each wanted box into that box's tensor."""
    for box, out in wanted:
        common = held.overlap(box)
        if common is not None:
            common.view(out, box).copy_(common.view(tensor, held))
