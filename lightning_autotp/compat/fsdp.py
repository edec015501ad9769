"""What FSDP2 keeps to itself (torch 2.11 and 2.13): its parameter groups, and what comes before a reduction."""

from collections.abc import Callable, Iterator
from typing import Any

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
        if group.reduce_grads and group.is_unsharded:  # else no rank has run it, or nothing is reduced yet
            missing = []
            for held in group.fsdp_params:
                own = held._unsharded_param
                if own.requires_grad and own.grad is None and held.unsharded_accumulated_grad is None:
                    own.grad = own.new_zeros(own.shape)
                    missing.append(held.sharded_param)
            self._look([held.sharded_param for held in group.fsdp_params], missing)
        type(group).post_backward(group, *unused)


def reduce_after_backward(root: FSDPModule, loss: Tensor) -> None:
    """Let the backward pass of ``loss``, which runs inside of ``root``'s forward pass, end with the reduction."""
    state: Any = root._get_fsdp_state()
    if loss.requires_grad:
        loss.register_hook(state._pre_backward)


def _groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # several from torch 2.13 on
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]
