"""What is derived for a model without rules: its proof, what is true of it, and what a rank holds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.derive import Derived, derive
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.prover import Look
from lightning_autotp.proof.step import loss_of_batch
from tests.derivation.models.frame import Model
from tests.helpers.truth import Trial, error_of, unsharded

PROOF_SEED = 9
"""Of other numbers than those that are judged with."""


@dataclass(frozen=True)
class Judged:
    """What was found.

    Args:
        found: what was derived.
        error: its largest error after some optimizer steps.
        share: the share of the parameters on the rank that holds most.
        seconds: what derivation and proof took.
    """

    found: Derived
    error: float
    share: float
    seconds: float


def judged(model: Model, size: int) -> Judged:
    """Derive a plan of ``model`` for ``size`` ranks and train with it."""
    built, config = model.build(), TPTrainingConfig(autotp_size=size)
    begun = time.perf_counter()
    look = Look("training", (model.batch(PROOF_SEED),), call=loss_of_batch)
    found = derive(built, look, config, size)
    seconds = time.perf_counter() - begun
    trial = Trial(built, found.plan, config, [model.batch(seed) for seed in (5, 6, 7)])
    error = error_of(trial, unsharded(trial))
    return Judged(found, error, share(found.plan, {name for name, _ in built.named_parameters()}), seconds)


def share(plan: ShardingPlan, names: set[str]) -> float:
    """The share of the parameters ``names`` on the rank that holds most of them."""
    layouts = [layout for name, layout in plan.layouts.items() if name in names]
    held = [sum(prod(layout.local_shape(rank)) for layout in layouts) for rank in range(plan.tp_size)]
    return max(held) / sum(prod(layout.shape) for layout in layouts)
