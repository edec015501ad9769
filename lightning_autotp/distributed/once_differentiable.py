"""Backward passes that are computed once and not differentiated."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as torchs_once_differentiable


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's, for functions whose gradients depend on what they saved, too.

    Torch raises only where incoming gradients have a graph. The gradient of what was saved would be lost without a word
    where these are constants, as that of a loss is.

    Raises:
        RuntimeError: when gradients of the gradients are asked for.
    """
    checked = torchs_once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # gradients are recorded: create_graph=True
            grads = tuple(_with_graph(grad) for grad in grads)
        return checked(ctx, *grads)

    return wrapper


def _with_graph(grad: Any) -> Any:
    return grad.detach().requires_grad_() if isinstance(grad, Tensor) and grad.is_floating_point() else grad
