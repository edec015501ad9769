"""What FSDP2 keeps to itself (torch 2.11 and 2.13): its parameter groups, and what comes before a reduction."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules of ``model`` whose parameters are gathered together, outermost first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gathered_parameters(module: FSDPModule) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of ``module``'s own group: each as it is sharded, and as the forward pass sees it.

    The latter is one object from the first time it was gathered on, so that hooks on it stay.
    """
    for group in _groups(module):
        for held in group.fsdp_params:
            if hasattr(held, "_unsharded_param"):
                yield held.sharded_param, held._unsharded_param


Look = Callable[[list[nn.Parameter], list[nn.Parameter]], None]
"""Is told the parameters of a group, as they are sharded, and which of them had no gradient."""


def before_reduction(module: FSDPModule, look: Look) -> None:
    """Let unused parameters of ``module``'s own group have zeros for gradients, before these are reduced.

    FSDP2 reduces the gradients that a rank has: where another rank has others, numbers end up in wrong places.
    """
    for group in _groups(module):
        group.post_backward = _Filled(group, look)


class _Filled:
    """A group's ``post_backward``, after its gradients are filled."""

    def __init__(self, group: Any, look: Look) -> None:
        self._group, self._look = group, look

    def __call__(self, *unused: Any) -> None:
        group = self._group
        if group.reduce_grads and (group.is_unsharded or any(map(_is_waiting, group.fsdp_params))):
            missing = []
            for held in group.fsdp_params:
                own = held._unsharded_param
                if own.requires_grad and not _is_waiting(held):
                    own.grad = torch.zeros(held._orig_size, dtype=own.dtype, device=own.device)
                    missing.append(held.sharded_param)
            self._look([held.sharded_param for held in group.fsdp_params], missing)
        type(group).post_backward(group, *unused)


def _is_waiting(held: Any) -> bool:
    """Whether a parameter has a gradient that is not reduced."""
    own = getattr(held, "_unsharded_param", None)
    return own is not None and (own.grad is not None or held.unsharded_accumulated_grad is not None)


def discard_gradients(module: FSDPModule, parameters: Collection[nn.Parameter]) -> None:
    """Forget gradients of ``parameters``, as they are sharded, that are not reduced, in ``module``'s own group."""
    for group in _groups(module):
        for held in (h for h in group.fsdp_params if _is_waiting(h) and h.sharded_param in parameters):
            held._unsharded_param.grad = held.unsharded_accumulated_grad = None


def recover(root: FSDPModule) -> None:
    """Make what an exception has left of a step as it was before it; torch 2.11 has no way to."""
    state: Any = root._get_fsdp_state()
    if hasattr(state, "_reset_iter_state"):
        state._reset_iter_state()


def reduce_after_backward(root: FSDPModule, loss: Tensor) -> None:
    """Let the backward pass of ``loss``, which runs inside of ``root``'s forward pass, end with the reduction."""
    state: Any = root._get_fsdp_state()
    if loss.requires_grad:
        loss.register_hook(state._pre_backward)


def _groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # several from torch 2.13 on
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]
