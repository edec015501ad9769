"""The loss of a sharded vocabulary: ``cross_entropy`` for training steps, Hugging Face models' own, the switch."""

import inspect
from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp.parallel.cross_entropy import Terms, Vocabulary, vocab_parallel_cross_entropy
from lightning_autotp.parallel.linear import ColumnParallel, ColumnParallelLinear
from lightning_autotp.plan import ShardingPlan

_HEAD_NAMES = ("lm_head", "embed_out", "output_layer", "decoder")
_REDUCTIONS = ("mean", "sum", "none")
_BY_ID = ("Chameleon", "Inkling")
"""Beginnings of the names of transformers' classes whose forward picks logits by their ids, which a part has not."""


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
    nothing but them; see :mod:`lightning_autotp.parallel.cross_entropy`. Of a head that is not cut it is
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
    linear = _linear(head)
    _check(logits, target, label_smoothing, reduction)
    terms = Terms(ignore_index, label_smoothing, z_loss)
    rows = target.reshape(-1)
    losses = _losses(logits.reshape(-1, logits.shape[-1]), rows, linear, terms)
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (rows != ignore_index).sum()


def _linear(head: nn.Module) -> nn.Linear:
    linear = getattr(head, "base_layer", getattr(head, "original_module", head))  # PEFT's, around what it adapts
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"head: the nn.Linear that made the logits belongs here (a model's `lm_head`), not {type(head).__name__}."
        )
    return linear


def _check(logits: Tensor, target: Tensor, label_smoothing: float, reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is none of {', '.join(map(repr, _REDUCTIONS))}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1.")
    if not logits.is_floating_point():
        raise ValueError(f"logits: floating-point numbers belong here, not {logits.dtype}.")
    if target.is_floating_point() or target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target: ids of shape {list(logits.shape[:-1])} belong to logits {list(logits.shape)}, not"
            f" {list(target.shape)} of {target.dtype}; give one id for each row of logits, not probabilities."
        )


def _losses(logits: Tensor, target: Tensor, head: nn.Linear, terms: Terms) -> Tensor:
    """The loss of each row of logits ``[T, V]`` or ``[T, V_r]``."""
    width, full = logits.shape[1], head.out_features
    vocabulary = _vocabulary(head)
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


def _vocabulary(head: nn.Module) -> Optional[Vocabulary]:
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


# -- AutoTPStrategy(loss_parallel=True) -------------------------------------------------------------------------------


class _ParallelLoss:
    """What transformers' ``ForCausalLMLoss`` computes, of a head that is cut along the vocabulary.

    ``logits [B, S, V_r]`` or ``[B, S, V]``, ``labels [B, S]`` not shifted yet -> a scalar. Source: transformers,
    ``loss/loss_utils.py``.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.full = _linear(head).out_features

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: Optional[int] = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tensor:
        if vocab_size not in (None, self.full, logits.shape[-1]):
            raise ValueError(
                f"loss_parallel: the model reads {vocab_size} of the {self.full} outputs of its head in its loss; leave"
                " `loss_parallel` off."
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(logits.shape[:-1]).to(logits.device)
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = cross_entropy(logits, target, self.head, ignore_index=ignore_index, reduction=reduction)
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def parallel_hf_loss(model: Any) -> None:
    """Make a Hugging Face model compute its own loss from the parts of its sharded head; twice is no error.

    A ``loss_function`` that the user gave it stays.

    Raises:
        ValueError: if the model's class computes its loss otherwise than through transformers' ``ForCausalLMLoss``.
    """
    head = model.get_output_embeddings()
    _vocabulary(_linear(head))
    name = type(model).__name__
    if name.startswith(_BY_ID):
        raise ValueError(
            f"loss_parallel: {name} picks logits by their ids inside its forward, and each rank would have its part of"
            " them only; leave `loss_parallel` off."
        )
    if not _calls_loss_function(type(model)):
        raise ValueError(
            f"loss_parallel: {name} computes its loss inside its forward and needs all logits for it; leave"
            " `loss_parallel` off (lightning_autotp.cross_entropy takes all logits, too), or train it as a class whose"
            " forward takes no `labels`, with lightning_autotp.cross_entropy in your training_step."
        )
    if "_loss_function" in model.__dict__:  # ours, of an earlier setup, or the user's
        return
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"loss_parallel: the loss of {name} is {model.loss_function.__name__}, which needs all logits; leave"
            f" `loss_parallel` off, or set `{name}.loss_function` to one that calls lightning_autotp.cross_entropy."
        )
    model.loss_function = _ParallelLoss(head)


def _calls_loss_function(cls: type) -> bool:
    """Whether a model's loss is what its ``loss_function`` gives, or there is none: its forward takes no labels."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            forward = inspect.unwrap(vars(base)["forward"])
            if "loss_function" in forward.__code__.co_names:
                return True
            if "super" not in forward.__code__.co_names:
                return "labels" not in inspect.signature(forward).parameters
    return False


