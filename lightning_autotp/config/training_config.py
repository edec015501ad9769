"""What the user says: one pydantic model, read from keyword arguments, YAML, JSON or a DeepSpeed config."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    field_serializer,
    field_validator,
    model_validator,
)

from lightning_autotp.config.dtypes import DType
from lightning_autotp.config.switches import LossParallel, check_loss_parallel
from lightning_autotp.presets import AutoTPPresets
from lightning_autotp.specs.layer_spec import AutoTPConfig, nearest

_IGNORED_FROM_DEEPSPEED = {
    "tp_grain_size": "sizes that do not divide are cut unevenly by themselves",
    "injection_policy_tuple": "rules go into `partition_config`",
    "keep_module_on_host": "each rank moves only its own part to the device",
    "replace_with_kernel_inject": "it concerns inference kernels",
    "kernel_inject": "it concerns inference kernels",
}

_DEEPSPEED_TOP_LEVEL = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "zero_optimization",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
}
"""Keys by which a DeepSpeed config is known."""


class _Section(BaseModel):
    """A part of the config that refuses unknown fields by name and passes over DeepSpeed's that mean nothing here."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {spelling for name, info in cls.model_fields.items() for spelling in (name, info.alias) if spelling}
        kept = {}
        for name, value in data.items():
            if name in _IGNORED_FROM_DEEPSPEED:
                rank_zero_warn(f"`{name}` has no effect here: {_IGNORED_FROM_DEEPSPEED[name]}.")
            elif name not in known:
                raise ValueError(
                    f"unknown field {name!r}.{nearest(str(name), known)} Fields: {', '.join(cls.model_fields)}."
                )
            else:
                kept[name] = value
        return kept


class TPConfig(_Section):
    """Where the tensor parallel group comes from.

    Args:
        tp_size: the tensor parallel size, for configs that give it here. 1 beside an ``autotp_size`` says nothing.
        mpu: an object with ``get_{model,data}_parallel_{rank,group,world_size}()``, whose groups are used.
        tp_group: the tensor parallel process group of this rank, or a callable that returns it once processes run.
    """

    tp_size: int = 1
    mpu: Any = None
    tp_group: Any = None

    @field_validator("tp_size")
    @classmethod
    def _positive(cls, size: int) -> int:
        if size < 1:
            raise ValueError(f"tp_size: {size} is not a positive number of ranks; 1 turns tensor parallelism off.")
        return size

    @field_validator("tp_group")
    @classmethod
    def _is_a_group(cls, group: Any) -> Any:
        if group is not None and not isinstance(group, dist.ProcessGroup) and not callable(group):
            raise ValueError(f"tp_group: {group!r} is neither a process group nor a callable that returns one.")
        return group

    @field_validator("mpu")
    @classmethod
    def _is_an_mpu(cls, mpu: Any) -> Any:
        methods = [
            f"get_{kind}_parallel_{what}" for kind in ("model", "data") for what in ("rank", "group", "world_size")
        ]
        missing = [name for name in methods if not callable(getattr(mpu, name, None))]
        if mpu is not None and missing:
            raise ValueError(f"mpu: {type(mpu).__name__} lacks {', '.join(missing)}.")
        return mpu

    @model_validator(mode="after")
    def _one_source(self) -> "TPConfig":
        if self.mpu is not None and self.tp_group is not None:
            raise ValueError("mpu and tp_group both say which ranks work together; give one of them.")
        return self


