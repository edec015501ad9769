"""Hugging Face models' own loss of a sharded vocabulary, and the switch: ``AutoTPStrategy(loss_parallel=...)``."""

from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp.compat import forget_loss_function, given_loss_function
from lightning_autotp.config.switches import FUSED, LossParallel
from lightning_autotp.introspection.forward_source import calls_loss_function, forwards_of, names_loss_function
from lightning_autotp.losses.functional import (
    cross_entropy,
    defers,
    fused_loss,
    linear_of,
    other_computation,
    vocabulary_of,
)
from lightning_autotp.losses.vocab_parallel_cross_entropy import Terms
from lightning_autotp.parallel.deferred_logits import is_taken, take_head_input
from lightning_autotp.parallel.linear import ColumnParallelLinear
from lightning_autotp.plans.plan import ShardingPlan

_HEAD_NAMES = ("lm_head", "embed_out", "output_layer", "decoder")

_BY_ID = ("Chameleon", "Inkling")
"""Beginnings of the names of transformers' classes whose forward picks logits by their ids, which a part has not."""


class _ParallelLoss:
    """What transformers' ``ForCausalLMLoss`` computes, of a head that is cut along the vocabulary.

    ``logits [B, S, V_r]`` or ``[B, S, V]``, or of a head that leaves them out ``[B, S, 0]``, ``labels [B, S]`` not
    shifted yet -> a scalar. Source: transformers, ``loss/loss_utils.py``.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.full = linear_of(head).out_features

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
        if defers(self.head) and torch.is_grad_enabled() and logits.shape[-1] != self.full:
            hidden = self._head_input(logits)
            loss = fused_loss(hidden, target, linear_of(self.head), Terms(ignore_index), reduction)
        else:
            loss = cross_entropy(logits, target, self.head, ignore_index=ignore_index, reduction=reduction)
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def _head_input(self, logits: Tensor) -> Tensor:
        if is_taken(logits):
            raise ValueError(
                "loss_parallel: 'fused' keeps what the head is given for one loss, and of these logits a second one is"
                " computed; use loss_parallel=True."
            )
        hidden = take_head_input(logits)
        if hidden is None:
            raise ValueError(
                "loss_parallel: 'fused' computes the loss of what the head is given, and this model changes its logits"
                " before its loss (it scales, caps or casts them); use loss_parallel=True."
            )
        return hidden


def parallel_hf_loss(model: Any) -> None:
    """Make a Hugging Face model compute its own loss from the parts of its sharded head; twice is no error.

    A ``loss_function`` that the user gave it stays.

    Raises:
        ValueError: if the model's class computes its loss otherwise than through transformers' ``ForCausalLMLoss``.
    """
    head = model.get_output_embeddings()
    vocabulary_of(linear_of(head))
    name = type(model).__name__
    if name.startswith(_BY_ID):
        raise ValueError(
            f"loss_parallel: {name} picks logits by their ids inside its forward, and each rank would have its part of"
            " them only; leave `loss_parallel` off."
        )
    if not calls_loss_function(type(model)):
        raise ValueError(
            f"loss_parallel: {name} computes its loss inside its forward and needs all logits for it; leave"
            " `loss_parallel` off (lightning_autotp.cross_entropy takes all logits, too), or train it as a class whose"
            " forward takes no `labels`, with lightning_autotp.cross_entropy in your training_step."
        )
    if given_loss_function(model) is not None:  # ours, of an earlier setup, or the user's
        return
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"loss_parallel: the loss of {name} is {model.loss_function.__name__}, which needs all logits; leave"
            f" `loss_parallel` off, or set `{name}.loss_function` to one that calls lightning_autotp.cross_entropy."
        )
    model.loss_function = _ParallelLoss(head)


def parallel_loss_head(module: nn.Module) -> Optional[Any]:
    """The head of which ``module``, a Hugging Face model, computes its loss from the parts of its outputs, or None."""
    loss = given_loss_function(module)
    return linear_of(loss.head) if isinstance(loss, _ParallelLoss) else None


def _refuse_fused(model: Any) -> None:
    """Refuse a Hugging Face model whose loss, or whose head, is not all that happens to the head's input."""
    name, instead = type(model).__name__, "use loss_parallel=True"
    reason = other_computation(model.get_output_embeddings())
    if reason:
        raise ValueError(
            f"loss_parallel: 'fused' computes what a linear does, but the head of {name} {reason}; {instead}."
        )
    if not isinstance(model.loss_function, _ParallelLoss):
        raise ValueError(
            f"loss_parallel: 'fused' leaves no logits to the loss_function that {name} was given; {instead}, or remove"
            " that loss_function."
        )
    if not any(names_loss_function(forward) for forward in forwards_of(type(model))):
        raise ValueError(
            f"loss_parallel: 'fused' needs a model that computes its loss, and the forward of {name} takes no `labels`;"
            f" {instead}, or call lightning_autotp.linear_cross_entropy in your training_step."
        )


def set_loss_parallel(model: nn.Module, plan: ShardingPlan, on: LossParallel) -> None:
    """Make the heads of a sharded model keep their part of the logits while gradients are recorded, or stop it.

    Heads are what Hugging Face models give as output embeddings; without such models, column linears with gathered
    outputs that are tied to an embedding cut along the vocabulary, or else those that have a head's name. With
    ``"fused"`` heads of Hugging Face models make no logits then, and the model's loss is computed of their input.

    Raises:
        ValueError: if there is no such head, or a Hugging Face model computes its loss in a way that needs all logits,
            or, fused, any.
    """
    if not any(not entry.layout.is_replicated for entry in plan.parameters.values()):
        return
    heads = dict(_gathering(model, plan))
    models = [(m, inside) for m in model.modules() if _is_hf(m) and (inside := _inside(_output_embeddings(m), heads))]
    for module in heads.values():
        module.keeps_part = module.defers = False
    for hf_model, _ in models:
        if isinstance(given_loss_function(hf_model), _ParallelLoss) and not on:
            forget_loss_function(hf_model)
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
        if on == FUSED:
            _refuse_fused(hf_model)
    if on == FUSED and not models:
        raise ValueError(
            "loss_parallel: 'fused' is for the loss of a Hugging Face model, and here is none whose head is cut; call"
            " lightning_autotp.linear_cross_entropy in your training_step, with loss_parallel=True or without."
        )
    for head in found:
        vocabulary_of(head)
        head.keeps_part, head.defers = True, on == FUSED


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