def set_loss_parallel(model: nn.Module, plan: ShardingPlan, on: bool) -> None:
    """Make the heads of a sharded model keep their part of the logits while gradients are recorded, or stop it.

    Heads are what Hugging Face models give as output embeddings; without such models, column linears with gathered
    outputs that are tied to an embedding cut along the vocabulary, or else those that have a head's name.

    Raises:
        ValueError: if there is no such head, or a Hugging Face model computes its loss in a way that needs all logits.
    """
    if not any(not entry.layout.is_replicated for entry in plan.parameters.values()):
        return
    heads = dict(_gathering(model, plan))
    models = [(m, inside) for m in model.modules() if _is_hf(m) and (inside := _inside(_output_embeddings(m), heads))]
    for module in heads.values():
        module.keeps_part = False
    for hf_model, _ in models:
        if isinstance(hf_model.__dict__.get("_loss_function"), _ParallelLoss) and not on:
            del hf_model._loss_function
    if not on:
        return
    found = [head for _, inside in models for head in inside]
    found = found or _tied(model, plan, heads)
    found = found or [module for path, module in heads.items() if path.rpartition(".")[2] in _HEAD_NAMES]
    if not found:
        raise ValueError(
            "loss_parallel: there is no head to keep its part of the logits: no linear that is cut by a column rule"
            " with `gather_output` is a Hugging Face model's output embedding, tied to an embedding cut along the"
            f" vocabulary, or named {', '.join(_HEAD_NAMES)}; cut the head so, or leave `loss_parallel` off."
        )
    for hf_model, _ in models:
        parallel_hf_loss(hf_model)
    for head in found:
        _vocabulary(head)
        head.keeps_part = True


def _gathering(model: nn.Module, plan: ShardingPlan) -> Iterator[tuple[str, ColumnParallelLinear]]:
    for entry in plan.parameters.values():
        module = model.get_submodule(entry.module)
        if entry.gather_output and isinstance(module, ColumnParallelLinear):
            yield entry.module, module


def _is_hf(module: nn.Module) -> bool:
    return hasattr(type(module), "loss_function") and hasattr(type(module), "get_output_embeddings")


def _output_embeddings(hf_model: Any) -> Optional[nn.Module]:
    head: Optional[nn.Module] = hf_model.get_output_embeddings()
    return head


def _inside(head: Optional[nn.Module], heads: dict[str, ColumnParallelLinear]) -> list[ColumnParallelLinear]:
    """Those of ``heads`` that are ``head`` or lie in it: PEFT wraps a linear and adds one that makes outputs, too."""
    inside = set() if head is None else {id(module) for module in head.modules()}
    return [module for module in heads.values() if id(module) in inside]


def _tied(model: nn.Module, plan: ShardingPlan, heads: dict[str, ColumnParallelLinear]) -> list[ColumnParallelLinear]:
    embeddings = [model.get_submodule(e.module) for e in plan.parameters.values() if e.kind == "vocabulary"]
    weights = {id(embedding.weight) for embedding in embeddings}
    return [module for module in heads.values() if id(module.weight) in weights]
