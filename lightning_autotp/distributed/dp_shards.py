"""Tensors that data parallel ranks hold rows of (ZeRO): FSDP2's DTensors, whose full tensor is what DDP would hold.

That full tensor is itself this rank's shard where tensor parallelism shards it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_autotp.layout.layout import Interval, chunk

_ROWS = "_autotp_rows"


def is_dp_sharded(tensor: Any) -> bool:
    """Whether data parallel ranks hold rows of it."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local_rows(tensor: Tensor) -> Tensor:
    """The rows that this rank holds, sharing memory with ``tensor``; itself if it is no such tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def all_rows(tensor: Tensor) -> Tensor:
    """All rows, a copy; ``tensor`` itself if it is no such tensor. Every data parallel rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: DTensor) -> Interval:
    """Which rows this rank holds: ``(first, number)``."""
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            return chunk(tensor.shape[0], tensor.device_mesh.size(dim), tensor.device_mesh.get_local_rank(dim))
    return 0, tensor.shape[0]


@torch.no_grad()
def with_rows(like: DTensor, rows: Tensor) -> DTensor:
    """A tensor shaped and placed as ``like`` of which this rank holds ``rows``, whatever their dtype."""
    rows = rows.to(like.device)
    options: dict[str, Any] = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(rows, like.device_mesh, like.placements, **options)


@torch.no_grad()
def like_sharded(like: DTensor, tensor: Tensor) -> DTensor:
    """A tensor placed as ``like`` of ``tensor``, which has all rows on every rank."""
    first, count = rows_of(like)
    return with_rows(like, tensor.narrow(0, first, count).clone())


def as_rows(tensor: Tensor, rows: "Interval | None") -> Tensor:
    """``tensor``, known from now on as these rows, ``(first, number)``, of one that was saved; None: as all of them."""
    if rows is not None:
        setattr(tensor, _ROWS, rows)
    return tensor


def placed_as(like: Any, value: Any) -> Any:
    """``value``, of all rows or :func:`as_rows`, placed as ``like`` is; itself where nothing of it is sharded so."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if getattr(value, _ROWS, None) == rows_of(like):
        return with_rows(like, value)
    return like_sharded(like, value) if value.shape == like.shape else value
