"""From rules and a model to a plan. Pure: works on the meta device, with no process group.

What cannot be made exact is refused here, with the parameter, the rule and the fix in the message.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Optional

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.introspection.forward_source import reads
from lightning_autotp.introspection.names import model_types
from lightning_autotp.planning.attention import head_inputs, local_attributes
from lightning_autotp.planning.checks import boundary_blockers, check, head_count_blockers, preset_blockers
from lightning_autotp.planning.partition import Cutter
from lightning_autotp.planning.rules import Matcher, find_rules
from lightning_autotp.plans.plan import Boundary, ParameterPlan, ShardingPlan
from lightning_autotp.specs.layer_spec import PartitionType, TPLayerSpec


def propose_plan(
    model: nn.Module, config: TPTrainingConfig, tp_size: Optional[int] = None, *, warn: bool = True
) -> ShardingPlan:
    """Decide by the rules alone how every parameter of ``model`` is cut.

    Args:
        model: the unsharded model; its parameters may be on the meta device.
        config: the user's config.
        tp_size: the tensor parallel size; None takes the config's.
        warn: whether to warn of what the user should know, which is in the plan, too.

    Raises:
        ValueError: if no rules can be found; if a rule cannot be applied to what it matches; if a column cut is never
            closed by a row or opened by ``gather_output``, or a row has no cut input; if nothing is cut at all; and in
            strict mode for everything in :attr:`ShardingPlan.warnings`.
    """
    size = config.size if tp_size is None else tp_size
    if size < 1:
        raise ValueError(f"tp_size: {size} is not a positive number of ranks.")
    if size == 1:
        return ShardingPlan(1, _entries(Cutter(Matcher(model, []), 1)))
    rules, strict = find_rules(model, config)
    matcher = Matcher(model, rules)
    cutter = Cutter(matcher, size)
    entries = _entries(cutter)
    boundaries = _boundaries(matcher, entries)
    warnings = check(model, entries, boundaries, rules, matcher.used)
    if strict and warnings:
        raise ValueError("strict_mode: " + " ".join(warnings))
    for warning in warnings if warn else ():
        rank_zero_warn(warning)
    columns = _column_linears(matcher.modules, entries)
    attributes = tuple(local_attributes(cutter, entries))
    blockers = [
        *cutter.blockers,
        *preset_blockers(model, entries),
        *boundary_blockers(matcher.modules, entries, boundaries),
        *head_count_blockers(model, columns, attributes),
    ]
    return ShardingPlan(
        size,
        entries,
        _siblings(cutter, columns),
        attributes,
        boundaries,
        tuple(head_inputs(cutter, entries, model_types(model))),
        tuple(warnings),
        tuple(dict.fromkeys(blockers)),
    )


def _entries(cutter: Cutter) -> dict[str, ParameterPlan]:
    """A plan for every parameter, under each of its names."""
    entries: dict[str, ParameterPlan] = {}
    for path, module in cutter.modules.items():
        for local_name, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{local_name}" if path else local_name
                entries[name] = cutter.decide(name, path, local_name, parameter)
    _follow_aliases(cutter.modules, entries)
    _agree_on_shared(cutter.modules, entries)
    return entries


def _by_parameter(modules: Mapping[str, nn.Module], names: Iterable[str]) -> list[list[str]]:
    """The names of each parameter."""
    found: dict[int, list[str]] = defaultdict(list)
    for name in names:
        module, _, local_name = name.rpartition(".")
        found[id(modules[module]._parameters[local_name])].append(name)
    return list(found.values())


def _follow_aliases(modules: Mapping[str, nn.Module], entries: dict[str, ParameterPlan]) -> None:
    """A module that only keeps another's parameter, and does not read it, takes it as it is cut (BERT's head bias)."""
    for names in _by_parameter(modules, entries):
        decided = next((entries[name] for name in names if entries[name].rule), None)
        for name in names:
            path, _, local_name = name.rpartition(".")
            if decided is not None and not entries[name].rule and local_name not in reads(modules[path]):
                entries[name] = replace(decided, name=name, module=path, features=None)


def _agree_on_shared(modules: Mapping[str, nn.Module], entries: Mapping[str, ParameterPlan]) -> None:
    """One parameter under several names (tied, or in a shared module) must be cut in one way."""
    for shared in _by_parameter(modules, entries):
        first = entries[shared[0]]
        for other in (entries[name] for name in shared[1:]):
            same_module = modules[first.module] is modules[other.module]
            if first.layout != other.layout or same_module and _how(first) != _how(other):
                raise ValueError(
                    f"{first.name} and {other.name} are one parameter, but {_decision(first)} while"
                    f" {_decision(other)}; write rules that cut both alike (an embedding by 'row' and its tied head"
                    " by 'column' with gather_output), or skip both."
                )


def _boundaries(matcher: Matcher, entries: Mapping[str, ParameterPlan]) -> tuple[Boundary, ...]:
    """What boundary rules name and whose inside is cut; where it is left whole, there is nothing to sum."""
    cut = {entry.module for entry in entries.values() if not entry.layout.is_replicated}
    found = []
    for path, module in matcher.modules.items():
        if path and matcher.boundary(path) and any(f"{inner}.".startswith(f"{path}.") for inner in cut):
            if "forward" in vars(module):
                raise ValueError(
                    f"{path} ({type(module).__name__}): its forward was replaced on the object, and nothing would sum"
                    " its outputs over the ranks; remove what replaced it (hooks of other libraries do), or skip what"
                    " is inside."
                )
            whole = (entries[f"{path}.{name}"] for name, p in module._parameters.items() if p is not None)
            once = [e.name.rpartition(".")[2] for e in whole if e.kind == "row" and e.layout.is_replicated]
            children = [n for n, child in module.named_children() if type(child) is nn.Identity]
            passing = [n for n in children if (rule := matcher.parameter(f"{path}.{n}")) and _is_row(rule.spec)]
            found.append(Boundary(path, tuple(once), tuple(passing)))
    return tuple(found)


def _is_row(spec: TPLayerSpec) -> bool:
    return spec.partition_type is PartitionType.ROW


def _column_linears(modules: Mapping[str, nn.Module], entries: Mapping[str, ParameterPlan]) -> dict[str, ParameterPlan]:
    """Weights of column linears, by module path, each module once."""
    found: dict[int, ParameterPlan] = {}
    for entry in entries.values():
        if entry.kind == "column" and entry.features is not None:
            found.setdefault(id(modules[entry.module]), entry)
    return {entry.module: entry for entry in found.values()}


def _siblings(cutter: Cutter, columns: Mapping[str, ParameterPlan]) -> tuple[tuple[str, ...], ...]:
    """Column linears under one parent with one input size: they may read one tensor and share its collective."""
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for path, entry in columns.items():
        assert entry.features is not None
        groups[(cutter.holder(path), entry.features[1])].append(path)
    return tuple(tuple(group) for group in groups.values())


def _how(entry: ParameterPlan) -> tuple[object, ...]:
    return entry.kind, entry.gather_output, entry.split_input, entry.grad_allreduce, entry.partial_outputs


def _decision(entry: ParameterPlan) -> str:
    rule = f" by rule {entry.rule!r}" if entry.rule else ""
    return f"{entry.name} is {'left whole' if entry.layout.is_replicated else f'cut as {entry.kind}'}{rule}"
