"""Rows of the operator table, and the truth about them: the operator run on full tensors and on each rank's.

Inputs are written in letters, a letter a dim: ``"bth hk"``; ``8:bt`` are indices below 8, ``p:th`` positive numbers,
``u:th`` numbers between 0 and 1, ``c:th`` complex ones, ``?:th`` a mask, ``e:b`` where
three groups of seven rows end.

Cases say what the ranks hold, one word an input: ``.`` replicated, ``t`` sharded along t, ``t*``
sharded with overlap, ``t=`` equal along t and as many as a shard has, ``t~`` one of them, ``+`` partial, ``0`` zeros;
``t%`` pairs of equal neighbours, of which a rank has those of its shard, ``t^`` one of each of these, ``t/`` one of
each pair; ``h|`` shards of each half of h, ``h-`` and ``h_`` those of the first and of the second, and else zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_autotp.dataflow.event import Event, Operand, RankCall, bound
from lightning_autotp.dataflow.placement import (
    Constant,
    Interval,
    Placement,
    Repeated,
    Shards,
    Sparse,
    constant,
    labels,
    repeated,
    shards,
    sparse,
)
from lightning_autotp.layout.layout import even_widths

SIZES = {
    "b": (3, 1),
    "t": (7, 1),
    "s": (7, 1),
    "h": (8, 1),
    "k": (5, 1),
    "n": (5, 1),
    "d": (4, 1),
    "q": (20, 4),
    "o": (1, 1),
    "z": (2, 1),
    "r": (3, 1),
}
"""The size of each letter's dim, and the unit that a shard of it holds a whole number of."""


@dataclass(frozen=True)
class Row:
    """An operator, its inputs, and cases of what the ranks hold of them.

    ``right``: the rule says what comes out. ``wrong``: the rule refuses, and the ranks' results do differ.
    ``conservative``: it refuses what for these numbers happens to agree. ``unknown``: it does not know.
    """

    operator: torch._ops.OpOverload
    inputs: str
    right: str = ""
    wrong: str = ""
    unknown: str = ""
    conservative: str = ""
    arguments: Callable[..., tuple[Any, ...]] = lambda *tensors: tensors
    options: Mapping[str, Any] = field(default_factory=dict)
    values: bool = True
    """Whether values are compared, not only shapes (not of uninitialized tensors)."""
    computed: Optional[Callable[..., Any]] = None
    """What computes it, where the operator itself does not run on a CPU."""
    called: str = ""
    """Another operator's name that is to be tested by this one, of the same arguments."""
    unchecked: bool = False
    """Whether its kernel reads anywhere if its inputs differ in dims that all have: a rank with such inputs fails."""

    @property
    def name(self) -> str:
        """The operator's name, as in the table of rules."""
        return self.called or self.operator._overloadpacket.__name__


@dataclass(frozen=True)
class Run:
    """One case run on full tensors and on each rank's: what the rules get, and what comes out."""

    event: Event
    full: list[Tensor]
    local: list[Optional[list[Tensor]]]


@dataclass(frozen=True)
class Input:
    """A full tensor, what the ranks hold of it, and their tensors."""

    full: Tensor
    placement: Placement
    local: list[Tensor]


def some_cases(row: Row, count: int) -> list[str]:
    """Up to ``count`` cases of any kind, drawn at random but always the same."""
    ways = []
    for spec in row.inputs.split():
        kind, _, letters = spec.rpartition(":")
        dims = [letter + how for letter in letters if SIZES[letter][0] > 1 for how in ("", "*", "=", "%")]
        dims += ["h|", "h-"] if "h" in letters and not kind else []
        ways.append([".", *dims, *([] if kind not in ("", "c") else ["+", "0"])])
    draw = Random(0)
    drawn = (" ".join(draw.choice(words) for words in ways) for _ in range(2 * count))
    return list(dict.fromkeys(drawn))[:count]


def parts_of(letter: str, ranks: int, overlap: bool) -> list[list[Interval]]:
    """Each rank's interval of a letter's dim."""
    size, unit = SIZES[letter]
    widths = even_widths(size, ranks, unit)
    if overlap:  # each rank holds a unit of the next rank's, too
        widths = tuple((start, min(length + unit, size - start)) for start, length in widths)
    return [[interval] for interval in widths]


