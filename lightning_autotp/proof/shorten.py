"""A model with its lists of blocks cut to the shortest beginning in which there is a block of every kind.

The beginning, and not a choice: models find what a block needs by its place in the list. Two blocks are of one kind if
everything that can be reached from them is alike; what cannot be compared is a kind of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from operator import itemgetter
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autotp.compat import FakeTensor
from lightning_autotp.plans.plan import SequencePlan, ShardingPlan

_LEAST = 2
"""So that what a block puts out enters a block."""

_LISTS = (nn.ModuleList, nn.Sequential)

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, type)


def shorten(model: nn.Module, plan: ShardingPlan) -> dict[str, tuple[int, int]]:
    """Cut lists of blocks in place, to no less than two.

    Args:
        model: an own copy of the model.
        plan: its plan: blocks that it treats otherwise are of another kind.

    Returns:
        by the path of a list, how many blocks there were, and how many are left.
    """
    done: dict[str, tuple[int, int]] = {}
    for path, kinds in kinds_of_blocks(model, plan):
        keep = max(max(kinds.index(kind) for kind in kinds) + 1, _LEAST)
        if keep < len(kinds):
            done[path] = (len(kinds), keep)
            keep_blocks(model, path, keep)
    return done


def kinds_of_blocks(
    model: nn.Module, plan: ShardingPlan, *, outermost: bool = False
) -> Iterator[tuple[str, list[Hashable]]]:
    """Yield the path of each list of blocks, the outer ones first, and of what kind each block is.

    Lists inside of blocks that are taken out meanwhile are passed over.

    Args:
        model: the model.
        plan: its plan: blocks that it treats otherwise are of another kind.
        outermost: pass over all lists inside of blocks.
    """
    shared = _shared(model)
    around: list[str] = []
    for path, blocks in list(model.named_modules()):
        if not isinstance(blocks, _LISTS) or len(blocks) < 2 or not _is_there(model, path):
            continue
        if outermost and any(path.startswith(outer) for outer in around):
            continue
        if list(blocks._modules) != [str(at) for at in range(len(blocks))]:  # a sequence with names
            continue
        around.append(f"{path}." if path else "")
        places = _places(blocks)
        named = zip(blocks, _planned(plan, path, len(blocks)))
        yield path, [(_Kinds(block, shared, places).of(block), planned) for block, planned in named]


def keep_blocks(model: nn.Module, path: str, count: int) -> None:
    """Take all blocks but the first ``count`` out of a list."""
    blocks = model.get_submodule(path)
    for name in list(blocks._modules)[count:]:
        del blocks._modules[name]


@contextmanager
def fewer_blocks(model: nn.Module, plan: ShardingPlan) -> Iterator[dict[str, tuple[int, int]]]:
    """Inside, ``model`` is what :func:`shorten` leaves of it, which is given; afterwards it has all blocks again."""
    before = [(blocks, dict(blocks._modules)) for blocks in model.modules() if isinstance(blocks, _LISTS)]
    try:
        yield shorten(model, plan)
    finally:
        for blocks, held in before:
            blocks._modules.update(held)


def restricted(plan: ShardingPlan, model: nn.Module) -> ShardingPlan:
    """The plan of what is left of a model."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    modules = {path for path, _ in model.named_modules()}
    sequence = plan.sequence
    if sequence is not None:
        blocks = tuple(path for path in sequence.blocks if path in modules)
        sequence = SequencePlan(blocks, tuple(region for region in sequence.regions if region.module in modules))
    return replace(
        plan,
        parameters={name: entry for name, entry in plan.parameters.items() if name in names},
        siblings=tuple(filter(None, (tuple(filter(modules.__contains__, group)) for group in plan.siblings))),
        attributes=tuple(attribute for attribute in plan.attributes if attribute.module in modules),
        boundaries=tuple(boundary for boundary in plan.boundaries if boundary.module in modules),
        head_inputs=tuple(given for given in plan.head_inputs if given.module in modules),
        sequence=sequence,
    )


def _is_there(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _shared(model: nn.Module) -> dict[int, str]:
    """Names of what exists once: the model's modules and tensors, by their ``id``."""
    found: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), path)
    return found


def _planned(plan: ShardingPlan, path: str, count: int) -> list[Hashable]:
    """What a plan says of each block of a list, by names inside of the block."""
    found: list[list[Hashable]] = [[] for _ in range(count)]
    prefix = f"{path}." if path else ""

    def inside(name: str) -> tuple[int, str] | None:
        place, _, rest = name.removeprefix(prefix).partition(".")
        return (int(place), rest) if name.startswith(prefix) and place.isdigit() and int(place) < count else None

    def named(paths: Iterable[str]) -> tuple[str, ...]:
        return tuple((inside(path) or (0, path))[1] for path in paths)

    for name, entry in plan.parameters.items():
        if at := inside(name):
            found[at[0]].append((at[1], replace(entry, name="", module="", reason="", rule="", source="")))
    others: list[Any] = [*plan.attributes, *plan.boundaries, *plan.head_inputs]
    for one in others:
        if at := inside(one.module):
            found[at[0]].append((at[1], replace(one, module="")))
    for group in plan.siblings:
        if at := inside(group[0]):
            found[at[0]].append(("siblings", named(group)))
    for region in plan.sequence.regions if plan.sequence is not None else ():
        if at := inside(region.module):
            found[at[0]].append((at[1], replace(region, module="", block="", rows=named(region.rows))))
    return [tuple(each) for each in found]


