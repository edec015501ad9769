"""Is a plan sound? What can be seen without running: cuts that nothing closes or opens, fused weights, head counts."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any

from torch import nn

from lightning_autotp.introspection.forward_source import computes, reads, views
from lightning_autotp.introspection.names import folded
from lightning_autotp.plans.plan import Boundary, LocalAttribute, ParameterPlan, Rule
from lightning_autotp.presets import find_preset

_LOW_COVERAGE = 0.5
"""Warn when less than this share of the elements of 2-D and larger parameters is cut."""


def check(
    model: nn.Module,
    entries: Mapping[str, ParameterPlan],
    boundaries: Collection[Boundary],
    rules: Sequence[Rule],
    used: Collection[int],
) -> list[str]:
    """Refuse what cannot be exact; return what looks unintended.

    Args:
        model: the model.
        entries: what was decided for its parameters.
        boundaries: the modules with a boundary rule whose inside is cut.
        rules: the rules that decided.
        used: the places in ``rules`` of those that matched something.

    Raises:
        ValueError: on unclosed column cuts, unopened row cuts, fused weights cut as if plain, or when nothing is cut.
    """
    if all(entry.layout.is_replicated for entry in entries.values()):
        sources = ", ".join(dict.fromkeys(rule.source for rule in rules)) or "an empty partition_config"
        raise ValueError(
            f"nothing of {type(model).__name__} is cut: no rule ({sources}) matches any of its weights. Its parameters"
            f" are named like {_example_name(entries)!r}; patterns are matched from the start of the name."
        )
    _refuse_foreign_preset(model, entries)
    _check_bare(model, entries, boundaries)
    _Pairs(model, entries, rules).check()
    return list(_warnings(model, entries, rules, used))


def _refuse_foreign_preset(model: nn.Module, entries: Mapping[str, ParameterPlan]) -> None:
    """A preset that knows the names of an embedding or a head alone is one for another family."""
    cut = [entry for entry in entries.values() if not entry.layout.is_replicated]
    inside = any(entry.kind in ("row", "column") and not entry.gather_output for entry in cut)
    if not inside and all(entry.source.startswith("preset ") for entry in cut):
        raise ValueError(
            f"{cut[0].source} cuts nothing of {type(model).__name__} but {_names([entry.name for entry in cut])}: it is"
            f" for other names than {_example_name(entries)!r}. Leave out `preset_model` to have one detected, or give"
            " `partition_config` rules."
        )


def preset_blockers(model: nn.Module, entries: Mapping[str, ParameterPlan]) -> list[str]:
    """What presets know they cannot cut exactly."""
    found: Iterable[Any] = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if hasattr(config, "model_type")}.values()
    blockers = []
    for entry in entries.values():
        if not entry.source.startswith("preset ") or entry.layout.is_replicated or entry.features is None:
            continue
        preset = find_preset(entry.source.removeprefix("preset "))
        wrong = (i for i in preset.inexact for c in configs if c.model_type in preset.model_types and i.when(c))
        blockers += [
            f"{folded(entry.name)} cannot be cut exactly by preset {preset.name}: {inexact.reason}."
            for inexact in wrong
            if re.match(inexact.pattern, entry.name)
        ]
    return blockers


def boundary_blockers(
    modules: Mapping[str, nn.Module], entries: Mapping[str, ParameterPlan], boundaries: Collection[Boundary]
) -> list[str]:
    """Modules with a boundary whose inside is not cut through: what they put out would be no partial sum."""
    blockers = []
    for boundary in boundaries:
        path = boundary.module
        inside = [e for e in entries.values() if f"{e.module}.".startswith(f"{path}.")]
        kinds = {e.kind for e in inside if not e.layout.is_replicated}
        if kinds != {"column", "row"}:
            blockers.append(
                f"{folded(path)} ({type(modules[path]).__name__}): a boundary rule sums its outputs, which is right"
                " only where some of its parameters are cut by 'column' rules and those that follow by 'row' rules;"
                f" here are {' and '.join(sorted(kinds))} cuts only. Cut both, or skip all."
            )
            continue
        once = {f"{path}.{name}" for name in boundary.once}
        for entry in inside:
            whole = entry.layout.is_replicated and not entry.grad_allreduce and entry.name not in once
            if whole and not (entry.features is None and entry.kind == "row" and entry.module == path):
                blockers.append(
                    f"{folded(entry.name)}: it is whole on every rank inside {folded(path)}, whose outputs a boundary"
                    " rule sums, so that what it adds would be added once per rank. Put the boundary around the cut"
                    " parameters alone; a bias of that module itself is added once by a 'row' rule."
                )
        made = [e for e in inside if e.kind == "column" and not e.name.endswith("bias") and not e.layout.is_replicated]
        read = {e.layout.shape[e.layout.dim or 0] for e in inside if e.kind == "row" and not e.layout.is_replicated}
        for entry in made:
            width, runs = entry.layout.shape[entry.layout.dim or 0], len(entry.layout.parts[-1])
            if width not in read and runs == 1 and not entry.interleaved and any(width % size == 0 for size in read):
                blockers.append(
                    f"{folded(entry.name)} (rule {entry.rule!r}): its {width} features are a multiple of the"
                    f" {min(read)} that the row cut behind it reads, so it holds several parts, and a plain cut would"
                    " give a rank one of them whole and none of another. Give the rule a `shape` with the number of"
                    " parts at `partition_dim`."
                )
    return blockers


def _check_bare(model: nn.Module, entries: Mapping[str, ParameterPlan], boundaries: Collection[Boundary]) -> None:
    """Cut parameters that are no layer's weight need something that closes their cut."""
    holders = {e.module.rpartition(".")[0] for e in entries.values() if e.kind == "column" and e.features is not None}
    named = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    times = Counter(parameter for _, parameter in named)
    shared = {name for name, parameter in named if times[parameter] > 1}
    for entry in entries.values():
        module = model.get_submodule(entry.module)
        inside = any(f"{entry.module}.".startswith(f"{boundary.module}.") for boundary in boundaries)
        layer = isinstance(module, nn.Embedding) or entry.features is not None or entry.kind == "whole"
        if inside and entry.features is not None and not entry.layout.is_replicated:
            raise ValueError(
                f"{entry.name} (rule {entry.rule!r}): it is inside a module with a boundary rule, whose output is"
                " summed, and a cut linear sums its own; remove one of the rules."
            )
        alias = entry.name in shared and entry.name.rpartition(".")[2] not in reads(module)
        if layer or inside or alias or entry.name.endswith("bias") and hasattr(module, "weight"):
            continue
        per_head = len(entry.layout.shape) == 1 and entry.kind == "column" and entry.module in holders
        if not per_head:
            raise ValueError(
                f"{entry.name} (rule {entry.rule!r}, {entry.kind}): this is a parameter of {type(module).__name__}, and"
                " nothing sums the output of that module. Add a boundary rule for it (`boundary: true`), narrow the"
                " pattern, or add a skip rule before it."
            )


