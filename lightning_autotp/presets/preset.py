"""What a preset is: rules and the model types they are for. A preset is data; adding one takes one small module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from lightning_autotp.specs.layer_spec import AutoTPConfig, PartitionType, TPLayerSpec
from lightning_autotp.specs.shape import Shape


@dataclass(frozen=True)
class HeadArgument:
    """An argument of an attention module's forward with one entry for each head of the full model, as ALiBi is.

    Args:
        pattern: a regular expression on the module's path.
        name: the argument.
        dim: its dim that counts heads.
        batched: whether that dim counts the heads of one sequence after those of the other; where the argument has four
            dims, sequences and heads are taken to have one each.
    """

    pattern: str
    name: str
    dim: int
    batched: bool = False


@dataclass(frozen=True)
class Inexact:
    """Parameters that a preset would cut wrongly under some configs.

    Args:
        pattern: a regular expression on their names.
        when: whether a config of one of the preset's model types is such a one.
        reason: why, and what to do.
    """

    pattern: str
    when: Callable[[Any], bool]
    reason: str


@dataclass(frozen=True)
class Preset:
    """The rules of one family of architectures.

    Args:
        name: what the user writes as ``preset_model``.
        model_types: the ``config.model_type`` values that this preset is detected for.
        rules: its rules, in order. They are alternatives (old and new parameter names): some may match nothing.
        completes: whether these rules only complete the plan that the model brings itself, and come before it.
        head_arguments: arguments that have an entry for each head of the full model.
        inexact: configs with which these rules would not be exact; setup refuses them, the plan can still be looked at.
    """

    name: str
    model_types: tuple[str, ...]
    rules: AutoTPConfig
    completes: bool = False
    head_arguments: tuple[HeadArgument, ...] = ()
    inexact: tuple[Inexact, ...] = ()


def column(
    *patterns: str,
    shape: "Shape | None" = None,
    partition_dim: Optional[int] = None,
    gather_output: bool = False,
) -> TPLayerSpec:
    """A column rule on layers whose module path ends in one of ``patterns``, or on parameters named so."""
    return TPLayerSpec(_ending(patterns), PartitionType.COLUMN, shape, partition_dim, gather_output=gather_output)


def row(
    *patterns: str, shape: "Shape | None" = None, partition_dim: Optional[int] = None, split_input: bool = False
) -> TPLayerSpec:
    """A row rule on layers whose module path ends in one of ``patterns``, or on parameters named so."""
    return TPLayerSpec(_ending(patterns), PartitionType.ROW, shape, partition_dim, split_input=split_input)


def skip(*patterns: str, partial_outputs: "int | str | None" = None) -> TPLayerSpec:
    """A rule that leaves layers whole whose module path ends in one of ``patterns``, or parameters named so."""
    return TPLayerSpec(_ending(patterns), PartitionType.SKIP, partial_outputs=partial_outputs)


def summed(*patterns: str) -> TPLayerSpec:
    """A rule for whole layers that see one rank's heads only (norms of queries and keys): gradients are summed."""
    return TPLayerSpec(_ending(patterns), PartitionType.SKIP, grad_allreduce=True)


def boundary(*patterns: str) -> TPLayerSpec:
    """A rule for modules whose path ends in one of ``patterns`` and whose inside is cut."""
    return TPLayerSpec([rf"(?:.*\.)?(?:{pattern})$" for pattern in patterns], PartitionType.SKIP, boundary=True)


def _ending(patterns: tuple[str, ...]) -> list[str]:
    return [rf"(?:.*\.)?(?:{pattern})(?:\.weight)?$" for pattern in patterns]


VOCABULARY = [row("embed_tokens"), column("lm_head", gather_output=True)]
"""Embedding and head cut along the vocabulary; tied, they stay one parameter."""

ATTENTION = [column(r"self_attn\.[qkv]_proj"), row(r"self_attn\.o_proj")]
"""Separate q, k and v projections and the output projection, by the names that most models share."""

HEAD_NORMS = [summed(r"self_attn\.[qk]_(?:norm|layernorm)")]
"""Norms over each head's features, one weight for all heads."""

GATED_MLP = [column(r"mlp\.(?:gate|up)_proj"), row(r"mlp\.down_proj")]
"""A gated MLP with separate gate and up projections."""

EXPERTS = [
    column(r"mlp\.experts\.gate_up_proj", shape=(-1, 2, -1), partition_dim=1),
    row(r"mlp\.experts\.down_proj"),
    boundary(r"mlp\.experts"),
    skip(r"mlp\.(?:gate|router)"),
]
"""Experts as parameters [E, 2I, H] and [E, H, I], cut inside each; the router stays whole."""

SHARED_EXPERTS = [
    column(r"mlp\.shared_experts\.(?:gate|up)_proj"),
    row(r"mlp\.shared_experts\.down_proj"),
]
"""Experts that every token goes through: a gated MLP beside the routed ones."""
