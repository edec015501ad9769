"""What the user says: one pydantic model, read from keyword arguments, YAML, JSON or a DeepSpeed config."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from lightning_autotp.config import deepspeed
from lightning_autotp.config.descriptions import describe, with_entries
from lightning_autotp.config.dtypes import DType
from lightning_autotp.config.files import read_document
from lightning_autotp.config.switches import LossSwitch, ProofSwitch, Size, Stage, Steps, Switch
from lightning_autotp.presets import AUTO, AutoTPPresets
from lightning_autotp.specs.layer_spec import AutoTPConfig, nearest


class _Section(BaseModel):
    """A part of the config that refuses unknown fields by name and passes over DeepSpeed's that mean nothing here."""

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, populate_by_name=True, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.__doc__ = with_entries(cls.__doc__ or "", describe(cls))

    @classmethod
    def spellings(cls) -> set[str]:
        """The names and aliases of all fields."""
        return {spelling for name, info in cls.model_fields.items() for spelling in (name, info.alias) if spelling}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = cls.spellings()
        if "loss_parallel" in known:
            data = deepspeed.with_loss_parallel(data)
        kept = {}
        for name, value in data.items():
            if name in deepspeed.IGNORED:
                rank_zero_warn(f"`{name}` has no effect here: {deepspeed.IGNORED[name]}.")
            elif name not in known:
                raise ValueError(
                    f"unknown field {name!r}.{nearest(str(name), known)} Fields: {', '.join(cls.model_fields)}."
                )
            else:
                kept[name] = value
        return kept


class TPConfig(_Section):
    """Where the tensor parallel group comes from."""

    tp_size: Size = 1
    """The tensor parallel size, for configs that give it here. 1 beside an ``autotp_size`` says nothing."""

    mpu: Any = None
    """An object with ``get_{model,data}_parallel_{rank,group,world_size}()``, whose groups are used."""

    tp_group: Any = None
    """The tensor parallel process group of this rank, or a callable that returns it once processes run."""

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


_BESIDE_CONTEXT = {
    "sequence_parallel": "sequence_parallel splits the tokens in blocks, too, and they do not go together yet",
    "shard_saved_activations": "what blocks keep is a rank's own tokens already",
    "compile": "blocks that exchange tokens are not compiled yet",
}
"""Switches that do not go with context parallelism, and why."""


