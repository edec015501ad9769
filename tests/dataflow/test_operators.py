"""The operator table against the truth: full tensors and each rank's, on 2 and 3 ranks, at least a row an operator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_autotp.dataflow.event import Event, Operand, RankCall, Unknown, Wrong
from lightning_autotp.dataflow.operators import registry
from lightning_autotp.dataflow.operators.registry import TABLE, is_random, propagate
from lightning_autotp.dataflow.placement import Placement
from tests.dataflow.rows_arithmetic import ARITHMETIC
from tests.dataflow.rows_convolutions import CONVOLUTIONS
from tests.dataflow.rows_groups import GROUPS
from tests.dataflow.rows_mixing import MIXING
from tests.dataflow.rows_moves import MOVES
from tests.dataflow.rows_norms import NORMS
from tests.dataflow.rows_pointwise import POINTWISE
from tests.helpers.operator_rows import Row, Run, differ, holds, run, some_cases

TABLES = (ARITHMETIC, POINTWISE, MOVES, CONVOLUTIONS, MIXING, GROUPS, NORMS)
ROWS = tuple(row for table in TABLES for row in table)
COUNT = f"{len(ROWS)} rows of {len(TABLE)} operators"
SENTENCE = r"\w[^\n]*\.$"
NAMES = [f"{at}-{row.name}" for at, row in enumerate(ROWS)]


def runs(row: Row, text: str) -> Iterator[tuple[str, Run]]:
    """Each case of ``text`` on 2 and on 3 ranks, with words that name it."""
    for case in filter(None, (case.strip() for case in text.split(","))):
        for ranks in (2, 3):
            yield f"{case!r} on {ranks} ranks", run(row, case, ranks)


def results(found: Run) -> list[tuple[Tensor, list[Tensor]]]:
    """Each output of the full model, with the ranks'."""
    return [(full, [mine[at] for mine in found.local if mine is not None]) for at, full in enumerate(found.full)]


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_what_a_rule_says_is_what_the_ranks_hold(row: Row) -> None:
    for case, found in runs(row, row.right):
        made = propagate(found.event)
        assert len(made) == len(found.full) and None not in found.local, case
        for placement, (full, local) in zip(made, results(found)):
            assert not row.values or holds(placement, full, local), f"{case}: not {placement}"


@pytest.mark.parametrize("row", [row for row in ROWS if row.wrong], ids=lambda row: row.name)
def test_what_a_rule_calls_wrong_is_wrong(row: Row) -> None:
    for case, found in runs(row, row.wrong):
        with pytest.raises(Wrong, match=SENTENCE):
            propagate(found.event)
        if any(mine is None or len(mine) != len(found.full) for mine in found.local):
            continue  # a rank fails, or makes another number of tensors
        assert any(differ(full, local) for full, local in results(found)), f"{case}: the ranks' results are right"


@pytest.mark.parametrize("row", [row for row in ROWS if row.unknown or row.conservative], ids=lambda row: row.name)
def test_what_a_rule_does_not_know_it_does_not_claim(row: Row) -> None:
    for text, finding in ((row.unknown, Unknown), (row.conservative, Wrong)):
        for _, found in runs(row, text):
            with pytest.raises(finding, match=SENTENCE):
                propagate(found.event)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table[0].name)
def test_no_rule_claims_what_is_not_so(table: tuple[Row, ...]) -> None:
    """Whatever the ranks hold of the inputs: shards, overlaps, equal entries, partial sums, zeros."""
    for row in table:
        for case in some_cases(row, count=8):
            found = run(row, case, ranks=3)
            try:
                made = propagate(found.event)
            except (Wrong, Unknown):
                continue
            for placement, (full, local) in zip(made, results(found)):
                assert not row.values or holds(placement, full, local), f"{row.name} of {case!r}: not {placement}"


@pytest.mark.parametrize("table", [TABLE], ids=[COUNT])
def test_every_operator_of_the_table_has_a_row_that_claims_something(table: dict[str, object]) -> None:
    shown = {row.name.removesuffix("_") for row in ROWS if row.right}
    assert not table.keys() - shown, f"these operators have no row: {sorted(table.keys() - shown)}"


def test_random_operators_are_marked() -> None:
    aten = torch.ops.aten
    assert is_random(aten.native_dropout.default) and is_random(aten.bernoulli_.float)
    assert not is_random(aten.mul.Tensor) and not is_random(aten.sort.default)


def test_an_operator_without_a_rule_is_known_only_where_all_is_replicated() -> None:
    row, made_of_sizes = Row(torch.ops.aten.i0.default, "th"), Row(torch.ops.aten.eye.default, "t", arguments=sizes)
    assert not TABLE.keys() & {row.name, made_of_sizes.name}
    assert [placement.is_replicated for placement in propagate(run(row, ".", ranks=2).event)] == [True]
    with pytest.raises(Unknown, match=r"no rule says what i0 makes of \[7, 8\] sharded along dim 1 \(0:4 \| 4:8\)."):
        propagate(run(row, "h", ranks=2).event)
    with pytest.raises(Unknown, match="rank 0 computes eye with 4 where the full model has 7."):
        propagate(run(made_of_sizes, "t", ranks=2).event)


def test_what_is_written_in_place_stays_placed_as_it_was_unless_nothing_shares_its_memory() -> None:
    row = Row(torch.ops.aten.copy_.default, "th th")
    found = run(row, "0 +", ranks=2)
    with pytest.raises(Unknown, match="copy_ writes what is partial into a tensor that is replicated."):
        propagate(found.event)
    assert propagate(found.event, alone=True) == [Placement((None, None), partial=True)]


def sizes(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def test_a_collective_registers_a_rule_that_is_always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TABLE", {})

    @registry.register("reduce_output", always=True)
    def reduce_output(event: Event) -> Placement:
        if not event.tensor("input").placement.partial:
            raise Wrong("sums over the ranks what each of them holds already.")
        return Placement.replicated(len(event.outputs[0]))

    def reduced(placement: Placement) -> list[Placement]:
        arguments = {"input": Operand((4,), placement, torch.float64)}
        return propagate(Event("reduce_output", arguments, ((4,),), (RankCall(arguments, ((4,),)),) * 2))

    assert reduced(Placement((None,), partial=True)) == [Placement.replicated(1)]
    with pytest.raises(Wrong, match="holds already"):
        reduced(Placement.replicated(1))
    with pytest.raises(ValueError, match="'reduce_output' has a rule already"):
        registry.register("reduce_output")(reduce_output)
