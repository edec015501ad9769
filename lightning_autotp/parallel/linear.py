"""Column and row parallel linears: an ``nn.Linear`` whose class was changed in place and whose weight is a part."""

from functools import cache
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from lightning_autotp.layout import Layout
from lightning_autotp.mesh import Mesh
from lightning_autotp.parallel.collectives import all_reduced, copy_input, gather_output, reduce_output, split_input
from lightning_autotp.parallel.sequence import scatter_tokens
from lightning_autotp.reading import delegates

_RIDE = "_autotp_columns"
"""The attribute of an input tensor on which results wait while ``torch.compile`` traces."""


class _ColumnLinears(torch.autograd.Function):
    """Linears that read one input: ``y_i = x w_i^T + b_i``, with ``x [..., K]`` whole and ``w_i [N_i, K]`` parts.

    Backward: ``gx = sum_i gy_i w_i`` is partial on each rank and is all-reduced, once for all of them (without a group
    it stays partial: what gathered ``x`` sums it); ``gw_i = gy_i^T x`` and ``gb_i`` are this rank's own. With
    ``overlap`` the all-reduce runs while they are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        columns: Optional["ColumnGroup"],
        group: Optional[ProcessGroup],
        overlap: bool,
        count: int,
        *params: Optional[Tensor],
    ) -> Any:
        weights, biases = params[:count], params[count:]
        trains = any(ctx.needs_input_grad[5 : 5 + count])
        ctx.save_for_backward(x if trains else None, *weights)
        ctx.columns, ctx.group, ctx.overlap, ctx.count = columns, group, overlap, count
        ctx.set_materialize_grads(False)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        x, *weights = ctx.saved_tensors
        if ctx.columns is not None:
            ctx.columns.forget()  # results that still wait hang on the graph that goes now
        flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
        shape = next(g.shape for g in grads if g is not None)[:-1]
        work, gx = None, None
        if ctx.needs_input_grad[0]:
            gx = _input_gradient(flat, weights).view(*shape, weights[0].shape[1])
            if ctx.group is None:
                pass
            elif ctx.overlap and not torch.compiler.is_compiling():
                work = dist.all_reduce(gx, group=ctx.group, async_op=True)
            else:
                gx = all_reduced(gx, ctx.group)
        needs = ctx.needs_input_grad[5:]
        flat_x = None if x is None else x.reshape(-1, x.shape[-1])
        gws = [None if g is None or flat_x is None or not need else g.t() @ flat_x for g, need in zip(flat, needs)]
        gbs = [None if g is None or not need else g.sum(0) for g, need in zip(flat, needs[ctx.count :])]
        if work is not None:
            work.wait()
        return gx, None, None, None, None, *gws, *gbs


def _input_gradient(grads: list[Optional[Tensor]], weights: list[Tensor]) -> Tensor:
    """``sum_i g_i w_i`` as ``[T, K]``, accumulated by the matmuls themselves."""
    total: Optional[Tensor] = None
    for grad, weight in zip(grads, weights):
        if grad is not None:
            total = grad @ weight if total is None else total.addmm_(grad, weight)
    assert total is not None  # autograd runs no backward without a gradient
    return total


class ColumnGroup:
    """Column linears that may read one tensor, so that its gradient is all-reduced once and not once per linear.

    The first one called computes all of them; the others take their result if they are called with the same object,
    unchanged, under the same autocast. Which linears really share an input is learned: those seen to read another
    tensor leave the others' company at the next :meth:`settle`, and not before, because a checkpointed region must
    compute the same again. A miss costs a collective, never correctness.
    """

    def __init__(self, members: list["ColumnParallel"]) -> None:
        self.members = members
        self.company = [0] * len(members)  # members with one number are computed together
        self.leaving: set[int] = set()
        self.input: Optional[Tensor] = None
        self.state: tuple[Any, ...] = ()
        self.results: dict[int, Tensor] = {}

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """The local output of member ``place`` on ``x``."""
        if torch.compiler.is_compiling():
            return self._traced(place, x)
        state = _state(x)
        if place in self.results:
            if self.input is x and self.state == state:
                return self._take(place)
            if self.input is not x:
                self.leaving |= self.results.keys()
        self.results = self._compute(place, x, self)
        self.input, self.state = x, state
        return self._take(place)

    def settle(self) -> None:
        """Between steps: drop what nobody asked for, and part those who read different tensors."""
        self.forget()
        if self.leaving:
            apart = max(self.company) + 1
            self.company = [apart if at in self.leaving else number for at, number in enumerate(self.company)]
            self.leaving = set()

    def forget(self) -> None:
        """Drop results that wait to be taken, and the input they are of."""
        self.input, self.results = None, {}

    def _take(self, place: int) -> Tensor:
        result = self.results.pop(place)
        if not self.results:
            self.input = None
        return result

    def _traced(self, place: int, x: Tensor) -> Tensor:
        # a module's state must not change in a region that is checkpointed while it is traced; a tensor's may
        owner, waiting = getattr(x, _RIDE, None) or (None, {})
        if owner is not self or place not in waiting:
            waiting = self._compute(place, x, None)
            setattr(x, _RIDE, (self, waiting))
        result = waiting.pop(place)
        if not waiting:  # x may be an input of the graph and live on
            setattr(x, _RIDE, None)
        return result

    def _compute(self, place: int, x: Tensor, columns: Optional["ColumnGroup"]) -> dict[int, Tensor]:
        places = [other for other, company in enumerate(self.company) if company == self.company[place]]
        members = [self.members[other] for other in places]
        weights = [m.matrix for m in members]
        biases = [m.bias for m in members]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            weights = [w.to(dtype) for w in weights]
            biases = [None if b is None else b.to(dtype) for b in biases]
        first = members[0]
        group = first.mesh.tp_group if first.reduces else None
        outputs = _ColumnLinears.apply(x, columns, group, first.overlap, len(members), *weights, *biases)
        return dict(zip(places, outputs))


def _state(x: Tensor) -> tuple[Any, ...]:
    """What a result depends on besides the object ``x``."""
    device = x.device.type
    return x._version, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class ColumnParallel(nn.Module):
    """A linear cut along its output features: ``[..., K]`` whole -> ``[..., N_r]``, or ``[..., N]`` gathered.

    With ``keeps_part`` one that gathers does so only where no gradients are recorded: the loss needs no more.
    Made by :meth:`convert`, never constructed.
    """

    mesh: Mesh
    layout: Layout
    overlap: bool
    gathers: bool
    reduces: bool
    keeps_part: bool = False
    group: ColumnGroup
    place: int
    weight: Any
    bias: Any

    @classmethod
    def convert(
        cls, module: nn.Module, mesh: Mesh, layout: Layout, *, overlap: bool, gather: bool, reduce: bool = True
    ) -> "ColumnParallel":
        """Change ``module`` in place; its parameters must already be this rank's parts.

        Without ``reduce`` the gradient of its input stays partial, for what made the input to sum it.
        """
        converted: Any = become(module, cls, mesh, layout)
        converted.overlap, converted.gathers, converted.reduces = overlap, gather, reduce
        return converted

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[N_r, K]``."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        if torch.is_grad_enabled() and input.requires_grad:
            output = self.group(self.place, input)
        else:
            output = F.linear(input, self.matrix, self.bias)
        if self.gathers and not (self.keeps_part and torch.is_grad_enabled()):
            return gather_output(output, self.layout, self.mesh)
        return output

    def extra_repr(self) -> str:
        gathered = ", gather_output" if self.gathers else ""
        return f"{super().extra_repr()}, column parallel {self.mesh.tp_rank}/{self.mesh.tp_size}{gathered}"


class ColumnParallelLinear(ColumnParallel, nn.Linear):
    """``nn.Linear`` cut along its output features; ``in_features`` and ``out_features`` stay those of the full one."""


class ColumnParallelConv1D(ColumnParallel):
    """transformers' ``Conv1D``, whose weight is ``[in, out]``, cut along its output features."""

    @property
    def matrix(self) -> Tensor:
        return self.weight.t()


