"""Heads that leave their logits to the loss: an empty output carries to it what the head was given."""

from collections.abc import Callable
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor

_INPUT = "_autotp_head_input"
"""The attribute of logits that were left out: the head's input until it is taken, and the versions of both."""

Function = TypeVar("Function", bound=Callable[..., Any])


def computed_eagerly(function: Function) -> Function:
    """``function``, which breaks the graphs of ``torch.compile``: its loop would be unrolled, for one length only."""
    eager: Function = torch.compiler.disable(function, reason="the loss of a fused head is computed eagerly")
    return eager


class _LeftOut(torch.autograd.Function):
    """Forward: logits that are not there. Backward: an error, where something was computed of them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # DDP hands on all outputs of a model, and no gradients of those without
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        if grads[0] is not None:
            raise ValueError(
                "loss_parallel: 'fused' leaves the logits out in training, and a loss was computed of them besides the"
                " model's own; use loss_parallel=True."
            )


@computed_eagerly
def leave_out_logits(x: Tensor) -> Tensor:
    """Logits ``[..., 0]`` that carry what their head was given, ``x [..., H]``, to the loss."""
    logits: Tensor = _LeftOut.apply(x.new_empty(*x.shape[:-1], 0).requires_grad_())
    setattr(logits, _INPUT, (x, _versions(logits, x)))
    return logits


@computed_eagerly
def take_head_input(logits: Tensor) -> Optional[Tensor]:
    """What the head was given, if ``logits`` are the object that it put out, both unchanged; they keep it no more."""
    x, versions = getattr(logits, _INPUT, (None, ()))
    if x is None or versions != _versions(logits, x):
        return None
    setattr(logits, _INPUT, (None, ()))
    taken: Tensor = x
    return taken


@computed_eagerly
def is_taken(logits: Tensor) -> bool:
    """Whether a loss was computed of what the head of ``logits`` was given."""
    return getattr(logits, _INPUT, ("", ()))[0] is None


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