def head_count_blockers(
    model: nn.Module, columns: Mapping[str, ParameterPlan], local: Collection[LocalAttribute]
) -> list[str]:
    """Uses of head counts that a cut would make wrong, or may make wrong where their names are not known."""
    known = {(attribute.module, attribute.name): attribute for attribute in local}
    blockers = []
    for (path, name), attribute in known.items():
        if name in computes(model.get_submodule(path)):
            blockers.append(
                f"{folded(path)} computes with `self.{name}` = {attribute.full} in its forward pass (a power, a"
                " divisor, a range), and with its projections cut that becomes a rank's own count; compute it in"
                " `__init__`, and keep it under a name of its own."
            )
    for path in dict.fromkeys(m.rpartition(".")[0] for m, entry in columns.items() if not entry.gather_output):
        module = model.get_submodule(path)
        read = {name for name, value in vars(module).items() if _is_head_count(name, value)} & reads(module)
        read |= {name for name in views(module) if _whole_number(module, name) > 1}
        for name in sorted(name for name in read if (path, name) not in known):
            blockers.append(
                f"{folded(path)} reads `self.{name}` = {_whole_number(module, name)} in its forward pass, and with its"
                " projections cut it may have to be a rank's own count, which nobody knows by that name; take the"
                " number of heads from the projection's width (`view(..., -1, head_dim)`), or call the count"
                " `num_heads`."
            )
        counts = {attribute.full for (at, _), attribute in known.items() if at == path}
        for name, child in module.named_modules():
            if (
                isinstance(child, (nn.ModuleList, nn.ParameterList))
                and len(child) in counts
                and len([*child.parameters()])
            ):
                blockers.append(
                    f"{folded(path)}.{name} holds {len(child)} parts, as many as {folded(path)} has heads: if there is"
                    " one for each head, a rank would use those of other heads than its own. Add skip rules for the"
                    " projections of this module."
                )
    return blockers


def _is_head_count(name: str, value: object) -> bool:
    is_count = re.search("head", name, re.IGNORECASE) and not re.search("dim|size|group|width", name)
    return bool(is_count) and type(value) is int and value > 1