class RowParallel(nn.Module):
    """A linear cut along its input features: ``[..., K_r]`` -> ``[..., N]``, summed over the ranks.

    The bias is whole on every rank and added once, after the sum. With ``splits`` the input comes whole, ``[..., K]``;
    with ``scatters`` the sum is scattered over the tokens, ``[1, T_r, N]`` (sequence parallelism). Made by
    :meth:`convert`, never constructed.
    """

    mesh: Mesh
    layout: Layout
    splits: bool
    scatters: bool
    weight: Any
    bias: Any

    @classmethod
    def convert(
        cls, module: nn.Module, mesh: Mesh, layout: Layout, *, split: bool = False, scatter: bool = False
    ) -> "RowParallel":
        """Change ``module`` in place; its weight must already be this rank's part."""
        converted: Any = become(module, cls, mesh, layout)
        converted.splits, converted.scatters = split, scatter
        return converted

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[N, K_r]``."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        weight = self.matrix
        if self.splits:
            input = split_input(input, self.layout, self.mesh)  # noqa: A001
        elif input.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"a row parallel linear of {self.layout.shape[self.layout.dim or 0]} input features got"
                f" {input.shape[-1]} of them on tensor parallel rank {self.mesh.tp_rank}, where its part is"
                f" {weight.shape[1]}: the layers before it must be cut by column rules that match this row rule."
            )
        output = F.linear(input, weight)
        output = scatter_tokens(output, self.mesh, reduce=True) if self.scatters else reduce_output(output, self.mesh)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        split = ", split_input" if self.splits else ""
        return f"{super().extra_repr()}, row parallel {self.mesh.tp_rank}/{self.mesh.tp_size}{split}"


class RowParallelLinear(RowParallel, nn.Linear):
    """``nn.Linear`` cut along its input features; ``in_features`` and ``out_features`` stay those of the full one."""


class RowParallelConv1D(RowParallel):
    """transformers' ``Conv1D``, whose weight is ``[in, out]``, cut along its input features."""

    @property
    def matrix(self) -> Tensor:
        return self.weight.t()


class PartialOutputLinear(nn.Linear):
    """A whole ``nn.Linear`` whose last ``count`` output features feed cut heads: their gradient is all-reduced."""

    mesh: Mesh
    layout: Layout
    count: int

    @classmethod
    def convert(cls, module: nn.Module, mesh: Mesh, layout: Layout, count: int) -> "PartialOutputLinear":
        """Change ``module`` in place."""
        converted: PartialOutputLinear = become(module, cls, mesh, layout)
        converted.count = count
        return converted

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        return copy_input(super().forward(input), self.mesh, self.count)


def become(module: nn.Module, base: type[nn.Module], mesh: Mesh, layout: Layout) -> Any:
    """Change the class of ``module`` to ``base``, or to a subclass of ``base`` and its own class."""
    module.__class__ = _joined_class(base, type(module))  # type: ignore[arg-type]  # classes do hash
    module.mesh, module.layout = mesh, layout  # type: ignore[assignment]
    return module


@cache
def _joined_class(base: Any, own: Any) -> Any:
    if own in base.__mro__:
        return base
    # a forward of its own that only works on what the base class returns (a scaled embedding) stays in front
    bases = (own, base) if delegates(own) else (base, own)
    return type(f"{base.__name__}{own.__name__}", bases, {"__doc__": own.__doc__})
