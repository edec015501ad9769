"""The operator table against the truth: full tensors and each rank's, on 2 and 3 ranks, at least a row an operator."""

from __future__ import annotations

import pytest
import torch

from lightning_autotp.dataflow.event import Unknown, Wrong
from lightning_autotp.dataflow.operators.registry import TABLE, is_random, propagate
from tests.dataflow.rows_arithmetic import ARITHMETIC
from tests.dataflow.rows_moves import MOVES
from tests.helpers.operator_rows import Row, differ, holds, run

ROWS = (*ARITHMETIC, *MOVES)
COUNT = f"{len(ROWS)} rows of {len(TABLE)} operators"
NAMES = [f"{at}-{row.name}" for at, row in enumerate(ROWS)]


def cases(text: str) -> list[str]:
    return [case.strip() for case in text.split(",") if case.strip()]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_what_a_rule_says_is_what_the_ranks_hold(row: Row, ranks: int) -> None:
    for case in cases(row.right):
        found = run(row, case, ranks)
        made = propagate(found.event)
        assert len(made) == len(found.full)
        for at, (placement, full) in enumerate(zip(made, found.full)):
            local = [mine[at] for mine in found.local if mine is not None]
            assert len(local) == ranks, f"{case}: a rank fails"
            if row.values:
                assert holds(placement, full, local), f"{case}: output {at} is not {placement}"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_what_a_rule_calls_wrong_is_wrong(row: Row, ranks: int) -> None:
    for case in cases(row.wrong):
        found = run(row, case, ranks)
        with pytest.raises(Wrong, match=r"\w[^\n]*\.$"):
            propagate(found.event)
        fails = None in found.local
        assert fails or any(
            differ(full, [mine[at] for mine in found.local if mine is not None]) for at, full in enumerate(found.full)
        ), f"{case}: the ranks' results are right"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("row", [row for row in ROWS if row.unknown or row.conservative], ids=lambda row: row.name)
def test_what_a_rule_does_not_know_it_does_not_claim(row: Row, ranks: int) -> None:
    for text, finding in ((row.unknown, Unknown), (row.conservative, Wrong)):
        for case in cases(text):
            with pytest.raises(finding, match=r"\w[^\n]*\.$"):
                propagate(run(row, case, ranks).event)


@pytest.mark.parametrize("table", [TABLE], ids=[COUNT])
def test_every_operator_of_the_table_has_a_row_that_claims_something(table: dict[str, object]) -> None:
    shown = {row.name.removesuffix("_") for row in ROWS if row.right}
    assert not table.keys() - shown, f"these operators have no row: {sorted(table.keys() - shown)}"


def test_random_operators_are_marked() -> None:
    aten = torch.ops.aten
    assert is_random(aten.native_dropout.default) and is_random(aten.bernoulli_.float)
    assert not is_random(aten.mul.Tensor) and not is_random(aten.sort.default)
