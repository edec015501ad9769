"""Random nets under random rules and switches: right ones are proved, wrong ones refuted or made right."""

from __future__ import annotations

import pytest

from lightning_autotp.proof import repair
from tests.helpers.fuzz.cases import case
from tests.helpers.truth import FALSE, Kind, counted, judged, of, proof_of, proved

CHUNK, CASES = 100, 2000


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan may be refuted or made right: which of them is no matter of how long repairs are looked for."""
    monkeypatch.setattr(repair, "SECONDS", 0.3)


def judge(seed: int) -> tuple[str, Kind]:
    """The verdict on a case, and what it is of."""
    found = case(seed)
    proof = proof_of(found.trial, found.batch)
    return f"{found.name}: {proof.verdict}", judged(found.trial, found.want, proof)


def check(seeds: range) -> None:
    counts = counted(map(judge, seeds))
    assert not any(counts[kind] for kind in FALSE)
    assert proved(counts) >= 0.85 * of(counts, "right")
    assert counts["wrong, refuted"] + counts["wrong, made right"] >= 0.9 * of(counts, "wrong")
    assert of(counts, "right") >= 0.2 * len(seeds)


def test_some_random_nets() -> None:
    check(range(40))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, CASES, CHUNK), ids=lambda first: f"{first}-{first + CHUNK - 1}")
def test_many_random_nets(first: int) -> None:
    check(range(first, first + CHUNK))