def made_input(spec: str, case: str, ranks: int) -> Input:
    """A tensor of random numbers as ``spec`` says, distributed as ``case`` says."""
    kind, _, letters = spec.rpartition(":")
    shape = [SIZES[letter][0] for letter in letters]
    if kind == "?":
        full = torch.randn(shape) > 0
    elif kind == "e":
        full = torch.tensor([1, 3, 7], dtype=torch.int32)
    elif kind.isdigit():
        full = torch.randint(int(kind), shape)
    else:
        full = torch.randn(shape, dtype=torch.float64)
        full = full.abs() + 0.5 if kind == "p" else full.sigmoid() if kind == "u" else full
        full = torch.complex(full, full.roll(1)) if kind == "c" else full
    none = (None,) * len(shape)
    if case == ".":
        return Input(full, Placement(none), [full.clone() for _ in range(ranks)])
    if case == "0":
        full = torch.zeros_like(full)
        return Input(full, Placement(none, zero=True), [full.clone() for _ in range(ranks)])
    if case == "+":
        pieces = [torch.randn_like(full) for _ in range(ranks - 1)]
        rest = full - sum(pieces) if pieces else full
        return Input(full, Placement(none, partial=True), [*pieces, rest])
    at, parts = letters.index(case[0]), parts_of(case[0], ranks, case[1:] == "*")
    if case[1:] == "~":
        parts = [[(0, 1)] for _ in range(ranks)]
    if case[1:] in ("%", "^", "/"):
        return repeated_input(full, at, case[1:], [part[0] for part in parts])
    if case[1:] in ("|", "-", "_"):
        return halved_input(full, at, case[1:], ranks)
    if case[1:] in ("=", "~"):
        full = full.narrow(at, 0, 1).expand(shape).contiguous()
        dim: Any = constant(shape[at], [part[0][1] for part in parts])
    else:
        dim = shards(shape[at], parts)
    local = [full.narrow(at, *part[0]).clone(memory_format=torch.contiguous_format) for part in parts]
    return Input(full, Placement((*none[:at], dim, *none[at + 1 :])), local)


