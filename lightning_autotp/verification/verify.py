"""A model trained whole and sharded, and compared."""

import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed import lockstep
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.error_metrics import (
    BOUNDS,
    NOISE,
    ROUNDING,
    Bounds,
    Errors,
    Precision,
    comparable,
    largest_errors,
)
from lightning_autotp.verification.rank_run import (
    Case,
    Measured,
    NotNewError,
    Refused,
    Run,
    plan_and_prove,
    rounding_noise,
    run_sharded,
    run_unsharded,
)
from lightning_autotp.verification.report import Judgement, Report, Row, worst_first
from lightning_autotp.verification.undisturbed import undisturbed

_ERRORS = (Exception, SystemExit)
"""What a model may raise without ending the process that verifies it."""


def verify(
    model: Union[str, os.PathLike[str]],
    tp_size: int,
    config: Union[TPTrainingConfig, Mapping[str, Any], str, os.PathLike[str], None] = None,
    *,
    steps: int = 3,
    tolerance: Optional[float] = None,
    kv_heads: int = 2,
    sequence_parallel: Optional[bool] = None,
) -> Report:
    """Train a model whole and sharded over ``tp_size`` ranks, all of them in this process, and compare.

    Both are computed in fp64, where a few ulps are far below what a mistake makes; a model that does not run in it
    keeps its dtypes. What a process shares (random states, the default dtype, warnings, ``sys.path``) is put back.

    Args:
        model: a Hugging Face model type or the path of a ``config.json``, of which a small model is made; or
            ``"module:factory"``, a callable without arguments that returns ``(model, batches)``: an nn.Module, and
            dicts of keyword arguments with which ``model(**batch)`` is the loss, or has it as ``loss``. It is called
            for every rank, after ``torch.manual_seed(0)``, and must build a new model each time.
        tp_size: the tensor parallel size; what ``config`` says of it does not matter.
        config: rules, preset and switches, as ``AutoTPStrategy`` takes them; what has no rules is derived from the
            first batch.
        steps: optimizer steps (AdamW).
        tolerance: the bound on the errors of gradients and weights; None is 1e-4, or 1e-3 for a model that does not run
            in fp64. That of the loss is 1e-6, or 1e-4.
        kv_heads: key and value heads of the small model.
        sequence_parallel: whether to run with it; None where ``config`` says it.

    Raises:
        ValueError: if ``config`` is wrong. What a model or its plan raises is in the report.
    """
    given = {} if sequence_parallel is None else {"sequence_parallel": sequence_parallel}
    loaded = TPTrainingConfig.load(config, **given)
    if loaded.context_parallel_size > 1:
        rank_zero_warn("context_parallel_size: tensor parallelism alone is verified here.")
    case = Case(str(model), tp_size, loaded, steps, kv_heads)
    started = time.monotonic()

    def report(verdict: Judgement, **found: Any) -> Report:
        return Report(case.source, tp_size, verdict, seconds=time.monotonic() - started, **found)

    with undisturbed():
        try:
            unsharded = _unsharded_runs(case)
        except _ERRORS as error:
            return report("error", message=_message(error), details=_frames(error), unsharded=True)
        try:
            plan, proof = plan_and_prove(case)
            precision, ranks = _sharded_ranks(case, plan, unsharded)
        except Refused as refused:
            return report("refused", message=str(refused))
        except _ERRORS as error:
            return report("error", message=_message(error), details=_frames(error))
        bounds = BOUNDS[precision]
        bounds = bounds if tolerance is None else Bounds(bounds.loss, tolerance)
        errors = [largest_errors([errors(rank) for rank in ranks]) for errors in _parts(steps)]
        noise: list[dict[str, float]] = [{} for _ in range(steps + 1)]
        if any(not error[0] <= bounds.tensors for of_all in errors for error in of_all.values()):
            noise = _noise(case, unsharded, ranks[0]) or noise
    rows = _rows(ranks, errors, noise, bounds.tensors)
    loss = max(comparable(rank.loss) for rank in ranks)
    passed = loss <= bounds.loss and not any(row.since for row in rows)
    return report(
        "pass" if passed else "fail",
        loss=loss,
        rows=rows,
        share=max(rank.share for rank in ranks),
        forward="" if passed else next((rank.forward for rank in ranks if rank.forward), ""),
        warnings=ranks[0].warnings,
        precision=precision,
        proof=proof.verdict.kind,
        repaired=tuple(proof.repairs.sentences()),
        findings=() if passed else tuple(str(one) for one in proof.verdict.findings),
    )


def _unsharded_runs(case: Case) -> dict[Precision, Run]:
    """The unsharded run in fp64; in fp32 if it fails.

    Raises:
        Exception: what the model raises in either.
    """
    try:
        return {"fp64": run_unsharded(case, "fp64")}
    except _ERRORS:
        return {"fp32": run_unsharded(case, "fp32")}


def _sharded_ranks(case: Case, plan: ShardingPlan, unsharded: dict[Precision, Run]) -> tuple[Precision, list[Measured]]:
    """The sharded run in fp64, and in fp32 if either fails in fp64; a run that is missing is added to ``unsharded``.

    Raises:
        Exception: what a rank raises in either.
    """
    if "fp64" in unsharded:
        try:
            return "fp64", run_sharded(case, plan, unsharded["fp64"], "fp64")
        except (Refused, NotNewError):
            raise
        except _ERRORS:
            unsharded["fp32"] = run_unsharded(case, "fp32")
    return "fp32", run_sharded(case, plan, unsharded["fp32"], "fp32")


def _noise(case: Case, unsharded: dict[Precision, Run], rank: Measured) -> Optional[list[dict[str, float]]]:
    """What fp32 itself misses of fp64; None if the model does not run in both: nothing is excused then."""
    if "fp64" not in unsharded:
        return None
    try:
        single = unsharded.get("fp32") or run_unsharded(case, "fp32")
    except _ERRORS:
        return None
    return rounding_noise(single, unsharded["fp64"], rank.layouts, case.tp_size)


def _message(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _frames(error: BaseException) -> str:
    """Where an error was raised, without our own frames and those of ``nn.Module``."""
    own, others = Path(__file__).parent, (lockstep.__file__, sys.modules[nn.Module.__module__].__file__)
    frames = traceback.extract_tb(error.__traceback__)
    return "".join(
        traceback.format_list([f for f in frames if Path(f.filename).parent != own and f.filename not in others])
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
            is_noise = rounding > NOISE * BOUNDS["fp32"].tensors
            excused = is_noise and of_norm <= ROUNDING
            noisy = max(noisy, rounding if is_noise else 0.0)
            if not (error <= tolerance or excused) or (at, name) in unequal:
                wrong.append(at)
        gradient = max(of_step.get(name, (0.0, 0.0))[0] for of_step in errors[:-1])
        equal = all((at, name) not in unequal for at in range(len(errors))) if name in shared else None
        since = min(wrong[0] + 1, steps) if wrong else 0
        rows.append(Row(name, gradient, errors[-1].get(name, (0.0, 0.0))[0], cut, rule, source, equal, noisy, since))
    return worst_first(rows)
