"""A plan as rules of a ``partition_config``, which a user can keep and edit."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, Optional

from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.introspection.layers import is_conv1d
from lightning_autotp.introspection.names import folded
from lightning_autotp.layout.layout import Layout
from lightning_autotp.planning.planner import propose_plan
from lightning_autotp.plans.plan import ParameterPlan, ShardingPlan

Rule = dict[str, Any]


def rules_of(model: nn.Module, plan: ShardingPlan) -> tuple[Rule, list[str]]:
    """The rules that shard ``model`` as ``plan`` does, for any tensor parallel size that they fit.

    Returns:
        the fields of a ``partition_config``; and the names, layer numbers folded, of parameters that the rules would
        shard in another way, or one sentence of why they are refused.
    """
    specs: dict[str, tuple[Rule, list[str]]] = {}

    def add(rule: Rule, pattern: str) -> None:
        specs.setdefault(repr(rule), (rule, []))[1].append(pattern)

    linears: dict[str, bool] = defaultdict(bool)
    for entry in plan.parameters.values():
        if entry.features is not None and (not entry.layout.is_replicated or entry.partial_outputs):
            linears[entry.module] = True
    done: set[str] = set()
    for name, entry in plan.parameters.items():
        beside = linears[entry.module] and not name.endswith("weight")
        key = folded(name)
        rule = None if key in done or beside else _rule(model.get_submodule(entry.module), entry)
        done.add(key)
        if rule is not None:
            module, _, local = key.rpartition(".")
            local = r"(weight|bias)" if linears[entry.module] and not entry.partial_outputs else re.escape(local)
            add(rule, f"{_pattern(module)}[.]{local}$" if module else f"{local}$")
    for boundary in plan.boundaries:
        pattern = f"{_pattern(folded(f'{boundary.module}.')[:-1])}$"
        rule = {"partition_type": "skip", "boundary": True}
        if pattern not in specs.get(repr(rule), (rule, []))[1]:
            add(rule, pattern)
        for local in boundary.once:
            once = f"{pattern[:-1]}[.]{re.escape(local)}$"
            row: Rule = {"partition_type": "row"}
            if once not in specs.get(repr(row), (row, []))[1]:
                add(row, once)
    rules: Rule = {"layer_specs": [{"patterns": patterns, **rule} for rule, patterns in specs.values()]}
    return rules, _lost(model, plan, rules)


def _lost(model: nn.Module, plan: ShardingPlan, rules: Rule) -> list[str]:
    try:
        again = propose_plan(model, TPTrainingConfig(partition_config=rules), plan.tp_size)
    except ValueError as error:
        return [f"it (refused: {error})"]
    wrong = [name for name, entry in plan.parameters.items() if again.layouts[name] != entry.layout]
    return list(dict.fromkeys(map(folded, wrong)))


def _rule(module: nn.Module, entry: ParameterPlan) -> Optional[Rule]:
    """The rule for one parameter, without its pattern; None where none is needed."""
    if entry.partial_outputs:
        return {"partition_type": "skip", "partial_outputs": entry.partial_outputs}
    if entry.grad_allreduce:
        return {"partition_type": "skip", "grad_allreduce": True}
    if entry.layout.is_replicated:
        return None
    if entry.kind in ("vocabulary", "heads"):
        return {"partition_type": "row" if entry.kind == "vocabulary" else "column"}
    rule: Rule = {"partition_type": entry.kind}
    if entry.features is None:
        rule |= _of_dims(entry)
    else:
        turned = is_conv1d(module)
        shape = _view(entry.layout, turned, column=entry.kind == "column")
        rule |= {} if shape is None else shape
    return {**rule, "gather_output": True} if entry.gather_output else rule


def _view(layout: Layout, turned: bool, *, column: bool) -> Optional[Rule]:
    """``shape`` and ``partition_dim`` of a linear's weight [out, in] (``turned``: [in, out]); None for a plain one."""
    sizes = _sub_sizes(layout)
    if len(sizes) < 2:
        return None
    if not column:
        return {"shape": [-1, list(sizes)]}
    repeat = _repeat(sizes)
    if repeat == len(sizes):
        assert layout.dim is not None
        return {"shape": [repeat, 1, -1], "partition_dim": 1}
    return {"shape": [list(sizes), -1]}


def _of_dims(entry: ParameterPlan) -> Rule:
    """``shape`` and ``partition_dim`` of a parameter that is no linear's."""
    dims, dim = len(entry.layout.shape), entry.layout.dim
    sizes = _sub_sizes(entry.layout)
    usual = dims - 1 if entry.kind == "row" else max(dims - 2, 0)
    if len(sizes) < 2 and dim == usual:
        return {}
    shape: list[Any] = [-1] * dims
    if len(sizes) > 1:
        shape[dim or 0] = len(sizes) if len(set(sizes)) == 1 else list(sizes)
    return {"shape": shape, "partition_dim": dim}


def _sub_sizes(layout: Layout) -> list[int]:
    """The sizes of the parts that lie one behind the other and are each sharded by themselves."""
    runs = sorted({(start, length, rank) for rank, part in enumerate(layout.parts) for start, length in part})
    sizes, before = [0], -1
    for start, length, rank in runs:
        if rank < before and start == sum(sizes):
            sizes.append(0)
        if start == sum(sizes):
            sizes[-1] += length
        before = rank
    return sizes


def _repeat(sizes: list[int]) -> int:
    """How often a sequence of sizes repeats, as a whole."""
    return len(sizes) if len(set(sizes)) == 1 and len(sizes) > 4 else 1


def _pattern(path: str) -> str:
    """A regular expression for a path with its layer numbers folded."""
    return ".".join(r"\d+" if part == "*" else re.escape(part) for part in path.split(".")).replace(".", "[.]")