class TPTrainingConfig(_Section):
    """Tensor parallel training, as DeepSpeed's ``tensor_parallel`` section says it.

    Args:
        autotp_size: the number of ranks that share one model; 0 and 1 turn tensor parallelism off.
        dtype: the parameters' dtype, a ``torch.dtype`` or its name. Applied only where it is set.
        tp_overlap_comm: overlap the all-reduce of the input gradient with the computation of the weight gradients.
        partition_config: custom rules; the fields of :class:`~lightning_autotp.AutoTPConfig`.
        preset_model: the name of a built-in preset, see :class:`~lightning_autotp.AutoTPPresets`.
        tensor_parallel: nested :class:`TPConfig` (alias ``tp``).
        sequence_parallel: between attention and MLP each rank holds its part of the tokens: less memory, the same
            communication.
        loss_parallel: in training the model's head keeps this rank's part of the logits, and the loss is computed of
            the parts; see :func:`lightning_autotp.cross_entropy`. ``"fused"``: a Hugging Face model's head makes no
            logits in training, and its loss is computed of what the head is given; see
            :func:`lightning_autotp.linear_cross_entropy`. With one rank nothing changes.
        compile: compile the model's blocks one by one (``torch.compile``), once they are sharded.
        shard_saved_activations: of what checkpointed blocks keep for the backward pass, each rank keeps its part: less
            memory, for one all-gather a block. Needs activation checkpointing and no ``sequence_parallel``.
        check_agreement: compare the data, the loss and replicated gradients across tensor parallel ranks, once a run.

    Raises:
        pydantic.ValidationError: a ``ValueError`` that names the field and the fix.
    """

    autotp_size: int = 0
    dtype: DType = torch.float16
    tp_overlap_comm: bool = False
    partition_config: Optional[dict[str, Any]] = None
    preset_model: Optional[str] = None
    tensor_parallel: TPConfig = Field(default_factory=TPConfig, alias="tp")
    sequence_parallel: StrictBool = False
    loss_parallel: LossParallel = False
    compile: StrictBool = False
    shard_saved_activations: StrictBool = False
    check_agreement: StrictBool = True

    @model_validator(mode="before")
    @classmethod
    def _one_nested_section(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "tp" in data and "tensor_parallel" in data:
            raise ValueError("tp and tensor_parallel are two names of one field; give one of them.")
        return data

    @field_validator("autotp_size")
    @classmethod
    def _not_negative(cls, size: int) -> int:
        if size < 0:
            raise ValueError(f"autotp_size: {size} is negative; 0 turns tensor parallelism off.")
        return size

    @field_validator("loss_parallel", mode="before")
    @classmethod
    def _known_loss(cls, value: Any) -> Any:
        check_loss_parallel(value)
        return value

    @field_validator("preset_model")
    @classmethod
    def _known_preset(cls, name: Optional[str]) -> Optional[str]:
        if name is not None:
            AutoTPPresets.get_preset(name)
        return name

    @field_validator("partition_config", mode="before")
    @classmethod
    def _valid_rules(cls, rules: Any) -> Any:
        if isinstance(rules, AutoTPConfig):
            rules = asdict(rules)
        if rules is None:
            return None
        parsed = asdict(AutoTPConfig.from_dict(rules))
        # only what was given: DeepSpeed's other fields have been warned of, and defaults need not be spelled out
        return {name: value for name, value in parsed.items() if name in rules}

    @model_validator(mode="after")
    def _one_size(self) -> "TPTrainingConfig":
        nested = self.tensor_parallel.tp_size
        if nested > 1 and self.autotp_size > 0 and nested != self.autotp_size:
            raise ValueError(
                f"tensor_parallel.tp_size {nested} contradicts autotp_size {self.autotp_size}; leave one of them out."
            )
        return self

    @field_serializer("partition_config")
    def _plain_rules(self, rules: Optional[dict[str, Any]]) -> Optional[dict[str, Any]]:
        # enums and tuples become what YAML and JSON know
        return None if rules is None else json.loads(json.dumps(rules))

    @property
    def size(self) -> int:
        """The tensor parallel size in force: ``autotp_size``, else ``tensor_parallel.tp_size``, at least 1."""
        return max(self.autotp_size, self.tensor_parallel.tp_size, 1)

    @property
    def rules(self) -> Optional[AutoTPConfig]:
        """The custom rules of ``partition_config``, if any."""
        return None if self.partition_config is None else AutoTPConfig.from_dict(self.partition_config)

    @classmethod
    def load(
        cls, source: Union["TPTrainingConfig", Mapping[str, Any], str, os.PathLike[str], None], **overrides: Any
    ) -> "TPTrainingConfig":
        """A config from a ready one, a mapping, or the path of a YAML or JSON file; ``overrides`` win over it.

        A mapping (or file) with a ``tensor_parallel`` section in DeepSpeed's sense is read from that section.

        Raises:
            ValueError: on anything that is wrong in it, with the field and the fix.
            FileNotFoundError: if the file does not exist; the message has its path.
        """
        if isinstance(source, TPTrainingConfig):
            data: dict[str, Any] = {name: getattr(source, name) for name in source.model_fields_set}
        elif source is None:
            data = {}
        elif isinstance(source, Mapping):
            data = _section(source, "config")
        else:
            data = _section(_read(Path(source)), str(source))
        # one thing may be said in two places: what the overrides say of it wins over both
        overridden = set(overrides)
        if overridden & {"tp", "tensor_parallel"}:
            overridden |= {"tp", "tensor_parallel", "autotp_size"}
        if "autotp_size" in overridden:
            data = {n: _without_size(v) if n in ("tp", "tensor_parallel") else v for n, v in data.items()}
        data = {name: value for name, value in data.items() if name not in overridden}
        return cls.model_validate({**data, **overrides})


def _without_size(nested: Any) -> Any:
    if isinstance(nested, TPConfig):
        return nested.model_copy(update={"tp_size": 1})
    return {n: v for n, v in nested.items() if n != "tp_size"} if isinstance(nested, Mapping) else nested


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {str(path)!r} (looked in {str(path.absolute().parent)!r}).")
    try:
        return json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config: {str(path)!r} cannot be read: {error}") from None


def _section(document: Any, where: str) -> dict[str, Any]:
    """The fields of ours in a document: its ``tensor_parallel`` section if it is a DeepSpeed config, else all of it.

    ``tensor_parallel`` names both DeepSpeed's section and our nested field; what stands in it tells them apart.
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"config: {where!r} holds {type(document).__name__}, not a mapping of fields.")
    ours = set(TPTrainingConfig.model_fields) | {"tp"}
    nested = set(TPConfig.model_fields) | {"tp_grain_size"}
    section = document.get("tensor_parallel")
    is_deepspeed = isinstance(section, Mapping) and (not section or not set(section) <= nested)
    if is_deepspeed and not (ours - {"tensor_parallel"}) & set(document):
        return dict(section)  # type: ignore[arg-type]
    if isinstance(section, Mapping) and set(document) & _DEEPSPEED_TOP_LEVEL:
        return {"tensor_parallel": section}  # DeepSpeed's section, with fields of our nested one
    if not ours & set(document) and document and not any(nearest(str(name), ours) for name in document):
        raise ValueError(
            f"config: {where!r} has {', '.join(map(repr, document))}, but neither a `tensor_parallel` section nor any"
            f" of the fields {', '.join(sorted(ours))}."
        )
    return dict(document)
