"""The collectives of tensor parallelism with their gradients, on plain local tensors.

Source: Megatron-LM (arXiv:1909.08053), section 3; its ``f`` is part of the column parallel linear, its ``g`` is
:func:`reduce_output`.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.once_differentiable import once_differentiable
from lightning_autotp.layout.layout import Layout


def gather_parts(local: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """The full tensor of which every tensor parallel rank holds its part. No autograd.

    Parts of unequal size travel padded to the largest, which every backend supports.
    """
    if layout.is_replicated:
        return local
    dim = layout.dim or 0
    widest = max(layout.widths)
    mine = local.movedim(dim, 0)
    padded = mine.new_zeros(widest, *mine.shape[1:])
    padded[: mine.shape[0]] = mine
    stacked = mesh.collectives.all_gather(padded)
    parts = stacked.view(mesh.tp_size, widest, *mine.shape[1:])
    return layout.unshard([parts[r, : layout.widths[r]].movedim(0, dim) for r in range(mesh.tp_size)])


class _ReduceOutput(torch.autograd.Function):
    """Forward: all-reduce ``[..., N]`` partial -> ``[..., N]`` full on every rank. Backward: the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        if not torch.compiler.is_compiling() and x.is_contiguous():
            ctx.mark_dirty(x)
        return mesh.collectives.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherOutput(torch.autograd.Function):
    """Forward: all-gather ``[..., N_r]`` -> ``[..., N]``. Backward: this rank's part of a gradient all ranks share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
        ctx.layout, ctx.mesh = layout, mesh
        last = Layout((*x.shape[:-1], layout.shape[layout.dim or 0]), layout.tp_size, x.ndim - 1, layout.parts)
        return gather_parts(x, last, mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        grad, layout = grads[0], ctx.layout
        pieces = [grad.narrow(-1, start, length) for start, length in layout.parts[ctx.mesh.tp_rank]]
        return torch.cat(pieces, -1), None, None


class _SplitInput(torch.autograd.Function):
    """Forward: this rank's part of ``[..., K]``. Backward: all-gather of the parts of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
        ctx.last = Layout(tuple(x.shape), layout.tp_size, x.ndim - 1, layout.parts)
        ctx.mesh = mesh
        return ctx.last.shard(x, mesh.tp_rank)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return gather_parts(grads[0], ctx.last, ctx.mesh), None, None


class _CopyInput(torch.autograd.Function):
    """Forward: ``x`` as it is. Backward: all-reduce of the gradient, of its last ``count`` features or (0) of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, mesh: Mesh) -> Tensor:
        ctx.count, ctx.mesh = count, mesh
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        grad = grads[0]
        if not ctx.count:
            return ctx.mesh.collectives.all_reduce(grad.clone()), None, None
        whole, partial = grad.split([grad.shape[-1] - ctx.count, ctx.count], -1)
        return torch.cat([whole, ctx.mesh.collectives.all_reduce(partial.contiguous())], -1), None, None


class _AddedOnce(torch.autograd.Function):
    """Forward: ``x`` on the first rank, zeros on the others. Backward: the gradient as it is, which all ranks share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        return x.clone() if mesh.tp_rank == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


def reduce_output(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum partial outputs ``[..., N]`` over the tensor parallel ranks (row parallel, vocabulary parallel).

    ``x`` must be a fresh result that nothing else reads: it is reduced in place.
    """
    reduced: Tensor = _ReduceOutput.apply(x, mesh)
    return reduced


def gather_output(x: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """All features ``[..., N]`` from every rank's own ``[..., N_r]``; ``layout`` says where they lie among all.

    What reads the result must do the same on every rank, as replicated code does: the backward pass takes this rank's
    part of the gradient and communicates nothing.
    """
    gathered: Tensor = _GatherOutput.apply(x, layout, mesh)
    return gathered


def split_input(x: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """This rank's part ``[..., K_r]`` of ``x`` ``[..., K]``, which all ranks share; its gradient is gathered."""
    part: Tensor = _SplitInput.apply(x, layout, mesh)
    return part


def copy_input(x: Tensor, mesh: Mesh, count: int = 0) -> Tensor:
    """``x``, whose gradient (or that of its last ``count`` features) is a sum over the tensor parallel ranks.

    Source: Megatron-LM (arXiv:1909.08053), section 3, ``f``.
    """
    copied: Tensor = _CopyInput.apply(x, count, mesh)
    return copied


def added_once(x: Tensor, mesh: Mesh) -> Tensor:
    """What this rank adds of ``x``, so that the sum over the ranks has it once; ``x`` gets the whole gradient."""
    added: Tensor = _AddedOnce.apply(x, mesh)
    return added
