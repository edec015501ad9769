"""The loss of a head's logits, or of what the head is given: functions for training steps, whether it is cut or not."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp.compat import autocast_dtype, has_hooks
from lightning_autotp.losses.vocab_parallel_cross_entropy import Terms, Vocabulary, vocab_parallel_cross_entropy
from lightning_autotp.losses.vocab_parallel_linear_cross_entropy import vocab_parallel_linear_cross_entropy
from lightning_autotp.parallel.linear import ColumnParallel

_REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    head: nn.Module,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """Cross entropy of logits whose head may be cut along the vocabulary; the same on every tensor parallel rank.

    With ``AutoTPStrategy(loss_parallel=True)`` a head's logits in training are this rank's part, and each rank reads
    nothing but them; see :mod:`lightning_autotp.losses.vocab_parallel_cross_entropy`. Of a head that is not cut it is
    :func:`torch.nn.functional.cross_entropy`, so that a LightningModule that calls this runs in any Trainer.

    Args:
        logits: ``[..., V]``, or this rank's part ``[..., V_r]``; computed in fp32, fp64 ones in fp64.
        target: ``[...]``, ids of the whole vocabulary.
        head: the linear that made the logits, as the model holds it.
        ignore_index: the target of tokens that do not count.
        label_smoothing: as in torch.
        reduction: ``"mean"`` over the tokens that count (NaN if there are none, as in torch), ``"sum"`` or ``"none"``.
        z_loss: adds ``z_loss * logsumexp(logits) ** 2`` to the loss of each token that counts (PaLM,
            arXiv:2204.02311, section 5).

    Returns:
        A scalar, or ``[...]`` with reduction ``"none"``.

    Raises:
        ValueError: if the arguments do not go together; the message names the argument and the fix.
    """
    linear = linear_of(head)
    _check("logits", logits, target, label_smoothing, reduction)
    if not logits.shape[-1] and defers(linear):
        raise ValueError(
            "logits: with loss_parallel='fused' the head makes none in training, and the model's own loss is computed"
            " without; give the model `labels`, or use loss_parallel=True."
        )
    terms = Terms(ignore_index, label_smoothing, z_loss)
    rows = target.reshape(-1)
    losses = _losses(logits.reshape(-1, logits.shape[-1]), rows, linear, terms)
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (rows != ignore_index).sum()


def linear_cross_entropy(
    hidden: Tensor,
    target: Tensor,
    head: nn.Module,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """``cross_entropy(head(hidden), target, head)`` without the logits: there are some thousand tokens' at a time.

    Instead of logits and their gradients, the gradients of ``hidden`` and, in fp32, of the head's parameters wait for
    the backward pass; see :mod:`lightning_autotp.losses.vocab_parallel_linear_cross_entropy`. The head may be cut along
    the vocabulary or whole, in any Trainer. Inside ``torch.compile`` it breaks the graph (with ``fullgraph=True`` that
    is an error). It can be differentiated once.

    Args:
        hidden: ``[..., H]``, what the head would be given, the same on every tensor parallel rank.
        target: ``[...]``, ids of the whole vocabulary.
        head: the linear, as the model holds it. It is not called: neither are hooks on it.
        ignore_index: the target of tokens that do not count.
        label_smoothing: as in torch.
        reduction: ``"mean"`` over the tokens that count (NaN if there are none, as in torch) or ``"sum"``.
        z_loss: as in :func:`cross_entropy`.

    Returns:
        A scalar, in fp32 (fp64, if ``hidden`` is).

    Raises:
        ValueError: if the arguments do not go together, or the head computes something else than its linear; the
            message names the argument and the fix.
    """
    if reduction == "none":
        raise ValueError(
            "reduction: 'none' needs each token's loss in the backward pass, and the gradients of their sum are made"
            " before it; use 'sum' or 'mean', or lightning_autotp.cross_entropy with the head's logits."
        )
    _check("hidden", hidden, target, label_smoothing, reduction)
    reason = other_computation(head) or ("has hooks, which would not run" if has_hooks(head) else "")
    if reason:
        raise ValueError(
            f"head: it {reason}, so that its loss cannot be fused with it; call the head and use"
            " lightning_autotp.cross_entropy with its logits."
        )
    return fused_loss(hidden, target, linear_of(head), Terms(ignore_index, label_smoothing, z_loss), reduction)


def other_computation(head: nn.Module) -> str:
    """Why the output of ``head`` may be another than its weight and bias make; "" if it is none."""
    if linear_of(head) is not head:
        return f"is wrapped by PEFT ({type(head).__name__})"
    if type(head).forward not in (nn.Linear.forward, ColumnParallel.forward) or "forward" in vars(head):
        return f"has a forward of its own ({type(head).__name__})"
    return ""


def fused_loss(hidden: Tensor, target: Tensor, head: nn.Linear, terms: Terms, reduction: str) -> Tensor:
    """The loss, ``"mean"`` or ``"sum"``, of what a linear makes of ``hidden [..., H]``, for targets ``[...]``."""
    if hidden.shape[-1] != head.in_features:
        raise ValueError(
            f"hidden: the last size is {hidden.shape[-1]}, but the head has {head.in_features} input features; give"
            " what the head would be given."
        )
    device = hidden.device.type
    if hidden.dtype != head.weight.dtype and autocast_dtype(device) is None:
        raise ValueError(
            f"hidden: it is {hidden.dtype}, but the head's weight is {head.weight.dtype}; cast one of them, or use"
            f" torch.autocast({device!r})."
        )
    found = vocabulary_of(head)
    cut = head if found is not None and isinstance(head, ColumnParallel) else None
    rows = target.reshape(-1)
    total = vocab_parallel_linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        head.bias,
        rows,
        found or Vocabulary(0, head.out_features, head.out_features),
        terms,
        None if cut is None else cut.mesh,
        reduces=cut is not None and cut.reduces,
        overlap=cut is not None and cut.overlap,
    )
    if reduction == "sum":
        return total
    count = (rows != terms.ignore_index).sum()
    # no tokens: the loss is NaN, but their gradients are zeros, and not 0 times the infinite 1 / 0
    return (total / count.clamp(min=1)).masked_fill(count == 0, torch.nan)


def linear_of(head: nn.Module) -> nn.Linear:
    linear = getattr(head, "base_layer", getattr(head, "original_module", head))  # PEFT's, around what it adapts
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"head: the nn.Linear that made the logits belongs here (a model's `lm_head`), not {type(head).__name__}."
        )
    return linear


def _check(name: str, given: Tensor, target: Tensor, label_smoothing: float, reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is none of {', '.join(map(repr, _REDUCTIONS))}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1.")
    if not given.is_floating_point():
        raise ValueError(f"{name}: floating-point numbers belong here, not {given.dtype}.")
    if target.is_floating_point() or target.shape != given.shape[:-1]:
        raise ValueError(
            f"target: ids of shape {list(given.shape[:-1])} belong to {name} {list(given.shape)}, not"
            f" {list(target.shape)} of {target.dtype}; give one id for each row of {name}, not probabilities."
        )


def _losses(logits: Tensor, target: Tensor, head: nn.Linear, terms: Terms) -> Tensor:
    """The loss of each row of logits ``[T, V]`` or ``[T, V_r]``."""
    width, full = logits.shape[1], head.out_features
    vocabulary = vocabulary_of(head)
    if vocabulary is None or width == full != vocabulary.length:
        if width != full:
            raise ValueError(
                f"logits: the last size is {width}, but the head has {full} output features; give the logits that"
                " `head` made, or the head that made them."
            )
        if vocabulary is None or torch.is_grad_enabled() and logits.requires_grad:
            return _whole(logits, target, terms)
        logits = logits.narrow(1, vocabulary.start, vocabulary.length)
    elif width != vocabulary.length:
        raise ValueError(
            f"logits: the last size is {width}, but the head has {full} output features, of which this rank holds"
            f" {vocabulary.length}; give the logits that `head` made, or the head that made them."
        )
    assert isinstance(head, ColumnParallel)
    return vocab_parallel_cross_entropy(logits, target, vocabulary, head.mesh, terms)


def _whole(logits: Tensor, target: Tensor, terms: Terms) -> Tensor:
    """The same losses ``[T]`` of all logits ``[T, V]``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        logits,
        target.long(),
        ignore_index=terms.ignore_index,
        label_smoothing=terms.label_smoothing,
        reduction="none",
    )
    if terms.z_loss:
        squares = logits.logsumexp(1).square()
        losses = losses + terms.z_loss * squares.masked_fill(target == terms.ignore_index, 0)
    return losses


def defers(head: nn.Module) -> bool:
    return isinstance(head, ColumnParallel) and head.defers


def vocabulary_of(head: nn.Module) -> Optional[Vocabulary]:
    """Which of its outputs a sharded head has here; None where every rank has them all."""
    if not isinstance(head, ColumnParallel) or head.mesh.tp_size == 1:
        return None
    layout = head.layout
    size = layout.shape[layout.dim or 0]
    if any(len(part) != 1 for part in layout.parts) or sum(layout.widths) != size:
        raise ValueError(
            f"head: a vocabulary of {size} that is cut into {layout.parts} is not one interval a rank; give the rule"
            " that cuts it no `shape`."
        )
    return Vocabulary(*layout.parts[head.mesh.tp_rank][0], size)
