"""A head and its cross entropy as one: the logits ``[T, V_r]`` are made and used a run of tokens at a time.

Source: Liger Kernel (arXiv:2410.10989), fused linear cross entropy; here each rank has its part of the vocabulary. The
forward pass makes the gradients, too, while a run's logits are there, of a sum of losses: the factor that the backward
pass is given (a mean's, a loss scale's) is one number, and multiplies what is summed up already.
"""

from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_autotp.compat import autocast_dtype
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.once_differentiable import once_differentiable
from lightning_autotp.losses.vocab_parallel_cross_entropy import Terms, Vocabulary, logits_gradient, token_losses
from lightning_autotp.parallel.deferred_logits import computed_eagerly

_CHUNK = 2**28
"""How many logits are there at most (half a GiB of bf16), but for one token's.

Each run of tokens reads and writes the weight's whole gradient: runs of some thousand tokens hide that.
"""


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward: ``x [T, H]``, ``w [V_r, H]``, ``b [V_r]``, targets ``[T]`` -> the sum of the losses.

    With ``g [T, V_r]`` the gradient of the logits, of which a run of tokens is there at a time, it keeps ``gx = g w``,
    partial on each rank, ``gw = g^T x`` and ``gb = sum g``, each only where it is needed; the last two are added up in
    fp32 (of fp64: in fp64). Backward: these times the factor that comes; with ``reduces`` ``gx`` is all-reduced, once,
    with ``overlap`` while the others are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        target: Tensor,
        vocabulary: Vocabulary,
        terms: Terms,
        mesh: Optional[Mesh],
        reduces: bool,
        overlap: bool,
        dtype: torch.dtype,
        recording: bool,
    ) -> Tensor:
        needs = [recording and needed for needed in ctx.needs_input_grad[:3]]
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        of_x = x.new_empty(x.shape, dtype=dtype) if needs[0] else None
        of_weight = weight.new_zeros(weight.shape, dtype=wide) if needs[1] else None
        of_bias = weight.new_zeros(weight.shape[0], dtype=wide) if needs[2] else None

        def loss(rows: slice) -> Tensor:
            """What a run of tokens adds; its logits are gone when this returns."""
            inputs, ids = x[rows].to(dtype), target[rows]
            logits = F.linear(inputs, w, b)
            losses, log_sum = token_losses(logits, ids, vocabulary, terms, mesh)
            if any(needs):
                one = torch.ones_like(log_sum)
                g = logits_gradient(logits, ids, log_sum, one, vocabulary, terms, out=logits)
                if of_x is not None:
                    torch.mm(g, w, out=of_x[rows])
                if of_weight is not None:
                    _add_product(of_weight, g.t(), inputs)
                if of_bias is not None:
                    of_bias.add_(g.sum(0, dtype=wide))
            return losses

        ranks = 1 if mesh is None else mesh.tp_size
        losses = torch.cat([loss(rows) for rows in _runs(x.shape[0], -(-vocabulary.size // ranks))])
        ctx.save_for_backward(of_x, of_weight, of_bias)
        ctx.mesh, ctx.overlap = mesh if reduces else None, overlap
        ctx.dtypes = [None if p is None else p.dtype for p in (x, weight, bias)]
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Optional[Tensor], ...]:
        of_x, of_weight, of_bias = ctx.saved_tensors
        factor = grads[0]
        gx, gw, gb, reduced = None, None, None, None
        if of_x is not None:
            gx = _times(of_x, factor, of_x.dtype)
            if ctx.mesh is not None and ctx.overlap:
                reduced = ctx.mesh.collectives.start_all_reduce(gx)
            elif ctx.mesh is not None:
                gx = ctx.mesh.collectives.all_reduce(gx)
        if of_weight is not None:
            gw = _times(of_weight, factor, ctx.dtypes[1])
        if of_bias is not None:
            gb = _times(of_bias, factor, ctx.dtypes[2])
        if reduced is not None:
            gx = reduced()
        return None if gx is None else gx.to(ctx.dtypes[0]), gw, gb, *[None] * 8


def _runs(tokens: int, width: int) -> Iterator[slice]:
    """Runs of tokens of about one length, so that ``width`` logits each are :data:`_CHUNK` at most.

    They must be alike on all ranks, which gather from one another for each, whatever width a rank's own part has.
    """
    most = max(1, _CHUNK // max(1, width))
    count = max(1, -(-tokens // most))
    rows = max(1, -(-tokens // count))
    for start in range(0, max(1, tokens), rows):
        yield slice(start, start + rows)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``, with ``total`` in fp32 where ``a`` and ``b`` are halves."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # on the CPU a product of halves is halves
        total += a @ b


def _times(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor x`` as a new tensor, computed in fp32 and rounded once; a graph that is retained needs ``x`` again."""
    # a factor of no dims would be rounded to the dtype of x first, and few 1 / T are numbers of fp16
    return torch.mul(x, factor.view(1), out=torch.empty_like(x, dtype=dtype))


@computed_eagerly
def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    target: Tensor,
    vocabulary: Vocabulary,
    terms: Terms,
    mesh: Optional[Mesh],
    *,
    reduces: bool,
    overlap: bool,
) -> Tensor:
    """The sum of the losses of ``x w^T + b``, in fp32 (fp64), the same bits on every tensor parallel rank.

    Besides ``gx [T, H]`` and the gradient of the weight it takes the memory of :data:`_CHUNK` logits. Forward it costs
    one all-gather of 3 numbers a token (4 with label smoothing) for each run of tokens, backward one all-reduce of
    ``gx``. ``torch.compile`` leaves it out of its graphs.

    Args:
        x: ``[T, H]``, whole on every rank.
        weight: ``[V_r, H]``, this rank's part; under autocast it and ``x`` are multiplied in autocast's dtype.
        bias: ``[V_r]``.
        target: ``[T]``, ids of the whole vocabulary or ``terms.ignore_index``, the same on every rank.
        vocabulary: where this rank's part lies.
        terms: what the loss is made of.
        mesh: the ranks that share the vocabulary; None where this one has it all.
        reduces: whether the gradient of ``x`` is summed over them here.
        overlap: whether that runs beside the backward pass's other work.
    """
    autocast = None if x.dtype == torch.float64 else autocast_dtype(x.device.type)  # fp64 is left alone by it
    dtype = x.dtype if autocast is None else autocast
    recording = torch.is_grad_enabled()
    total: Tensor = _LinearCrossEntropy.apply(
        x, weight, bias, target, vocabulary, terms, mesh, reduces, overlap, dtype, recording
    )
    return total
