"""What follows from a step and is made, not asked for: sums of partial gradients, and counts that are per rank."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Optional

from torch import nn

from lightning_autotp.plans.plan import LocalAttribute, ShardingPlan
from lightning_autotp.proof.verdict import Verdict
from lightning_autotp.sharding.local_config import set_local

SECONDS = 4.0
"""How long to look, in seconds of this process, for a plan that is right; most models that have one need a second."""


_COUNT = re.compile(r"heads?(?!.*(dim|size|width))")
"""Names of counts of heads, and of key heads."""


@dataclass(frozen=True)
class Repairs:
    """What a plan lacks.

    Args:
        partial: replicated parameters whose gradients are partial sums: these are to be summed over the ranks.
        local: numbers that modules read in their forward pass, of which each rank must have its own.
        full: numbers that the plan gave each rank its own of, and that must stay those of the full model.
    """

    partial: tuple[str, ...] = ()
    local: tuple[LocalAttribute, ...] = ()
    full: tuple[LocalAttribute, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to repair."""
        return bool(self.partial or self.local or self.full)

    def everywhere(self, paths: Sequence[str]) -> Repairs:
        """Make the repairs of some blocks those of all blocks that are alike, whose modules are among ``paths``."""

        def spread(found: tuple[LocalAttribute, ...]) -> tuple[LocalAttribute, ...]:
            alike = ((one, path) for one in found for path in paths if _generic(path) == _generic(one.module))
            return tuple(dict.fromkeys(replace(one, module=path) for one, path in alike))

        return replace(self, local=spread(self.local), full=spread(self.full))

    def plan(self, plan: ShardingPlan) -> ShardingPlan:
        """The plan with these repairs; gradients of parameters in other blocks that are alike are summed, too."""
        alike = {_generic(name) for name in self.partial}
        entries = {
            name: replace(entry, grad_allreduce=True)
            if entry.layout.is_replicated and _generic(name) in alike
            else entry
            for name, entry in plan.parameters.items()
        }
        gone = {(one.module, one.name) for one in (*self.full, *self.local)}
        kept = tuple(one for one in plan.attributes if (one.module, one.name) not in gone)
        return replace(plan, parameters=entries, attributes=kept + self.local)

    def carry_out(self, model: nn.Module, rank: int) -> None:
        """Give the modules of a sharded model their numbers."""
        for one in self.full:
            set_local(model.get_submodule(one.module), one.name, one.full)
        for one in self.local:
            set_local(model.get_submodule(one.module), one.name, one.local[rank])

    def sentences(self) -> list[str]:
        """What was done, for people."""
        said = []
        if self.partial:
            names = ", ".join(sorted({_starred(name) for name in self.partial}))
            said.append(f"the gradients of {names} are partial sums on each rank and are summed over them")
        if self.local:
            names = ", ".join(sorted({_starred(f"{one.module}.{one.name}") for one in self.local}))
            said.append(f"{names} is each rank's own")
        if self.full:
            names = ", ".join(sorted({_starred(f"{one.module}.{one.name}") for one in self.full}))
            said.append(f"{names} stays the full model's")
        return said


Proving = Callable[[ShardingPlan], tuple[Verdict, tuple[str, ...]]]
"""The verdict of a plan, and the replicated parameters whose gradients it found to be partial sums."""


def proved_or_repaired(
    model: nn.Module, plan: ShardingPlan, prove: Proving, seconds: float = SECONDS
) -> tuple[Verdict, Repairs]:
    """The verdict of ``plan``, or that of it with repairs where it is refuted and they make it right.

    Args:
        model: the unsharded model.
        plan: the plan.
        prove: proves a plan.
        seconds: how long to look for numbers that are per rank.
    """
    verdict, partial = prove(plan)
    if partial:
        repairs = Repairs(partial)
        again, _ = prove(repairs.plan(plan))
        if again.kind == "proved":
            return again, repairs
    if verdict.kind == "refuted" and not verdict.is_of_a_switch:
        found = _found(model, plan, prove, seconds)
        if found is not None:
            return found
    return verdict, Repairs()