def _places(blocks: nn.ModuleList | nn.Sequential) -> set[tuple[str, str]]:
    """The attributes, by module and name, that are every block's own place in the list."""
    found: set[tuple[str, str]] | None = None
    for at, block in enumerate(blocks):
        mine = {
            (path, name)
            for path, module in block.named_modules()
            for name, value in vars(module).items()
            if type(value) is int and value == at
        }
        found = mine if found is None else found & mine
    return found or set()


class _Kinds:
    """What a block is, but for its place: equal for blocks that compute the same."""

    def __init__(self, block: nn.Module, shared: dict[int, str], places: set[tuple[str, str]]) -> None:
        self.shared, self.places = shared, places
        self.seen: dict[int, int] = {}
        self.inside = {id(module): path for path, module in block.named_modules()}

    def of(self, value: Any) -> Hashable:
        """What a value is: equal for values that are alike."""
        if isinstance(value, _PLAIN):
            return self._plain(value)
        if id(value) in self.seen:
            return ("again", self.seen[id(value)])
        self.seen[id(value)] = len(self.seen)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, dict):
            return ("dict", type(value), tuple((self.of(key), self.of(one)) for key, one in value.items()))
        if isinstance(value, (list, tuple)):
            return (type(value), tuple(self.of(one) for one in value))
        if isinstance(value, (set, frozenset)):
            return (type(value), frozenset(self.of(one) for one in value))
        if isinstance(value, MethodType):
            return ("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, partial):
            return ("partial", *map(self.of, (type(value), value.func, value.args, value.keywords, vars(value))))
        if is_dataclass(value) and not hasattr(value, "__dict__"):  # others may compute what they are asked for
            return ("data", type(value), tuple(self.of(getattr(value, one.name)) for one in fields(value)))
        return self._object(value)

    @staticmethod
    def _plain(value: Any) -> Hashable:
        return (type(value), repr(value)) if isinstance(value, float) else (type(value), value)

    @staticmethod
    def _tensor(value: Tensor) -> Hashable:
        values = None
        known = not value.is_meta and not isinstance(value, FakeTensor)
        if not isinstance(value, nn.Parameter) and known and value.numel() <= 4096:
            values = tuple(value.detach().flatten().tolist())
        return ("tensor", type(value), tuple(value.shape), value.dtype, value.requires_grad, values)

    def _module(self, value: nn.Module) -> Hashable:
        if id(value) not in self.inside:
            return ("outside", self.shared.get(id(value), id(value)))
        path = self.inside[id(value)]
        held = sorted(
            ((name, one) for name, one in vars(value).items() if (path, name) not in self.places), key=itemgetter(0)
        )
        return ("module", type(value), tuple((name, self.of(one)) for name, one in held))

    def _function(self, value: FunctionType) -> Hashable:
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(self.of(cell.cell_contents))
            except ValueError:
                cells.append("empty")
        defaults = self.of(value.__defaults__), self.of(value.__kwdefaults__)
        return ("function", value.__module__, _code(value.__code__), tuple(cells), defaults)

    def _object(self, value: Any) -> Hashable:
        kind: Any = type(value)
        if kind.__hash__ is not object.__hash__ and kind.__eq__ is not object.__eq__:
            try:
                return ("equal", type(value), hash(value), value)
            except TypeError:
                pass
        attributes = getattr(value, "__dict__", None)
        if type(value).__module__ == "builtins" or attributes is None or _has_hidden_state(kind):
            return ("own", id(value))
        return (
            "object",
            type(value),
            tuple((name, self.of(one)) for name, one in sorted(attributes.items(), key=itemgetter(0))),
        )


@cache
def _has_hidden_state(own: Any) -> bool:
    """Whether objects of a class hold more than their ``__dict__`` shows: in slots, or in what is written in C."""
    heap = 1 << 9  # classes that are written in Python have this flag
    return any(
        "__slots__" in vars(one) and vars(one)["__slots__"] or not one.__flags__ & heap for one in own.__mro__[:-1]
    )


def _code(code: CodeType) -> Hashable:
    constants = tuple(_code(one) if isinstance(one, CodeType) else (type(one), repr(one)) for one in code.co_consts)
    return (code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants)
