"""Classes and their ranks -> a plan: columns, rows, what follows them, and what is gathered around the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any, Optional

import numpy as np
from torch import nn

from lightning_autotp.derivation.assign import Ranks, parts_of
from lightning_autotp.derivation.atoms import EVERY, Ids
from lightning_autotp.derivation.features import Features, components
from lightning_autotp.derivation.trace import is_plain, sizes_of
from lightning_autotp.introspection.forward_source import delegates, reads
from lightning_autotp.introspection.layers import is_conv1d, is_convolution
from lightning_autotp.introspection.names import folded
from lightning_autotp.layout.layout import Interval, Layout, even_widths
from lightning_autotp.plans.plan import Boundary, LocalAttribute, ParameterPlan, ShardingPlan

LARGE = 0.01
"""The share of a model's parameters from which on linears that nothing closes are sharded and gathered again."""

SOURCE = "derived"

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def derived_plan(
    model: nn.Module, features: Features, ranks: Ranks, tp_size: int, *, gather: bool = True
) -> ShardingPlan:
    """The plan that gives each rank its classes.

    Args:
        model: the unsharded model.
        features: its features' classes.
        ranks: the ranks of the classes.
        tp_size: the tensor parallel size.
        gather: whether large linears that are left, and the vocabulary, are sharded and their outputs gathered.
    """
    maker = _Maker(model, features, ranks, tp_size)
    entries = {name: maker.entry(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    boundaries = tuple(dict.fromkeys(maker.boundaries(entries)))
    attributes = tuple(maker.groups(entries.values()))
    if gather:
        entries = maker.vocabulary(entries)
        entries = maker.gathered(entries, [boundary.module for boundary in boundaries])
    return ShardingPlan(tp_size, entries, siblings_of(entries, maker.first), attributes, boundaries)


Entries = dict[str, ParameterPlan]

Parts = tuple[tuple[Interval, ...], ...]


class _Maker:
    def __init__(self, model: nn.Module, features: Features, ranks: Ranks, tp_size: int) -> None:
        self.features, self.ranks, self.tp_size = features, ranks, tp_size
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        first = {id(module): path for path, module in model.named_modules()}
        self.first = set(first.values())
        self.canonical = {path: first[id(module)] for path, module in self.modules.items()}
        self._like_others()
        self.evidence = _evidence(features)
        of = {id(p): name for name, p in model.named_parameters()}
        known = {*features.entries, *features.dims, *features.late}
        alike = {(folded(name), self.parameters[name].shape): name for name in known if name in self.parameters}
        self.own_name = {name: of[id(p)] for name, p in self.parameters.items()}
        self.seen_name = {
            name: own if own in known else alike.get((folded(own), self.parameters[name].shape), own)
            for name, own in self.own_name.items()
        }

    def _like_others(self) -> None:
        """Linears that the run did not use (experts without tokens) are taken as those of the same name elsewhere."""
        seen = {**self.features.columns, **self.features.rows}
        like = {(folded(path), sizes_of(self.modules[path])): path for path in seen if path in self.modules}
        for path, module in self.modules.items():
            if self.canonical[path] not in seen and is_plain(module):
                self.canonical[path] = like.get((folded(path), sizes_of(module)), path)

    def entry(self, name: str) -> ParameterPlan:
        path, _, local = name.rpartition(".")
        module, shape = self.modules[path], tuple(self.parameters[name].shape)
        linear = is_plain(module) and local in ("weight", "bias")
        found = sizes_of(module) if linear and local == "weight" else None
        entry = ParameterPlan(name, path, Layout.replicated(shape, self.tp_size), features=found)
        if linear:
            return self._linear(entry, self.canonical[path], module, local)
        seen = self.seen_name[name]
        return self._stack(entry, seen) if seen in self.features.dims else self._entries(entry, seen)

    def _linear(self, entry: ParameterPlan, path: str, module: nn.Module, local: str) -> ParameterPlan:
        if self._is_direct(entry):
            return replace(entry, reason="it is read by others than its layer, too")
        columns, rows = self.features.columns.get(path), self.features.rows.get(path)
        turned = is_conv1d(module) and local == "weight"
        if columns is not None:
            parts = parts_of(columns, self.ranks, self.tp_size)
            if parts is None:
                partial = local == "weight" and not is_convolution(module)
                count = self._partial(columns) if partial else 0
                return replace(entry, partial_outputs=count, reason=self._why(path))
            return self._with(entry, "column", 1 if turned else 0, parts)
        if rows is not None:
            parts = parts_of(rows, self.ranks, self.tp_size)
            if parts is None:
                return replace(entry, reason=self._why(path))
            if local == "bias":
                return replace(entry, kind="row", source=SOURCE, reason="added once, after the sum")
            return self._with(entry, "row", 0 if turned else 1, parts)
        return replace(entry, reason="the step that was looked at did not use it")

    def _partial(self, classes: Ids) -> int:
        """How many of a replicated linear's last outputs are read by sharded features alone."""
        partial = [int(one) != EVERY and int(one) in self.ranks for one in classes]
        count = len(partial) - (max((at for at, one in enumerate(partial) if not one), default=-1) + 1)
        return count if sum(partial) == count else 0

    def _stack(self, entry: ParameterPlan, name: str) -> ParameterPlan:
        outputs, inputs = self.features.dims[name]
        for kind, known, dim in (("row", self.features.rows, inputs), ("column", self.features.columns, outputs)):
            parts = parts_of(known[name], self.ranks, self.tp_size) if name in known else None
            if parts is not None:
                return self._with(entry, kind, dim, parts)
        return replace(entry, reason="its matrices read and make replicated features")

    def _entries(self, entry: ParameterPlan, name: str) -> ParameterPlan:
        """A parameter of which sharded features need some entries: it is sharded if these are slices of one dim."""
        classes = self.features.entries.get(name)
        if classes is None:
            return entry
        of = [self.ranks.get(int(one)) for one in classes.ravel()]
        sets = sorted({ranks for ranks in of if ranks is not None})
        if not sets or any(len(ranks) > 1 for ranks in sets):
            return entry
        held = np.array([-1 if ranks is None else sets.index(ranks) for ranks in of]).reshape(classes.shape)
        for dim, size in enumerate(entry.layout.shape):
            if classes.shape[dim] != size:  # its entries along it are one
                continue
            lines = np.moveaxis(held, dim, 0).reshape(classes.shape[dim], -1)
            most = lines.max(1)  # what no step has read yet goes with the rest of its slice
            if (most >= 0).all() and ((lines == most[:, None]) | (lines < 0)).all():
                parts = parts_of(most + 1, {at + 1: ranks for at, ranks in enumerate(sets)}, self.tp_size)
                kind = "heads" if isinstance(self.modules[entry.module], nn.Embedding) else "column"
                return entry if parts is None else self._with(entry, kind, dim, parts)
        return entry

    def _with(self, entry: ParameterPlan, kind: str, dim: int, parts: Parts) -> ParameterPlan:
        if not all(parts):
            return replace(entry, reason=f"there is not a part of it for each of {self.tp_size} ranks")
        layout = Layout(entry.layout.shape, self.tp_size, dim, parts)
        seen = self.seen_name.get(entry.name, "")
        reason = self.evidence.get(self.canonical[entry.module]) or self.evidence.get(seen, "")
        return replace(entry, kind=kind, layout=layout, source=SOURCE, reason=f"{SOURCE}: {reason}")

    def _why(self, path: str) -> str:
        return "its outputs meet features that every rank has" if path in self.features.columns else ""

    # -- around -------------------------------------------------------------------------------------------------------

    def boundaries(self, entries: Mapping[str, ParameterPlan]) -> Iterable[Boundary]:
        """Modules with stacks of matrices, whose outputs are partial sums."""
        for name, entry in entries.items():
            if self.seen_name[name] in self.features.dims and entry.kind == "row":
                held = self.modules[entry.module]._parameters
                own = {n: f"{entry.module}.{n}" for n, p in held.items() if p is not None}
                late = (n for n, full in own.items() if self.seen_name[full] in self.features.late)
                once = tuple(n for n in late if entries[own[n]].layout.is_replicated)
                yield Boundary(entry.module, once)

    def groups(self, entries: Iterable[ParameterPlan]) -> Iterable[LocalAttribute]:
        """The numbers of groups of convolutions and norms that are sharded by them."""
        for entry in entries:
            module: Any = self.modules[entry.module]
            if entry.kind != "column" or is_plain(module) or not entry.name.endswith("weight"):
                continue
            name = "groups" if isinstance(module, _CONVOLUTIONS) else "num_groups"
            if isinstance(module, (*_CONVOLUTIONS, nn.GroupNorm)):
                count, width = getattr(module, name), entry.layout.shape[0]
                yield LocalAttribute(entry.module, name, count, tuple(n * count // width for n in entry.layout.widths))

    def vocabulary(self, entries: dict[str, ParameterPlan]) -> dict[str, ParameterPlan]:
        """Embeddings along the vocabulary, and heads with as many outputs along them."""
        heads = {m.out_features for m in self.modules.values() if isinstance(m, nn.Linear)}
        tables = {
            path: m
            for path, m in self.modules.items()
            if isinstance(m, nn.Embedding)
            and m.num_embeddings >= 2 * self.tp_size
            and (m.num_embeddings in heads or self._is_large(m.weight.numel()))
        }
        sizes = {m.num_embeddings for m in tables.values()}
        made = dict(entries)
        for name, entry in entries.items():
            module = self.modules[entry.module]
            if not name.endswith("weight") or not entry.layout.is_replicated or entry.partial_outputs:
                continue
            if self._is_direct(entry):
                continue
            if entry.module in tables and _looks_up(module):
                made[name] = self._even(entry, "vocabulary")
            elif is_plain(module) and entry.layout.shape[0] in sizes and not is_conv1d(module):
                made |= self._with_gather(entries, entry)
        return self._agreeing(entries, made)

    def gathered(self, entries: dict[str, ParameterPlan], boundaries: list[str]) -> dict[str, ParameterPlan]:
        """Large linears that are left: each rank computes some outputs, which are gathered."""
        left: dict[str, list[str]] = defaultdict(list)
        for name, entry in entries.items():
            inside = any(f"{name}.".startswith(f"{path}.") for path in boundaries)
            free = entry.layout.is_replicated and not entry.partial_outputs and not self._is_direct(entry)
            if entry.features and free and not inside:
                left[folded(name)].append(name)
        made = dict(entries)
        for names in left.values():
            if not self._is_large(sum(self.parameters[name].numel() for name in names)):
                continue
            for name in names:
                entry = entries[name]
                assert entry.features is not None
                if entry.features[0] < 2 * self.tp_size:
                    continue
                made |= self._with_gather(entries, entry)
        return self._agreeing(entries, made)

    def _with_gather(self, entries: Entries, weight: ParameterPlan) -> Entries:
        """A linear's weight and bias, along its outputs, which are gathered."""
        turned = is_conv1d(self.modules[weight.module])
        bias = entries.get(f"{weight.module}.bias")
        made = [
            self._even(weight, "column", 1 if turned else 0),
            *([] if bias is None else [self._even(bias, "column")]),
        ]
        return {one.name: replace(one, gather_output=True) for one in made}

    def _is_direct(self, entry: ParameterPlan) -> bool:
        """Whether others than its layer read it, or another parameter of that layer."""
        own = (self.own_name.get(f"{entry.module}.{name}") for name in ("weight", "bias"))
        return any(name in self.features.direct for name in own)

    def _is_large(self, count: int) -> bool:
        distinct = {id(p): p for p in self.parameters.values()}
        return count >= LARGE * sum(p.numel() for p in distinct.values())

    def _even(self, entry: ParameterPlan, kind: str, dim: int = 0) -> ParameterPlan:
        layout = entry.layout
        shares = [even_widths(layout.shape[dim], self.tp_size)]
        return replace(
            entry,
            kind=kind,
            layout=Layout.cut(layout.shape, dim, self.tp_size, shares),
            source=SOURCE,
            reason=f"{SOURCE}: {'by its rows' if kind == 'vocabulary' else 'nothing contracts its outputs alone'}",
        )

    def _agreeing(self, before: Mapping[str, ParameterPlan], made: Entries) -> Entries:
        """``made``, but for layers with a parameter that has several names of which only some could be sharded.

        A module that only keeps another's parameter, and does not read it, takes it as it is.
        """
        names: dict[str, list[str]] = defaultdict(list)
        for name, own in self.own_name.items():
            names[own].append(name)
        for same in names.values():
            if len({made[name].layout for name in same}) == 1:
                continue
            decided = next((name for name in same if made[name] != before[name]), None)
            if decided is None:
                continue
            others = [name for name in same if made[name] == before[name]]
            if any(name.rpartition(".")[2] in reads(self.modules[made[name].module]) for name in others):
                layers = {made[name].module for name in same}  # weights and biases stay together
                made.update((name, before[name]) for name, entry in made.items() if entry.module in layers)
            else:
                kept = made[decided]
                made.update((n, replace(kept, name=n, module=made[n].module, features=None)) for n in others)
        return made


def _evidence(features: Features) -> dict[str, str]:
    """By path of a linear or name of a parameter: which linears make the features it has to do with, which contract."""
    found = {}
    for one in components(features):
        made, contracted = (", ".join(dict.fromkeys(map(_last, paths))) for paths in (one.columns, one.rows))
        text = f"features of {made}" + (f", contracted by {contracted}" if contracted else "")
        found.update(dict.fromkeys((*one.columns, *one.rows, *one.entries), text))
    return found


def _last(path: str) -> str:
    """The last name in a path that is no number."""
    return next((name for name in reversed(path.split(".")) if not name.isdigit()), path)


def _looks_up(module: nn.Module) -> bool:
    own: Any = type(module)
    plain = "forward" not in vars(module) and (own.forward is nn.Embedding.forward or delegates(own))
    return plain and not any(getattr(module, option) for option in ("max_norm", "scale_grad_by_freq", "sparse"))


def siblings_of(entries: Mapping[str, ParameterPlan], first: Set[str]) -> tuple[tuple[str, ...], ...]:
    """Column linears under one parent with one input size: they may read one tensor and share its collective.

    Modules with several paths are called by the one that is among ``first``.
    """
    groups: dict[tuple[str, Optional[int]], list[str]] = defaultdict(list)
    for entry in entries.values():
        if entry.kind == "column" and len(entry.layout.shape) == 2 and entry.features and entry.module in first:
            groups[entry.module.rpartition(".")[0], entry.features[1]].append(entry.module)
    return tuple(map(tuple, groups.values()))
