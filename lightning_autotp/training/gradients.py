"""What happens to gradients between the backward pass and the optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lightning_autotp.compat import foreach_copy_, foreach_norm, scaler_settings
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout
from lightning_autotp.sharding.state import Sharded


@dataclass(frozen=True)
class Partial:
    """A run of a parameter whose gradient is a sum over the ranks ``owners``: all of it where ``dim`` is None."""

    parameter: nn.Parameter
    owners: tuple[int, ...]
    dim: Optional[int] = None
    start: int = 0
    length: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """This run of a tensor shaped like the parameter."""
        return tensor if self.dim is None else tensor.narrow(self.dim, self.start, self.length)


class TPGradients:
    """The gradients of a sharded model: partial ones are completed, and their norm is that of the whole model.

    A gradient is partial where a whole parameter sees only its rank's heads (``grad_allreduce``), and where ranks hold
    the same key and value heads. It is multiplied by the number of ranks that share it as it arrives, and averaged over
    them before it is used. The average of a complete gradient is that gradient, so that it may be taken at any time and
    any number of times, gradient accumulation included.

    Args:
        model: a sharded model.
        sharded: how it was sharded.
        compiled: whether some of it is compiled. Then each rank picks its fastest kernels by timing them, which round
            otherwise than another's: the gradients of whole parameters are averaged, too, so that these stay the same.
    """

    def __init__(self, model: nn.Module, sharded: Sharded, *, compiled: bool = False) -> None:
        self.mesh = sharded.mesh
        entries = sharded.plan.parameters
        self.layouts: dict[nn.Parameter, Layout] = {}
        self.partial: dict[nn.Parameter, list[Partial]] = {}
        self.rounded: list[nn.Parameter] = []
        everyone = tuple(range(self.mesh.tp_size))
        for name, parameter in model.named_parameters():
            self.layouts[parameter] = layout = entries[name].layout
            if entries[name].grad_allreduce:
                self.partial[parameter] = [Partial(parameter, everyone)]
            elif compiled and layout.is_replicated and parameter.is_floating_point() and self.mesh.tp_size > 1:
                self.rounded.append(parameter)
            shares = layout.shared(self.mesh.tp_rank)
            if shares:
                self.partial[parameter] = [
                    Partial(parameter, share.owners, layout.dim, share.start, share.length) for share in shares
                ]
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._complete = self._averaged = True
        self._handles = [self._on_gradient(p, self._scaled(p, runs)) for p, runs in self.partial.items()]
        self._handles += [self._on_gradient(p, self._seen) for p in self.rounded]

    def remove(self) -> None:
        """Take the hooks off the parameters again."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def complete(self, *, average: bool = True) -> None:
        """Make partial gradients whole, with one all-reduce for all of a dtype and of a set of ranks.

        Those of whole parameters of a compiled model are averaged, unless without ``average``: so that ranks that
        differ by more than rounding can be told before.
        """
        waiting: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = defaultdict(list)
        for parameter, runs in () if self._complete else self.partial.items():
            if parameter.grad is not None:
                for run in runs:
                    waiting[(run.owners, parameter.grad.dtype)].append(run.of(parameter.grad))
        self._complete = True
        if average and not self._averaged:
            self._averaged = True
            for parameter in self.rounded:
                # one that is not there on this rank may be on others: all reduce as many numbers
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                if parameter.requires_grad and grad.layout is torch.strided:
                    # in fp32, of halves: what fp16 holds once it may not hold twice
                    dtype = torch.promote_types(grad.dtype, torch.float32)
                    waiting[(tuple(range(self.mesh.tp_size)), dtype)].append(grad)
        # in one order on all ranks, though each takes part in some of these only
        for owners, dtype in sorted(waiting, key=str):
            grads = waiting[(owners, dtype)]
            flat = torch.cat([g.reshape(-1) for g in grads]).to(dtype)
            flat = self.mesh.collectives.all_reduce(flat, owners)
            flat /= len(owners)
            parts = flat.split([g.numel() for g in grads])
            foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])

    def incomplete(self) -> dict[str, Tensor]:
        """The gradients of whole parameters that wait for :meth:`complete`, by name."""
        whole = [p for p in self.partial if self._is_whole(p) and not self._complete]
        return {self._names[p]: p.grad for p in whole if p.grad is not None}

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
        cut = [piece for p in with_grad if not self._is_whole(p) for piece in self._pieces(p)]
        whole = [(p.grad, 1) for p in with_grad if p.grad is not None and self._is_whole(p)]
        device = next(iter(self.layouts)).device
        squares = _sum_of_squares(cut, device)
        squares = self.mesh.collectives.all_reduce(squares)
        return (squares + _sum_of_squares(whole, device)).sqrt()

    def _pieces(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, int]]:
        """The gradient of a cut parameter in runs, each with the number of ranks that hold it."""
        grad = parameter.grad
        assert grad is not None
        end, dim = 0, self.layouts[parameter].dim or 0
        for run in self.partial.get(parameter, []):
            yield grad.narrow(dim, end, run.start - end), 1
            yield run.of(grad), len(run.owners)
            end = run.start + run.length
        yield grad.narrow(dim, end, grad.shape[dim] - end), 1

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients so that their true norm is at most ``max_norm``; returns the norm before."""
        parameters = list(parameters)
        norm = self.total_norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def _scaled(self, parameter: nn.Parameter, runs: list[Partial]) -> Callable[[Tensor], Tensor]:
        factor: Any = self.mesh.tp_size
        if runs[0].dim is not None:
            width = [1] * parameter.ndim
            width[runs[0].dim] = parameter.shape[runs[0].dim]
            factor = torch.ones(width, device=parameter.device)
            for run in runs:
                run.of(factor).fill_(len(run.owners))

        def scaled(grad: Tensor) -> Tensor:
            self._complete = False
            return grad * (factor if isinstance(factor, int) else factor.to(grad))

        return scaled

    def _seen(self, grad: Tensor) -> None:
        self._averaged = False

    @staticmethod
    def _on_gradient(
        parameter: nn.Parameter, hook: Callable[[Tensor], Optional[Tensor]]
    ) -> "torch.utils.hooks.RemovableHandle":
        # a frozen parameter takes no hook, but may be thawed later: the hook stays on it
        trains = parameter.requires_grad
        handle = parameter.requires_grad_().register_hook(hook)
        parameter.requires_grad_(trains)
        return handle

    def _is_whole(self, parameter: nn.Parameter) -> bool:
        layout = self.layouts.get(parameter)
        return layout is None or layout.is_replicated


def _sum_of_squares(grads: list[tuple[Tensor, int]], device: torch.device) -> Tensor:
    """Of all elements, those that ``n`` ranks hold divided by it; in float32 at least."""
    total = torch.zeros((), device=device)
    for double in (False, True):
        of_kind = [(g, n) for g, n in grads if (g.dtype == torch.float64) is double and g.numel()]
        if of_kind:
            dtype = torch.float64 if double else torch.float32
            squares = torch.stack(foreach_norm([g for g, _ in of_kind], 2, dtype=dtype)).square()
            if any(n > 1 for _, n in of_kind):
                squares = squares / torch.tensor([n for _, n in of_kind], device=device)
            total = total + squares.sum()
    return total


def shared_scaler(scaler: Any, mesh: Mesh) -> ShardedGradScaler:
    """A loss scaler with the settings of ``scaler`` that skips a step on all ranks if one of them overflows."""
    settings = scaler_settings(scaler)
    started = settings.pop("started")
    shared = ShardedGradScaler(**settings, process_group=mesh.tp_group)
    if started:
        shared.load_state_dict(scaler.state_dict())
    return shared
