"""Vocabulary parallel cross entropy: each rank reads its own logits, and one small all-gather makes the loss of all.

Source: Megatron-LM (arXiv:1909.08053), section 3. There the ranks all-reduce the largest logit, the target's logit and
the sum of exponentials one after the other; here each rank's own go together, and every rank combines them alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from lightning_autotp.compat import assert_async
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.once_differentiable import once_differentiable
from lightning_autotp.kernels.dispatch import kernels_of

_CHUNK = 2**24
"""How many logits are looked at together where no kernel does: what is computed of them in fp32 takes 64 MiB a time."""


@dataclass(frozen=True)
class Vocabulary:
    """This rank's interval of the vocabulary: the ids ``start`` to ``start + length`` of ``size``."""

    start: int
    length: int
    size: int


@dataclass(frozen=True)
class Terms:
    """What the loss of a token is made of, besides its target's logit.

    Args:
        ignore_index: the target of tokens that do not count.
        label_smoothing: the share of the target that is spread over the whole vocabulary, as in torch.
        z_loss: the factor of ``logsumexp(logits) ** 2``, which is added.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class _CrossEntropy(torch.autograd.Function):
    """Forward: logits ``[T, V_r]``, targets ``[T]`` -> losses ``[T]``. Backward: this rank's own gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, vocabulary: Vocabulary, terms: Terms, mesh: Mesh) -> Tensor:
        losses, log_sum = token_losses(logits, target, vocabulary, terms, mesh)
        ctx.save_for_backward(logits, target, log_sum)
        ctx.vocabulary, ctx.terms = vocabulary, terms
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        logits, target, log_sum = ctx.saved_tensors
        return logits_gradient(logits, target, log_sum, grads[0], ctx.vocabulary, ctx.terms), None, None, None, None


def token_losses(
    logits: Tensor, target: Tensor, vocabulary: Vocabulary, terms: Terms, mesh: Optional[Mesh]
) -> tuple[Tensor, Tensor]:
    """The losses ``[T]`` of logits ``[T, V_r]``, and ``lse [T]``, which :func:`logits_gradient` reads. No autograd.

    With ``t`` the target, ``e`` the smoothing and ``z`` the z-loss's factor::

        loss = lse - (1 - e) x_t - e / V sum_c x_c + z lse^2

    Without a mesh these are all logits, and nothing is gathered.
    """
    smoothing = terms.label_smoothing
    known = (target == terms.ignore_index) | ((target >= 0) & (target < vocabulary.size))
    assert_async(known.all(), f"a target is out of range for the {vocabulary.size} logits")
    here, local = _place(target, vocabulary)
    kernels = kernels_of("cross_entropy", logits)
    statistics = kernels.statistics if kernels else _statistics
    mine = statistics(logits, here, local, with_sum=smoothing > 0)
    everyones = mine[None] if mesh is None else mesh.collectives.all_gather(mine).view(mesh.tp_size, *mine.shape)
    largest, sums, targets = everyones[:, 0], everyones[:, 1], everyones[:, 2]
    top = largest.amax(0)
    # of shifted logits x - top, whose exponentials do not overflow: (1 - e) + e = 1, so that the shift cancels
    log_sum = (sums * (largest - top).exp()).sum(0).log()
    losses = log_sum - (1 - smoothing) * (targets.sum(0) - top)
    if smoothing:
        losses -= smoothing * (everyones[:, 3].sum(0) / vocabulary.size - top)
    log_sum += top
    if terms.z_loss:
        losses += terms.z_loss * log_sum.square()
    return losses.masked_fill(target == terms.ignore_index, 0), log_sum


