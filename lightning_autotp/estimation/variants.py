"""Steps of all ways to run a model on so many tensor parallel ranks, from few traces of few blocks and small batches.

Of each way two depths and two batches are traced (:mod:`~lightning_autotp.estimation.extrapolate`). A switch that the
model accepts is on: ``sequence_parallel`` and ``loss_parallel`` send no more bytes on than off, and keep fewer. Losses
differ in the end of the forward and the beginning of the backward pass only, so those of parts are traced with one
depth and put in the place of the ordinary one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from torch import nn

from lightning_autotp.config.switches import FUSED, LossParallel
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.estimation.cost import of_context
from lightning_autotp.estimation.depth import Depth, copied, depth_of
from lightning_autotp.estimation.extrapolate import NotAffineError, at_depth, with_head
from lightning_autotp.estimation.job import Job
from lightning_autotp.estimation.step import Rank, Seen, Step, repeated
from lightning_autotp.model_sources.full_size import checkpoint
from lightning_autotp.recipe.make_plan import make_plan

BATCHES = (1, 2)
"""Times the batch of one sequence that are traced."""

_Traces = dict[tuple[bool, int], Seen]
"""By whether it is the larger depth, and the batch."""


@dataclass
class Variant:
    """One way to run a model; its sizes and switches are those of ``job``.

    Args:
        job: what is run, with one data parallel rank.
        traces: what was seen.
        periods: how many periods of blocks the model has more than what was seen; None if that was the whole model.
    """

    job: Job
    traces: _Traces
    periods: Optional[int]
    _steps: dict[float, Step] = field(default_factory=dict)

    def step(self, batches: int, cp: int) -> Step:
        """A context parallel rank's step with so many times the batch of one sequence, before its exchanges.

        Raises:
            NotAffineError: if the depths that were traced do not go together.
        """
        size = batches / cp
        if size not in self._steps:
            few = self._seen(False, batches, cp)
            if self.periods is None:
                self._steps[size] = Step.of(few)
            else:
                self._steps[size] = at_depth(few, self._seen(True, batches, cp), self.periods)
        return self._steps[size]

    def _seen(self, larger: bool, batches: int, cp: int) -> Seen:
        small, large = (self.traces[larger, batch] for batch in BATCHES)
        return of_context(small, large, BATCHES, batches, cp)


class Variants:
    """The ways to run a model.

    Args:
        model: the whole model, of tensors without values, which is not changed.
        batch: of one sequence.
        job: with the switches that are asked for, or None for the search's choice.
        asked: the fields of ``job`` that are.

    Attributes:
        refused: what the model does not accept, by switch, with the reason.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Any], job: Job, asked: frozenset[str]) -> None:
        self.model, self.job, self._asked = model, job, asked
        self.refused: dict[str, str] = {}
        self._depths: dict[int, Optional[Depth]] = {}
        self._batches = {times: repeated(batch, times, job.model) for times in BATCHES}

    def of(self, tp: int) -> Iterator[Variant]:
        """All for ``tp`` ranks.

        Raises:
            ValueError: if none is accepted.
        """
        losses = self._choices("loss_parallel", tp)
        switched, plain = self._plain(tp)
        ways = [plain]
        if self._choices("checkpointing", tp) != [False]:
            ways += self._checkpointed(tp, switched)
        if self._choices("checkpointing", tp) == [True]:
            ways = ways[1:]
        accepted = [way for loss in losses if loss for way in self._with_loss(tp, loss, plain, ways)]
        yield from accepted or ways

    def _depth(self, tp: int) -> Optional[Depth]:
        if tp not in self._depths:
            self._depths[tp] = depth_of(self.model, make_plan(self.model, self.job.config, tp))
        return self._depths[tp]

    def _plain(self, tp: int) -> tuple[Job, Variant]:
        """The way without checkpointing and a loss of parts, with sequence parallelism if the model accepts it."""
        refusal: Optional[ValueError] = None
        for parallel in self._choices("sequence_parallel", tp):
            job = _switched(self.job, tp, parallel, False)
            try:
                way = Variant(job, *self._traced(tp, job, checkpointing=False))
            except ValueError as error:
                refusal = refusal or error
                continue
            if refusal is not None:
                self.refused["sequence_parallel"] = str(refusal)
            return job, way
        assert refusal is not None
        raise refusal

    def _choices(self, switch: str, tp: int) -> list[Any]:
        """What a switch may be, the first choice first."""
        if switch != "checkpointing" and tp == 1:  # nothing to share
            return [False]
        if switch in self._asked:
            return [getattr(self.job, switch)]
        choices: dict[str, list[Any]] = {"loss_parallel": [True, FUSED], "checkpointing": [False, True]}
        return choices.get(switch, [True, False])

    def _checkpointed(self, tp: int, job: Job) -> list[Variant]:
        job = replace(job, checkpointing=True)
        try:
            return [Variant(job, *self._traced(tp, job, checkpointing=True))]
        except ValueError as error:
            if "checkpointing" in self._asked:
                raise
            self.refused["checkpointing"] = str(error)
            return []

    def _with_loss(self, tp: int, loss: LossParallel, plain: Variant, ways: list[Variant]) -> Iterator[Variant]:
        job = _switched(plain.job, tp, bool(plain.job.sequence_parallel), loss)
        try:
            head = self._run(self._copy(tp, larger=False), job, tp)
        except ValueError as error:
            if "loss_parallel" in self._asked:
                raise
            self.refused[f"loss_parallel {loss}" if loss == FUSED else "loss_parallel"] = str(error)
            return
        for way in ways:
            mine = replace(job, checkpointing=way.job.checkpointing)
            try:
                traces = {
                    (larger, times): with_head(seen, plain.traces[False, times], head[times])
                    for (larger, times), seen in way.traces.items()
                }
                yield Variant(mine, traces, way.periods)
            except NotAffineError:
                yield Variant(mine, *self._traced(tp, mine, checkpointing=mine.checkpointing))

    def _traced(self, tp: int, job: Job, *, checkpointing: bool) -> tuple[_Traces, Optional[int]]:
        depth = self._depth(tp)
        traces: _Traces = {}
        for larger in (False, True) if depth is not None else (False,):
            model = self._copy(tp, larger=larger)
            if checkpointing:
                checkpoint(model)
            traces.update({(larger, times): seen for times, seen in self._run(model, job, tp).items()})
        if depth is None:
            return traces, None
        try:
            Variant(job, traces, depth.periods).step(BATCHES[1] + 1, 1)
        except NotAffineError:  # blocks look alike, and do not compute the same
            self._depths[tp] = None
            return self._traced(tp, job, checkpointing=checkpointing)
        return traces, depth.periods

    def _copy(self, tp: int, *, larger: bool) -> nn.Module:
        depth = self._depth(tp)
        return copied(self.model) if depth is None else depth.model(self.model, larger=larger)

    def _run(self, model: nn.Module, job: Job, tp: int) -> dict[int, Seen]:
        rank = Rank(model, job, tp)
        return {times: rank.run(batch) for times, batch in self._batches.items()}


def _switched(job: Job, tp: int, sequence: bool, loss: LossParallel) -> Job:
    config = TPTrainingConfig.load(job.config, sequence_parallel=sequence, loss_parallel=loss)
    return replace(job, tp=tp, sequence_parallel=sequence, loss_parallel=loss, config=config, checkpointing=False)
