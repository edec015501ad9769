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
        zero: what is sharded over data parallel ranks: nothing (0), optimizer state (1), also gradients (2), also
            weights (3).
        batch: sequences (or images) a data parallel rank sees in a step; 1 unless a factory brings its own.
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
    batch: Optional[int] = None
    seq: Optional[int] = None
    precision: str = "bf16-true"
    sequence_parallel: Optional[bool] = None
    loss_parallel: Optional[LossParallel] = None
    checkpointing: bool = False
    own_loop: bool = False
    config: TPTrainingConfig = field(default_factory=TPTrainingConfig)

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "batch", "seq"):
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
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: {self.precision!r} is not known; give one of {', '.join(PRECISIONS)}.")
        if ":" in self.model and (self.batch, self.seq) != (None, None):
            raise ValueError(
                f"batch, seq: {self.model} is a factory that brings its own batch; leave them out and size its batch."
            )
