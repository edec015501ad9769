"""One training step of one rank of a job, without weights, GPUs or other ranks.

Tensors are torch's fake ones, which have shapes and no memory; the other tensor parallel ranks are not there, and what
is sent to them is counted. Everything else is what ``AutoTPStrategy`` does. Rank 0 holds the most where a cut is
uneven.

Fake tensors are said to be on the CPU. What is not the same on a GPU: attention is the CPU's flash kernel, which keeps
what CUDA's does (query, key, value, output, one number a token and head; transformers gives both the key heads
unrepeated) but needs less while it works; autocast has other lists of ops there, so that mixed precision is less exact.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autotp.compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    hide_values_from_transformers,
)
from lightning_autotp.distributed.recording import Collective, recording_mesh
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.estimation.job import PRECISIONS, Job
from lightning_autotp.estimation.trace import Attention, Trace, Work
from lightning_autotp.estimation.tracker import StepTracker
from lightning_autotp.model_sources.factory import loss_of
from lightning_autotp.model_sources.full_size import build
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.recipe.make_plan import make_plan
from lightning_autotp.sharding.shard import shard
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.gradients import TPGradients


@dataclass(frozen=True)
class Held:
    """What a rank holds between steps without data parallelism; all in bytes, but for the number of parameters.

    Args:
        parameters: how many numbers the unsharded model has.
        weights: of this rank's parameters.
        trained: of those of them that train.
        buffers: of this rank's buffers.
        block: of the parameters of the largest block (a numbered layer).
        outside: of the parameters that are in no block.
        trained_block, trained_outside: of those of them that train.
    """

    parameters: int
    weights: int
    trained: int
    buffers: int
    block: int
    outside: int
    trained_block: int
    trained_outside: int


@dataclass(frozen=True)
class Seen:
    """What one rank was seen to do with a batch.

    Args:
        held: what is there between steps.
        tokens: how many it reads; 0 for a model that reads none.
        trace: what happened.
        collectives: what is sent for the batch.
        once: what is sent once a step, however many batches that has.
    """

    held: Held
    tokens: int
    trace: Trace
    collectives: Counter[Collective]
    once: Counter[Collective]


@dataclass(frozen=True)
class Step:
    """What one rank does with a batch, without data parallelism; see :class:`~lightning_autotp.estimation.trace.Trace`.

    Args:
        held: what is there between steps.
        tokens: how many a data parallel rank reads; 0 for a model that reads none.
        forward, kept, backward: bytes of activations and of what else comes and goes: the most in the forward pass,
            those at its end, and by bytes of gradients the most in the backward pass.
        work: what is computed.
        collectives: what is sent.
        once: what is sent once a step, however many batches that has.
        attention: the attention kernels of the forward pass.
    """

    held: Held
    tokens: int
    forward: int
    kept: int
    backward: dict[int, int]
    work: Counter[Work]
    collectives: Counter[Collective]
    once: Counter[Collective] = field(default_factory=Counter)
    attention: Counter[Attention] = field(default_factory=Counter)

    @classmethod
    def of(cls, seen: Seen) -> "Step":
        """The sums of what was seen."""
        trace = seen.trace
        sums = (trace.most_forward, trace.kept, trace.most_backward, trace.work)
        return cls(seen.held, seen.tokens, *sums, seen.collectives, seen.once, Counter(trace.attention))


def run_step(job: Job) -> Step:
    """Run one step of ``job``, on one of its batches and without context parallelism.

    Raises:
        ValueError: if the model cannot be read, its plan is refused, or its step needs to know the values of tensors.
    """
    with without_values(job.model):
        model, batch = built(job)
        return Step.of(Rank(model, job, job.tp).run(batch))


@contextmanager
def without_values(source: str) -> Iterator[None]:
    """Inside, tensors that are made have shapes and no memory.

    Raises:
        ValueError: if what is run inside needs to know their values; the message names ``source``, the model.
    """
    with FakeTensorMode(), hide_values_from_transformers():
        try:
            yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"model: {source}'s step depends on the values of its tensors (in {error.func}), and an estimate"
                " has none; estimate a model of the same sizes without such code."
            ) from None


def built(job: Job) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a job, and one of its batches."""
    dtype, _ = PRECISIONS[job.precision]
    return build(job.model, dtype=dtype, batch=job.batch, seq=job.seq, checkpointing=job.checkpointing)


def repeated(batch: dict[str, Any], times: int, source: str) -> dict[str, Any]:
    """A batch with as many times the rows.

    Raises:
        ValueError: if its tensors do not have the same number of rows; the message names ``source``, the model.
    """
    rows = {value.shape[0] if value.ndim else 0 for value in batch.values() if isinstance(value, Tensor)}
    if len(rows) > 1 or rows == {0}:
        raise ValueError(
            f"model: the tensors in {source}'s batch have {sorted(rows)} rows, so it cannot be made larger or smaller;"
            " give one whose tensors all begin with the dim of rows."
        )
    return {name: torch.cat([value] * times) if isinstance(value, Tensor) else value for name, value in batch.items()}


class Rank:
    """Rank 0 of ``tp``, without the others.

    Args:
        model: the unsharded model, which is sharded in place.
        job: with the switches; its sizes do not matter.
        tp: the tensor parallel size.

    Raises:
        ValueError: if its plan is refused.
    """

    def __init__(self, model: nn.Module, job: Job, tp: int) -> None:
        self.model, self._autocast = model, PRECISIONS[job.precision][1]
        plan = make_plan(model, job.config, tp)
        mesh, self._recorder = recording_mesh(silent_mesh(tp))
        shard(model, plan, mesh, job.config, device=torch.device("cpu"))
        found = sharded(model)
        assert found is not None
        self._sharded, self._gradients = found, TPGradients(model, found)
        self.held = _held(model, plan)

    def run(self, batch: dict[str, Any]) -> Seen:
        """Run a step, as it is once column linears have learned which of them share an input."""
        found, counts = self._sharded, self._recorder.counts
        known = [*self.model.parameters(), *self.model.buffers(), *(x for x in batch.values() if isinstance(x, Tensor))]
        learned = False
        while not learned:
            counts.clear()
            with StepTracker(self.model, known) as tracker:
                precision = nullcontext() if self._autocast is None else torch.autocast("cpu", self._autocast)
                with precision, nullcontext() if found.saved is None else found.saved.step():
                    loss = loss_of(self.model(**batch))
                tracker.begin_backward()
                loss.backward()
                each = counts.copy()
                self._gradients.complete()
            learned = not any(group.leaving for group in found.columns)
            found.settle()
            self.model.zero_grad()
        tokens = batch["input_ids"].numel() if "input_ids" in batch else 0
        return Seen(self.held, tokens, tracker.trace, each, counts - each)


def _held(model: nn.Module, plan: ShardingPlan) -> Held:
    blocks: dict[str, int] = defaultdict(int)
    trained: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        numbered = re.match(r"(?:.*?\.)??\d+(?=\.)", name)
        block = numbered[0] if numbered else ""
        blocks[block] += parameter.nbytes
        trained[block] += parameter.nbytes if parameter.requires_grad else 0
    outside, trained_outside = blocks.pop("", 0), trained.pop("", 0)
    return Held(
        parameters=sum(prod(plan.parameters[name].layout.shape) for name, _ in model.named_parameters()),
        weights=sum(blocks.values()) + outside,
        trained=sum(trained.values()) + trained_outside,
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        block=max(blocks.values(), default=0),
        outside=outside,
        trained_block=max(trained.values(), default=0),
        trained_outside=trained_outside,
    )
