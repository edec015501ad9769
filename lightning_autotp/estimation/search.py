"""Which layout is best? All that so many GPUs allow, priced, and the best of each.

TP x CP x DP, ZeRO stages and groups, switches and batches are gone through; see ``layouts.py`` for what is a layout,
``variants.py`` for the steps of tensor parallel ranks, and ``cost.py`` for what they cost. Of each layout the
switches and the batch with the shortest step count. Of steps that are alike in three digits, the one with less to set
up is better: without ZeRO, CP, checkpointing, a fused loss, TP, in this order, then the one that needs less memory.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional

from lightning_autotp.estimation.cost import Estimate, priced
from lightning_autotp.estimation.hardware import Machine
from lightning_autotp.estimation.job import Job
from lightning_autotp.estimation.layouts import LeftOut, cp_sizes, divisors, tp_sizes, zero_stages
from lightning_autotp.estimation.step import built, without_values
from lightning_autotp.estimation.variants import Variant, Variants
from lightning_autotp.estimation.wanted import Wanted


@dataclass(frozen=True)
class Choice:
    """A layout, with the switches and the batch that make its step the shortest.

    Args:
        estimate: what it costs.
        mfu: model FLOP/s utilization: operations of the model without recomputing, over what the GPUs can do.
        larger: what would be faster, and does not fit.
    """

    estimate: Estimate
    mfu: float
    larger: Optional[Estimate]

    @property
    def bound(self) -> tuple[str, float]:
        """What takes the most of a step, and which part of it."""
        found = self.estimate
        work = {"matrix products": found.work.products, "memory traffic": found.work.moves}
        parts = {**work, "the optimizer": found.work.optimizer, **found.waits}
        most = max(parts, key=lambda name: parts[name])
        return most, parts[most] / found.seconds if found.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, with plain values; sizes in bytes, times in seconds."""
        bound, part = self.bound
        larger = None
        if self.larger is not None:
            larger = {"job": _job(self.larger), "seconds": self.larger.seconds, "lacks": self.larger.lacks}
        speed = {"mfu": self.mfu, "bound": bound, "bound_part": part, "larger": larger}
        return {**self.estimate.as_dict(), "tokens_a_second": self.estimate.tokens / self.estimate.seconds, **speed}


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        wanted: what was asked.
        machine: what on.
        rows: sequences that all GPUs see in a step.
        best: the best layouts, the best first; none if nothing fits.
        slower: layouts that fit, too.
        too_large: layouts that do not fit: of each what lacks the least.
        left_out: why others are none.
        refused: switches that the model does not accept, with the reason.
        took: seconds that the search took.
    """

    wanted: Wanted
    machine: Machine
    rows: int
    best: tuple[Choice, ...]
    slower: tuple[Choice, ...]
    too_large: tuple[Estimate, ...]
    left_out: dict[str, list[str]]
    refused: dict[str, str]
    took: float

    def as_dict(self) -> dict[str, Any]:
        """Everything, with plain values; sizes in bytes, times in seconds."""
        return {
            "model": self.wanted.model,
            "gpus": self.wanted.gpus,
            "rows": self.rows,
            "best": [choice.as_dict() for choice in self.best],
            "slower": [{"job": _job(c.estimate), "seconds": c.estimate.seconds} for c in self.slower],
            "too_large": [{"job": _job(found), "lacks": found.lacks} for found in self.too_large],
            "left_out": self.left_out,
            "refused": self.refused,
            "took": self.took,
        }


def search(wanted: Wanted, machine: Machine) -> Found:
    """Find the best layouts for ``wanted`` on ``machine``; nothing is trained, and no process group is needed.

    Raises:
        ValueError: if the model cannot be read, no layout is left, or its step needs to know the values of tensors.
    """
    started = time.monotonic()
    left_out = LeftOut()
    with without_values(wanted.model):
        model, batch = built(wanted.job)
        rows = wanted.rows(batch)
        variants = Variants(model, batch, wanted.job, wanted.asked)
        ids = batch.get("input_ids")
        seq = 0 if ids is None else ids.shape[-1]
        config = getattr(model, "config", None)
        priced_layouts = []
        useful: Optional[float] = None  # operations of the model for one sequence
        for tp in tp_sizes(wanted, machine, config, left_out):
            layouts = [
                (cp, zero, group)
                for cp in cp_sizes(tp, wanted, machine, config, seq, left_out)
                if _shared(rows, wanted.gpus // tp // cp, left_out)
                for zero, group in zero_stages(tp, cp, wanted, machine, left_out)
            ]
            if not layouts:
                continue
            try:
                ways = list(variants.of(tp))
            except ValueError as error:
                left_out.add(f"refused: {error}", f"TP {tp}")
                continue
            useful = useful or _operations(ways[0], tp)
            for cp, zero, group in layouts:
                dp = wanted.gpus // tp // cp
                found: list[Estimate] = []
                for way in ways:
                    job = replace(way.job, dp=dp, cp=cp, zero=zero, zero_group=group)
                    try:
                        found += _batches(way, job, rows // dp, wanted, machine)
                    except ValueError as error:
                        left_out.add(f"refused: {error}", f"TP {tp} x CP {cp}")
                if found:
                    priced_layouts.append(_choose(found, useful * rows / wanted.gpus))
    choices = sorted((c for c in priced_layouts if isinstance(c, Choice)), key=lambda choice: _order(choice.estimate))
    too_large = sorted((e for e in priced_layouts if isinstance(e, Estimate)), key=lambda estimate: estimate.lacks)
    if not priced_layouts:
        why = "; ".join(f"{', '.join(what)}: {reason}" for reason, what in left_out.reasons.items())
        raise ValueError(f"gpus: no layout of {wanted.gpus} GPUs is possible ({why}); change what these name.")
    return Found(
        wanted,
        machine,
        rows,
        tuple(choices[: wanted.best]),
        tuple(choices[wanted.best :]),
        tuple(too_large),
        left_out.reasons,
        variants.refused,
        time.monotonic() - started,
    )


def _operations(way: Variant, tp: int) -> float:
    if way.job.checkpointing:  # a quarter is for recomputing, about
        return sum(work.flops * count for work, count in way.step(1, 1).work.items()) * tp * 3 / 4
    return sum(work.flops * count for work, count in way.step(1, 1).work.items()) * tp


def _shared(rows: int, dp: int, left_out: LeftOut) -> bool:
    if rows % dp:
        left_out.add(f"{rows} sequences of a step cannot be shared evenly", f"DP {dp}")
    return rows % dp == 0


def _batches(way: Variant, job: Job, rows: int, wanted: Wanted, machine: Machine) -> Iterator[Estimate]:
    """Larger and larger batches, to the first that does not fit."""
    for batch in divisors(rows):
        if wanted.batch not in (None, batch):
            continue
        started = time.monotonic()
        mine = replace(job, batch=None if ":" in job.model else batch, accumulate=rows // batch)
        found = priced(way.step(batch, job.cp), mine, machine, started)
        yield found
        if not found.fits:
            return


def _choose(estimates: list[Estimate], operations: float) -> "Choice | Estimate":
    """The best of a layout, or what lacks the least; ``operations`` are those of a GPU in a step."""
    fitting = [found for found in estimates if found.fits]
    if not fitting:
        return min(estimates, key=lambda found: found.lacks)
    best = min(fitting, key=_order)
    sheet = best.machine.sheet
    peak = sheet.fp32 if best.job.precision == "32-true" else sheet.bf16
    faster = [found for found in estimates if not found.fits and found.seconds < best.seconds * 0.99]
    larger = min(faster, key=lambda found: found.seconds, default=None)
    return Choice(best, operations / (best.seconds * peak), larger)


def _order(found: Estimate) -> tuple[Any, ...]:
    job = found.job
    rounded = float(f"{found.seconds:.3g}")
    return (rounded, job.zero, job.cp, job.checkpointing, job.loss_parallel == "fused", job.tp, found.memory.peak)


def _job(found: Estimate) -> dict[str, Any]:
    return {name: value for name, value in vars(found.job).items() if name != "config"}
