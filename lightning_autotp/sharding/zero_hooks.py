"""What is done around the modules that FSDP2 gathers: parameters on demand, and outputs whose gradients it sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_autotp.compat import tree_leaves, tree_map
from lightning_autotp.distributed.dp_shards import is_dp_sharded


class OnDemand:
    """Gathers the parameters of a module that runs outside of the call that gathers them.

    A step may call a layer of a block, or go on after a backward pass, and ``generate`` runs a model inside of the one
    that is sharded. What is frozen or thawed in a step, as ``toggle_optimizer`` does, is so for what is gathered, too.
    """

    def __init__(self, modules: list[FSDPModule], sharded: dict[nn.Parameter, nn.Parameter]) -> None:
        self._sharded = sharded
        self._of: dict[nn.Module, FSDPModule] = {}
        for module in modules:  # outermost first, so that the innermost wins
            for inner in module.modules():  # type: ignore[attr-defined]
                if any(is_dp_sharded(p) for p in inner._parameters.values()):
                    self._of[inner] = module

    @property
    def owners(self) -> list[nn.Module]:
        """The modules that have such parameters themselves."""
        return list(self._of)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if any(is_dp_sharded(p) for p in module._parameters.values()):
            self._of[module].unshard()
        for parameter in module._parameters.values():
            sharded = None if parameter is None else self._sharded.get(parameter)
            if sharded is not None and sharded.requires_grad != parameter.requires_grad:  # type: ignore[union-attr]
                parameter.requires_grad_(sharded.requires_grad)  # type: ignore[union-attr]


def with_own_memory(block: nn.Module, args: Any, output: Any) -> Any:
    """``output`` of a block, as FSDP2 can see its gradient arrive, before which it gathers the block's parameters.

    It does so by hooks on tensors, which changing a view in place takes off.

    Raises:
        ValueError: if there are no tensors in it that can be seen.
    """
    if not torch.is_grad_enabled():
        return output
    leaves = tree_leaves(output)
    if not any(isinstance(leaf, Tensor) for leaf in leaves) and any(hasattr(leaf, "__dict__") for leaf in leaves):
        raise ValueError(
            f"zero_stage: a block ({type(block).__name__}) returns {type(leaves[0]).__name__}, in which its tensors are"
            " not seen. Return tensors, tuples, lists, dicts or registered dataclasses from it, or use zero_stage=0."
        )
    viewed = any(isinstance(leaf, Tensor) and leaf._base is not None and leaf.requires_grad for leaf in leaves)
    return tree_map(_own, output) if viewed else output


def _own(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf._base is not None and leaf.requires_grad else leaf
