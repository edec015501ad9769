"""What happens to gradients between the backward pass and the optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lightning_autotp.apply import Sharded
from lightning_autotp.layout import Layout
from lightning_autotp.mesh import Mesh


class TPGradients:
    """The gradients of a sharded model: partial ones are completed, and their norm is that of the whole model.

    A replicated parameter whose gradient is partial (``grad_allreduce``) has it multiplied by the tensor parallel size
    as it arrives, and averaged over the ranks before it is used. The average of a complete gradient is that gradient,
    so that it may be taken at any time and any number of times, gradient accumulation included.
    """

    def __init__(self, model: nn.Module, sharded: Sharded) -> None:
        self.mesh = sharded.mesh
        entries = sharded.plan.parameters
        self.layouts: dict[nn.Parameter, Layout] = {}
        self.partial: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            self.layouts[parameter] = entries[name].layout
            if entries[name].grad_allreduce:
                self.partial.append(parameter)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._complete = True
        self._handles = [self._scale(parameter) for parameter in self.partial]

    def remove(self) -> None:
        """Take the hooks off the parameters again."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def complete(self) -> None:
        """Make partial gradients whole, with one all-reduce for all of a dtype; nothing to do if they are."""
        if self._complete:
            return
        self._complete = True
        grads = [p.grad for p in self.partial if p.grad is not None]
        for dtype in dict.fromkeys(g.dtype for g in grads):
            of_dtype = [g for g in grads if g.dtype == dtype]
            flat = torch.cat([g.reshape(-1) for g in of_dtype])
            dist.all_reduce(flat, group=self.mesh.tp_group)
            flat /= self.mesh.tp_size
            parts = flat.split([g.numel() for g in of_dtype])
            torch._foreach_copy_(of_dtype, [part.view_as(g) for part, g in zip(parts, of_dtype)])

    def incomplete(self) -> dict[str, Tensor]:
        """The gradients that wait for :meth:`complete`, by name."""
        return {self._names[p]: p.grad for p in self.partial if p.grad is not None and not self._complete}

    def whole(self) -> dict[str, Tensor]:
        """The gradients of parameters that every rank holds whole, by name."""
        return {n: p.grad for p, n in self._names.items() if p.grad is not None and self.layouts[p].is_replicated}

    def whole_parameters(self) -> dict[str, Tensor]:
        """The parameters that every rank holds whole, by name."""
        return {name: p for p, name in self._names.items() if self.layouts[p].is_replicated}

    @torch.no_grad()
    def total_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The 2-norm, in float32 or float64, of the gradient of the unsharded parameters; the same on every rank.

        What is cut is summed over the ranks, what is whole counts once.
        """
        with_grad = [p for p in parameters if p.grad is not None]
        cut = [p.grad for p in with_grad if p.grad is not None and not self._is_whole(p)]
        whole = [p.grad for p in with_grad if p.grad is not None and self._is_whole(p)]
        device = next(iter(self.layouts)).device
        squares = _sum_of_squares(cut, device)
        dist.all_reduce(squares, group=self.mesh.tp_group)
        return (squares + _sum_of_squares(whole, device)).sqrt()

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients so that their true norm is at most ``max_norm``; returns the norm before."""
        parameters = list(parameters)
        norm = self.total_norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def _scale(self, parameter: nn.Parameter) -> "torch.utils.hooks.RemovableHandle":
        def scaled(grad: Tensor) -> Tensor:
            self._complete = False
            return grad * self.mesh.tp_size

        # a frozen parameter takes no hook, but may be thawed later: the hook stays on it
        trains = parameter.requires_grad
        handle = parameter.requires_grad_().register_hook(scaled)
        parameter.requires_grad_(trains)
        return handle

    def _is_whole(self, parameter: nn.Parameter) -> bool:
        layout = self.layouts.get(parameter)
        return layout is None or layout.is_replicated


def _sum_of_squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """In float32 at least."""
    total = torch.zeros((), device=device)
    for double in (False, True):
        of_kind = [g for g in grads if (g.dtype == torch.float64) is double]
        if of_kind:
            norms = torch._foreach_norm(of_kind, 2, dtype=torch.float64 if double else torch.float32)
            total = total + torch.stack(norms).square().sum()
    return total


def shared_scaler(scaler: Any, mesh: Mesh) -> ShardedGradScaler:
    """A loss scaler with the settings of ``scaler`` that skips a step on all ranks if one of them overflows."""
    shared = ShardedGradScaler(
        device=scaler._device,
        init_scale=scaler._init_scale,
        growth_factor=scaler.get_growth_factor(),
        backoff_factor=scaler.get_backoff_factor(),
        growth_interval=scaler.get_growth_interval(),
        enabled=scaler.is_enabled(),
        process_group=mesh.tp_group,
    )
    if scaler._scale is not None:
        shared.load_state_dict(scaler.state_dict())
    return shared
