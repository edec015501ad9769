"""Which rules a model gets, and which of them decides about a parameter. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.introspection.names import ancestors, clean_name, model_types
from lightning_autotp.plans.plan import Rule
from lightning_autotp.presets import AUTO, find_preset, preset_for
from lightning_autotp.presets.hf_tp_plan import model_plan
from lightning_autotp.presets.preset import Preset
from lightning_autotp.specs.layer_spec import TPLayerSpec


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
    if _named(config) and (custom is None or custom.use_default_specs):
        assert config.preset_model is not None
        rules += _of_preset(find_preset(config.preset_model), model, None)
    if custom is not None or config.preset_model is not None:
        return rules, strict
    rules, types = _detected(model), model_types(model)
    if not rules:
        tried = f"model types {', '.join(map(repr, types))} have no preset" if types else "no module has a model type"
        raise ValueError(
            f"no rules to cut {type(model).__name__}: no partition_config and no preset_model were given, {tried}, and"
            " the model has no plan of its own. Give `preset_model` or `partition_config`, or a `sample_batch` to"
            " derive a plan from."
        )
    return rules, strict


def has_rules(model: nn.Module, config: TPTrainingConfig) -> bool:
    """Whether the config has rules for ``model``, or some are detected."""
    return config.partition_config is not None or config.preset_model is not None or bool(_detected(model))


def _named(config: TPTrainingConfig) -> bool:
    return config.preset_model is not None and config.preset_model != AUTO


def _detected(model: nn.Module) -> list[Rule]:
    rules: list[Rule] = []
    for model_type in model_types(model):
        found = preset_for(model_type)
        if found is not None:
            rules += _of_preset(found, model, [model_type])
    return rules or _of_model(model)


def _of_preset(preset: Preset, model: nn.Module, only: Optional[list[str]]) -> list[Rule]:
    specs = preset.rules.layer_specs
    specs = specs if only is None else [replace(spec, model_types=only) for spec in specs]
    own = _of_model(model) if preset.completes else []
    return [Rule(spec, f"preset {preset.name}") for spec in specs] + own


def _of_model(model: nn.Module) -> list[Rule]:
    return [Rule(spec, "model plan") for spec in model_plan(model).layer_specs]


@dataclass(frozen=True)
class Match:
    """The spec that decides, the pattern of it that matched, and where it came from."""

    spec: TPLayerSpec
    pattern: str
    source: str


class Matcher:
    """Finds the rule for a name: the first that matches decides. Remembers which rules were of use."""

    def __init__(self, model: nn.Module, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.used: set[int] = set()

    def parameter(self, name: str) -> Optional[Match]:
        """The rule for a parameter, by its full name."""
        return self._match(name, boundary=False)

    def boundary(self, path: str) -> Optional[Match]:
        """The boundary rule for a module."""
        return self._match(path, boundary=True)

    def config_around(self, name: str) -> Any:
        """The config of the innermost model around a parameter or module, if one has a ``model_type``."""
        for path in ancestors(name):
            config = getattr(self.modules[path], "config", None)
            if getattr(config, "model_type", None):
                return config
        return None

    def _match(self, name: str, boundary: bool) -> Optional[Match]:
        cleaned = clean_name(name)
        for number, rule in enumerate(self.rules):
            if rule.spec.boundary is not boundary:
                continue
            for pattern in rule.spec.patterns:
                if re.match(pattern, cleaned) and self._applies(rule.spec, name):
                    self.used.add(number)
                    return Match(rule.spec, pattern, rule.source)
        return None

    def _applies(self, spec: TPLayerSpec, name: str) -> bool:
        if spec.model_types is None:
            return True
        config = self.config_around(name)
        if config is not None:
            return str(getattr(config, "model_type", "")).lower() in [t.lower() for t in spec.model_types]
        holders = [type(self.modules[path]).__name__ for path in ancestors(name)]
        return any(re.match(t, holder, re.IGNORECASE) for t in spec.model_types for holder in holders)
