"""What rules leave replicated is sharded by a derived plan, where that changes nothing that the rules decide."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import replace

from torch import nn

from lightning_autotp.derivation.derive import Derived
from lightning_autotp.derivation.plan import LARGE, siblings_of
from lightning_autotp.introspection.names import folded
from lightning_autotp.plans.plan import ParameterPlan, ShardingPlan


def gaps(model: nn.Module, plan: ShardingPlan) -> tuple[str, ...]:
    """The linears, layer numbers folded, that hold a good part of a model and of which no rule says anything."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    inside = tuple(f"{boundary.module}." for boundary in plan.boundaries)
    left: dict[str, int] = defaultdict(int)
    for name, size in sizes.items():
        entry = plan.parameters[name]
        if entry.features is not None and _is_open(entry) and not entry.partial_outputs and not name.startswith(inside):
            left[folded(name)] += size
    return tuple(name for name, size in left.items() if size >= LARGE * sum(sizes.values()))


def filled(model: nn.Module, plan: ShardingPlan, derived: Derived) -> ShardingPlan:
    """``plan`` with what ``derived`` shards besides; the plan itself if that is nothing.

    What belongs together is taken as a whole, and only if no rule decides of any of it; a parameter with several names
    under all of them.
    """
    wanted = {name for name in plan.parameters if _is_open(plan.parameters[name])}
    for group in derived.groups:
        members = {name for name in plan.parameters if folded(name) in group}
        if not members <= wanted:
            wanted -= members
    named: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named[id(parameter)].add(name)
    for names in named.values():
        if not names <= wanted:
            wanted -= names
    taken = {n: e for n, e in derived.plan.parameters.items() if n in wanted and _adds(e)}
    if not any(not entry.layout.is_replicated for entry in taken.values()):
        return plan
    return _joined(plan, taken, derived.plan, {path for path, _ in model.named_modules()})


def _joined(
    plan: ShardingPlan, taken: Mapping[str, ParameterPlan], derived: ShardingPlan, first: Set[str]
) -> ShardingPlan:
    entries = {**plan.parameters, **taken}
    modules = {entry.module for entry in taken.values() if not entry.layout.is_replicated}

    def around(path: str) -> bool:
        return any(f"{module}.".startswith(f"{path}.") or not path for module in modules)

    known = {(one.module, one.name) for one in plan.attributes}
    attributes = [one for one in derived.attributes if around(one.module) and (one.module, one.name) not in known]
    boundaries = [one for one in derived.boundaries if around(one.module) and one not in plan.boundaries]
    siblings = [group for group in siblings_of(entries, first) if not modules.isdisjoint(group)]
    grouped = {path for group in siblings for path in group}
    return replace(
        plan,
        parameters=entries,
        siblings=(*(group for group in plan.siblings if grouped.isdisjoint(group)), *siblings),
        attributes=(*plan.attributes, *attributes),
        boundaries=(*plan.boundaries, *boundaries),
    )


def _is_open(entry: ParameterPlan) -> bool:
    """Whether no rule decides of a parameter."""
    return entry.layout.is_replicated and not entry.rule


def _adds(entry: ParameterPlan) -> bool:
    """Whether a derived entry says more than that a parameter is replicated."""
    return not entry.layout.is_replicated or entry.grad_allreduce or bool(entry.partial_outputs) or entry.kind == "row"