def _whole_number(module: nn.Module, name: str) -> int:
    """What ``name`` (``x`` or ``x.y``) is of ``module``, 0 if that is no whole number."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if type(value) is int else 0


class _Pairs:
    """Every column cut has a row cut that closes it, in the innermost module that holds both."""

    def __init__(self, model: nn.Module, entries: Mapping[str, ParameterPlan], rules: Sequence[Rule]) -> None:
        self.model = model
        self.entries = entries
        self.plain = {
            p for rule in rules if rule.source == "user" and rule.spec.shape is None for p in rule.spec.patterns
        }
        self.stuck_columns: list[str] = []
        self.stuck_rows: list[str] = []

    def check(self) -> None:
        open_columns, open_rows = self._unpaired("", self.model)
        open_columns, open_rows = self.stuck_columns + open_columns, self.stuck_rows + open_rows
        if open_columns:
            raise ValueError(
                f"{_names(open_columns)}: a column cut that no row cut closes: what follows would see only a part of"
                " the features. Cut the layer that reads this output with partition_type 'row', or set"
                " `gather_output: true`."
            )
        if open_rows:
            raise ValueError(
                f"{_names(open_rows)}: a row cut whose input no column cut makes: it would be fed all features where it"
                " expects its part. Cut the layers that make its input with partition_type 'column', or skip this one."
            )

    def _unpaired(self, path: str, module: nn.Module) -> tuple[list[str], list[str]]:
        """Names of column and row weights under ``module`` that find no partner in it."""
        columns: list[str] = []
        rows: list[str] = []
        weight = self.entries.get(f"{path}.weight" if path else "weight")
        if weight is not None and weight.features is not None:
            columns += [weight.name] * (weight.kind == "column" and not weight.gather_output)
            rows += [weight.name] * (weight.kind == "row" and not weight.split_input)
        for name, child in module.named_children():
            child_columns, child_rows = self._unpaired(f"{path}.{name}" if path else name, child)
            if isinstance(module, nn.Sequential):  # here, and only here, the order of the layers is known
                if child_rows and not columns:
                    rows += child_rows
                elif child_rows:
                    self._agree(columns, child_rows)
                    columns = []
                columns += child_columns
            else:
                columns += child_columns
                rows += child_rows
        return (columns, rows) if isinstance(module, nn.Sequential) else self._pair(path, module, columns, rows)

    def _pair(self, path: str, module: nn.Module, columns: list[str], rows: list[str]) -> tuple[list[str], list[str]]:
        """What stays open of the cuts under ``module``.

        Its own layers are taken to feed each other. Layers deeper in it only where the widths agree (attention does not
        feed the MLP's second layer), and never across the blocks of a list, each of which must close what it opens.
        """
        if not columns or not rows:
            return columns, rows
        deep = [name for name in columns + rows if _owner(self.entries[name].module) != path]
        if deep and isinstance(module, nn.ModuleList):
            self.stuck_columns += columns
            self.stuck_rows += rows
            return [], []
        made = [self._features(name)[0] for name in columns]
        read = [self._features(name)[1] for name in rows]
        if deep and not any(out % size == 0 for out in made for size in read) and sum(made) not in read:
            return columns, rows
        self._agree(columns, rows)
        return [], []

    def _features(self, name: str) -> tuple[int, int]:
        features = self.entries[name].features
        assert features is not None
        return features

    def _agree(self, columns: list[str], rows: list[str]) -> None:
        """A plain rule of the user's on a weight that is a multiple of what the row reads: it must be a fused one."""
        read = {self._features(name)[1] for name in rows}
        for name in columns:
            entry = self.entries[name]
            out = self._features(name)[0]
            if entry.rule not in self.plain or out in read:
                continue
            for size in sorted(read):
                if out % size == 0 and out > size:
                    raise ValueError(
                        f"{folded(name)} (rule {entry.rule!r}): its {out} output features are {out // size} times what"
                        f" the row cut that follows reads ({size}), so it holds {out // size} parts, and a plain cut"
                        f" would give a rank one part whole and none of another. Give the rule `shape: [{out // size},"
                        " -1]` (or the parts' sizes); `shape: [-1, -1]` if the parts are interleaved head by head."
                    )


def _warnings(
    model: nn.Module, entries: Mapping[str, ParameterPlan], rules: Sequence[Rule], used: Collection[int]
) -> Iterable[str]:
    for number, rule in enumerate(rules):
        if rule.source == "user" and number not in used:
            yield f"partition_config: the rule {rule.spec.patterns} matches no parameter."
    yield from left_whole(model, entries)


def left_whole(model: nn.Module, entries: Mapping[str, ParameterPlan]) -> Iterable[str]:
    """Sentences on linears that no rule matches and that are whole, and on a small share of weights that is cut."""
    linears = [e for e in entries.values() if e.features is not None and not _is_adapter(e.name)]
    unmatched = [e.name for e in linears if not e.rule and e.layout.is_replicated]
    if unmatched:
        yield f"no rule matches the linear layers {_names(unmatched)}; every rank holds them whole."
    parameters = dict(model.named_parameters())  # each once, however many names it has
    matrices = [e for name, e in entries.items() if name in parameters and len(e.layout.shape) > 1]
    cut = sum(prod(e.layout.shape) for e in matrices if not e.layout.is_replicated)
    share = cut / max(1, sum(prod(e.layout.shape) for e in matrices))
    if share < _LOW_COVERAGE:
        yield f"only {share:.0%} of the model's weights is cut; the rest is whole on every rank."


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _owner(layer: str) -> str:
    """The path of the module that works with a layer, of which PEFT may have made a few."""
    return re.sub(r"\.(base_layer|lora_[AB]\.[^.]+)$", "", layer).rpartition(".")[0]


def _example_name(entries: Mapping[str, ParameterPlan]) -> str:
    matrices = [name for name, entry in entries.items() if len(entry.layout.shape) > 1]
    return (matrices or list(entries) or ["(it has none)"])[len(matrices) // 2]


def _names(names: Sequence[str]) -> str:
    shown = list(dict.fromkeys(map(folded, names)))
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
