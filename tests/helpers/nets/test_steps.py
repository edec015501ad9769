"""The training steps are what they say they are: each one trains unsharded, and on two ranks by numbers."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_autotp import AutoTPStrategy
from tests.helpers.nets.step_frame import Step
from tests.helpers.nets.steps import LATE, STEPS
from tests.helpers.small_nets import alone, everyones, parts_of

ALL = (*STEPS, *LATE)
HALF = ("autocast inside",)
FAST = ("LoRA", "GAN", "manual, accumulating", "manual, clipped by a local norm", "late: another key")
"""Run on ranks by every run of the tests; the others by those that may take long."""


def lines_with(step: Step, model: nn.Module) -> list[str]:
    """The source lines that ``step.line`` is a part of, in all files of the module's classes, descriptions left out."""
    files = [sys.modules[name] for name in sorted({type(m).__module__ for m in model.modules()}) if "tests." in name]
    lines = (line for file in files for line in inspect.getsource(file).splitlines())
    return [line for line in lines if step.line in line and f'"{step.line}"' not in line]


def fit(step: Step, folder: Path | None, steps: int = -1, **options: Any) -> LightningModule:
    """The module after training as its user would."""
    torch.manual_seed(11)
    module = step.build()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=step.epochs,
        max_steps=steps,
        logger=False if folder is None else CSVLogger(str(folder)),
        callbacks=step.callbacks(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(module, step.train_dataloaders())
    assert trainer.global_step > 0
    return module


def names(*, right: bool) -> list[Any]:
    """Names of steps as the parameters of a test."""
    chosen = [step.name for step in ALL if step.right is right]
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.long) for name in chosen]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_there_are_as_many_as_were_asked_for() -> None:
    assert len({step.name for step in ALL}) == len(ALL)
    assert sum(step.right for step in STEPS) >= 28
    assert len(STEPS) >= 32
    assert len(LATE) >= 10 and all(step.first_wrong >= 2 for step in LATE)


@pytest.mark.parametrize("step", ALL, ids=lambda step: step.name)
def test_a_step_trains_unsharded(step: Step, tmp_path: Path) -> None:
    module = fit(step, tmp_path, 2 if step.epochs == 1 else -1, devices=1)
    before, after = weights(_configured(step)), weights(module)
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert bool(step.line) is not step.right
    if step.line:
        assert len(lines_with(step, module)) == 1


def _configured(step: Step) -> LightningModule:
    module = step.build()
    module.configure_model()
    return module


def error_of(step: Step, steps: int) -> float:
    """On ranks: how far this rank's weights are from the unsharded run's, the largest relative to their norm.

    Raises:
        Exception: what training raises under tensor parallelism.
    """
    # of sums in bfloat16, which fp64 modules do not know, rounding is all that differs
    precision = "32-true" if step.name in HALF else "64-true"
    options: dict[str, Any] = {"precision": precision, "use_distributed_sampler": False}
    with alone():
        want = weights(fit(step, None, steps, devices=1, **options))
    # without the proof, which would not let a wrong one train
    strategy = AutoTPStrategy(autotp_size=2, proof="on" if step.right else "off", **step.config)
    module = fit(step, None, steps, devices=2, strategy=strategy, **options)
    parts = parts_of(module, want)
    errors = [float((got - parts[name]).norm() / (parts[name].norm() + 1e-6)) for name, got in weights(module).items()]
    return max(everyones(max(errors)))


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize("name", names(right=True))
def test_a_right_step_gives_the_same_weights_on_two_ranks(name: str) -> None:
    (step,) = (step for step in ALL if step.name == name)
    assert error_of(step, -1) < (1e-2 if name in HALF else 1e-9)


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize("name", names(right=False))
def test_a_wrong_step_is_right_until_it_is_wrong(name: str) -> None:
    (step,) = (step for step in ALL if step.name == name)
    if step.first_wrong > 1:
        assert error_of(step, step.first_wrong - 1) < 1e-9
    try:
        error = error_of(step, step.first_wrong)
    except RuntimeError as loud:
        assert "ranks" in str(loud)
    else:
        assert error > 1e-5
