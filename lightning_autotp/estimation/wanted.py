"""What a search for a layout is asked."""

from dataclasses import dataclass, field
from typing import Any, Optional

from lightning_autotp.config.switches import LossParallel
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.estimation.job import Job

SWITCHES = ("sequence_parallel", "loss_parallel", "checkpointing")

_TOKENS = 2**20


@dataclass(frozen=True)
class Wanted:
    """A training job without a layout; what is None the search chooses.

    Args:
        model: as :class:`~lightning_autotp.estimation.Job` takes it. The batch of a factory must have tensors that
            begin with the dim of rows.
        gpus: how many GPUs there are.
        tokens: that all GPUs read in a step of the optimizer, in as many batches as that takes; of a model that reads
            no ``input_ids``, rows of its batch. None for about a million (32 rows a GPU), one sequence a GPU at least.
        seq: tokens a sequence, as a job takes it.
        precision: as a job takes it.
        own_loop: as a job takes it.
        config: as a job takes it; the switches that it sets are not chosen.
        tp, cp, dp, zero, zero_group, batch: as a job takes them.
        sequence_parallel, loss_parallel, checkpointing: as a job takes them.
        best: how many layouts are named.

    Raises:
        ValueError: on what cannot be; the message names the field and the fix.
    """

    model: str
    gpus: int
    tokens: Optional[int] = None
    seq: Optional[int] = None
    precision: str = "bf16-true"
    own_loop: bool = False
    config: TPTrainingConfig = field(default_factory=TPTrainingConfig)
    tp: Optional[int] = None
    cp: Optional[int] = None
    dp: Optional[int] = None
    zero: Optional[int] = None
    zero_group: Optional[int] = None
    batch: Optional[int] = None
    sequence_parallel: Optional[bool] = None
    loss_parallel: Optional[LossParallel] = None
    checkpointing: Optional[bool] = None
    best: int = 5

    def __post_init__(self) -> None:
        sizes = ("gpus", "tokens", "tp", "cp", "dp", "zero_group", "batch", "best")
        for name in sizes:
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{name}: {size} is not a positive number; give 1 or more.")
        given = {name: getattr(self, name) or 1 for name in ("tp", "cp", "dp")}
        ranks = given["tp"] * given["cp"] * given["dp"]
        if self.gpus % ranks:
            said = " x ".join(f"{name} {size}" for name, size in given.items() if getattr(self, name) is not None)
            raise ValueError(f"gpus: {said} does not divide {self.gpus}; give a multiple of {ranks}.")
        object.__setattr__(self, "config", TPTrainingConfig.load(self.config))
        _ = self.job  # which looks at the rest

    @property
    def job(self) -> Job:
        """One sequence on one rank, with what is said of the rest."""
        chosen = {name: getattr(self, name) for name in SWITCHES if getattr(self, name) is not None}
        return Job(
            self.model,
            zero=self.zero or 0,
            batch=None if ":" in self.model else 1,
            seq=self.seq,
            precision=self.precision,
            own_loop=self.own_loop,
            config=self.config,
            **chosen,
        )

    @property
    def asked(self) -> frozenset[str]:
        """The switches that are not chosen."""
        said = {name for name in SWITCHES if getattr(self, name) is not None}
        return frozenset(said | self.config.model_fields_set & set(SWITCHES))

    def rows(self, batch: dict[str, Any]) -> int:
        """How many times ``batch``, one sequence, all GPUs see in a step.

        Raises:
            ValueError: if the tokens are no whole number of sequences.
        """
        ids = batch.get("input_ids")
        unit = ids.numel() if ids is not None else next(iter(batch.values())).shape[0]
        one = unit * self.gpus
        tokens = self.tokens or one * max(1, _TOKENS // one if ids is not None else 32)
        if tokens % unit:
            of = f"{unit} tokens" if ids is not None else f"{unit} rows"
            raise ValueError(f"tokens: {tokens} are no whole number of sequences of {of}; give a multiple of {unit}.")
        return tokens // unit
