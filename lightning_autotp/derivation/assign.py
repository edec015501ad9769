"""Classes of features -> ranks: classes that are alike in what they hold are dealt out evenly, in their order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from lightning_autotp.derivation.atoms import EVERY, OWN, Ids
from lightning_autotp.derivation.features import Features
from lightning_autotp.layout.layout import Interval, even_widths

Ranks = dict[int, tuple[int, ...]]
"""By class, the ranks that hold it."""


def assign_ranks(features: Features, tp_size: int) -> Ranks:
    """The ranks of every class that some rank does without.

    Classes with the same numbers of features of the same pieces of the same linears are alike. Where they need shared
    features (the key head of a query head), those with the same needs stand together: ranks are dealt out to them.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for one, use in _uses(features, by_piece=True).items():
        groups[use].append(one)
    if any(len(members) < tp_size for members in groups.values()):
        groups = defaultdict(list)  # pieces with a class for each of their own
        for one, use in _uses(features, by_piece=False).items():
            groups[use].append(one)
    ranks: Ranks = {}
    for members in groups.values():
        for rank, part in enumerate(_dealt(sorted(members), features, tp_size)):
            ranks.update((one, (rank,)) for one in part)
    return ranks | _followers(features, ranks)


def _uses(features: Features, *, by_piece: bool) -> dict[int, Hashable]:
    """By class of features that are dealt out: what it is of."""
    found: dict[int, list[Hashable]] = defaultdict(list)
    for path, classes in features.columns.items():
        own = features.levels(path) == OWN
        marks = features.marks[path] if by_piece else np.zeros_like(classes)
        for (one, mark), count in zip(*_counted(classes[own], marks[own])):
            found[one].append((path, mark, count))
    for path, classes in features.rows.items():
        for (one, _), count in zip(*_counted(classes, np.zeros_like(classes))):
            if one in found:
                found[one].append((path, count))
    return {one: tuple(use) for one, use in found.items() if one != EVERY}


def _counted(classes: Ids, marks: Ids) -> tuple[list[tuple[int, int]], list[int]]:
    if not len(classes):
        return [], []
    pairs, counts = np.unique(np.stack([classes, marks]), axis=1, return_counts=True)
    return [(int(a), int(b)) for a, b in pairs.T], counts.tolist()


def _dealt(members: Sequence[int], features: Features, tp_size: int) -> list[list[int]]:
    """The classes of each rank."""
    cohorts: dict[frozenset[int], list[int]] = defaultdict(list)
    shared = {int(one) for path, levels in features.shared.items() for one in features.columns[path][levels != OWN]}
    for one in members:
        cohorts[frozenset(features.needed.get(one, set()) & shared - {EVERY})].append(one)
    lists = list(cohorts.values())
    if len(lists) == 1 or len(lists) > tp_size:
        return [[members[at] for at in range(start, start + n)] for start, n in even_widths(len(members), tp_size)]
    dealt = []
    for cohort, (_, ranks) in zip(lists, even_widths(tp_size, len(lists))):
        dealt += [cohort[start : start + n] for start, n in even_widths(len(cohort), ranks)]
    return dealt


def _followers(features: Features, ranks: Ranks) -> Ranks:
    """The ranks of classes that are needed by others: those of all that need them."""
    held: dict[int, set[int]] = {one: set(of) for one, of in ranks.items()}
    open_ = list(held)
    while open_:
        one = open_.pop()
        for other in features.needed.get(one, ()):
            if other == EVERY or other in ranks:
                continue
            before = held.setdefault(other, set())
            if not held[one] <= before:
                before |= held[one]
                open_.append(other)
    return {one: tuple(sorted(of)) for one, of in held.items() if one not in ranks}


def parts_of(classes: Ids, ranks: Ranks, tp_size: int) -> tuple[tuple[Interval, ...], ...] | None:
    """What each rank holds of features with these classes, as intervals; None if every rank holds all of them.

    What several ranks hold is the same intervals on all of them, as a checkpoint's chunks are.
    """
    every = tuple(range(tp_size))
    of = [ranks.get(int(one), every) if one != EVERY else every for one in classes]
    if all(one == every for one in of):
        return None
    starts = [0, *(at for at in range(1, len(of)) if of[at] != of[at - 1]), len(of)]
    shared = any(len(one) > 1 for one in of)
    parts: list[list[Interval]] = [[] for _ in range(tp_size)]
    for start, end in zip(starts, starts[1:]):
        for rank in of[start]:
            mine = parts[rank]
            if mine and sum(mine[-1]) == start and not shared:
                mine[-1] = (mine[-1][0], mine[-1][1] + end - start)
            else:
                mine.append((start, end - start))
    return tuple(map(tuple, parts))
