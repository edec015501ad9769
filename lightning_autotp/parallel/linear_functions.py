"""Autograd functions of column and row parallel linears, on plain local tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_autotp.distributed.functions import copy_input, reduce_output
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.once_differentiable import once_differentiable
from lightning_autotp.distributed.twice_differentiable import TransformedFunction, twice_differentiable, without_context
from lightning_autotp.parallel.overlap import Overlap, as_sequences


class WaitingResults(Protocol):
    """What keeps results of a function until they are asked for."""

    def forget(self) -> None:
        """Drop them: the graph that they hang on goes."""


def _column_linears_again(ctx: Any, *grads: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
    x, *weights = ctx.saved_tensors
    if ctx.columns is not None:
        ctx.columns.forget()
    flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
    shape = next(g.shape for g in grads if g is not None)[:-1]
    gx: Optional[Tensor] = None
    if ctx.needs_input_grad[0]:
        terms = [g @ w for g, w in zip(flat, weights) if g is not None]
        gx = sum(terms[1:], terms[0]).view(*shape, weights[0].shape[1])
        gx = gx if ctx.mesh is None else reduce_output(gx.clone(), ctx.mesh)
    if x is not None:
        # its gradient by way of the weights' is a sum over the ranks
        x = (x if ctx.mesh is None else copy_input(x, ctx.mesh)).flatten(0, -2)
    return gx, None, None, None, None, *_parameter_gradients(flat, x, ctx.needs_input_grad[5:])


class ColumnLinears(TransformedFunction):
    """Linears that read one input: ``y_i = x w_i^T + b_i``, with ``x [..., K]`` whole and ``w_i [N_i, K]`` parts.

    Backward: ``gx = sum_i gy_i w_i`` is partial on each rank and is all-reduced, once for all of them (without a mesh
    it stays partial: what gathered ``x`` sums it); ``gw_i = gy_i^T x`` and ``gb_i`` are this rank's own. With
    ``overlap`` the all-reduce runs while they are computed.
    """

    @staticmethod
    def forward(
        x: Tensor,
        columns: Optional[WaitingResults],
        mesh: Optional[Mesh],
        overlap: bool,
        count: int,
        *params: Optional[Tensor],
    ) -> Any:
        weights, biases = params[:count], params[count:]
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases))  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, columns, mesh, overlap, count, *params = inputs
        trains = any(ctx.needs_input_grad[5 : 5 + count])
        ctx.save_for_backward(x if trains else None, *params[:count])
        ctx.columns, ctx.mesh, ctx.overlap = columns, mesh, overlap
        ctx.set_materialize_grads(False)

    @staticmethod
    @twice_differentiable(_column_linears_again)
    def backward(ctx: Any, *grads: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        x, *weights = ctx.saved_tensors
        if ctx.columns is not None:
            ctx.columns.forget()  # results that still wait hang on the graph that goes now
        flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
        shape = next(g.shape for g in grads if g is not None)[:-1]
        reduced: Callable[[], Optional[Tensor]] = _nothing
        if ctx.needs_input_grad[0]:
            gx = _input_gradient(flat, weights).view(*shape, weights[0].shape[1])
            if ctx.mesh is None:
                reduced = partial(_given, gx)
            elif ctx.overlap:
                reduced = ctx.mesh.collectives.start_all_reduce(gx)
            else:
                reduced = partial(_given, ctx.mesh.collectives.all_reduce(gx))
        of_parameters = _parameter_gradients(flat, None if x is None else x.flatten(0, -2), ctx.needs_input_grad[5:])
        return reduced(), None, None, None, None, *of_parameters


ColumnLinearsPlainly = without_context(ColumnLinears)


class GatherColumns(torch.autograd.Function):
    """The same of a rank's own tokens ``x [1, T_r, K]``, which are gathered first: ``X [B, S, K]`` and ``y_i``.

    Backward: the partial ``gX = sum_i gy_i w_i`` (and what else reads ``X`` adds) is reduce-scattered to ``gx``; with
    overlap this runs while the gradients of weights and biases are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        columns: Optional[WaitingResults],
        overlap: Overlap,
        form: str,
        length: int,
        rows: int,
        count: int,
        *params: Optional[Tensor],
    ) -> Any:
        weights, biases = params[:count], params[count:]
        full, products = overlap.gather_matmul(x[0], weights, biases, form)  # type: ignore[arg-type]
        outputs = tuple(as_sequences(y, length, rows) for y in (full, *products))
        if torch.compiler.is_compiling():  # a view, so that changing it in place is an error: results would be stale
            outputs = (outputs[0].view_as(outputs[0]), *outputs[1:])
        trains = any(ctx.needs_input_grad[7 : 7 + count])
        ctx.save_for_backward(outputs[0] if trains else None, *weights)
        ctx.columns, ctx.overlap = columns, overlap
        ctx.padding = full.shape[0] - outputs[0].shape[:2].numel()
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        full, *weights = ctx.saved_tensors
        if ctx.columns is not None:
            ctx.columns.forget()
        of_full, *flat = [None if g is None else g.flatten(0, -2) for g in grads]
        part: Callable[[], Optional[Tensor]] = _nothing
        if ctx.needs_input_grad[0]:
            gx = of_full if all(g is None for g in flat) else _input_gradient(flat, weights, of_full)
            assert gx is not None  # autograd runs no backward without a gradient
            if ctx.padding:
                gx = torch.cat([gx, gx.new_zeros(ctx.padding, gx.shape[1])])
            part = ctx.overlap.scatter(gx)
        of_parameters = _parameter_gradients(
            flat, None if full is None else full.flatten(0, 1), ctx.needs_input_grad[7:]
        )
        gathered = part()
        return None if gathered is None else gathered[None], None, None, None, None, None, None, *of_parameters


