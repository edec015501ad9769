"""The pieces that one rank holds of a larger tensor, as ``torch.distributed.checkpoint`` (DCP) sees them."""

from typing import Any, Optional

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lightning_autotp.compat import make_wrapper_subclass
from lightning_autotp.layout.layout import Interval, Layout


class ShardedView(Tensor):
    """A local tensor that presents itself as the chunks its layout gives: written and read in place, resharded freely.

    Source: the ``_Checkpointable`` protocol of ``torch/distributed/checkpoint/planner_helpers.py``. ``size()`` is that
    of the full tensor; there is nothing to compute with.
    """

    __slots__ = ["local", "pieces", "rows"]
    local: Tensor
    rows: Optional[Interval]
    pieces: list[tuple[torch.Size, Tensor]]

    @staticmethod
    def __new__(cls, local: Tensor, layout: Layout, rank: int, rows: Optional[Interval] = None) -> "ShardedView":
        view: ShardedView = make_wrapper_subclass(cls, torch.Size(layout.shape), dtype=local.dtype, device=local.device)
        view.local, view.rows = local, rows
        if rows is None:
            parts = list(zip(layout.boxes(rank), layout.split(local, rank)))
        else:  # of what the rank holds by its layout, ``local`` has these rows
            parts = [(box, inside.view(local)) for box, inside in layout.row_boxes(rank, rows)]
        view.pieces = [(torch.Size(box.offset), part) for box, part in parts]
        return view

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, piece.size()) for offset, piece in self.pieces]

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, offset),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offset, piece.size()),
                    properties=TensorProperties.create_from_tensor(piece),
                    size=self.size(),
                ),
            )
            for offset, piece in self.pieces
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(piece for offset, piece in self.pieces if offset == index.offset)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise TypeError(f"{func} on a ShardedView: it only stands for a tensor's place in a checkpoint.")

    def __repr__(self) -> str:  # type: ignore[override]  # the default computes on the values
        return f"ShardedView({tuple(self.size())}, pieces at {[tuple(offset) for offset, _ in self.pieces]})"