def _found(model: nn.Module, plan: ShardingPlan, prove: Proving, seconds: float) -> Optional[tuple[Verdict, Repairs]]:
    """The numbers that are to be per rank, or are not, for ``plan`` to be proved; None if none are found."""
    until = time.process_time() + seconds  # not the clock's: what is found must not depend on what else runs
    groups = [*_localized(plan), *_candidates(model, plan)]
    pairs = (found for found in combinations(groups, 2) if _apart(found))
    trials: Iterator[tuple[Repairs, ...]] = chain(_all_counts(groups), ((one,) for one in groups), pairs)
    for chosen in trials:
        if time.process_time() > until:
            return None
        repairs = Repairs(
            local=tuple(one for each in chosen for one in each.local),
            full=tuple(one for each in chosen for one in each.full),
        )
        verdict, partial = prove(repairs.plan(plan))
        if verdict.kind != "proved" and partial:
            repairs = replace(repairs, partial=partial)
            verdict, _ = prove(repairs.plan(plan))
        if verdict.kind == "proved":
            return verdict, repairs
    return None


def _all_counts(groups: Sequence[Repairs]) -> Iterator[tuple[Repairs, ...]]:
    """All numbers together that are called counts of heads: a forward may read several of them."""
    counts = tuple(one for one in groups if one.local and _COUNT.search(one.local[0].name))
    if len(counts) > 1 and _apart(counts):
        yield counts


def _apart(chosen: Iterable[Repairs]) -> bool:
    """Whether no number is repaired in two ways."""
    names = [(one.module, one.name) for each in chosen for one in (*each.local, *each.full)]
    return len(set(names)) == len(names)


def _localized(plan: ShardingPlan) -> list[Repairs]:
    """For each number that the plan gives ranks their own of: that it stays as it is."""
    groups: dict[str, list[LocalAttribute]] = defaultdict(list)
    for one in plan.attributes:
        groups[one.name].append(one)
    return [Repairs(full=tuple(found)) for found in groups.values()]


def _candidates(model: nn.Module, plan: ShardingPlan) -> list[Repairs]:
    """For each number of modules around column parallel layers: that each rank has its part of it."""
    taken = {(one.module, one.name) for one in plan.attributes}
    groups: dict[tuple[type, str, tuple[float, ...]], list[LocalAttribute]] = defaultdict(list)
    for path, parts in _parts(plan).items():
        module = model.get_submodule(path)
        for name, value in _numbers(module).items():
            for part in parts:
                local = tuple(value * share for share in part)
                whole = tuple(round(number) for number in local)
                if (path, name) in taken or any(abs(a - b) > 1e-6 or b < 1 for a, b in zip(local, whole)):
                    continue
                key = type(module), name, part
                groups[key].append(LocalAttribute(path, name, value, whole))
    found = [Repairs(local=tuple(each)) for each in groups.values()]
    # counts of heads have few digits; and what is read is more often an attribute than the config
    return sorted(found, key=lambda one: (one.local[0].name.startswith("config."), one.local[0].full))


def _parts(plan: ShardingPlan) -> dict[str, list[tuple[float, ...]]]:
    """By path of a module with column parallel layers in it, or in a child: which part of them each rank has."""
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for entry in plan.parameters.values():
        if entry.kind != "column" or entry.features is None or entry.gather_output or not entry.name.endswith("weight"):
            continue
        layout = entry.layout
        assert layout.dim is not None
        total = layout.shape[layout.dim]
        part = tuple(layout.local_shape(rank)[layout.dim] / total for rank in range(layout.tp_size))
        parent = entry.module.rpartition(".")[0]
        for path in {parent, parent.rpartition(".")[0]}:
            if path and part not in found[path]:
                found[path].append(part)
        if not parent and part not in found[""]:
            found[""].append(part)
    return {path: parts for path, parts in found.items() if parts}


def _numbers(module: nn.Module) -> Mapping[str, int]:
    """The whole numbers that a module has itself, and the counts of heads in its config."""
    own = {name: value for name, value in vars(module).items() if type(value) is int and not name.startswith("_")}
    config = getattr(module, "config", None)
    heads = {
        f"config.{name}": value
        for name, value in (vars(config).items() if hasattr(config, "__dict__") else ())
        if type(value) is int and "head" in name
    }
    return {name: value for name, value in {**own, **heads}.items() if value > 1}


def _generic(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _starred(name: str) -> str:
    return re.sub(r"\d+", "*", name)
