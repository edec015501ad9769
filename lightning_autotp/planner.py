"""From rules and a model to a plan. Pure: works on the meta device, with no process group.

What cannot be made exact is refused here, with the parameter, the rule and the fix in the message.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Optional

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_autotp.config import TPTrainingConfig
from lightning_autotp.layout import Interval, Layout, even_widths, replicated_widths, sub_parameters
from lightning_autotp.plan import LocalAttribute, ParameterPlan, Rule, ShardingPlan, folded
from lightning_autotp.presets import find_preset, preset_for, resolve_shape
from lightning_autotp.presets.heads import KEY_COUNTS, QUERY_COUNTS, Heads
from lightning_autotp.presets.model_plan import model_plan
from lightning_autotp.soundness import check, head_count_blockers, preset_blockers
from lightning_autotp.specs import PartitionType, TPLayerSpec

_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|base_layer)\.")


def make_plan(model: nn.Module, config: TPTrainingConfig, tp_size: Optional[int] = None) -> ShardingPlan:
    """Decide for every parameter of ``model`` how it is cut.

    Args:
        model: the unsharded model; its parameters may be on the meta device.
        config: the user's config.
        tp_size: the tensor parallel size; None takes the config's.

    Raises:
        ValueError: if no rules can be found; if a rule cannot be applied to what it matches; if a column cut is never
            closed by a row or opened by ``gather_output``, or a row has no cut input; if nothing is cut at all; and in
            strict mode for everything in :attr:`ShardingPlan.warnings`.
    """
    size = config.size if tp_size is None else tp_size
    if size < 1:
        raise ValueError(f"tp_size: {size} is not a positive number of ranks.")
    rules, strict = find_rules(model, config) if size > 1 else ([], False)
    planner = _Planner(model, rules, size)
    planner.decide()
    if size > 1:
        planner.warnings += check(model, planner.entries, rules, planner.used)
        if strict and planner.warnings:
            raise ValueError("strict_mode: " + " ".join(planner.warnings))
    for warning in planner.warnings:
        rank_zero_warn(warning)
    return planner.plan()


def find_rules(model: nn.Module, config: TPTrainingConfig) -> tuple[list[Rule], bool]:
    """The rules for ``model`` in the order of their precedence, and whether strict mode is on.

    The user's ``partition_config`` comes first (alone without a preset, or with ``use_default_specs`` false), then
    ``preset_model``; with neither, presets detected from ``config.model_type``, then the model's own plan.

    Raises:
        ValueError: if there are none; the message says what was tried.
    """
    custom = config.rules
    strict = custom is not None and custom.strict_mode
    rules = [Rule(spec, "user") for spec in custom.layer_specs] if custom is not None else []
    if config.preset_model is not None and (custom is None or custom.use_default_specs):
        preset = find_preset(config.preset_model)
        rules += [Rule(spec, f"preset {preset.name}") for spec in preset.rules.layer_specs]
    if custom is not None or config.preset_model is not None:
        return rules, strict
    types = _model_types(model)
    for model_type in types:
        preset_found = preset_for(model_type)
        if preset_found is not None:
            only = [replace(spec, model_types=[model_type]) for spec in preset_found.rules.layer_specs]
            rules += [Rule(spec, f"preset {preset_found.name}") for spec in only]
    rules = rules or [Rule(spec, "model plan") for spec in model_plan(model).layer_specs]
    if not rules:
        tried = f"model types {', '.join(map(repr, types))} have no preset" if types else "no module has a model type"
        raise ValueError(
            f"no rules to cut {type(model).__name__}: no partition_config and no preset_model were given, {tried}, and"
            " the model has no plan of its own. Give `preset_model` or `partition_config`."
        )
    return rules, strict


def clean_name(name: str) -> str:
    """A parameter or module name without the wrappers of compile, activation checkpointing and PEFT."""
    return _WRAPPERS.sub("", name)


class _Planner:
    """One walk over a model: decides every parameter, then checks the whole."""

    def __init__(self, model: nn.Module, rules: Sequence[Rule], tp_size: int) -> None:
        self.model = model
        self.rules = rules
        self.tp_size = tp_size
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.entries: dict[str, ParameterPlan] = {}
        self.heads: dict[str, Optional[Heads]] = {}
        self.used: set[int] = set()
        self.warnings: list[str] = []
        self.blockers: list[str] = []

    def plan(self) -> ShardingPlan:
        columns = self._weights("column")
        attributes = tuple(self._local_attributes(columns))
        blockers = [
            *self.blockers,
            *preset_blockers(self.entries, _model_types(self.model)),
            *head_count_blockers(self.model, columns, attributes),
        ]
        return ShardingPlan(
            self.tp_size,
            self.entries,
            _siblings(columns),
            attributes,
            tuple(self.warnings),
            tuple(dict.fromkeys(blockers)) if self.tp_size > 1 else (),
        )

    # -- deciding -----------------------------------------------------------------------------------------------------

    def decide(self) -> None:
        """A plan for every parameter, under each of its names."""
        for path, module in self.modules.items():
            for local_name, parameter in module._parameters.items():
                if parameter is not None:
                    name = f"{path}.{local_name}" if path else local_name
                    self.entries[name] = self._decide(name, path, module, local_name, parameter)
        self._agree_on_shared()

    def _decide(
        self, name: str, path: str, module: nn.Module, local_name: str, parameter: nn.Parameter
    ) -> ParameterPlan:
        whole = ParameterPlan(name, path, Layout.replicated(parameter.shape, self.tp_size))
        follows_weight = local_name == "bias" and isinstance(module, nn.Linear)
        if isinstance(module, ParametrizationList):
            # the rule for the weight that is computed from this; path: LAYER.parametrizations.weight
            layer, _, computed = path.rpartition(".parametrizations.")
            found = self._match(f"{layer}.{computed}" if computed else path)
            if found is not None and found[0].partition_type is not PartitionType.SKIP:
                raise ValueError(
                    f"{layer}.{computed} (rule {found[1]!r}, {found[0].partition_type.value}, from {found[2]}): this"
                    " weight is parametrized; remove the parametrization, or add a skip rule."
                )
        found = self._match(f"{path}.weight" if follows_weight and path else "weight" if follows_weight else name)
        if found is None:
            return replace(whole, reason="no rule matches" if parameter.ndim > 1 else "not a matrix, no rule matches")
        spec, pattern, source = found
        decided = replace(whole, rule=pattern, source=source)
        if spec.partition_type is PartitionType.SKIP:
            return replace(decided, grad_allreduce=spec.grad_allreduce, reason="a skip rule")
        where = f"{name} (rule {pattern!r}, {spec.partition_type.value}, from {source})"
        if isinstance(module, nn.Embedding):
            return self._embedding(decided, spec, module, where)
        if isinstance(module, nn.Linear) and local_name in ("weight", "bias"):
            return self._linear(decided, spec, module, local_name, where)
        raise ValueError(
            f"{where}: this is a parameter of {type(module).__name__}, and only the weights of nn.Linear and"
            " nn.Embedding can be cut; narrow the pattern, or add a skip rule before it."
        )

    def _match(self, name: str) -> Optional[tuple[TPLayerSpec, str, str]]:
        cleaned = clean_name(name)
        for number, rule in enumerate(self.rules):
            for pattern in rule.spec.patterns:
                if re.match(pattern, cleaned) and self._applies(rule.spec, name):
                    self.used.add(number)
                    return rule.spec, pattern, rule.source
        return None

    def _applies(self, spec: TPLayerSpec, name: str) -> bool:
        if spec.model_types is None:
            return True
        config = self._config_around(name)
        if config is not None:
            return str(getattr(config, "model_type", "")).lower() in [t.lower() for t in spec.model_types]
        holders = [type(self.modules[path]).__name__ for path in _ancestors(name)]
        return any(re.match(t, holder, re.IGNORECASE) for t in spec.model_types for holder in holders)

    def _config_around(self, name: str) -> Any:
        """The config of the innermost model around a parameter or module, if one has a ``model_type``."""
        for path in _ancestors(name):
            config = getattr(self.modules[path], "config", None)
            if getattr(config, "model_type", None):
                return config
        return None

    def _embedding(self, entry: ParameterPlan, spec: TPLayerSpec, module: nn.Embedding, where: str) -> ParameterPlan:
        _refuse_bypassed(module, nn.Embedding, where)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise ValueError(
                    f"{where}: an embedding with `{option}` cannot be cut exactly; add a skip rule for it."
                )
        if spec.shape is not None:
            raise ValueError(f"{where}: an embedding has no fused parts; leave out `shape`.")
        if spec.partition_type is PartitionType.ROW:
            return replace(entry, kind="vocabulary", layout=self._plain(entry.layout.shape, 0, where))
        if not spec.gather_output:
            raise ValueError(
                f"{where}: a column cut of an embedding gives each rank some of its features, and nothing closes it;"
                " set `gather_output: true`, or cut the vocabulary with partition_type 'row'."
            )
        return replace(entry, kind="column", layout=self._plain(entry.layout.shape, 1, where), gather_output=True)

    def _linear(
        self, entry: ParameterPlan, spec: TPLayerSpec, module: nn.Linear, local_name: str, where: str
    ) -> ParameterPlan:
        _refuse_bypassed(module, nn.Linear, where)
        parent = self.modules[entry.module.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{where}: nn.MultiheadAttention reads the weights of this layer without calling it, so it cannot be"
                " cut; add a skip rule, or use separate projections."
            )
        if ".base_layer" in f".{entry.module}":
            self.blockers.append(
                f"{folded(where)}: layers that PEFT has wrapped cannot be cut yet; add a skip rule for them."
            )
        is_row = spec.partition_type is PartitionType.ROW
        if is_row and local_name == "bias":
            return replace(entry, kind="row", reason="added once, after the sum over the ranks")
        weight = self._linear_layout(entry.module, module, spec, where)
        layout = weight if local_name == "weight" else weight.along(module.out_features)
        return replace(entry, kind="row" if is_row else "column", layout=layout, gather_output=spec.gather_output)

    def _linear_layout(self, path: str, module: nn.Linear, spec: TPLayerSpec, where: str) -> Layout:
        heads = self._heads_around(path)
        shape = (module.out_features, module.in_features)
        dim = 1 if spec.partition_type is PartitionType.ROW else 0
        if spec.shape is None:
            sizes, repeat = [shape[dim]], 1
        else:
            try:
                sizes, repeat = sub_parameters(resolve_shape(spec.shape, heads), spec.cut_dim, shape, dim)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        widths = [self._widths(size, heads, where) for size in sizes]
        return self._checked(Layout.cut(shape, dim, self.tp_size, widths, repeat), where)

    def _plain(self, shape: tuple[int, ...], dim: int, where: str) -> Layout:
        widths = even_widths(shape[dim], self.tp_size)
        return self._checked(Layout.cut(shape, dim, self.tp_size, [widths]), where)

    def _widths(self, size: int, heads: Optional[Heads], where: str) -> tuple[Interval, ...]:
        """How ``size`` is shared among the ranks: in whole heads where it is that of all heads, evenly elsewhere."""
        if heads is None:
            return even_widths(size, self.tp_size)
        if size == heads.size("q") + 2 * heads.size("kv") and self.tp_size <= heads.kv:
            # one projection that keeps the parts of each head (group) together, as Bloom's
            return even_widths(size, self.tp_size, unit=size // heads.kv)
        if size not in (heads.size("q"), heads.size("kv")):
            return even_widths(size, self.tp_size)
        if self.tp_size <= heads.kv:
            return even_widths(size, self.tp_size, unit=size // heads.kv)
        if self.tp_size % heads.kv or heads.q % self.tp_size:
            raise ValueError(
                f"{where}: {heads.q} query heads and {heads.kv} key heads cannot be shared by {self.tp_size} ranks;"
                f" use a tensor parallel size of at most {heads.kv}, or one that divides {heads.q} and is a multiple of"
                f" {heads.kv}."
            )
        if size == heads.size("q"):
            return even_widths(size, self.tp_size, unit=heads.dim)
        self.blockers.append(
            f"{folded(where)}: {heads.kv} key and value heads are fewer than {self.tp_size} ranks, so that ranks would"
            f" share a head and have to sum its gradient, which is not done yet; use a tensor parallel size of at most"
            f" {heads.kv}."
        )
        return replicated_widths(size, self.tp_size, unit=heads.dim)

    def _checked(self, layout: Layout, where: str) -> Layout:
        if self.tp_size > 1 and 0 in layout.widths:
            most = sum(width > 0 for width in layout.widths)
            raise ValueError(
                f"{where}: cut for {self.tp_size} ranks, {self.tp_size - most} of them would hold nothing of"
                f" {list(layout.shape)}; use a tensor parallel size of at most {most}, or a skip rule."
            )
        return layout

    def _heads_around(self, path: str) -> Optional[Heads]:
        """The head structure of the module that holds the linear at ``path``, or None if it is no attention."""
        parent = path.rpartition(".")[0]
        if parent not in self.heads:
            module = self.modules[parent]
            widths = [
                width
                for name, child in module.named_children()
                if isinstance(child, nn.Linear)
                for width in self._column_parts(f"{parent}.{name}" if parent else name, child)
            ]
            self.heads[parent] = Heads.of(module, self._config_around(path), widths)
        return self.heads[parent]

    def _column_parts(self, path: str, module: nn.Linear) -> list[int]:
        """The sub-parameter sizes of a column linear, as far as they are known before its heads are; else none."""
        found = self._match(f"{path}.weight")
        if found is None or found[0].partition_type is not PartitionType.COLUMN:
            return []
        if found[0].shape is None:
            return [module.out_features]
        try:
            shape = resolve_shape(found[0].shape, None)
            return sub_parameters(shape, found[0].cut_dim, (module.out_features, module.in_features), 0)[0]
        except ValueError:
            return []

    def _agree_on_shared(self) -> None:
        """One parameter under several names (tied, or in a shared module) must be cut in one way."""
        names: dict[int, list[str]] = defaultdict(list)
        for name in self.entries:
            module, _, local_name = name.rpartition(".")
            names[id(self.modules[module]._parameters[local_name])].append(name)
        for shared in names.values():
            first = self.entries[shared[0]]
            for other in (self.entries[name] for name in shared[1:]):
                same_module = self.modules[first.module] is self.modules[other.module]
                if first.layout != other.layout or same_module and _how(first) != _how(other):
                    raise ValueError(
                        f"{first.name} and {other.name} are one parameter, but {_decision(first)} while"
                        f" {_decision(other)}; write rules that cut both alike (an embedding by 'row' and its tied head"
                        " by 'column' with gather_output), or skip both."
                    )

    # -- what the plan carries ----------------------------------------------------------------------------------------

    def _local_attributes(self, columns: dict[str, ParameterPlan]) -> Iterator[LocalAttribute]:
        """Head counts kept by modules whose projections are cut in whole heads."""
        for path in dict.fromkeys(module.rpartition(".")[0] for module in columns):
            heads = self._heads_around(f"{path}.x" if path else "x")
            if heads is None:
                continue
            for which, names in (("q", QUERY_COUNTS), ("kv", KEY_COUNTS)):
                widths = self._head_widths(path, columns, heads, which)
                for name in names:
                    full = getattr(self.modules[path], name, None)
                    if widths and full == heads.size(which) // heads.dim and type(full) is int:
                        yield LocalAttribute(path, name, full, tuple(width // heads.dim for width in widths))

    def _head_widths(
        self, path: str, columns: dict[str, ParameterPlan], heads: Heads, which: str
    ) -> Optional[list[int]]:
        """Each rank's width of what is cut in the heads of ``which`` under the module at ``path``, if anything is."""
        size = heads.size(which)
        for module, entry in columns.items():
            if module.rpartition(".")[0] == path and not entry.gather_output:
                if entry.layout.shape[0] == size:
                    return list(entry.layout.widths)
                if entry.layout.shape[0] in (3 * size, heads.size("q") + 2 * heads.size("kv")):
                    return [length for _, length in self._widths(size, heads, entry.name)]
        return None

    def _weights(self, kind: str) -> dict[str, ParameterPlan]:
        """Weights of linears of ``kind``, by module path, each module once."""
        found: dict[int, ParameterPlan] = {}
        for entry in self.entries.values():
            module = self.modules[entry.module]
            if entry.kind == kind and isinstance(module, nn.Linear) and entry.name.endswith("weight"):
                found.setdefault(id(module), entry)
        return {entry.module: entry for entry in found.values()}