def _nothing() -> None:
    return None


def _given(x: Tensor) -> Tensor:
    return x


def _parameter_gradients(
    grads: list[Optional[Tensor]], x: Optional[Tensor], needs: tuple[bool, ...]
) -> list[Optional[Tensor]]:
    """``g_i^T x`` for each weight and ``sum g_i`` for each bias, where they are needed."""
    gws = [None if g is None or x is None or not need else g.t() @ x for g, need in zip(grads, needs)]
    gbs = [None if g is None or not need else g.sum(0) for g, need in zip(grads, needs[len(grads) :])]
    return gws + gbs


def _input_gradient(grads: list[Optional[Tensor]], weights: list[Tensor], more: Optional[Tensor] = None) -> Tensor:
    """``sum_i g_i w_i`` as ``[T, K]``, accumulated by the matmuls themselves, and ``more``."""
    total: Optional[Tensor] = None
    for grad, weight in zip(grads, weights):
        if grad is not None:
            total = grad @ weight if total is None else total.addmm_(grad, weight)
    if total is not None and more is not None:
        total += more
    assert total is not None  # autograd runs no backward without a gradient
    return total


class RowScatter(torch.autograd.Function):
    """Forward: ``x w^T`` of ``x [..., K_r]``, ``w [N, K_r]``, reduce-scattered over all tokens: ``[1, T_r, N]``.

    Backward: the gradient of all tokens is gathered, ``gx = gY w`` and ``gw = gY^T x``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, overlap: Overlap, scatter: str, gather: str) -> Tensor:
        ctx.overlap, ctx.form, ctx.shape = overlap, gather, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        x = x.flatten(0, -2)
        padding = -x.shape[0] % overlap.mesh.tp_size
        if padding:
            x = torch.cat([x, x.new_zeros(padding, x.shape[1])])
        part = overlap.matmul_scatter(x, weight, scatter)
        return as_sequences(part, part.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        weights = [weight.t()] if ctx.needs_input_grad[0] else []
        full, products = ctx.overlap.gather_matmul(grads[0][0], weights, [None] * len(weights), ctx.form)
        tokens = ctx.shape[:-1].numel()
        gx = products[0][:tokens].view(ctx.shape) if products else None
        gw = None if x is None else full[:tokens].t() @ x.flatten(0, -2)
        return gx, gw, None, None, None
