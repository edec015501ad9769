"""Autograd functions of which gradients of gradients can be taken, and ``torch.func``'s gradients."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from lightning_autotp.compat import transforms_are_active
from lightning_autotp.distributed.once_differentiable import once_differentiable


class TransformedFunction(torch.autograd.Function):
    """A function for ``torch.func.grad`` and ``vjp`` as well; ``vmap`` is refused.

    Outside of transforms its form :func:`without_context` is called.
    """

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


def without_context(function: type[TransformedFunction]) -> type[torch.autograd.Function]:
    """The same function with a forward that takes ``ctx``: Dynamo of torch 2.11 traces ``setup_context`` wrongly."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    namespace = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(f"{function.__name__}WithoutContext", (torch.autograd.Function,), namespace)


def is_transformed() -> bool:
    """Whether transforms of ``torch.func`` are under way, which need ``setup_context``."""
    return not torch.compiler.is_compiling() and transforms_are_active()


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
