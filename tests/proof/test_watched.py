"""Numbers that note what is decided by them."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_autotp.proof.watched import Decisions, watch


def test_it_computes_like_the_number() -> None:
    seven = watch(7, "step", Decisions())
    assert isinstance(seven, int)
    assert (int(seven + 1), int(1 + seven), int(seven % 4), int(15 - seven), float(seven / 2), f"{seven}") == (
        *(8, 8, 3, 8, 3.5, "7"),
    )
    assert [0, 1, 2, 3, 4, 5, 6, 42][seven] == 42
    assert list(range(seven))[-1] == 6
    assert {7: "seven"}[int(seven)] == "seven"


@pytest.mark.parametrize("flipped", [False, True], ids=["as it is", "flipped"])
@pytest.mark.parametrize(
    ("decide", "answer"),
    [
        (lambda n: n > 3, True),
        (lambda n: n % 2 == 0, False),
        (lambda n: bool(n), True),
        (lambda n: 1 if n else 0, 1),
        (lambda n: n / 10 < 0.5, False),
        (lambda n: not n, False),
    ],
    ids=["compared", "computed", "bool", "branch", "quotient", "not"],
)
def test_a_decision_is_noted_with_its_line_and_may_be_flipped(decide: Any, answer: Any, flipped: bool) -> None:
    decisions = Decisions(frozenset({0}) if flipped else frozenset())
    assert bool(decide(watch(7, "trainer.global_step", decisions))) is (bool(answer) != flipped)
    assert len(decisions.made) == 1
    assert __file__ in decisions.made[0]
    assert decisions.made[0].endswith("decides by trainer.global_step")


def test_other_values_are_not_watched() -> None:
    decisions = Decisions()
    for value in (None, "7", True, [7]):
        assert watch(value, "value", decisions) is value
    assert not decisions.made
