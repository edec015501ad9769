"""Vocabulary parallel embedding: an ``nn.Embedding`` whose class was changed in place and whose weight is a part."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp.compat import assert_async
from lightning_autotp.distributed.functions import gather_output, reduce_output
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout
from lightning_autotp.parallel.convert import become


class VocabParallelEmbedding(nn.Embedding):
    """``nn.Embedding`` cut along its vocabulary: each rank looks up its own rows, the sum over ranks has them all.

    ``[...]`` indices -> ``[..., H]``. ``num_embeddings`` and ``padding_idx`` stay those of the full layer.
    Source: Megatron-LM (arXiv:1909.08053), section 3.
    """

    mesh: Mesh
    layout: Layout

    @staticmethod
    def convert(module: nn.Embedding, mesh: Mesh, layout: Layout) -> "VocabParallelEmbedding":
        """Change ``module`` in place; its weight must already be this rank's part."""
        converted: VocabParallelEmbedding = become(module, VocabParallelEmbedding, mesh, layout)
        return converted

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Embedding's name for it
        # an index that no rank holds would be looked up as zeros; asynchronous on CUDA, as torch's own check is
        known = ((input >= 0) & (input < self.num_embeddings)).all()
        assert_async(known, f"an index is out of range for the {self.num_embeddings} embeddings")
        start, length = self.layout.parts[self.mesh.tp_rank][0]
        local = input - start
        elsewhere = (local < 0) | (local >= length)
        padding = None
        if self.padding_idx is not None and 0 <= self.padding_idx - start < length:
            padding = self.padding_idx - start
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight, padding)
        return reduce_output(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.mesh)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, vocabulary parallel {self.mesh.tp_rank}/{self.mesh.tp_size}"


class ColumnParallelEmbedding(nn.Embedding):
    """``nn.Embedding`` cut along its features, which are all-gathered after the lookup: ``[...]`` -> ``[..., H]``."""

    mesh: Mesh
    layout: Layout

    @staticmethod
    def convert(module: nn.Embedding, mesh: Mesh, layout: Layout) -> "ColumnParallelEmbedding":
        """Change ``module`` in place; its weight must already be this rank's part."""
        converted: ColumnParallelEmbedding = become(module, ColumnParallelEmbedding, mesh, layout)
        return converted

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Embedding's name for it
        return gather_output(super().forward(input), self.layout, self.mesh)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, column parallel {self.mesh.tp_rank}/{self.mesh.tp_size}"
