"""Column and row parallel linears: an ``nn.Linear`` whose class was changed in place and whose weight is a part."""

from collections.abc import Callable
from functools import cache
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_autotp.layout import Layout
from lightning_autotp.mesh import Mesh
from lightning_autotp.parallel.collectives import all_reduced, copy_input, gather_output, reduce_output, split_input
from lightning_autotp.parallel.linear_cross_entropy import leave_out_logits
from lightning_autotp.parallel.once import once_differentiable
from lightning_autotp.parallel.overlap import Overlap, as_sequences, form_of
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
        ctx.columns, ctx.group, ctx.overlap = columns, group, overlap
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
        of_parameters = _parameter_gradients(flat, None if x is None else x.flatten(0, -2), ctx.needs_input_grad[5:])
        if work is not None:
            work.wait()
        return gx, None, None, None, None, *of_parameters


class _GatherColumns(torch.autograd.Function):
    """The same of a rank's own tokens ``x [1, T_r, K]``, which are gathered first: ``X [B, S, K]`` and ``y_i``.

    Backward: the partial ``gX = sum_i gy_i w_i`` (and what else reads ``X`` adds) is reduce-scattered to ``gx``; with
    overlap this runs while the gradients of weights and biases are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        columns: Optional["ColumnGroup"],
        overlap: Overlap,
        form: str,
        length: int,
        count: int,
        *params: Optional[Tensor],
    ) -> Any:
        weights, biases = params[:count], params[count:]
        full, products = overlap.gather_matmul(x[0], weights, biases, form)  # type: ignore[arg-type]
        outputs = tuple(as_sequences(y, length) for y in (full, *products))
        if torch.compiler.is_compiling():  # a view, so that changing it in place is an error: results would be stale
            outputs = (outputs[0].view_as(outputs[0]), *outputs[1:])
        trains = any(ctx.needs_input_grad[6 : 6 + count])
        ctx.save_for_backward(outputs[0] if trains else None, *weights)
        ctx.columns, ctx.overlap, ctx.padding = columns, overlap, full.shape[0] % length
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        full, *weights = ctx.saved_tensors
        if ctx.columns is not None:
            ctx.columns.forget()
        of_full, *flat = [None if g is None else g.flatten(0, -2) for g in grads]
        part: Callable[[], Optional[Tensor]] = _nothing
        if ctx.needs_input_grad[0]:
            gx = of_full if all(g is None for g in flat) else _input_gradient(flat, weights, of_full)
            assert gx is not None  # autograd runs no backward without a gradient
            if ctx.padding:
                gx = torch.cat([gx, gx.new_zeros(ctx.padding, gx.shape[1])])
            part = ctx.overlap.scatter(gx)
        of_parameters = _parameter_gradients(
            flat, None if full is None else full.flatten(0, 1), ctx.needs_input_grad[6:]
        )
        gathered = part()
        return None if gathered is None else gathered[None], None, None, None, None, None, *of_parameters


def _nothing() -> None:
    return None


def _parameter_gradients(
    grads: list[Optional[Tensor]], x: Optional[Tensor], needs: tuple[bool, ...]
) -> list[Optional[Tensor]]:
    """``g_i^T x`` for each weight and ``sum g_i`` for each bias, where they are needed."""
    gws = [None if g is None or x is None or not need else g.t() @ x for g, need in zip(grads, needs)]
    gbs = [None if g is None or not need else g.sum(0) for g, need in zip(grads, needs[len(grads) :])]
    return gws + gbs


def _input_gradient(grads: list[Optional[Tensor]], weights: list[Tensor], more: Optional[Tensor] = None) -> Tensor:
    """``sum_i g_i w_i`` as ``[T, K]``, accumulated by the matmuls themselves, and ``more``."""
    total: Optional[Tensor] = None
    for grad, weight in zip(grads, weights):
        if grad is not None:
            total = grad @ weight if total is None else total.addmm_(grad, weight)
    if total is not None and more is not None:
        total += more
    assert total is not None  # autograd runs no backward without a gradient
    return total


class ColumnGroup:
    """Column linears that may read one tensor, so that its gradient is all-reduced once and not once per linear.

    The first one called computes all of them; the others take their result if they are called with the same object,
    unchanged, under the same autocast. Which linears really share an input is learned: those seen to read another
    tensor leave the others' company at the next :meth:`settle`, and not before, because a checkpointed region must
    compute the same again. A miss costs a collective, never correctness.

    Args:
        members: the linears.
        steady: whether nothing changes their input in place between their calls, which a graph that is traced cannot
            see; unless they are steady, each computes alone there.
    """

    def __init__(self, members: list["ColumnParallel"], steady: bool = True) -> None:
        self.members, self.steady = members, steady
        sizes = [member.layout.shape[member.layout.dim or 0] for member in members]
        self.form = form_of("gather", members[0].matrix.shape[1], sizes)
        self.company = [0] * len(members)  # members with one number are computed together
        self.leaving: set[int] = set()
        self.input: Optional[Tensor] = None
        self.state: tuple[Any, ...] = ()
        self.results: dict[int, Tensor] = {}
        self.offered = False  # whether the results were computed before anyone asked
        self.declined = False
        self.takes_offers = True

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """The local output of member ``place`` on ``x``."""
        if torch.compiler.is_compiling():
            return self._traced(place, x)
        state = _state(x)
        if place in self.results:
            if self.input is x and self.state == state:
                return self._take(place)
            if self.offered:
                self.declined = True
            elif self.input is not x:
                self.leaving |= self.results.keys()
        self.results = self._compute(place, x, self)
        self.input, self.state, self.offered = x, state, False
        return self._take(place)

    def gather(self, x: Tensor, overlap: Overlap, length: int) -> Optional[Tensor]:
        """All tokens ``[B, S, K]`` of every rank's ``x [1, T_r, K]``; the members' outputs on them wait to be taken.

        None where members do not take them, or no gradient of ``x`` is recorded; ``length`` is S. Under autocast what
        comes back has its dtype, in which all members read it anyway and half as much travels.
        """
        alike = self.steady and len(set(self.company)) == 1 and self.takes_offers
        if not alike or not (torch.is_grad_enabled() and x.requires_grad):
            return None
        tracing = torch.compiler.is_compiling()
        columns = None if tracing else self
        x, weights, biases = self._cast(x, self.members)
        full, *outputs = _GatherColumns.apply(
            x, columns, overlap, self.form, length, len(self.members), *weights, *biases
        )
        results = dict(enumerate(outputs))
        if tracing:
            setattr(full, _RIDE, (self, _autocast(full), results))
        else:
            self.input, self.state, self.results, self.offered = full, _state(full), results, True
        gathered: Tensor = full
        return gathered

    def __getstate__(self) -> dict[str, Any]:
        # of a copy: what waits belongs to a graph
        return vars(self) | {"input": None, "state": (), "results": {}}

    def settle(self) -> None:
        """Between steps: drop what nobody asked for, and part those who read different tensors."""
        self.forget()
        self.takes_offers &= not self.declined
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
        if not self.steady:
            return self._compute(place, x, None, alone=True)[place]
        owner, autocast, waiting = getattr(x, _RIDE, None) or (None, (), {})
        if owner is not self or place not in waiting or autocast != _autocast(x):
            waiting = self._compute(place, x, None)
            setattr(x, _RIDE, (self, _autocast(x), waiting))
        result = waiting.pop(place)
        if not waiting:  # x may be an input of the graph and live on
            setattr(x, _RIDE, None)
        return result

    @staticmethod
    def _cast(x: Tensor, members: list["ColumnParallel"]) -> tuple[Tensor, list[Tensor], list[Optional[Tensor]]]:
        """``x`` and the members' weights and biases, in autocast's dtype where it is on."""
        weights, biases = [m.matrix for m in members], [m.bias for m in members]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            weights = [w.to(dtype) for w in weights]
            biases = [None if b is None else b.to(dtype) for b in biases]
        return x, weights, biases

    def _compute(
        self, place: int, x: Tensor, columns: Optional["ColumnGroup"], alone: bool = False
    ) -> dict[int, Tensor]:
        places = [other for other, company in enumerate(self.company) if company == self.company[place]]
        places = [place] if alone else places
        members = [self.members[other] for other in places]
        x, weights, biases = self._cast(x, members)
        first = members[0]
        group = first.mesh.tp_group if first.reduces else None
        outputs = _ColumnLinears.apply(x, columns, group, first.overlap, len(members), *weights, *biases)
        return dict(zip(places, outputs))


def _state(x: Tensor) -> tuple[Any, ...]:
    """What a result depends on besides the object ``x``."""
    return x._version, *_autocast(x)


def _autocast(x: Tensor) -> tuple[bool, torch.dtype]:
    device = x.device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class ColumnParallel(nn.Module):
    """A linear cut along its output features: ``[..., K]`` whole -> ``[..., N_r]``, or ``[..., N]`` gathered.

    With ``keeps_part`` one that gathers does so only where no gradients are recorded: the loss needs no more. With
    ``defers`` it computes nothing where they are: the loss does, of the input that an empty output carries to it.
    Made by :meth:`convert`, never constructed.
    """

    mesh: Mesh
    layout: Layout
    overlap: bool
    gathers: bool
    reduces: bool
    keeps_part: bool = False
    defers: bool = False
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
        if self.defers and torch.is_grad_enabled():
            return leave_out_logits(input)
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


class _RowScatter(torch.autograd.Function):
    """Forward: ``x w^T`` of ``x [..., K_r]``, ``w [N, K_r]``, reduce-scattered over all tokens: ``[1, T_r, N]``.

    Backward: the gradient of all tokens is gathered, ``gx = gY w`` and ``gw = gY^T x``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, overlap: Overlap, scatter: str, gather: str) -> Tensor:
        ctx.overlap, ctx.form, ctx.shape = overlap, gather, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        x = x.flatten(0, -2)
        padding = -x.shape[0] % overlap.mesh.tp_size
        if padding:
            x = torch.cat([x, x.new_zeros(padding, x.shape[1])])
        part = overlap.matmul_scatter(x, weight, scatter)
        return as_sequences(part, part.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        weights = [weight.t()] if ctx.needs_input_grad[0] else []
        full, products = ctx.overlap.gather_matmul(grads[0][0], weights, [None] * len(weights), ctx.form)
        tokens = ctx.shape[:-1].numel()
        gx = products[0][:tokens].view(ctx.shape) if products else None
        gw = None if x is None else full[:tokens].t() @ x.flatten(0, -2)
        return gx, gw, None, None, None


class RowParallel(nn.Module):
    """A linear cut along its input features: ``[..., K_r]`` -> ``[..., N]``, summed over the ranks.

    The bias is whole on every rank and added once, after the sum. With ``splits`` the input comes whole, ``[..., K]``;
    with ``scatters`` the sum is scattered over the tokens, ``[1, T_r, N]`` (sequence parallelism). Made by
    :meth:`convert`, never constructed.
    """

    mesh: Mesh
    layout: Layout
    splits: bool
    scatters: Optional[Overlap]
    forms: tuple[str, str]
    weight: Any
    bias: Any

    @classmethod
    def convert(
        cls, module: nn.Module, mesh: Mesh, layout: Layout, *, split: bool = False, scatter: Optional[Overlap] = None
    ) -> "RowParallel":
        """Change ``module`` in place; its weight must already be this rank's part."""
        converted: Any = become(module, cls, mesh, layout)
        converted.splits, converted.scatters = split, scatter
        inputs, outputs = layout.shape[layout.dim or 0], converted.matrix.shape[0]
        converted.forms = form_of("scatter", inputs, [outputs]), form_of("gather", outputs, [inputs])
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
        if self.scatters is None:
            output = reduce_output(F.linear(input, weight), self.mesh)
        else:
            if torch.is_autocast_enabled(input.device.type):
                dtype = torch.get_autocast_dtype(input.device.type)
                input, weight = input.to(dtype), weight.to(dtype)  # noqa: A001
            output = _RowScatter.apply(input, weight, self.scatters, *self.forms)
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