def repeated_input(full: Tensor, at: int, how: str, parts: Sequence[Interval]) -> Input:
    """A tensor whose neighbours along dim ``at`` are equal pairs, and of which ranks hold as many as ``how`` says."""
    classes = [index // 2 for index in range(full.shape[at])]
    held = [classes[start : start + length] for start, length in parts]
    held = [sorted(set(classes if how == "/" else mine)) if how != "%" else mine for mine in held]
    single = full.narrow(at, 0, max(classes) + 1)
    local = [single.index_select(at, torch.tensor(mine, dtype=torch.long)) for mine in held]
    dims: list[Any] = [None] * full.ndim
    dims[at] = repeated(classes, held)
    return Input(single.index_select(at, torch.tensor(classes)), Placement(tuple(dims)), local)


def halved_input(full: Tensor, at: int, how: str, ranks: int) -> Input:
    """A tensor of which ranks hold a shard of each half along dim ``at``; one half is zero, unless ``how`` is |."""
    half = full.shape[at] // 2
    widths = even_widths(half, ranks, 1)
    parts = [list(range(start, start + length)) for start, length in widths]
    mine = [[*its, *(half + index for index in its)] for its in parts]
    known = {"|": range(2 * half), "-": range(half), "_": range(half, 2 * half)}[how]
    mask = torch.zeros(full.shape[at], dtype=torch.bool)
    mask[known.start : known.stop] = True
    full = full * mask.reshape([-1 if dim == at else 1 for dim in range(full.ndim)])
    dims: list[Any] = [None] * full.ndim
    dims[at] = sparse(full.shape[at], [[index if index in known else -1 for index in its] for its in mine])
    return Input(full, Placement(tuple(dims)), [full.index_select(at, torch.tensor(its)) for its in mine])


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors that an operator returns."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def operand(given: Input, tensor: Tensor) -> Operand:
    """What the rules get of an input, in the memory of ``tensor``."""
    layout = tensor.stride(), int(tensor.storage_offset())
    return Operand(tuple(given.full.shape), given.placement, given.full.dtype, *layout)


def run(row: Row, case: str, ranks: int) -> Run:
    """Run ``row`` with its inputs distributed as ``case`` says."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed is slow: it keeps a traceback for CUDA
    inputs = [made_input(spec, word, ranks) for spec, word in zip(row.inputs.split(), case.split(), strict=True)]
    operands = {id(i.full): operand(i, i.full) for i in inputs}

    def given(tensors: Sequence[Tensor], known: Mapping[int, Operand]) -> dict[str, Any]:
        arguments = bound(row.operator, row.arguments(*tensors), row.options)
        return tree_map(lambda leaf: known[id(leaf)] if isinstance(leaf, Tensor) else leaf, arguments)

    compute = row.computed or row.operator
    fulls = [i.full for i in inputs]
    arguments = given(fulls, operands)
    full = tensors_of(compute(*row.arguments(*(t.clone() for t in fulls)), **row.options))
    calls, local = [], []
    for rank in range(ranks):
        mine = [i.local[rank] for i in inputs]
        its = given(mine, {id(m): operand(i, m) for m, i in zip(mine, inputs)})
        try:
            if row.unchecked and len({i.shape[: min(m.ndim for m in mine)] for i in mine}) > 1:
                raise ValueError("inputs of different shapes")
            made = tensors_of(compute(*row.arguments(*(t.clone() for t in mine)), **row.options))
        except (RuntimeError, IndexError, ValueError):
            made = None
        calls.append(RankCall(its, None if made is None else tuple(tuple(t.shape) for t in made)))
        local.append(made)
    event = Event(row.name, arguments, tuple(tuple(t.shape) for t in full), tuple(calls))
    return Run(event, full, local)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree to rounding."""
    return a.shape == b.shape and torch.allclose(wide(a), wide(b), rtol=1e-9, atol=1e-9, equal_nan=True)


def wide(tensor: Tensor) -> Tensor:
    """The numbers in fp64."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def holds(placement: Placement, full: Tensor, local: Sequence[Tensor]) -> bool:
    """Whether the ranks' tensors are exactly what ``placement`` says of the full one."""
    if placement.zero and full.count_nonzero():
        return False
    if any(placement.local_shape(tuple(full.shape), rank) != tuple(mine.shape) for rank, mine in enumerate(local)):
        return False
    dims = list(placement.dims)
    for at, dim in enumerate(dims):
        if isinstance(dim, (Constant, Repeated)):  # one entry of each class stands for all
            classes, held = labels(dim, full.shape[at], len(local))
            if not all(repeats(tensor, at, its) for tensor, its in zip((full, *local), (classes, *held))):
                return False
            full, local = one_of_each(full, at, classes), [one_of_each(m, at, its) for m, its in zip(local, held)]
            dims[at] = shards(full.shape[at], [[(label, 1) for label in sorted({*its})] for its in held])
        if isinstance(dim, Sparse):  # zero but at the indices that are named
            named = sorted(dim.named)
            if full.count_nonzero() != full.index_select(at, torch.tensor(named, dtype=torch.long)).count_nonzero():
                return False
            places = [[place for place, index in enumerate(its) if index >= 0] for its in dim.held]
            kept = [mine.index_select(at, torch.tensor(p, dtype=torch.long)) for mine, p in zip(local, places)]
            if any(mine.count_nonzero() != its.count_nonzero() for mine, its in zip(local, kept)):
                return False
            local, dims[at] = kept, shards(dim.size, [[(i, 1) for i in its if i >= 0] for its in dim.held])
    total = torch.zeros(full.numel(), dtype=wide(full).dtype)
    for rank, mine in enumerate(local):
        part, place = full, torch.arange(full.numel()).reshape(full.shape)
        for at, dim in enumerate(dims):
            if isinstance(dim, Shards):
                indices = [index for start, length in dim.parts[rank] for index in range(start, start + length)]
                part = part.index_select(at, torch.tensor(indices, dtype=torch.long))
                place = place.index_select(at, torch.tensor(indices, dtype=torch.long))
        if not placement.partial and not same(part, mine):
            return False
        total.index_add_(0, place.reshape(-1), wide(mine).reshape(-1))
    return not placement.partial or same(total.reshape(full.shape), full)


def one_of_each(tensor: Tensor, at: int, classes: Sequence[int]) -> Tensor:
    """The first entry of each class along a dim, classes in order."""
    return tensor.index_select(
        at, torch.tensor([classes.index(label) for label in sorted({*classes})], dtype=torch.long)
    )


def repeats(tensor: Tensor, at: int, classes: Sequence[int]) -> bool:
    """Whether all entries of a class are alike."""
    places = {label: place for place, label in enumerate(sorted({*classes}))}
    back = torch.tensor([places[label] for label in classes], dtype=torch.long)
    return same(one_of_each(tensor, at, classes).index_select(at, back), tensor)


def differ(full: Tensor, local: Sequence[Tensor]) -> bool:
    """Whether the ranks' results are the full one in no usual placement: replicated, partial, sharded along a dim."""
    if all(same(mine, full) for mine in local):
        return False
    if all(mine.shape == full.shape for mine in local) and same(sum(map(wide, local)), wide(full)):  # type: ignore[arg-type]
        return False
    for dim in range(full.ndim):
        rest = [(*mine.shape[:dim], *mine.shape[dim + 1 :]) for mine in local]
        if (
            all(len(mine.shape) == full.ndim for mine in local)
            and len(set(rest)) == 1
            and same(torch.cat(list(local), dim), full)
        ):
            return False
    return True