class TPTrainingConfig(_Section):
    """Tensor parallel training, as DeepSpeed's ``tensor_parallel`` section says it.

    The words at each field are those of ``AutoTPStrategy``'s docstring and of the command line's help.

    Raises:
        pydantic.ValidationError: a ``ValueError`` that names the field and the fix.
    """

    autotp_size: Size = 0
    """The number of ranks that share one model; 0 and 1 turn tensor parallelism off."""

    dtype: DType = torch.float16
    """The parameters' dtype, a ``torch.dtype`` or its name, as ``"bfloat16"``. Applied only where it is set, and needs
    a Trainer precision that agrees with it."""

    tp_overlap_comm: Switch = False
    """Overlap the all-reduce of the input gradient with the computation of the weight gradients."""

    partition_config: Optional[dict[str, Any]] = None
    """Custom rules; the fields of :class:`~lightning_autotp.AutoTPConfig`."""

    preset_model: Optional[str] = None
    """The name of a built-in preset, see :class:`~lightning_autotp.AutoTPPresets`; or ``"auto"``: no rules, the plan is
    derived from a step of the model on a sample, as it is where no rules are given and none are detected."""

    tensor_parallel: TPConfig = Field(default_factory=TPConfig, alias="tp")
    """Where the groups come from, see :class:`~lightning_autotp.TPConfig` (``tp`` is another name for it)."""

    sequence_parallel: Switch = False
    """Between attention and MLP each rank holds its part of the tokens: less memory, the same communication."""

    context_parallel_size: Size = 1
    """The number of ranks that split the tokens of one batch between the first block and the last, for long sequences
    (Ulysses): beside ``autotp_size``, the processes are data x context x tensor parallel ranks. They see the same
    batches. Attention must be transformers' or ``F.scaled_dot_product_attention``, of heads that the ranks divide."""

    loss_parallel: LossSwitch = False
    """In training the model's head keeps this rank's part of the logits, and the loss is computed of the parts; see
    :func:`lightning_autotp.cross_entropy`. ``"fused"``: a Hugging Face model's head makes no logits in training, and
    its loss is computed of what the head is given; see :func:`lightning_autotp.linear_cross_entropy`. With one rank
    nothing changes. DeepSpeed's ``vocab_parallel_lm_head`` means it."""

    compile: Switch = False
    """Compile the model's blocks one by one (``torch.compile``), once they are sharded."""

    shard_saved_activations: Switch = False
    """Of what checkpointed blocks keep for the backward pass, each rank keeps its part: less memory, for one all-gather
    a block. Needs activation checkpointing and no ``sequence_parallel``."""

    zero_stage: Stage = 0
    """ZeRO over the data parallel ranks, by torch's FSDP2. 1 and 2: each holds a part of the parameters, gradients and
    optimizer state between steps, and all parameters from a step's forward to its backward pass; 1 is stored as 2. 3:
    parameters are gathered a block at a time. 0: each holds all. A DeepSpeed config says it as
    ``zero_optimization.stage``."""

    zero_group_size: Size = 0
    """Data parallel ranks that share parameters with ``zero_stage``, of which the others hold the same (hybrid
    sharding; those of a node, say); 0: all."""

    zero_accumulate_unsharded: Switch = False
    """With ``zero_stage`` and gradients of several batches, keep whole gradients until the last of these and reduce
    them once, instead of after each: less communication for more memory."""

    broadcast_batch: Switch = False
    """Load data on the first of the ranks that share a model, which sends the batches to the others; theirs are not
    iterated. Each rank loads, and they are compared, without it."""

    check_agreement: Switch = True
    """Compare the data, the loss and replicated gradients across tensor parallel ranks at the start of a run, and later
    what was zero or not finite then."""

    check_every_n_steps: Steps = 1000
    """With ``check_agreement``, compare a checksum of replicated parameters every so many optimizer steps; 0 never."""

    proof: ProofSwitch = "on"
    """Before the first step of each kind, compare it on a small copy of the model with the unsharded step: its loss and
    every gradient. ``"on"``: a difference is an error that names the line of code, and what could not be looked at a
    warning. ``"warn"``: both are warnings. ``"require"``: both are errors. ``"off"``: no look is taken."""

    unsafe_checkpoint_load: Switch = False
    """Load anything that a checkpoint holds, which may run code from it; for files that you trust. Without it, a load
    takes tensors, numbers, strings, paths, lists and dicts, and what `torch.serialization.add_safe_globals` allows."""

    verify_checksums: Switch = False
    """Before a checkpoint is loaded, compare all of it with the checksums recorded when it was saved; without it,
    sizes, the ids of the save and the small files of a directory are compared."""

    async_checkpoint: Switch = False
    """While training goes on, write checkpoints from a copy in host memory, which is kept for the next ones. The next
    save waits for the last, as the end of training and any exit do, and raises its error if it failed."""

    @model_validator(mode="before")
    @classmethod
    def _one_nested_section(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "tp" in data and "tensor_parallel" in data:
            raise ValueError("tp and tensor_parallel are two names of one field; give one of them.")
        return data

    @field_validator("context_parallel_size")
    @classmethod
    def _at_least_one(cls, size: int) -> int:
        if size < 1:
            raise ValueError(f"context_parallel_size: {size} is not a positive number of ranks; 1 turns it off.")
        return size

    @model_validator(mode="after")
    def _with_context_parallel(self) -> "TPTrainingConfig":
        if self.context_parallel_size > 1:
            for name, why in _BESIDE_CONTEXT.items():
                if getattr(self, name):
                    raise ValueError(f"context_parallel_size: {why}; turn `{name}` off, or leave it at 1.")
        return self

    @field_validator("autotp_size")
    @classmethod
    def _not_negative(cls, size: int) -> int:
        if size < 0:
            raise ValueError(f"autotp_size: {size} is negative; 0 turns tensor parallelism off.")
        return size

    @field_validator("tensor_parallel", mode="before")
    @classmethod
    def _is_nested(cls, nested: Any) -> Any:
        if not isinstance(nested, (TPConfig, Mapping)):
            raise ValueError(
                f"tensor_parallel: {nested!r} is not a mapping with {', '.join(TPConfig.model_fields)}; the size alone"
                " is `autotp_size`."
            )
        return nested

    @field_validator("preset_model", mode="before")
    @classmethod
    def _known_preset(cls, name: Any) -> Any:
        if name is not None:
            if not isinstance(name, str):
                raise ValueError(
                    f"preset_model: {name!r} is not a name; write one of {', '.join(AutoTPPresets.names())}."
                )
            if name.lower() == AUTO:
                return AUTO
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
    def _zero_together(self) -> "TPTrainingConfig":
        if self.zero_group_size < 0:
            raise ValueError(f"zero_group_size: {self.zero_group_size} is negative; 0 takes all data parallel ranks.")
        for name in ("zero_group_size", "zero_accumulate_unsharded"):
            if getattr(self, name) and not self.zero_stage:
                raise ValueError(f"{name}: it goes with zero_stage 1, 2 or 3, which is 0; set one, or leave it out.")
        return self

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
            cls = type(source) if isinstance(source, cls) else cls  # the one with more fields
            data: dict[str, Any] = {name: getattr(source, name) for name in source.model_fields_set}
        elif source is None:
            data = {}
        elif isinstance(source, (str, os.PathLike)):
            path = Path(source)
            data = cls._section(read_document(path, "config"), str(path))
        else:
            data = cls._section(source, "config")
        # one thing may be said in two places: what the overrides say of it wins over both
        overridden = set(overrides)
        for same in ({"tp", "tensor_parallel"}, {"loss_parallel", deepspeed.HEAD, deepspeed.BACKEND}):
            overridden |= same if overridden & same else set()
        if "tp" in overridden:
            overridden |= {"autotp_size"}
        if "autotp_size" in overridden:
            data = {n: _without_size(v) if n in ("tp", "tensor_parallel") else v for n, v in data.items()}
        data = {name: value for name, value in data.items() if name not in overridden}
        return cls.model_validate({**data, **overrides})

    @classmethod
    def _section(cls, document: Any, where: str) -> dict[str, Any]:
        return deepspeed.section_of(document, where, cls.spellings(), TPConfig.spellings())


def _without_size(nested: Any) -> Any:
    if isinstance(nested, TPConfig):
        return nested.model_copy(update={"tp_size": 1})
    return {n: v for n, v in nested.items() if n != "tp_size"} if isinstance(nested, Mapping) else nested