def _siblings(columns: dict[str, ParameterPlan]) -> tuple[tuple[str, ...], ...]:
    """Column linears under one parent with one input size: they may read one tensor and share its collective."""
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for module, entry in columns.items():
        groups[(module.rpartition(".")[0], entry.layout.shape[1])].append(module)
    return tuple(tuple(group) for group in groups.values())


def _refuse_bypassed(module: nn.Module, base: type[nn.Module], where: str) -> None:
    """Refuse a layer whose own class computes something else than ``base`` does, or whose weight is computed."""
    if type(module).forward is not base.forward:
        raise ValueError(
            f"{where}: {type(module).__name__} has a forward of its own, which a cut would bypass; add a skip rule."
        )
    if hasattr(module, "parametrizations"):
        raise ValueError(f"{where}: this weight is parametrized; remove the parametrization, or add a skip rule.")


def _how(entry: ParameterPlan) -> tuple[str, bool, bool]:
    return entry.kind, entry.gather_output, entry.grad_allreduce


def _decision(entry: ParameterPlan) -> str:
    rule = f" by rule {entry.rule!r}" if entry.rule else ""
    return f"{entry.name} is {'left whole' if entry.layout.is_replicated else f'cut as {entry.kind}'}{rule}"


def _ancestors(name: str) -> Iterator[str]:
    """The paths of the modules around a name, innermost first, the root (``""``) last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _model_types(model: nn.Module) -> list[str]:
    """The model types of all configs in ``model``, outermost first."""
    types = (getattr(getattr(module, "config", None), "model_type", None) for module in model.modules())
    return list(dict.fromkeys(t for t in types if isinstance(t, str) and t))
