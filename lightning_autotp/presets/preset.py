"""What a preset is: rules and the model types they are for. A preset is data; adding one takes one small module."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_autotp.specs import AutoTPConfig, PartitionType, Shape, TPLayerSpec


@dataclass(frozen=True)
class Preset:
    """The rules of one family of architectures.

    Args:
        name: what the user writes as ``preset_model``.
        model_types: the ``config.model_type`` values that this preset is detected for.
        rules: its rules, in order. They are alternatives (old and new parameter names): some may match nothing.
        inexact: model types whose forward pass cannot be cut exactly by rules alone, with the reason. Setup refuses
            them; the plan can still be looked at.
    """

    name: str
    model_types: tuple[str, ...]
    rules: AutoTPConfig
    inexact: Mapping[str, str] = field(default_factory=dict)


def column(*patterns: str, shape: "Shape | None" = None, gather_output: bool = False) -> TPLayerSpec:
    """A column rule on weights whose module path ends in one of ``patterns``."""
    return TPLayerSpec(_weights(patterns), PartitionType.COLUMN, shape=shape, gather_output=gather_output)


def row(*patterns: str) -> TPLayerSpec:
    """A row rule on weights whose module path ends in one of ``patterns``."""
    return TPLayerSpec(_weights(patterns), PartitionType.ROW)


def skip(*patterns: str) -> TPLayerSpec:
    """A rule that leaves weights whole whose module path ends in one of ``patterns``."""
    return TPLayerSpec(_weights(patterns), PartitionType.SKIP)


def _weights(patterns: tuple[str, ...]) -> list[str]:
    return [rf"(?:.*\.)?{pattern}\.weight$" for pattern in patterns]


VOCABULARY = [row("embed_tokens"), column("lm_head", gather_output=True)]
"""Embedding and head cut along the vocabulary; tied, they stay one parameter."""

ATTENTION = [column(r"self_attn\.[qkv]_proj"), row(r"self_attn\.o_proj")]
"""Separate q, k and v projections and the output projection, by the names that most models share."""

GATED_MLP = [column(r"mlp\.(?:gate|up)_proj"), row(r"mlp\.down_proj")]
"""A gated MLP with separate gate and up projections."""
