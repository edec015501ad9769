"""Is a plan sound? What can be seen without running: cuts that nothing closes or opens, fused weights, head counts."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

from torch import nn

from lightning_autotp.plan import LocalAttribute, ParameterPlan, Rule, folded
from lightning_autotp.presets import find_preset

_LOW_COVERAGE = 0.5
"""Warn when less than this share of the elements of 2-D and larger parameters is cut."""


def check(
    model: nn.Module, entries: Mapping[str, ParameterPlan], rules: Sequence[Rule], used: Collection[int]
) -> list[str]:
    """Refuse what cannot be exact; return what looks unintended.

    Args:
        model: the model.
        entries: what was decided for its parameters.
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
    _Pairs(model, entries, rules).check()
    return list(_warnings(model, entries, rules, used))


def preset_blockers(entries: Mapping[str, ParameterPlan], model_types: Iterable[str]) -> list[str]:
    """What presets know they cannot cut exactly."""
    names = {e.source.removeprefix("preset ") for e in entries.values() if e.source.startswith("preset ")}
    reasons = {t: find_preset(name).inexact.get(t) for t in model_types for name in sorted(names)}
    return [f"model type {t!r} cannot be cut exactly yet: {reason}." for t, reason in reasons.items() if reason]


def head_count_blockers(
    model: nn.Module, columns: Mapping[str, ParameterPlan], local: Iterable[LocalAttribute]
) -> list[str]:
    """Head counts under names nobody knows, which a cut module reads: a view by the full count would go unnoticed."""
    known = {(attribute.module, attribute.name) for attribute in local}
    blockers = []
    for path in dict.fromkeys(m.rpartition(".")[0] for m, entry in columns.items() if not entry.gather_output):
        module = model.get_submodule(path)
        read = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
        for name, value in vars(module).items():
            is_count = re.search("head", name, re.IGNORECASE) and not re.search("dim|size|group|width", name)
            if is_count and type(value) is int and value > 1 and name in read and (path, name) not in known:
                blockers.append(
                    f"{folded(path)} reads `self.{name}` = {value} in its forward pass, and with its projections cut it"
                    " may have to be a rank's own count, which nobody knows by that name; take the number of heads from"
                    " the projection's width (`view(..., -1, head_dim)`), or call the count `num_heads`."
                )
    return blockers


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
        if weight is not None and isinstance(module, nn.Linear):
            columns += [weight.name] * (weight.kind == "column" and not weight.gather_output)
            rows += [weight.name] * (weight.kind == "row")
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
        deep = [name for name in columns + rows if self.entries[name].module.rpartition(".")[0] != path]
        if deep and isinstance(module, nn.ModuleList):
            self.stuck_columns += columns
            self.stuck_rows += rows
            return [], []
        made = [self.entries[name].layout.shape[0] for name in columns]
        read = [self.entries[name].layout.shape[1] for name in rows]
        if deep and not any(out % size == 0 for out in made for size in read) and sum(made) not in read:
            return columns, rows
        self._agree(columns, rows)
        return [], []

    def _agree(self, columns: list[str], rows: list[str]) -> None:
        """A plain rule of the user's on a weight that is a multiple of what the row reads: it must be a fused one."""
        read = {self.entries[name].layout.shape[1] for name in rows}
        for name in columns:
            entry = self.entries[name]
            out = entry.layout.shape[0]
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
    linears = [e for e in entries.values() if e.name.endswith("weight")]
    unmatched = [e.name for e in linears if not e.rule and isinstance(model.get_submodule(e.module), nn.Linear)]
    if unmatched:
        yield f"no rule matches the linear layers {_names(unmatched)}; every rank holds them whole."
    parameters = dict(model.named_parameters())  # each once, however many names it has
    matrices = [e for name, e in entries.items() if name in parameters and len(e.layout.shape) > 1]
    cut = sum(prod(e.layout.shape) for e in matrices if not e.layout.is_replicated)
    share = cut / max(1, sum(prod(e.layout.shape) for e in matrices))
    if share < _LOW_COVERAGE:
        yield f"only {share:.0%} of the model's weights is cut; the rest is whole on every rank."


def _example_name(entries: Mapping[str, ParameterPlan]) -> str:
    matrices = [name for name, entry in entries.items() if len(entry.layout.shape) > 1]
    return (matrices or list(entries) or ["(it has none)"])[len(matrices) // 2]


def _names(names: Sequence[str]) -> str:
    shown = list(dict.fromkeys(map(folded, names)))
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
