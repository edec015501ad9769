"""Hand-written nets and training steps in many styles: right ones are proved, wrong ones refuted or made right."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_autotp import AutoTPStrategy
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.proof.compared import Proof
from lightning_autotp.proof.prover import Look, Prover
from lightning_autotp.proof.step import loss_of_batch, loss_step
from lightning_autotp.proof.values import prove_values
from lightning_autotp.recipe.make_plan import make_plan
from lightning_autotp.recipe.proving import PlanRefutedError
from tests.helpers.closeness import assert_close
from tests.helpers.nets import NETS
from tests.helpers.nets.frame import Net
from tests.helpers.nets.step_frame import Step
from tests.helpers.nets.steps import LATE, STEPS
from tests.helpers.small_nets import RULES, Regressor, Rows, alone, parts_of, trainer, weights


def names(said: object, line: str) -> bool:
    """Whether what is said of a step names the line of code that contains ``line``."""
    places = re.findall(r"([^\s`:(]*\.py):(\d+)", str(said))
    return any(line in Path(file).read_text().splitlines()[int(number) - 1] for file, number in places)


def prove(net: Net, size: int) -> Proof | None:
    """The proof of a net's plan; None if it is refused before."""
    config, model = TPTrainingConfig.load(net.config), net.build()
    try:
        plan = make_plan(model, config, size)
    except ValueError:
        return None
    return prove_values(model, plan, config, loss_step(loss_of_batch, net.batch()))


def count(nets: list[tuple[Net, int]]) -> Counter[str]:
    """How many nets of each kind there are; asserts that none is judged falsely."""
    counts: Counter[str] = Counter()
    for net, size in nets:
        found = prove(net, size)
        where = f"{net.name} at TP={size}: {found}"
        if found is None:
            assert not net.right, where
            counts["refused by its rules"] += 1
        elif net.right:
            assert found.verdict.kind == "proved", where
            counts["right and proved"] += 1
        elif found.repairs:
            assert found.verdict.kind == "proved", where
            counts["wrong and made right"] += 1
        else:
            assert found.verdict.kind == "refuted", where
            assert names(found.verdict, net.line), where
            counts["wrong and refuted with its line"] += 1
    print(dict(counts))
    return counts


def test_nets_on_two_ranks() -> None:
    counts = count([(net, 2) for net in NETS[::3] if 2 in net.sizes])
    assert counts["right and proved"] >= 20
    assert counts["wrong and refuted with its line"] >= 20


@pytest.mark.long
@pytest.mark.timeout(600)
def test_all_nets_at_all_sizes() -> None:
    counts = count([(net, size) for net in NETS for size in net.sizes])
    assert counts["wrong and refuted with its line"] >= 100


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_training_step(step: Step) -> None:
    config, model = TPTrainingConfig.load(step.config), step.build()
    model.configure_model()
    prover = Prover(model, make_plan(model, config, 2), config)
    prover.sharded(model)
    verdict = prover.prove(model, Look("training", (step.batches()[0], 0))).verdict
    assert verdict.kind == ("proved" if step.right else "refuted"), verdict
    assert step.right or names(verdict, step.line), verdict


@pytest.mark.parametrize("name", [step.name for step in LATE])
@pytest.mark.ranks(2)
def test_a_step_that_becomes_wrong_later_is_refuted_before_it_is_taken_or_made_right(name: str) -> None:
    (step,) = (step for step in LATE if step.name == name)
    model = step.build()
    run = trainer(AutoTPStrategy(autotp_size=2, **step.config), callbacks=step.callbacks(), max_epochs=step.epochs)
    try:
        run.fit(model, step.train_dataloaders())
    except PlanRefutedError as refuted:
        assert run.global_step < step.first_wrong
        assert names(refuted, step.line), refuted
    else:  # it was made right
        with alone():
            want = step.build()
            trainer("auto", devices=1, callbacks=step.callbacks(), max_epochs=step.epochs).fit(
                want, step.train_dataloaders()
            )
        assert_close(weights(model), parts_of(model, weights(want)), 1e-4, "weight")


@pytest.mark.parametrize("off", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("stage", ["training", "predict"])
def test_a_step_is_proved_where_gradients_are_off(stage: str, off: Any) -> None:
    config, model = TPTrainingConfig(partition_config=RULES), Regressor()
    prover = Prover(model, make_plan(model, config, 2), config)
    prover.sharded(model)
    with off():
        verdict = prover.prove(model, Look(stage, (Rows().rows * 1, 0))).verdict
    assert verdict.kind == "proved", verdict
