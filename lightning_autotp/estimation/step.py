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
from contextlib import nullcontext
from dataclasses import dataclass
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
from lightning_autotp.distributed.recording import Collective, RecordingCollectives, recording_mesh
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.estimation.job import PRECISIONS, Job
from lightning_autotp.estimation.tracker import StepTracker, Work
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
    """

    parameters: int
    weights: int
    trained: int
    buffers: int
    block: int
    outside: int


@dataclass(frozen=True)
class Step:
    """What one rank does in a step, without data parallelism; see :class:`StepTracker`.

    Args:
        held: what is there between steps.
        tokens: how many a data parallel rank reads; 0 for a model that reads none.
        forward, kept, backward: bytes of activations and of what else comes and goes.
        work: what is computed.
        collectives: what is sent.
    """

    held: Held
    tokens: int
    forward: int
    kept: int
    backward: dict[int, int]
    work: Counter[Work]
    collectives: Counter[Collective]


def run_step(job: Job) -> Step:
    """Run one step of ``job``.

    Raises:
        ValueError: if the model cannot be read, its plan is refused, or its step needs to know the values of tensors.
    """
    with FakeTensorMode(), hide_values_from_transformers():
        try:
            return _run_step(job)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"model: {job.model}'s step depends on the values of its tensors (in {error.func}), and an estimate"
                " has none; estimate a model of the same sizes without such code."
            ) from None


def _run_step(job: Job) -> Step:
    dtype, _ = PRECISIONS[job.precision]
    model, batch = build(job.model, dtype=dtype, batch=job.batch, seq=job.seq, checkpointing=job.checkpointing)
    plan = make_plan(model, job.config, job.tp)
    mesh, recorder = recording_mesh(silent_mesh(job.tp))
    shard(model, plan, mesh, job.config, device=torch.device("cpu"))
    tracker = _tracked(model, batch, job, recorder)
    tokens = batch["input_ids"].numel() if "input_ids" in batch else 0
    found = (tracker.forward, tracker.kept, tracker.backward, tracker.work, recorder.counts)
    return Step(_held(model, plan), tokens, *found)


def _tracked(model: nn.Module, batch: dict[str, Any], job: Job, recorder: RecordingCollectives) -> StepTracker:
    """A step as it is once column linears have learned which of them share an input."""
    found = sharded(model)
    assert found is not None
    gradients = TPGradients(model, found)
    known = [*model.parameters(), *model.buffers(), *(x for x in batch.values() if isinstance(x, Tensor))]
    _, autocast = PRECISIONS[job.precision]
    learned = False
    while not learned:
        recorder.counts.clear()
        with StepTracker(model, known) as tracker:
            precision = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
            with precision, nullcontext() if found.saved is None else found.saved.step():
                loss = loss_of(model(**batch))
            tracker.begin_backward()
            loss.backward()
            gradients.complete()
        learned = not any(group.leaving for group in found.columns)
        found.settle()
        model.zero_grad()
    return tracker


def _held(model: nn.Module, plan: ShardingPlan) -> Held:
    blocks: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        block = re.match(r"(?:.*?\.)??\d+(?=\.)", name)
        blocks[block[0] if block else ""] += parameter.nbytes
    outside = blocks.pop("", 0)
    return Held(
        sum(prod(plan.parameters[name].layout.shape) for name, _ in model.named_parameters()),
        sum(parameter.nbytes for parameter in model.parameters()),
        sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
        sum(buffer.nbytes for buffer in model.buffers()),
        max(blocks.values(), default=0),
        outside,
    )
