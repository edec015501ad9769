"""Plans that are broken on purpose: those that train wrong are refuted or made right, those that stay right proved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_autotp.proof import repair
from tests.helpers.broken_plans import broken
from tests.helpers.hf_trials import proof_batch, trial_of, truth_of
from tests.helpers.truth import FALSE, Kind, counted, judged, of, proof_of, proved

TYPES = [
    *("llama", "gpt2", "bloom", "mixtral", "deepseek_v2", "qwen2", "qwen3", "phi3", "gemma2", "falcon", "opt", "t5"),
]
NO_SEQUENCES = ("opt", "t5")
"""Types for which sequence parallelism is refused."""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan may be refuted or made right: which of them is no matter of how long repairs are looked for."""
    monkeypatch.setattr(repair, "SECONDS", 0.3)


def judge(number: int) -> tuple[str, Kind]:
    """The verdict on a broken plan, and what it is of."""
    name = TYPES[number % len(TYPES)]
    sequence_parallel = number // len(TYPES) % 2 == 1 and name not in NO_SEQUENCES
    size = 4 if number % 5 == 4 else 2
    trial = trial_of(name, size, sequence_parallel=sequence_parallel)
    change, plan = broken(trial.plan, number)
    trial = replace(trial, plan=plan)
    proof = proof_of(trial, proof_batch(name))
    kind = judged(trial, truth_of(name), proof)
    said = f"{number} {name} TP={size}{' sequence_parallel' if sequence_parallel else ''} {change}"
    return f"{said}: {proof.verdict if kind != 'right, proved' else ''}", kind


def check(numbers: range) -> None:
    counts = counted(map(judge, numbers))
    assert not any(counts[kind] for kind in FALSE)
    assert proved(counts) >= 0.95 * of(counts, "right")
    assert counts["wrong, refuted"] + counts["wrong, made right"] == of(counts, "wrong")


def test_some_broken_plans() -> None:
    check(range(9, 15))  # half of them with sequence parallelism


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, 200, 50), ids=lambda first: f"{first}-{first + 49}")
def test_all_broken_plans(first: int) -> None:
    check(range(first, first + 50))
