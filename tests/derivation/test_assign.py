"""Classes are dealt out evenly, in their order, those that need the same things to the same ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from lightning_autotp.derivation.assign import Ranks, assign_ranks, parts_of
from lightning_autotp.derivation.atoms import EVERY, SHARED, Ids
from lightning_autotp.derivation.features import Features


def features(
    columns: Mapping[str, Sequence[int]],
    rows: Mapping[str, Sequence[int]] | None = None,
    *,
    shared: Sequence[str] = (),
    marks: Mapping[str, Sequence[int]] | None = None,
    needed: Mapping[int, set[int]] | None = None,
) -> Features:
    """Features with these classes; of ``shared`` linears none is dealt out."""

    def arrays(found: Mapping[str, Sequence[int]] | None) -> dict[str, Ids]:
        return {path: np.array(ids) for path, ids in (found or {}).items()}

    made = arrays(columns)
    return Features(
        columns=made,
        rows=arrays(rows),
        entries={},
        dims={},
        shared={path: np.full(len(made[path]), SHARED) for path in shared},
        marks={path: np.zeros_like(ids) for path, ids in made.items()} | arrays(marks),
        needed=dict(needed or {}),
        given_up=(),
    )


def test_classes_are_dealt_out_in_their_order() -> None:
    ranks = assign_ranks(features({"up": [1, 2, 3, 4]}, {"down": [1, 2, 3, 4]}), 2)
    assert ranks == {1: (0,), 2: (0,), 3: (1,), 4: (1,)}


def test_the_first_ranks_get_more_where_classes_are_uneven() -> None:
    ranks = assign_ranks(features({"q": [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]}), 4)
    assert [ranks[one] for one in range(1, 7)] == [(0,), (0,), (1,), (1,), (2,), (3,)]


def test_what_every_rank_has_is_not_dealt_out() -> None:
    assert assign_ranks(features({"up": [EVERY, 1, 2]}), 2) == {1: (0,), 2: (1,)}


def test_classes_of_different_linears_are_dealt_out_by_themselves() -> None:
    ranks = assign_ranks(features({"q": [1, 2], "up": [3, 4, 5, 6]}), 2)
    assert ranks == {1: (0,), 2: (1,), 3: (0,), 4: (0,), 5: (1,), 6: (1,)}


def test_pieces_that_are_taken_apart_are_dealt_out_by_themselves() -> None:
    # attention and a gated net from one linear: each rank gets half of the heads and half of the gate
    classes, marks = [1, 1, 2, 2, 3, 4, 5, 6], [7, 7, 7, 7, 8, 8, 8, 8]
    ranks = assign_ranks(features({"fused": classes}, marks={"fused": marks}), 2)
    assert ranks == {1: (0,), 2: (1,), 3: (0,), 4: (0,), 5: (1,), 6: (1,)}


def test_where_each_class_has_its_own_piece_marks_are_no_reason() -> None:
    # heads that were taken one by one
    ranks = assign_ranks(features({"q": [1, 1, 2, 2]}, marks={"q": [5, 5, 6, 6]}), 2)
    assert ranks == {1: (0,), 2: (1,)}


def test_a_key_head_follows_to_all_ranks_of_its_query_heads() -> None:
    # four query heads, two key heads, four ranks
    found = features({"q": [1, 2, 3, 4], "k": [8, 9]}, shared=["k"], needed={1: {8}, 2: {8}, 3: {9}, 4: {9}})
    ranks = assign_ranks(found, 4)
    assert [ranks[one] for one in (1, 2, 3, 4)] == [(0,), (1,), (2,), (3,)]
    assert ranks[8] == (0, 1) and ranks[9] == (2, 3)


def test_query_heads_of_one_key_head_stand_together() -> None:
    # interleaved: heads 1, 3, 5 need one key, 2, 4, 6 the other
    found = features(
        {"q": [1, 2, 3, 4, 5, 6], "k": [8, 9]}, shared=["k"], needed={one: {9 if one % 2 else 8} for one in range(1, 7)}
    )
    ranks = assign_ranks(found, 2)
    assert [ranks[one] for one in (1, 3, 5)] == [(0,)] * 3 and [ranks[one] for one in (2, 4, 6)] == [(1,)] * 3
    assert ranks[9] == (0,) and ranks[8] == (1,)


def test_with_more_keys_than_ranks_heads_are_dealt_out_as_they_lie() -> None:
    found = features({"q": [1, 2, 3, 4], "k": [7, 8, 9]}, shared=["k"], needed={1: {7}, 2: {8}, 3: {8}, 4: {9}})
    ranks = assign_ranks(found, 2)
    assert [ranks[one] for one in (1, 2, 3, 4)] == [(0,), (0,), (1,), (1,)]
    assert ranks[7] == (0,) and ranks[8] == (0, 1) and ranks[9] == (1,)


def test_one_key_for_all_heads_is_on_all_ranks() -> None:
    found = features({"q": [1, 2, 3, 4], "k": [9]}, shared=["k"], needed={one: {9} for one in (1, 2, 3, 4)})
    assert assign_ranks(found, 2)[9] == (0, 1)


def test_what_a_follower_needs_follows_too() -> None:
    found = features({"q": [1, 2], "k": [8]}, shared=["k"], needed={1: {8}, 8: {9}, 9: {EVERY, 10}})
    ranks = assign_ranks(found, 2)
    assert ranks[8] == ranks[9] == ranks[10] == (0,)
    assert EVERY not in ranks


def test_parts_are_joined_runs() -> None:
    ranks: Ranks = {1: (0,), 2: (0,), 3: (1,), 4: (1,)}
    assert parts_of(np.array([1, 1, 2, 3, 4]), ranks, 2) == (((0, 3),), ((3, 2),))
    assert parts_of(np.array([1, 3, 2, 4]), ranks, 2) == (((0, 1), (2, 1)), ((1, 1), (3, 1)))


def test_what_some_rank_does_without_is_cut_and_the_rest_is_on_all() -> None:
    ranks: Ranks = {1: (0,), 2: (1,)}
    assert parts_of(np.array([EVERY, 1, 2]), ranks, 2) == (((0, 1), (1, 1)), ((0, 1), (2, 1)))


@pytest.mark.parametrize("classes", [[EVERY, EVERY], [5, 6]])
def test_what_every_rank_holds_has_no_parts(classes: list[int]) -> None:
    assert parts_of(np.array(classes), {1: (0,), 5: (0, 1)}, 2) is None


def test_shared_runs_are_the_same_intervals_on_all_their_ranks() -> None:
    ranks: Ranks = {1: (0, 1), 2: (1,), 3: (0,)}
    found = parts_of(np.array([3, 1, 1, 2]), ranks, 2)
    assert found == (((0, 1), (1, 2)), ((1, 2), (3, 1)))