def logits_gradient(
    logits: Tensor,
    target: Tensor,
    log_sum: Tensor,
    grad: Tensor,
    vocabulary: Vocabulary,
    terms: Terms,
    out: Optional[Tensor] = None,
) -> Tensor:
    """The gradient ``[T, V_r]`` of the logits, ``grad [T]`` being that of the losses. No autograd.

    With ``p`` the softmax over all V classes, and else as in :func:`token_losses`::

        dloss / dx_c = p_c (1 + 2 z lse) - (1 - e) [c = t] - e / V

    It is written to ``out`` if that is given, contiguous; that may be the logits.
    """
    grad = grad.to(log_sum.dtype).masked_fill(target == terms.ignore_index, 0).unsqueeze(-1)
    log_sum = log_sum.unsqueeze(-1)
    of_softmax = grad * (1 + 2 * terms.z_loss * log_sum) if terms.z_loss else grad
    here, local = _place(target, vocabulary)
    of_target = (grad * (terms.label_smoothing - 1)).masked_fill(~here, 0)
    of_all = grad * (terms.label_smoothing / vocabulary.size) if terms.label_smoothing else None
    kernels = kernels_of("cross_entropy", logits)
    gradient = kernels.gradient if kernels else _gradient
    return gradient(logits, local, log_sum, of_softmax, of_target, of_all, out)


def _statistics(logits: Tensor, here: Tensor, local: Tensor, *, with_sum: bool) -> Tensor:
    """What the others need of this rank's logits ``[T, V_r]``, in fp32 (of fp64: in fp64), as ``[3 or 4, T]``.

    The largest logit m, ``sum_c exp(x_c - m)``, the target's logit if it is here, else 0, and ``sum_c x_c``.
    """
    found = []
    for rows in _chunks(logits):
        x = logits[rows]
        dtype = torch.promote_types(x.dtype, torch.float32)
        largest = x.amax(1, keepdim=True).to(dtype)
        finite = largest.masked_fill(largest == -torch.inf, 0)  # all of them masked: exp(-inf - 0) is 0
        target = x.gather(1, local[rows]).to(dtype).masked_fill_(~here[rows], 0)
        sums = [x.sum(1, keepdim=True, dtype=dtype)] if with_sum else []
        found.append(torch.cat([largest, torch.sub(x, finite).exp_().sum(1, keepdim=True), target, *sums], 1))
    return torch.cat(found).t().contiguous()


def _gradient(
    logits: Tensor,
    local: Tensor,
    log_sum: Tensor,
    of_softmax: Tensor,
    of_target: Tensor,
    of_all: Optional[Tensor],
    out: Optional[Tensor],
) -> Tensor:
    """``exp(x_c - log_sum) of_softmax - of_all + [c = local] of_target`` ``[T, V_r]``; the others are ``[T, 1]``."""
    result = torch.empty_like(logits) if out is None else out
    for rows in _chunks(logits):
        part = torch.sub(logits[rows], log_sum[rows]).exp_().mul_(of_softmax[rows])
        if of_all is not None:
            part.sub_(of_all[rows])
        result[rows] = part.scatter_add_(1, local[rows], of_target[rows])
    return result


def _place(target: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Which targets ``[T]`` this rank has, ``[T, 1]``, and their places among its logits (0 for the others)."""
    local = target.long().unsqueeze(-1) - vocabulary.start
    here = (local >= 0) & (local < vocabulary.length)
    return here, local.masked_fill(~here, 0)


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Runs of the rows of ``[T, V_r]``; all of them in a graph, whose compiler fuses what is done to them."""
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    rows = max(1, _CHUNK // max(1, logits.shape[1]))
    for start in range(0, max(1, logits.shape[0]), rows):
        yield slice(start, start + rows)


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, vocabulary: Vocabulary, mesh: Mesh, terms: Terms
) -> Tensor:
    """The loss of each token, in fp32 (of fp64 logits: in fp64), the same bits on every tensor parallel rank.

    Forward it costs one all-gather of 3 numbers a token (4 with label smoothing), backward nothing.

    Args:
        logits: ``[T, V_r]``, this rank's part.
        target: ``[T]``, ids of the whole vocabulary or ``terms.ignore_index``, the same on every rank.
        vocabulary: where this rank's part lies.
        mesh: the ranks that share the vocabulary.
        terms: what the loss is made of.

    Returns:
        ``[T]``; 0 for tokens that do not count.
    """
    losses: Tensor = _CrossEntropy.apply(logits, target, vocabulary, terms, mesh)
    return losses
