"""Autograd functions of which gradients of gradients can be taken, and ``torch.func``'s gradients."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from lightning_autotp.distributed.once_differentiable import once_differentiable


class TransformedFunction(torch.autograd.Function):
    """A function for ``torch.func.grad`` and ``vjp``; ``vmap`` is refused."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refuse.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "torch.func.vmap goes over a layer that is sharded for tensor parallelism, whose collectives cannot be"
            " batched. Call the module on the batch itself (layers take any leading dims), or loop over it."
        )


def twice_differentiable(again: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a backward pass that is itself recorded (``create_graph=True``) be ``again``, made of differentiable calls.

    Args:
        again: computes the same gradients, of the same arguments.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        once = once_differentiable(backward)

        @wraps(backward)
        def wrapper(ctx: Any, *grads: Any) -> Any:
            # compiled graphs are differentiated once: torch.compile says so itself
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return again(ctx, *grads)
            return once(ctx, *grads)

        return wrapper

    return decorate
