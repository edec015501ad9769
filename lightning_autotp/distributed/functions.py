"""The collectives of tensor parallelism with their gradients, on plain local tensors.

Source: Megatron-LM (arXiv:1909.08053), section 3; its ``f`` is part of the column parallel linear, its ``g`` is
:func:`reduce_output`.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.twice_differentiable import (
    TransformedFunction,
    is_transformed,
    twice_differentiable,
    without_context,
)
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


def _reduce_output_again(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
    return copy_input(grads[0], ctx.mesh), None, None  # each rank goes on with its part alone


class _ReduceOutput(TransformedFunction):
    """Forward: all-reduce ``[..., N]`` partial -> ``[..., N]`` full on every rank. Backward: the gradient as it is."""

    @staticmethod
    def forward(x: Tensor, mesh: Mesh, in_place: bool) -> Tensor:
        if not in_place and not torch.compiler.is_compiling() and x.is_contiguous():
            x = x.clone()  # under torch.func's transforms nothing is changed in place
        return mesh.collectives.all_reduce(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.mesh, in_place = inputs
        if in_place and output is x:  # not so where Dynamo compiles the forward alone
            ctx.mark_dirty(x)

    @staticmethod
    @twice_differentiable(_reduce_output_again)
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def _gather_output_again(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
    return split_input(grads[0], ctx.layout, ctx.mesh), None, None


class _GatherOutput(TransformedFunction):
    """Forward: all-gather ``[..., N_r]`` -> ``[..., N]``. Backward: this rank's part of a gradient all ranks share."""

    @staticmethod
    def forward(x: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
        last = Layout((*x.shape[:-1], layout.shape[layout.dim or 0]), layout.tp_size, x.ndim - 1, layout.parts)
        return gather_parts(x, last, mesh)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.layout, ctx.mesh = inputs

    @staticmethod
    @twice_differentiable(_gather_output_again)
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        grad, layout = grads[0], ctx.layout
        pieces = [grad.narrow(-1, start, length) for start, length in layout.parts[ctx.mesh.tp_rank]]
        return torch.cat(pieces, -1), None, None


def _split_input_again(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
    return gather_output(grads[0], ctx.last, ctx.mesh), None, None


class _SplitInput(TransformedFunction):
    """Forward: this rank's part of ``[..., K]``. Backward: all-gather of the parts of the gradient."""

    @staticmethod
    def forward(x: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
        return _of_features(x.shape, layout).shard(x, mesh.tp_rank)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.layout, ctx.mesh = inputs
        ctx.last = _of_features(x.shape, ctx.layout)

    @staticmethod
    @twice_differentiable(_split_input_again)
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return gather_parts(grads[0], ctx.last, ctx.mesh), None, None


def _of_features(shape: torch.Size, layout: Layout) -> Layout:
    return Layout(tuple(shape), layout.tp_size, len(shape) - 1, layout.parts)


def _copy_input_again(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
    grad = grads[0]
    if not ctx.count:
        return reduce_output(grad.clone(), ctx.mesh), None, None
    whole, partial = grad.split([grad.shape[-1] - ctx.count, ctx.count], -1)
    return torch.cat([whole, reduce_output(partial.clone(), ctx.mesh)], -1), None, None


class _CopyInput(TransformedFunction):
    """Forward: ``x`` as it is. Backward: all-reduce of the gradient, of its last ``count`` features or (0) of all."""

    @staticmethod
    def forward(x: Tensor, count: int, mesh: Mesh) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.count, ctx.mesh = inputs

    @staticmethod
    @twice_differentiable(_copy_input_again)
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        grad = grads[0]
        if not ctx.count:
            return ctx.mesh.collectives.all_reduce(grad.clone()), None, None
        whole, partial = grad.split([grad.shape[-1] - ctx.count, ctx.count], -1)
        return torch.cat([whole, ctx.mesh.collectives.all_reduce(partial.contiguous())], -1), None, None


class _AddedOnce(TransformedFunction):
    """Forward: ``x`` on the first rank, zeros on the others. Backward: the gradient as it is, which all ranks share."""

    @staticmethod
    def forward(x: Tensor, mesh: Mesh) -> Tensor:
        return x.clone() if mesh.tp_rank == 0 else torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


_ReduceOutputPlainly = without_context(_ReduceOutput)
_GatherOutputPlainly = without_context(_GatherOutput)
_SplitInputPlainly = without_context(_SplitInput)
_CopyInputPlainly = without_context(_CopyInput)
_AddedOncePlainly = without_context(_AddedOnce)


def reduce_output(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum partial outputs ``[..., N]`` over the tensor parallel ranks (row parallel, vocabulary parallel).

    ``x`` must be a fresh result that nothing else reads: it is reduced in place.
    """
    in_place = not torch.compiler.is_compiling() and x.is_contiguous() and not is_transformed()
    reduced: Tensor = (_ReduceOutput if is_transformed() else _ReduceOutputPlainly).apply(x, mesh, in_place)
    return reduced


def gather_output(x: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """All features ``[..., N]`` from every rank's own ``[..., N_r]``; ``layout`` says where they lie among all.

    What reads the result must do the same on every rank, as replicated code does: the backward pass takes this rank's
    part of the gradient and communicates nothing.
    """
    gathered: Tensor = (_GatherOutput if is_transformed() else _GatherOutputPlainly).apply(x, layout, mesh)
    return gathered


def split_input(x: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """This rank's part ``[..., K_r]`` of ``x`` ``[..., K]``, which all ranks share; its gradient is gathered."""
    part: Tensor = (_SplitInput if is_transformed() else _SplitInputPlainly).apply(x, layout, mesh)
    return part


def copy_input(x: Tensor, mesh: Mesh, count: int = 0) -> Tensor:
    """``x``, whose gradient (or that of its last ``count`` features) is a sum over the tensor parallel ranks.

    Source: Megatron-LM (arXiv:1909.08053), section 3, ``f``.
    """
    copied: Tensor = (_CopyInput if is_transformed() else _CopyInputPlainly).apply(x, count, mesh)
    return copied


def added_once(x: Tensor, mesh: Mesh) -> Tensor:
    """What this rank adds of ``x``, so that the sum over the ranks has it once; ``x`` gets the whole gradient."""
    added: Tensor = (_AddedOnce if is_transformed() else _AddedOncePlainly).apply(x, mesh)
    return added
