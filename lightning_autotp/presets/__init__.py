"""What we know of architectures: one small module per family, and the registry that finds them."""

from dataclasses import replace
from typing import Any, Optional

from lightning_autotp.layout.heads import Heads
from lightning_autotp.presets import (
    bert,
    bloom,
    chatglm,
    deepseek_v2,
    falcon,
    gemma,
    glm4_moe,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    llama,
    mixtral,
    mpt,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    starcoder2,
    t5,
    vit,
)
from lightning_autotp.presets.completions import COMPLETIONS
from lightning_autotp.presets.preset import Preset
from lightning_autotp.specs.layer_spec import AutoTPConfig, TPLayerSpec, nearest
from lightning_autotp.specs.shape import resolve_shape

_FAMILIES = (
    llama,
    bloom,
    chatglm,
    mixtral,
    deepseek_v2,
    qwen2,
    phi3,
    qwen3,
    qwen3_moe,
    gemma,
    gpt_neox,
    gpt2,
    gpt_bigcode,
    gptj,
    opt,
    falcon,
    mpt,
    starcoder2,
    olmo2,
    glm4_moe,
    gpt_oss,
    t5,
    bert,
    vit,
)

_PRESETS = {preset.name: preset for preset in (*(module.PRESET for module in _FAMILIES), *COMPLETIONS)}

AUTO = "auto"
"""What ``preset_model`` says for a plan that is derived from the model."""


class AutoTPPresets:
    """The built-in presets, by name."""

    @staticmethod
    def names() -> list[str]:
        """The names that ``preset_model`` takes."""
        return list(_PRESETS)

    @staticmethod
    def get_preset(name: str, model_config: Any = None) -> AutoTPConfig:
        """The rules of a preset.

        Args:
            name: one of :meth:`names`, in any case.
            model_config: a model's config. With it, shapes that depend on head counts come as numbers; without, their
                entries are names (``"q"``, ``"kv"``) that ``make_plan`` resolves.

        Raises:
            ValueError: if there is no such preset (the message lists them), or the config lacks the head counts.
        """
        rules = find_preset(name).rules
        if model_config is None:
            return rules
        heads = Heads.from_config(model_config)
        return replace(rules, layer_specs=[_with_sizes(spec, heads) for spec in rules.layer_specs])


def find_preset(name: str) -> Preset:
    """The preset of that name, in any case.

    Raises:
        ValueError: if there is none; the message lists the names.
    """
    if not isinstance(name, str) or name.lower() not in _PRESETS:
        raise ValueError(
            f"preset_model: there is no preset {name!r}.{nearest(str(name), _PRESETS)} Presets: {', '.join(_PRESETS)};"
            " other architectures need none: leave it out."
        )
    return _PRESETS[name.lower()]


def preset_for(model_type: str) -> Optional[Preset]:
    """The preset that is detected for a ``config.model_type``, if any."""
    return next((preset for preset in _PRESETS.values() if model_type in preset.model_types), None)


def _with_sizes(spec: TPLayerSpec, heads: Optional[Heads]) -> TPLayerSpec:
    return spec if spec.shape is None else replace(spec, shape=resolve_shape(spec.shape, heads))
