"""What happens to gradients between the backward pass and the optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lightning_autotp.compat import foreach_copy_, foreach_norm, scaler_settings
from lightning_autotp.distributed.dp_shards import all_rows, local_rows, rows_of
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout
from lightning_autotp.sharding.state import Sharded
from lightning_autotp.sharding.zero import zero_of


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

    Under ZeRO a gradient is of the rows that this rank holds, and is reduced over the data parallel ranks as it
    arrives; all that is elementwise is done on these rows. Ranks may hold the same key heads in other rows: for these
    all rows are gathered.

    Args:
        model: a sharded model.
        sharded: how it was sharded.
        compiled: whether some of it is compiled. Then each rank picks its fastest kernels by timing them, which round
            otherwise than another's: the gradients of whole parameters are averaged, too, so that these stay the same.
    """

    def __init__(self, model: nn.Module, sharded: Sharded, *, compiled: bool = False) -> None:
        self.mesh, self.zero = sharded.mesh, zero_of(model)
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
        self._complete = self._averaged = self._reduced = True
        self._handles = [self._on_gradient(p, self._scaled(p, runs)) for p, runs in self.partial.items()]
        self._handles += [self._on_gradient(p, self._seen) for p in self.rounded]
        if self.zero is not None:
            self.zero.on_reduction = self._arrive

    def remove(self) -> None:
        """Take the hooks off the parameters again."""
        for handle in self._handles:
            handle.remove()
        if self.zero is not None:
            self.zero.on_reduction = None

    @torch.no_grad()
    def complete(self, *, average: bool = True) -> None:
        """Make partial gradients whole, with one all-reduce for all of a dtype and of a set of ranks.

        Those of whole parameters of a compiled model are averaged, unless without ``average``: so that ranks that
        differ by more than rounding can be told before.
        """
        waiting: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = defaultdict(list)
        gathered: list[tuple[Any, Tensor]] = []
        if self.zero is not None and self.zero.agree(not self._reduced):
            self._reduced, self._complete, self._averaged = True, False, False
            self.zero.average_replicated()
            self.zero.forget_unused()
        for parameter, runs in () if self._complete else self.partial.items():
            if parameter.grad is not None:
                grad: Tensor = local_rows(parameter.grad)
                if runs[0].dim is not None and grad is not parameter.grad:
                    grad = all_rows(parameter.grad)
                    gathered.append((parameter.grad, grad))
                for run in runs:
                    waiting[(run.owners, grad.dtype)].append(run.of(grad))
        self._complete = True
        if average and not self._averaged:
            self._averaged = True
            for parameter in self.rounded:
                # one that is not there on this rank may be on others: all reduce as many numbers
                grad = local_rows(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
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
        for sharded_grad, full in gathered:
            local_rows(sharded_grad).copy_(full.narrow(0, *rows_of(sharded_grad)))

    def incomplete(self) -> dict[str, Tensor]:
        """The gradients of whole parameters that wait for :meth:`complete`, by name."""
        whole = [p for p in self.partial if self._is_whole(p) and not self._complete]
        return {self._names[p]: local_rows(p.grad) for p in whole if p.grad is not None}

    def whole(self) -> dict[str, Tensor]:
        """The gradients of parameters that every rank holds whole, by name."""
        whole = [(n, p.grad) for p, n in self._names.items() if self.layouts[p].is_replicated]
        return {name: local_rows(grad) for name, grad in whole if grad is not None}

    def whole_parameters(self) -> dict[str, Tensor]:
        """The parameters that every rank holds whole, by name."""
        return {name: local_rows(p) for p, name in self._names.items() if self.layouts[p].is_replicated}

    @torch.no_grad()
    def total_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The 2-norm, in float32 or float64, of the gradient of the unsharded parameters; the same on every rank.

        What is cut is summed over the ranks, what is whole counts once. Under ZeRO every data parallel rank must call
        it.
        """
        with_grad = [p for p in parameters if p.grad is not None]
        rows: tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]] = [], []
        all_of_them: tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]] = [], []
        for p in with_grad:
            assert p.grad is not None
            held = local_rows(p.grad)
            of_rows = held is not p.grad
            if self._is_whole(p):
                (rows if of_rows else all_of_them)[1].append((held, 1))
            elif of_rows and p not in self.partial:
                rows[0].append((held, 1))
            else:
                all_of_them[0].extend(self._pieces(p, all_rows(p.grad)))
        device = next(iter(self.layouts)).device
        cut, whole = (_sum_of_squares(grads, device) for grads in all_of_them)
        if self.zero is not None:
            dtype = _widest(with_grad)
            both = torch.stack([_sum_of_squares(grads, device).to(dtype) for grads in rows])
            shared = self.zero.sum_over_shards(both)
            cut, whole = cut + shared[0], whole + shared[1]
        return (self.mesh.collectives.all_reduce(cut) + whole).sqrt()

    def _pieces(self, parameter: nn.Parameter, grad: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The gradient of a cut parameter in runs, each with the number of ranks that hold it."""
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
        torch.nn.utils.clip_grads_with_norm_(_with_rows(parameters), max_norm, norm)
        return norm

    def clip_value(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        """Clip every element of the gradients to ``[-value, value]``."""
        torch.nn.utils.clip_grad_value_(_with_rows(parameters), value)

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

    def _arrive(self) -> None:
        """Gradients of some data parallel rank are about to arrive, though this one may have used nothing."""
        self._complete = self._averaged = self._reduced = False

    def _on_gradient(
        self, parameter: nn.Parameter, hook: Callable[[Tensor], Optional[Tensor]]
    ) -> "torch.utils.hooks.RemovableHandle":
        if self.zero is not None:
            parameter = self.zero.unsharded.get(parameter, parameter)
        # a frozen parameter takes no hook, but may be thawed later: the hook stays on it
        trains = parameter.requires_grad
        handle = parameter.requires_grad_().register_hook(hook)
        parameter.requires_grad_(trains)
        return handle

    def _is_whole(self, parameter: nn.Parameter) -> bool:
        layout = self.layouts.get(parameter)
        return layout is None or layout.is_replicated


def _with_rows(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Stand-ins whose gradients are what this rank holds of them, in the same memory."""
    found = []
    for parameter in parameters:
        if parameter.grad is not None and local_rows(parameter.grad) is not parameter.grad:
            rows = local_rows(parameter.grad)
            parameter = nn.Parameter(rows.detach())  # clipping reads the gradient alone
            parameter.grad = rows
        found.append(parameter)
    return found


def _widest(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    """That of norms, alike on all ranks, some of which may hold no rows."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32


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


def shared_scaler(scaler: Any, mesh: Mesh, *, zero: bool = False) -> ShardedGradScaler:
    """A loss scaler with the settings of ``scaler`` that skips a step on all ranks if one of them overflows."""
    settings = scaler_settings(scaler)
    started = settings.pop("started")
    # under ZeRO data parallel ranks hold other rows of the gradients
    shared = ShardedGradScaler(**settings, process_group=mesh.collectives.process_group("world" if zero else "tp"))
    if started:
        shared.load_state_dict(scaler.state_dict())
    return shared
