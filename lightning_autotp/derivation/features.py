"""Which features of which linears can be dealt out to the ranks, and which follow: runs until nothing changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_autotp.derivation.atoms import EVERY, OWN, SHARED, WHOLE, Atoms, Ids
from lightning_autotp.derivation.trace import Tracer

_MOST_RUNS = 60

_CONTRACTS = "(contracts)"


@dataclass(frozen=True)
class Features:
    """The classes of the features of a model.

    Args:
        columns: of each linear that reads a replicated tensor, the class of each output.
        rows: of each linear that contracts sharded features, the class of each input.
        entries: of other parameters, the class of each entry.
        dims: of a parameter that is a stack of matrices, its dims of outputs and of inputs.
        shared: of ``columns``, which outputs are not dealt out but follow.
        marks: of ``columns``, which outputs operators take together.
        needed: by a class, the classes that it needs.
        given_up: operators that no rule follows.
        direct: names of parameters of linears and embeddings that are read by others than these.
        late: names of parameters that are first read after a stack of their module has contracted sharded features.
    """

    columns: dict[str, Ids]
    rows: dict[str, Ids]
    entries: dict[str, Ids]
    dims: dict[str, tuple[int, int]]
    shared: dict[str, Ids]
    marks: dict[str, Ids]
    needed: dict[int, set[int]]
    given_up: tuple[str, ...]
    direct: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()

    def own(self, path: str) -> bool:
        """Whether the linear at ``path`` has outputs that are dealt out."""
        return path in self.columns and bool((self.levels(path) == OWN).any())

    def levels(self, path: str) -> Ids:
        return self.shared.get(path, np.zeros(len(self.columns[path]), np.int64))


def features_of_run(
    model: nn.Module, call: Callable[[nn.Module], Any], tp_size: int, whole: Iterable[str] = ()
) -> Features:
    """The classes of features, of which at least ``tp_size`` stand apart wherever they are dealt out.

    Args:
        model: an own copy of the model, which is run.
        call: runs a step of it and returns what it gives.
        tp_size: the tensor parallel size.
        whole: paths of linears whose outputs are not to be dealt out.
    """
    shared: dict[str, Ids] = {}
    entries: set[str] = set()
    direct: set[str] = set()
    given_up: dict[str, None] = {}
    left = set(whole)
    for _ in range(_MOST_RUNS):
        tracer = Tracer(model, shared, entries, direct)
        with tracer.running():
            output = call(model)
        for one in tree_leaves(output):
            if isinstance(one, Tensor) and (ids := tracer.labels(one)) is not None:
                tracer.atoms.everywhere(ids)
        given_up.update(dict.fromkeys(tracer.given_up))
        for path in left & set(tracer.columns):
            shared[path] = np.full(len(tracer.columns[path]), SHARED)
        again = bool(left & set(tracer.columns)) or tracer.direct > direct
        left, direct = left - set(tracer.columns), tracer.direct
        if not _follow(tracer, shared, entries, tp_size) and not again:
            return _found(tracer, shared, tuple(given_up))
    raise RuntimeError(f"the features of {type(model).__name__} did not settle after {_MOST_RUNS} runs.")


def _follow(tracer: Tracer, shared: dict[str, Ids], entries: set[str], tp_size: int) -> bool:
    """Note in ``shared`` what cannot be dealt out, and what every rank must have; whether there was anything."""
    atoms, changed = tracer.atoms, False
    for name, ids in tracer.entries.items():
        if (atoms.find(ids) == EVERY).all():
            entries.add(name)
            changed = True
    own: dict[str, Ids] = {}
    for path, ids in tracer.columns.items():
        levels = shared.get(path, np.zeros(len(ids), np.int64))
        classes = atoms.find(ids)
        gone = (levels == SHARED) & (classes == EVERY)
        if gone.any():
            shared[path], changed = np.where(gone, WHOLE, levels), True
        if not (levels == OWN).any():
            continue
        if (classes[levels == OWN] == EVERY).any():
            shared[path], changed = np.full(len(ids), SHARED), True
        else:
            own[path] = np.where(levels == OWN, classes, -1)
    if changed:
        return True
    for paths in _groups(own):
        classes = np.unique(np.concatenate([own[path] for path in paths]))
        if (classes >= 0).sum() >= tp_size:
            continue
        changed = True
        pieces = _pieces(atoms, {path: tracer.columns[path] for path in paths}, own)
        smallest = min(len(at) for _, at in pieces)
        for path, at in pieces:
            if len(at) == smallest:
                levels = shared.get(path, np.zeros(len(own[path]), np.int64)).copy()
                levels[at] = SHARED
                shared[path] = levels
    return changed


@dataclass(frozen=True)
class Component:
    """Linears and parameters whose features are dealt out together, and follow.

    Args:
        columns: linears, or stacks of matrices, that make the features; those that are followed among them.
        rows: linears, or stacks of matrices, that contract them.
        entries: other parameters of which they need entries.
        classes: all classes of features in it.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    entries: tuple[str, ...]
    classes: frozenset[int]


