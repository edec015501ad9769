"""A model trained whole and sharded, and compared."""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Optional, Union

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.verification.error_metrics import (
    LOSS_TOLERANCE,
    NOISE,
    ROUNDING,
    TOLERANCE,
    Errors,
    comparable,
    largest_errors,
)
from lightning_autotp.verification.rank_pool import Pool, RankError
from lightning_autotp.verification.rank_run import Case, Measured, measure, rounding_noise
from lightning_autotp.verification.report import Report, Row, Verdict, worst_first


def verify(
    model: Union[str, os.PathLike[str]],
    tp_size: int,
    config: Union[TPTrainingConfig, Mapping[str, Any], str, os.PathLike[str], None] = None,
    *,
    steps: int = 3,
    tolerance: float = TOLERANCE,
    kv_heads: int = 2,
    sequence_parallel: Optional[bool] = None,
    timeout: float = 120.0,
    pool: Optional[Pool] = None,
) -> Report:
    """Train a model whole and sharded over ``tp_size`` CPU processes, and compare.

    A script that calls this must do so under ``if __name__ == "__main__":``, as with all of Python's multiprocessing.

    Args:
        model: a Hugging Face model type or the path of a ``config.json``, of which a small model is made; or
            ``"module:factory"``, a callable without arguments that returns ``(model, batches)``: an nn.Module, and
            dicts of keyword arguments with which ``model(**batch)`` is the loss, or has it as ``loss``. It is called in
            every rank, after ``torch.manual_seed(0)``.
        tp_size: the tensor parallel size; what ``config`` says of it does not matter.
        config: rules, preset and switches, as ``AutoTPStrategy`` takes them.
        steps: optimizer steps (AdamW).
        tolerance: the bound on the errors of gradients and weights; that of the loss is 1e-4.
        kv_heads: key and value heads of the small model.
        sequence_parallel: whether to run with it; None where ``config`` says it.
        timeout: seconds that a run may take.
        pool: processes to use; None starts some and ends them.

    Raises:
        ValueError: if ``config`` is wrong. What a model or its plan raises is in the report.
    """
    given = {} if sequence_parallel is None else {"sequence_parallel": sequence_parallel}
    loaded = TPTrainingConfig.load(config, **given)
    case = Case(str(model), tp_size, loaded, steps, kv_heads)
    started = time.monotonic()

    def report(verdict: Verdict, **found: Any) -> Report:
        return Report(case.source, tp_size, verdict, seconds=time.monotonic() - started, **found)

    with contextlib.nullcontext(pool) if pool is not None else Pool() as used:
        try:
            path = used.reference(case, timeout)
        except RankError as error:
            return report("error", message=error.message, details=error.details, unsharded=True)
        try:
            ranks: list[Measured] = used.run(tp_size, measure, case, path, timeout=timeout)
        except RankError as error:
            if error.refused:
                return report("refused", message=error.message)
            return report("error", message=error.message, details=error.details)
        steps_and_weights = [largest_errors([errors(rank) for rank in ranks]) for errors in _parts(steps)]
        noise: list[dict[str, float]] = [{} for _ in range(steps + 1)]
        if any(not error[0] <= tolerance for errors in steps_and_weights for error in errors.values()):
            with contextlib.suppress(RankError):  # some models cannot run in float64: nothing is excused then
                noise = used.run(1, rounding_noise, case, path, ranks[0].layouts, timeout=timeout)[0]
    rows = _rows(ranks, steps_and_weights, noise, tolerance)
    loss = max(comparable(rank.loss) for rank in ranks)
    passed = loss <= LOSS_TOLERANCE and not any(row.since for row in rows)
    share = max(rank.share for rank in ranks)
    forward = "" if passed else next((rank.forward for rank in ranks if rank.forward), "")
    return report(
        "pass" if passed else "fail", loss=loss, rows=rows, share=share, forward=forward, warnings=ranks[0].warnings
    )


def _parts(steps: int) -> Iterator[Callable[[Measured], Errors]]:
    """Where a rank's errors are: those of each step's gradients, then those of the weights."""
    for step in range(steps):
        yield lambda rank, step=step: rank.gradients[step]  # type: ignore[misc]
    yield lambda rank: rank.weights


def _rows(
    ranks: Sequence[Measured], errors: Sequence[Errors], noise: Sequence[Mapping[str, float]], tolerance: float
) -> tuple[Row, ...]:
    """One row a parameter; ``errors`` and ``noise`` have one entry a step and one for the weights."""
    steps = len(errors) - 1
    seen: dict[tuple[int, str, int], set[bytes]] = defaultdict(set)
    for rank in ranks:
        for (at, name, index), digest in rank.digests.items():
            seen[(at, name, index)].add(digest)
    shared = {name for _, name, _ in seen}
    unequal = {(at, name) for (at, name, _), digests in seen.items() if len(digests) > 1}
    rows = []
    for name, (cut, rule, source) in ranks[0].decided.items():
        wrong, noisy = [], 0.0
        for at, of_all in enumerate(errors):
            error, of_norm = of_all.get(name, (0.0, 0.0))
            rounding = noise[at].get(name, 0.0)
            is_noise = rounding > NOISE * tolerance
            excused = is_noise and of_norm <= ROUNDING
            noisy = max(noisy, rounding if is_noise else 0.0)
            if not (error <= tolerance or excused) or (at, name) in unequal:
                wrong.append(at)
        gradient = max(of_step.get(name, (0.0, 0.0))[0] for of_step in errors[:-1])
        equal = all((at, name) not in unequal for at in range(len(errors))) if name in shared else None
        since = min(wrong[0] + 1, steps) if wrong else 0
        rows.append(Row(name, gradient, errors[-1].get(name, (0.0, 0.0))[0], cut, rule, source, equal, noisy, since))
    return worst_first(rows)
