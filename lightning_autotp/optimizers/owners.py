"""Between parts and whole tensors: to the rank that owns one, and back."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from lightning_autotp.distributed.functions import gather_parts
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Interval, Layout

_MOST = 2**25
"""Elements, over all ranks, that travel at once: what is on its way is held twice."""


@dataclass(frozen=True)
class Owned:
    """Where a sharded tensor lies, and which tensor parallel rank owns it whole; None: all of them."""

    layout: Layout
    owner: Optional[int]

    def is_here(self, mesh: Mesh) -> bool:
        """Whether this rank holds it whole."""
        return self.owner is None or self.owner == mesh.tp_rank


def owners_of(layouts: Sequence[Layout], tp_size: int, load: Optional[list[int]] = None) -> list[int]:
    """An owner for each of ``layouts``, the largest first, so that all ranks own about as much.

    Args:
        layouts: of the tensors to be owned.
        tp_size: the number of ranks.
        load: the elements that each rank owns already, which are added to.
    """
    load = [0] * tp_size if load is None else load
    owners = [0] * len(layouts)
    sizes = [torch.Size(layout.shape).numel() for layout in layouts]
    for at in sorted(range(len(layouts)), key=lambda at: -sizes[at]):
        owners[at] = min(range(tp_size), key=lambda rank: (load[rank], rank))
        load[owners[at]] += sizes[at]
    return owners


@torch.no_grad()
def to_owners(parts: Sequence[Tensor], owned: Sequence[Owned], mesh: Mesh) -> list[Optional[Tensor]]:
    """The whole tensors on their owners, None elsewhere; every tensor parallel rank must call it.

    What several ranks hold alike is taken from the first of them.
    """
    whole: list[Optional[Tensor]] = [None] * len(parts)
    for bucket in _buckets(parts, owned):
        if owned[bucket[0]].owner is None:
            for at in bucket:
                whole[at] = gather_parts(parts[at], owned[at].layout, mesh)
            continue
        by_owner = [[at for at in bucket if owned[at].owner == rank] for rank in range(mesh.tp_size)]
        sent = [
            _flat(parts[bucket[0]], [run for at in theirs for run in _kept(parts[at], owned[at].layout, mesh.tp_rank)])
            for theirs in by_owner
        ]
        here = by_owner[mesh.tp_rank]
        lengths = [sum(_numel(owned[at].layout, rank) for at in here) for rank in range(mesh.tp_size)]
        for at in here:
            whole[at] = parts[at].new_empty(owned[at].layout.shape)
        for rank, flat in enumerate(mesh.collectives.exchange(sent, lengths)):
            for at in here:
                layout, full = owned[at].layout, whole[at]
                assert full is not None
                for _, start, length in _first(layout, rank):
                    run = full.narrow(layout.dim or 0, start, length)
                    run.copy_(flat[: run.numel()].view(run.shape))
                    flat = flat[run.numel() :]
    return whole


@torch.no_grad()
def from_owners(whole: Sequence[Optional[Tensor]], parts: Sequence[Tensor], owned: Sequence[Owned], mesh: Mesh) -> None:
    """Overwrite ``parts`` with each rank's part of the whole tensors; every tensor parallel rank must call it."""
    for bucket in _buckets(parts, owned):
        if owned[bucket[0]].owner is None:
            for at in bucket:
                full = whole[at]
                assert full is not None
                parts[at].copy_(owned[at].layout.shard(full, mesh.tp_rank))
            continue
        here = [(owned[at].layout, whole[at]) for at in bucket if owned[at].owner == mesh.tp_rank]
        like = parts[bucket[0]]
        sent = [
            _flat(like, [layout.shard(full, rank) for layout, full in here if full is not None])
            for rank in range(mesh.tp_size)
        ]
        by_owner = [[at for at in bucket if owned[at].owner == rank] for rank in range(mesh.tp_size)]
        lengths = [sum(parts[at].numel() for at in theirs) for theirs in by_owner]
        for theirs, flat in zip(by_owner, mesh.collectives.exchange(sent, lengths)):
            for at, piece in zip(theirs, flat.split([parts[at].numel() for at in theirs])):
                parts[at].copy_(piece.view(parts[at].shape))


def _buckets(parts: Sequence[Tensor], owned: Sequence[Owned]) -> Iterator[list[int]]:
    """Which tensors travel together: of one dtype and kind of owner, and not too many."""
    kinds: dict[tuple[torch.dtype, bool], list[int]] = defaultdict(list)
    for at, part in enumerate(parts):
        kinds[part.dtype, owned[at].owner is None].append(at)
    for key in sorted(kinds, key=str):
        bucket: list[int] = []
        size = 0
        for at in kinds[key]:
            numel = torch.Size(owned[at].layout.shape).numel()
            if bucket and size + numel > _MOST:
                yield bucket
                bucket, size = [], 0
            bucket.append(at)
            size += numel
        yield bucket


def _first(layout: Layout, rank: int) -> list[tuple[int, int, int]]:
    """The runs ``(local start, start, length)`` of what ``rank`` holds that no rank before it holds."""
    before: set[Interval] = {interval for part in layout.parts[:rank] for interval in part}
    found, local = [], 0
    for start, length in layout.parts[rank]:
        if (start, length) not in before:
            found.append((local, start, length))
        local += length
    return found


def _kept(part: Tensor, layout: Layout, rank: int) -> list[Tensor]:
    return [part.narrow(layout.dim or 0, local, length) for local, _, length in _first(layout, rank)]


def _numel(layout: Layout, rank: int) -> int:
    across = torch.Size(n for dim, n in enumerate(layout.shape) if dim != layout.dim).numel()
    return across * sum(length for *_, length in _first(layout, rank))


def _flat(like: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    flat = [piece.reshape(-1) for piece in pieces]
    return torch.cat(flat) if flat else like.new_empty(0)