def components(features: Features) -> list[Component]:
    """The components of a model, in the order of their first linears; what one linear contracts is in one."""
    own = {
        path: np.where(features.levels(path) == OWN, classes, -1)
        for path, classes in features.columns.items()
        if features.own(path)
    }
    rows = {f"{path} {_CONTRACTS}": classes for path, classes in features.rows.items()}
    groups = ([path for path in group if path in own] for group in _groups(own | rows))
    found = []
    for paths in filter(None, groups):
        classes = {int(one) for path in paths for one in own[path] if one >= 0}
        classes |= _behind(features, classes)

        def touching(of: Mapping[str, Ids], classes: set[int] = classes) -> tuple[str, ...]:
            return tuple(name for name, ids in of.items() if not classes.isdisjoint(ids.ravel().tolist()))

        found.append(
            Component(
                touching(features.columns), touching(features.rows), touching(features.entries), frozenset(classes)
            )
        )
    return found


def _behind(features: Features, classes: set[int]) -> set[int]:
    """What classes need, directly or by way of others."""
    found: set[int] = set()
    left = list(classes)
    while left:
        for other in features.needed.get(left.pop(), ()):
            if other not in found and other != EVERY:
                found.add(other)
                left.append(other)
    return found


def _groups(own: Mapping[str, Ids]) -> list[list[str]]:
    """Linears that have features in one class with each other's, directly or by way of others."""
    by_class: dict[int, str] = {}
    group: dict[str, str] = {path: path for path in own}

    def first(path: str) -> str:
        while group[path] != path:
            path = group[path]
        return path

    for path, classes in own.items():
        for one in np.unique(classes[classes >= 0]).tolist():
            group[first(path)] = first(by_class.setdefault(one, path))
    found: dict[str, list[str]] = defaultdict(list)
    for path in own:
        found[first(path)].append(path)
    return list(found.values())


def _pieces(atoms: Atoms, columns: Mapping[str, Ids], own: Mapping[str, Ids]) -> list[tuple[str, Ids]]:
    """What to leave out first where too few ranks could share: linears, or what one linear's outputs are taken as."""
    places = {path: np.flatnonzero(own[path] >= 0) for path in columns}
    if len({len(at) for at in places.values()}) > 1:
        return list(places.items())
    found = []
    for path, at in places.items():
        marks = atoms.marks(columns[path])[at]
        found += [(path, at[marks == mark]) for mark in np.unique(marks)]
    if len({len(at) for _, at in found}) == 1:
        return list(places.items())
    return found


def _late(tracer: Tracer) -> Iterator[str]:
    first: dict[str, int] = {}
    for name in tracer.dims:
        if name in tracer.summed:
            module = name.rpartition(".")[0]
            first[module] = min(tracer.summed[name], first.get(module, tracer.summed[name]))
    for name, at in tracer.read.items():
        if at > first.get(name.rpartition(".")[0], at):
            yield name


def _found(tracer: Tracer, shared: dict[str, Ids], given_up: tuple[str, ...]) -> Features:
    atoms = tracer.atoms
    needed: dict[int, set[int]] = defaultdict(set)
    for a, b in atoms.needed():
        needed[a].add(b)
    return Features(
        {path: atoms.find(ids) for path, ids in tracer.columns.items()},
        {path: atoms.find(ids) for path, ids in tracer.rows.items()},
        {name: atoms.find(ids) for name, ids in tracer.entries.items()},
        tracer.dims,
        {path: levels for path, levels in shared.items() if path in tracer.columns},
        {path: atoms.marks(ids) for path, ids in tracer.columns.items()},
        needed,
        given_up,
        frozenset(tracer.direct),
        frozenset(_late(tracer)),
    )
