"""Heads over ranks: even widths, and key heads that several ranks share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_autotp.layout.heads import share_heads
from lightning_autotp.layout.layout import Interval
from tests.helpers.layouts import Sharing, properties, sharings


@properties
@given(sharings())
def test_every_query_head_is_on_one_rank_with_its_key_head(sharing: Sharing) -> None:
    queries, keys = share_heads(sharing.queries, sharing.keys, sharing.tp_size)
    assert len(queries) == len(keys) == sharing.tp_size
    assert [head for start, length in queries for head in range(start, start + length)] == list(range(sharing.queries))
    group = sharing.queries // sharing.keys
    for (start, length), (key, held) in zip(queries, keys):
        assert length > 0 and held > 0, "no rank is idle"
        assert {head // group for head in range(start, start + length)} == set(range(key, key + held))


@properties
@given(sharings())
def test_ranks_have_heads_as_even_as_they_can(sharing: Sharing) -> None:
    queries, keys = share_heads(sharing.queries, sharing.keys, sharing.tp_size)
    group = sharing.queries // sharing.keys
    counts = [length for _, length in queries]
    if sharing.tp_size <= sharing.keys:
        assert [length for _, length in keys] == [count // group for count in counts]
        assert all(count % group == 0 for count in counts), "whole groups"
        assert max(counts) - min(counts) in (0, group)
        assert sum(length for _, length in keys) == sharing.keys, "no key head is held twice"
    else:
        assert [length for _, length in keys] == [1] * sharing.tp_size
        ranks = [sum(start == head for start, _ in keys) for head in range(sharing.keys)]
        assert max(ranks) - min(ranks) <= 1, "key heads are shared by as many ranks, or by one more"
        for head in range(sharing.keys):
            inside = [count for count, (start, _) in zip(counts, keys) if start == head]
            assert sum(inside) == group and max(inside) - min(inside) <= 1


@properties
@given(keys=st.integers(1, 6), group=st.integers(1, 4), more=st.integers(1, 5))
def test_more_ranks_than_query_heads_are_refused_with_the_number(keys: int, group: int, more: int) -> None:
    queries = keys * group
    with pytest.raises(
        ValueError, match=rf"^{queries} query heads cannot be shared by {queries + more} .* {queries}\.$"
    ):
        share_heads(queries, keys, queries + more)


@pytest.mark.parametrize(
    ("heads", "tp_size", "queries", "keys"),
    [
        ((6, 6), 4, (2, 2, 1, 1), ((0, 2), (2, 2), (4, 1), (5, 1))),
        ((8, 2), 4, (2, 2, 2, 2), ((0, 1), (0, 1), (1, 1), (1, 1))),
        ((12, 3), 4, (2, 2, 4, 4), ((0, 1), (0, 1), (1, 1), (2, 1))),
        ((6, 2), 4, (2, 1, 2, 1), ((0, 1), (0, 1), (1, 1), (1, 1))),
        ((8, 4), 3, (4, 2, 2), ((0, 2), (2, 1), (3, 1))),
        ((8, 1), 3, (3, 3, 2), ((0, 1), (0, 1), (0, 1))),
        ((4, 2), 1, (4,), ((0, 2),)),
        ((5, 5), 5, (1, 1, 1, 1, 1), ((0, 1), (1, 1), (2, 1), (3, 1), (4, 1))),
    ],
)
def test_share_heads(
    heads: tuple[int, int], tp_size: int, queries: tuple[int, ...], keys: tuple[Interval, ...]
) -> None:
    mine, held = share_heads(*heads, tp_size)
    assert tuple(length for _, length in mine) == queries
    assert held == keys


@pytest.mark.parametrize(("heads", "tp_size"), [((4, 2), 5), ((1, 1), 2), ((8, 1), 16)])
def test_share_heads_refuses_idle_ranks(heads: tuple[int, int], tp_size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^{heads[0]} query heads cannot be shared by {tp_size} ranks; .*{heads[0]}\.$"
    ):
        share_heads(*heads, tp_size)
