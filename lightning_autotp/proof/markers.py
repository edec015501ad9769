"""Marks where tensors enter and leave the modules that a plan shards: in the full model and in a rank's alike.

What such a module computes inside is known (it is this package's), and need not be followed. A mark is an autograd
function that does nothing, so that what crosses is recorded forward and backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.compat import in_backward, tree_map
from lightning_autotp.layout.layout import Layout
from lightning_autotp.losses.loss_parallel import parallel_loss_head
from lightning_autotp.parallel.embedding import ColumnParallelEmbedding, VocabParallelEmbedding
from lightning_autotp.parallel.linear import ColumnParallel, PartialOutputLinear, RowParallel
from lightning_autotp.parallel.reduced_module import Boundary, OnFirstRank
from lightning_autotp.plans.plan import HeadInput, SequencePlan, ShardingPlan
from lightning_autotp.proof.memory import NUMBER
from lightning_autotp.proof.own_forward import layer_below, own_parameters
from lightning_autotp.proof.recorded import Call, Crossing
from lightning_autotp.proof.trace import Tracer

Kind = Literal[
    "column",
    "row",
    "vocabulary",
    "column embedding",
    "partial outputs",
    "reduced",
    "passing",
    "heads",
    "once",
    "loss",
    "split tokens",
    "gather tokens",
    "scatter tokens",
    "join tokens",
]


@dataclass(frozen=True)
class Marked:
    """A module whose edges are marked.

    Args:
        path: its path.
        kind: what it is; all but ``reduced`` are opaque.
        layout: that of its weight.
        moves: whether a column gathers its output, or a row splits its input.
        count: how many of its outputs have their gradient summed.
        siblings: the path that it shares crossings of its input with.
        keeps_part: whether a column that gathers does so only where no gradients are recorded.
        sums: whether a column's (or a region's) partial input gradient is summed here.
        tokens: whether ranks have their own tokens on the outer side of a row.
        head: the layout of the head whose sharded outputs a loss reads.
        ranks: how many ranks there are, where it splits or gathers tokens.
        given: an argument of which each rank takes its own heads, which is marked like a module.
    """

    path: str
    kind: Kind
    layout: Optional[Layout] = None
    moves: bool = False
    count: int = 0
    siblings: str = ""
    keeps_part: bool = False
    sums: bool = True
    tokens: bool = False
    head: Optional[Layout] = None
    ranks: int = 1
    given: Optional[HeadInput] = None


def marked_modules(sharded: nn.Module, plan: ShardingPlan) -> dict[str, Marked]:
    """The modules of a sharded model whose edges are to be marked, by path."""
    siblings = {path: paths[0] for paths in plan.siblings for path in paths}
    found: dict[str, Marked] = {}
    for path, module in sharded.named_modules():
        if isinstance(module, ColumnParallel):
            first = siblings.get(path, path)
            keeps, sums = module.keeps_part, module.reduces
            found[path] = Marked(
                path, "column", module.layout, module.gathers, siblings=first, keeps_part=keeps, sums=sums
            )
        elif isinstance(module, RowParallel):
            found[path] = Marked(
                path, "row", module.layout, module.splits, tokens=module.scatters is not None, ranks=plan.tp_size
            )
        elif isinstance(module, PartialOutputLinear):
            found[path] = Marked(path, "partial outputs", module.layout, count=module.count)
        elif isinstance(module, VocabParallelEmbedding):
            found[path] = Marked(path, "vocabulary", module.layout)
        elif isinstance(module, ColumnParallelEmbedding):
            found[path] = Marked(path, "column embedding", module.layout)
        elif isinstance(module, OnFirstRank):
            found[path] = Marked(path, "passing")
        elif isinstance(module, Boundary):
            found[path] = Marked(path, "reduced")
        head = parallel_loss_head(module)
        if head is not None:
            found[f"{path}(loss)"] = Marked(f"{path}(loss)", "loss", head=head.layout)
    for given in plan.head_inputs:
        path = f"{given.module}({given.argument})"
        found[path] = Marked(path, "heads", given=given)
    for boundary in plan.boundaries:
        for name in boundary.once:
            found[f"{boundary.module}.{name}"] = Marked(f"{boundary.module}.{name}", "once")
    if plan.sequence is not None:
        found |= {mark.path: mark for mark in _of_tokens(sharded, plan.sequence, plan.tp_size)}
    return found


def _of_tokens(sharded: nn.Module, sequence: SequencePlan, ranks: int) -> Iterator[Marked]:
    """Where tokens are split and gathered, marked like modules."""
    yield Marked(f"{sequence.blocks[0]}(tokens)", "split tokens", ranks=ranks)
    for region in {id(sharded.get_submodule(region.module)): region for region in sequence.regions}.values():
        yield Marked(f"{region.module}(all tokens)", "gather tokens", sums=region.reduces, moves=True, ranks=ranks)
        if not region.reduces:
            yield Marked(f"{region.module}(own tokens)", "scatter tokens", ranks=ranks)
    yield Marked(f"{sequence.blocks[-1]}(whole sequences)", "join tokens", sums=False, ranks=ranks)


def without_collectives(sharded: nn.Module) -> None:
    """Let reduced modules of a sharded model compute as their own class does: the marks stand for what is added.

    What stands for transformers' grouped experts computes the same as these, and is left out, too.
    """
    for module in list(sharded.modules()):
        if isinstance(module, Boundary):
            own: Any = type(module)
            module.__class__ = type(own.__name__, (own,), {"forward": _own_forward})


def _own_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    module._inside = True
    try:
        return super(Boundary, module).forward(*args, **kwargs)
    finally:
        module._inside = False


class _Mark(torch.autograd.Function):
    """Does nothing, and records it, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tracer: Tracer, crossing: Crossing, shape: Optional[tuple[int, ...]] = None
    ) -> Tensor:
        ctx.tracer, ctx.crossing, ctx.shape = tracer, crossing, None if shape is None else tuple(x.shape)
        return _crossed(x, tracer, crossing, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        there: Crossing = ctx.crossing
        back = Crossing(there.path, there.leaves, True, there.calls, there.part, there.made)
        return _crossed(grads[0], ctx.tracer, back, ctx.shape), None, None, None


def _crossed(x: Tensor, tracer: Tracer, crossing: Crossing, shape: Optional[tuple[int, ...]]) -> Tensor:
    with tracer.quiet():
        y = x.new_empty(shape) if shape is not None else torch.empty_like(x) if x.is_meta else x.clone()
        tracer.cross(x, y, crossing)
    return y


@dataclass
class _Shared:
    """A crossing that column linears share: of which input, under which state, with which values of all weights."""

    x: Tensor
    y: Tensor
    state: tuple[int, bool]
    calls: list[Call]
    weights: list[int]

    @property
    def paths(self) -> list[str]:
        """The members that were given it."""
        return [call.path for call in self.calls]


class Markers:
    """Hooks of one run of a model on the edges of its sharded modules."""

    def __init__(
        self, model: nn.Module, tracer: Tracer, marked: dict[str, Marked], plan: ShardingPlan, *, full: bool
    ) -> None:
        self.tracer, self.full, self.tp_size = tracer, full, plan.tp_size
        self.batch: tuple[int, ...] = ()
        """How many sequences of which length the full model's tokens are."""
        self._shared: dict[str, _Shared] = {}
        self._members: dict[str, list[nn.Module]] = {}
        self._under_way: dict[str, list[Call]] = {path: [] for path in marked}
        for token_mark in marked.values():
            self._mark_tokens(model, token_mark)
        seen: set[int] = set()
        for path, module in model.named_modules():
            mark = marked.get(path)
            if mark is None or id(module) in seen:
                continue
            seen.add(id(module))
            if mark.siblings:
                self._members.setdefault(mark.siblings, []).append(module)
            base = None if mark.layout is None else layer_below(type(module))
            if base is not None:
                self._mark_base(module, base, mark)
                continue
            module.register_forward_pre_hook(partial(self._enter, mark), with_kwargs=True)
            module.register_forward_hook(partial(self._leave, mark), prepend=True, always_call=True)
        for mark in marked.values():
            if mark.given is not None:
                module, leaves = model.get_submodule(mark.given.module), partial(self._argument, mark, mark.given)
                module.register_forward_pre_hook(partial(leaves, False), with_kwargs=True, prepend=True)
                module.register_forward_pre_hook(partial(leaves, True), with_kwargs=True)
            if mark.kind == "once":
                self._read_once(model, mark)
            elif mark.kind == "loss":
                self._mark_loss(model.get_submodule(mark.path.removesuffix("(loss)")), mark)

    def _enter(self, mark: Marked, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = Call(mark.path)
        self.tracer.trace.calls.setdefault(mark.path, []).append(call)
        self._under_way[mark.path].append(call)
        if mark.layout is not None and not self.tracer.nodes.inside:
            self.tracer.note_written(call, own_parameters(module))
        entered = tree_map(lambda x: self._entered(mark, call, x) if isinstance(x, Tensor) else x, (args, kwargs))
        if mark.kind != "reduced":
            self.tracer.nodes.enter_opaque()
        return entered

    def _entered(self, mark: Marked, call: Call, x: Tensor) -> Tensor:
        if self.tracer.nodes.inside:
            return x
        if not mark.siblings:
            y = self._mark(x, Crossing(mark.path, False, False, [call]))
            call.entered.append(self.tracer.numbers.ref(y).number)
            return y
        members = self._members[mark.siblings]
        state = (x._version, torch.is_grad_enabled())
        weights = [self.tracer.numbers.ref(p).number for member in members for p in member.parameters()]
        found = self._shared.get(mark.siblings)
        if found is not None and found.x is x and found.state == state and mark.path not in found.paths:
            found.calls.append(call)
            call.written_between = found.weights != weights
            y = found.y
        else:
            calls = [call]
            y = self._mark(x, Crossing(mark.siblings, False, False, calls))
            self._shared[mark.siblings] = _Shared(x, y, state, calls, weights)
        call.entered.append(self.tracer.numbers.ref(y).number)
        return y

    def _leave(self, mark: Marked, module: nn.Module, args: Any, output: Any) -> Any:
        if mark.kind != "reduced":
            self.tracer.nodes.leave_opaque()
        call = self._under_way[mark.path].pop()
        if output is None:  # it raised, as a recompute does that has all it needs
            return None
        if mark.kind == "reduced" and not isinstance(output, Tensor):
            raise TypeError(f"{mark.path} returns {type(output).__name__}; a reduced module must return one tensor.")
        if self.tracer.nodes.inside or not isinstance(output, Tensor):
            return output
        shape = self._own_shape(output) if mark.tokens and self.full else None
        part = mark.keeps_part and torch.is_grad_enabled()
        y = self._mark(output, Crossing(mark.path, True, False, [call], part), shape)
        call.left.append(self.tracer.numbers.ref(y).number)
        return y

    def _argument(self, mark: Marked, given: HeadInput, leaves: bool, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before and behind what takes a rank's own heads of an argument."""

        def crossed(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if not leaves:
                self._under_way[mark.path].append(Call(mark.path))
            call = self._under_way[mark.path][-1]
            y = self._mark(x, Crossing(mark.path, leaves, False, [call]))
            (call.left if leaves else call.entered).append(self.tracer.numbers.ref(y).number)
            return y

        if given.argument in kwargs:
            return args, kwargs | {given.argument: crossed(kwargs[given.argument])}
        place = list(inspect.signature(type(module).forward).parameters).index(given.argument) - 1  # without self
        return tuple(crossed(x) if at == place else x for at, x in enumerate(args)), kwargs

    def _read_once(self, model: nn.Module, mark: Marked) -> None:
        """Mark a parameter that a reduced module adds once, wherever it is read inside of the module."""
        path, _, name = mark.path.rpartition(".")
        module: Any = model.get_submodule(path)
        own = type(module)
        inner = getattr(own, name, None)

        def read(reading: Any) -> Any:
            value = reading._parameters[name] if inner is None else inner.__get__(reading)
            inside = self._under_way[path] or in_backward()
            if value is None or not inside or self.tracer.nodes.inside:
                return value
            return self._mark(value, Crossing(mark.path, True, False, [Call(mark.path)]))

        module.__class__ = type(own.__name__, (own,), {name: property(read)})

    def _mark(self, x: Tensor, crossing: Crossing, shape: Optional[tuple[int, ...]] = None) -> Tensor:
        marked: Tensor = _Mark.apply(x, self.tracer, crossing, shape)
        for name, value in vars(x).items():  # what hooks of sharded modules tell each other of it
            if name != NUMBER:
                setattr(marked, name, value)
        return marked

    def _mark_loss(self, model: Any, mark: Marked) -> None:
        """Mark what a model's own loss function, which reads sharded outputs, is given and gives."""
        own = model.loss_function
        model.loss_function = lambda *args, **kwargs: self._across(mark, model, own, args, kwargs)

    def _mark_base(self, module: nn.Module, base: Any, mark: Marked) -> None:
        """Mark what a forward of a layer's own class calls by ``super()``: what it does with it is followed."""
        own: Any = type(module)

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._across(mark, module, partial(base.forward, module), args, kwargs)

        inner = type(base.__name__, (base,), {"forward": forward})
        module.__class__ = type(own.__name__, (own, inner), {})

    def _across(self, mark: Marked, module: nn.Module, call: Any, args: Any, kwargs: Any) -> Any:
        """What ``call`` returns, with the edges marked."""
        args, kwargs = self._enter(mark, module, args, kwargs)
        output = None
        try:
            output = call(*args, **kwargs)
        finally:
            output = self._leave(mark, module, args, output)
        return output

    # -- tokens

    def _mark_tokens(self, model: nn.Module, mark: Marked) -> None:
        """Marks before and behind what splits or gathers tokens; in the full model they change shapes only."""
        if not mark.kind.endswith("tokens"):
            return
        module = model.get_submodule(mark.path.rpartition("(")[0])
        enters, leaves = partial(self._moved, mark, False), partial(self._moved, mark, True)
        if mark.kind in ("split tokens", "gather tokens"):
            module.register_forward_pre_hook(lambda _, a, k: on_hidden(a, k, enters), with_kwargs=True, prepend=True)
            module.register_forward_pre_hook(lambda _, a, k: on_hidden(a, k, leaves), with_kwargs=True)
        else:
            module.register_forward_hook(lambda _, a, output: on_first(output, enters), prepend=True)
            module.register_forward_hook(lambda _, a, output: on_first(output, leaves))

    def _moved(self, mark: Marked, leaves: bool, x: Tensor) -> Tensor:
        if not leaves:
            if mark.kind == "split tokens":
                self.batch = tuple(x.shape[:2])
            self._under_way[mark.path].append(Call(mark.path))
        call = self._under_way[mark.path].pop() if leaves else self._under_way[mark.path][-1]
        shape: Optional[tuple[int, ...]] = None
        if leaves and self.full:
            whole = mark.kind == "join tokens" or mark.kind == "gather tokens" and mark.moves
            shape = (*self.batch, *x.shape[2:]) if whole else self._own_shape(x)
        y = self._mark(x, Crossing(mark.path, leaves, False, [call]), shape)
        (call.left if leaves else call.entered).append(self.tracer.numbers.ref(y).number)
        return y

    def _own_shape(self, x: Tensor) -> tuple[int, ...]:
        """All tokens of ``x`` as one sequence, padded so that every rank has as many."""
        tokens = prod(x.shape[:-1])
        return 1, tokens + -tokens % self.tp_size, x.shape[-1]


def on_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the hidden states changed: the first of them, or the one of that name."""
    if args and isinstance(args[0], Tensor):
        return (change(args[0]), *args[1:]), kwargs
    for name in ("hidden_states", "x"):
        if isinstance(kwargs.get(name), Tensor):
            return args, kwargs | {name: change(kwargs[name])}
    return args, kwargs


def on_first(output: Any, change: Any) -> Any:
    """An output with its first part changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)
