"""What is to be estimated: a model, how it is laid out over ranks, and how it is trained."""

from dataclasses import dataclass, field
from typing import Optional

import torch

from lightning_autotp.config.switches import LossParallel
from lightning_autotp.config.training_config import TPTrainingConfig

PRECISIONS = {
    "bf16-true": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "32-true": (torch.float32, None),
}
"""Trainer precisions: the parameters' dtype, and autocast's."""

STAGES = range(4)


@dataclass(frozen=True)
class Job:
    """A training job; sizes that are None are the model's own.

    Args:
        model: a Hugging Face model type, the path of a ``config.json`` or of a directory with one, a hub name
            (``owner/name``), or ``"module:factory"`` as ``verify`` takes it.
        tp: tensor parallel size.
        dp: data parallel size.
        zero: ``zero_stage``: 0 replicates; 1 and 2 shard weights, gradients and optimizer state over data parallel
            ranks, and gather all weights for each batch; 3 gathers them a block at a time.
        zero_group: ``zero_group_size``: data parallel ranks that share these, of which the others hold the same; None
            for all.
        cp: context parallel size: ranks that share the tokens of a sequence.
        accumulate: batches whose gradients are summed up for a step of the optimizer.
        batch: sequences (or images) in a data parallel rank's batch; 1 unless a factory brings its own.
        seq: tokens a sequence; the model's longest, at most 4096, unless a factory brings its own.
        precision: the Trainer's, of :data:`PRECISIONS`.
        sequence_parallel: as ``AutoTPStrategy`` takes it; None where ``config`` says it.
        loss_parallel: as ``AutoTPStrategy`` takes it; None where ``config`` says it.
        checkpointing: Hugging Face's gradient checkpointing.
        own_loop: gradients are freed before the forward pass, as in a loop of one's own; Lightning's Trainer frees
            them after it.
        config: rules, preset and switches, in any form that ``TPTrainingConfig.load`` takes; its size does not matter.
            Once the job is made it is a :class:`~lightning_autotp.TPTrainingConfig` that has the two switches above.

    Raises:
        ValueError: on a size or a name that cannot be; the message names the field and the fix.
    """

    model: str
    tp: int = 1
    dp: int = 1
    zero: int = 0
    zero_group: Optional[int] = None
    cp: int = 1
    accumulate: int = 1
    batch: Optional[int] = None
    seq: Optional[int] = None
    precision: str = "bf16-true"
    sequence_parallel: Optional[bool] = None
    loss_parallel: Optional[LossParallel] = None
    checkpointing: bool = False
    own_loop: bool = False
    config: TPTrainingConfig = field(default_factory=TPTrainingConfig)

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "zero_group", "cp", "accumulate", "batch", "seq"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}: {size} is not a positive number; give 1 or more.")
        switches = {"sequence_parallel": self.sequence_parallel, "loss_parallel": self.loss_parallel}
        given = {name: value for name, value in switches.items() if value is not None}
        object.__setattr__(self, "config", TPTrainingConfig.load(self.config, **given))
        for name in switches:
            object.__setattr__(self, name, getattr(self.config, name))
        if self.zero not in STAGES:
            raise ValueError(f"zero: there is no stage {self.zero}; give one of {', '.join(map(str, STAGES))}.")
        if self.zero_group is not None:
            self._check_group(self.zero_group)
        if self.seq is not None and self.seq % self.cp:
            raise ValueError(f"cp: {self.cp} ranks do not divide seq, {self.seq} tokens; give a number that does.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: {self.precision!r} is not known; give one of {', '.join(PRECISIONS)}.")
        if ":" in self.model and (self.batch, self.seq) != (None, None):
            raise ValueError(
                f"batch, seq: {self.model} is a factory that brings its own batch; leave them out and size its batch."
            )

    def _check_group(self, group: int) -> None:
        if not self.zero:
            raise ValueError("zero_group: it goes with zero 1, 2 or 3, which is 0; set one, or leave it out.")
        if self.replicas % group:
            raise ValueError(f"zero_group: {group} does not divide dp x cp, {self.replicas}; give a number that does.")

    @property
    def ranks(self) -> int:
        """GPUs that it runs on."""
        return self.tp * self.cp * self.dp

    @property
    def replicas(self) -> int:
        """Data and context parallel ranks, which hold the same shards but for ZeRO."""
        return self.dp * self.cp

    @property
    def shards(self) -> int:
        """Of these, ranks that share weights, gradients and optimizer state."""
        return (self.zero_group or self.replicas) if self.zero else 1
