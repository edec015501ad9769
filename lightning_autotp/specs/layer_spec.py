"""What a rule says: which parameters it names, how they are cut, and how rules are merged.

The vocabulary is DeepSpeed AutoTP's (``TPLayerSpec``, ``AutoTPConfig``), so that a ``partition_config`` moves over as
it is. Every mistake that can be seen without a model is an error here, at configuration time.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Optional, Union

from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_autotp.specs.shape import Shape, is_size, parse_shape

_IGNORED_BY_US = {
    "tp_size": "the size is `autotp_size`",
    "embedding_partition_dim": "write a rule for the embedding instead",
    "lm_head_patterns": "write a rule for the head instead",
}


class PartitionType(str, Enum):
    """How a layer is cut: its input features (ROW), its output features (COLUMN), or not at all (SKIP)."""

    ROW = "row"
    COLUMN = "column"
    SKIP = "skip"

    @classmethod
    def parse(cls, value: Any) -> "PartitionType":
        """``value`` as a partition type, in any case.

        Raises:
            ValueError: if it is none of row, column and skip.
        """
        try:
            return cls(value.lower() if isinstance(value, str) else value)
        except ValueError:
            raise ValueError(
                f"partition_type: {value!r} is not one of {', '.join(repr(t.value) for t in cls)}."
            ) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest known name, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


@dataclass(frozen=True)
class TPLayerSpec:
    """One rule: parameters whose name matches one of ``patterns`` are cut by ``partition_type``.

    Args:
        patterns: regular expressions, matched with :func:`re.match` (anchored at the start) against names as
            ``named_parameters()`` of the LightningModule gives them, wrappers such as ``_orig_mod.`` removed.
        partition_type: COLUMN cuts the output features, ROW the input features, SKIP leaves the layer whole. On an
            ``nn.Embedding`` ROW cuts the vocabulary and COLUMN the features. On any other parameter COLUMN cuts the
            last but one dim (of a vector: its only one) and ROW the last, as experts ``[E, out, in]`` need it; a
            vector under a ROW rule is a bias that is added once.
        shape: the view of a fused weight before it is cut. The entry at ``partition_dim`` names the sub-parameters,
            each of which is cut separately: ``(2, -1)`` two equal ones, ``((q, k, v), -1)`` unequal ones by their
            sizes. ``"q"`` and ``"kv"`` stand for the sizes of all query and all key (value) heads of the model.
            Entries are the dims of the parameter one for one; further ones behind the cut entry divide it into runs
            that stay together, as ``(-1, -1, -1, 2)`` with ``partition_dim`` 2 keeps interleaved pairs of the last dim.
        partition_dim: the dim of ``shape`` that is cut. Default: 0 for COLUMN, 1 for ROW.
        model_types: apply only where the ``config.model_type`` of the model that owns the parameter (or, without a
            config, its class name as a regular expression) is one of these. Default: everywhere.
        gather_output: COLUMN only: all-gather the output, so that what follows sees all features.
        split_input: ROW only: the input comes whole, and each rank takes its part of it.
        grad_allreduce: SKIP only: each rank sees only its part of what flows through this parameter (it is used
            between a column and a row cut), so its gradient is summed over the tensor parallel ranks.
        partial_outputs: SKIP only, on an ``nn.Linear``: how many of its last output features feed every rank's own
            heads directly, so that their gradient is summed over the ranks in the backward pass (the rotary key of
            multi-head latent attention). A number, or the name of an attribute of the module around it.
        boundary: SKIP only: ``patterns`` name modules whose inside is cut by other rules (experts). What enters them is
            whole and its gradient is summed, their output is summed.

    Raises:
        ValueError: on any value that no model could make right; the message names the field.
    """

    patterns: list[str]
    partition_type: PartitionType = PartitionType.COLUMN
    shape: Optional[Shape] = None
    partition_dim: Optional[int] = None
    model_types: Optional[list[str]] = None
    gather_output: bool = False
    split_input: bool = False
    grad_allreduce: bool = False
    partial_outputs: Union[int, str, None] = None
    boundary: bool = False

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 - the dataclass is frozen
        put("patterns", _strings("patterns", self.patterns))
        if not self.patterns:
            raise ValueError("patterns: the list is empty; give at least one regular expression on parameter names.")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"patterns: {pattern!r} is not a regular expression: {error}.") from None
        put("partition_type", PartitionType.parse(self.partition_type))
        if self.model_types is not None:
            put("model_types", _strings("model_types", self.model_types))
        for flag in ("gather_output", "split_input", "grad_allreduce", "boundary"):
            if not isinstance(getattr(self, flag), bool):
                raise ValueError(f"{flag}: {getattr(self, flag)!r} is not true or false.")
        if self.split_input and self.partition_type is not PartitionType.ROW:
            raise ValueError(
                f"split_input: only a row rule has an input to split, this one is {self.partition_type.value}."
            )
        if self.gather_output and self.partition_type is not PartitionType.COLUMN:
            raise ValueError(
                f"gather_output: only a column rule has an output to gather, this one is {self.partition_type.value}."
            )
        if self.grad_allreduce and self.partition_type is not PartitionType.SKIP:
            raise ValueError(
                "grad_allreduce: a cut parameter's gradient belongs to one rank and must not be summed; it goes with"
                f" partition_type 'skip', this rule is {self.partition_type.value}."
            )
        self._check_whole()
        self._check_shape(put)

    def _check_whole(self) -> None:
        """What only goes with a module that is left as it is."""
        whole = self.partition_type is PartitionType.SKIP
        if self.boundary and (not whole or self.grad_allreduce or self.partial_outputs is not None):
            raise ValueError(
                "boundary: a rule with it names modules, cuts nothing itself and has no other flag; use partition_type"
                " 'skip', and rules of their own for the parameters inside."
            )
        if self.partial_outputs is None:
            return
        if not whole:
            raise ValueError(
                f"partial_outputs: it goes with partition_type 'skip', this rule is {self.partition_type.value}."
            )
        if self.grad_allreduce:
            raise ValueError(
                "partial_outputs: with it the gradient of the weight is whole already, and `grad_allreduce` would"
                " multiply it; leave one of them out."
            )
        if not (isinstance(self.partial_outputs, str) and self.partial_outputs) and not is_size(self.partial_outputs):
            raise ValueError(
                f"partial_outputs: {self.partial_outputs!r} is neither a number of features of at least 1 nor the name"
                " of an attribute that holds it."
            )

    def _check_shape(self, put: Any) -> None:
        if self.partition_dim is not None and (
            isinstance(self.partition_dim, bool) or not isinstance(self.partition_dim, int)
        ):
            raise ValueError(f"partition_dim: {self.partition_dim!r} is not a whole number.")
        if self.shape is None:
            if self.partition_dim is not None and self.partition_dim not in (0, 1):
                raise ValueError(
                    f"partition_dim: {self.partition_dim} is out of range without a `shape`: a weight has dims 0 and 1."
                )
            if self.partition_dim is not None and self.partition_dim != self.cut_dim:
                raise ValueError(
                    f"partition_dim: a {self.partition_type.value} rule cuts dim {self.cut_dim} of a weight;"
                    f" {self.partition_dim} needs a `shape` to speak of."
                )
            return
        put("shape", parse_shape(self.shape, self.partition_dim, 1 if self.partition_type is PartitionType.ROW else 0))

    @property
    def cut_dim(self) -> int:
        """The dim of ``shape`` (without one: of an ``nn.Linear`` weight ``[out, in]``) that is cut."""
        if self.shape is not None and self.partition_dim is not None:
            return self.partition_dim
        return 1 if self.partition_type is PartitionType.ROW else 0

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> "TPLayerSpec":
        """A rule from a mapping with this class's fields as keys.

        Raises:
            ValueError: on an unknown key (the message has the nearest name) or a bad value.
        """
        _refuse_unknown("layer_specs", spec, cls)
        if "patterns" not in spec:
            raise ValueError("layer_specs: a rule has no `patterns`; give a list of regular expressions.")
        return cls(**spec)


@dataclass(frozen=True)
class AutoTPConfig:
    """A set of rules, tried in order: the first that matches a parameter decides.

    Args:
        layer_specs: the rules.
        use_default_specs: with a preset beside it, true merges (these rules first, the preset's fill the gaps), false
            uses these rules alone.
        strict_mode: make errors of what is otherwise a warning: linear layers that no rule matches, little of the
            model cut, rules of the user's that match nothing.
    """

    layer_specs: list[TPLayerSpec] = field(default_factory=list)
    use_default_specs: bool = True
    strict_mode: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layer_specs, (str, bytes, Mapping)) or not isinstance(self.layer_specs, Iterable):
            raise ValueError(f"layer_specs: a list of rules belongs here, not {self.layer_specs!r}.")
        specs = [s if isinstance(s, TPLayerSpec) else TPLayerSpec.from_dict(s) for s in self.layer_specs]
        object.__setattr__(self, "layer_specs", specs)
        for flag in ("use_default_specs", "strict_mode"):
            if not isinstance(getattr(self, flag), bool):
                raise ValueError(f"{flag}: {getattr(self, flag)!r} is not true or false.")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "AutoTPConfig":
        """Rules from a mapping, as ``partition_config`` has them.

        DeepSpeed's ``tp_size``, ``embedding_partition_dim`` and ``lm_head_patterns`` mean nothing here and are dropped
        with a warning each.

        Raises:
            ValueError: on an unknown key (the message has the nearest name) or a bad value.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"partition_config: {config!r} is not a mapping.")
        for name in _IGNORED_BY_US.keys() & config.keys():
            rank_zero_warn(f"partition_config: `{name}` has no effect here: {_IGNORED_BY_US[name]}.")
        known = {name: value for name, value in config.items() if name not in _IGNORED_BY_US}
        _refuse_unknown("partition_config", known, cls)
        return cls(**known)


def merge_autotp_configs(base: AutoTPConfig, override: AutoTPConfig) -> AutoTPConfig:
    """The rules of both, ``override``'s first, so that ``base``'s only fill the gaps.

    Strict mode holds if either asks for it; ``use_default_specs`` is ``override``'s.
    """
    return AutoTPConfig(
        layer_specs=override.layer_specs + base.layer_specs,
        use_default_specs=override.use_default_specs,
        strict_mode=base.strict_mode or override.strict_mode,
    )


def _strings(name: str, value: Any) -> list[str]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"{name}: {value!r} is not a list; write [{value!r}].")
    items = list(value)
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"{name}: {item!r} is not a string.")
    return items


def _refuse_unknown(where: str, given: Any, cls: Any) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: {given!r} is not a mapping.")
    known = [f.name for f in fields(cls)]
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: unknown field {name!r}.{nearest(str(name), known)} Fields: {', '.join(known)}.")
