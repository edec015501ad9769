"""Where the shards of a tensor lie after a view: arithmetic on intervals, group by group of merged and split dims."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise, product
from math import prod
from typing import Optional

from lightning_autotp.dataflow.placement import DimPlacement, Part, Shape, joined, repeated
from lightning_autotp.layout.layout import Interval


def flattened(parts: Sequence[Part], sizes: Sequence[int]) -> Part:
    """The indices of a block in the flat order of dims of ``sizes``, in the block's own order."""
    if not sizes:
        return ((0, 1),)
    row = prod(sizes[1:])
    rest = flattened(parts[1:], sizes[1:])
    if rest == ((0, row),):
        return joined((start * row, length * row) for start, length in parts[0])
    rows = (at for start, length in parts[0] for at in range(start, start + length))
    return joined((at * row + start, length) for at in rows for start, length in rest)


def unflattened(runs: Part, sizes: Sequence[int]) -> Optional[list[Part]]:
    """The block along dims of ``sizes`` that lists the flat indices ``runs`` in order; None if there is none."""
    if not sizes:
        return []
    row = prod(sizes[1:])
    if all(start % row == 0 and length % row == 0 for start, length in runs):
        whole = [(start // row, length // row) for start, length in runs]
        return [joined(whole), *(((0, size),) for size in sizes[1:])] if _apart(whole) else None
    pieces = [piece for start, length in runs for piece in _by_row(start, length, row)]
    rows = [
        (at, joined((start, length) for _, start, length in found))
        for at, found in groupby(pieces, key=lambda piece: piece[0])
    ]
    patterns = {pattern for _, pattern in rows}
    if len(patterns) != 1 or len({at for at, _ in rows}) != len(rows):
        return None
    rest = unflattened(patterns.pop(), sizes[1:])
    return None if rest is None else [joined((at, 1) for at, _ in rows), *rest]


def _apart(runs: Iterable[Interval]) -> bool:
    """Whether no index is in two runs."""
    return all(sum(before) <= start for before, (start, _) in pairwise(sorted(runs)))


def _by_row(start: int, length: int, row: int) -> Iterator[tuple[int, int, int]]:
    """(row, start in the row, length) of a run, a piece a row."""
    while length > 0:
        at, begin = divmod(start, row)
        step = min(length, row - begin)
        yield at, begin, step
        start, length = start + step, length - step


def factored(
    classes: Sequence[Hashable], sizes: Sequence[int], held: Sequence[Sequence[Hashable]], local: list[list[int]]
) -> Optional[list[DimPlacement]]:
    """Dims of ``sizes``, and of ``local`` sizes on the ranks, that have these labels in flat order; None if none do."""
    places = list(product(*map(range, sizes)))
    lines: list[list[list[Hashable]]] = [[[] for _ in range(size)] for size in sizes]
    for place, label in zip(places, classes):
        for dim, at in enumerate(place):
            lines[dim][at].append(label)
    numbers = [_numbered(map(tuple, line)) for line in lines]  # what is alike along a dim has equal lines across it
    known: dict[Hashable, list[int]] = {}
    for place, label in zip(places, classes):
        its = [numbers[dim][at] for dim, at in enumerate(place)]
        if known.setdefault(label, its) != its:
            return None
    entries: list[list[list[int]]] = [[[-1] * size for size in mine] for mine in local]
    for own, mine, shape in zip(held, entries, local):
        for place, label in zip(product(*map(range, shape)), own):
            for dim, at in enumerate(place):
                number = known[label][dim]
                if mine[dim][at] not in (-1, number):
                    return None
                mine[dim][at] = number
    return [repeated(own, [mine[dim] for mine in entries]) for dim, own in enumerate(numbers)]


def _numbered(labels: Iterable[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]


def groups(old: Shape, new: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of old and of new dims that have the same number of elements; dims of size 1 end a run."""
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [], []
        x = y = 1
        if i < len(old):
            before, x, i = [i], old[i], i + 1
        if j < len(new):
            after, y, j = [j], new[j], j + 1
        while x != y:
            if (x < y or y == 0) and i < len(old):
                x, before, i = x * old[i], [*before, i], i + 1
            elif j < len(new):
                y, after, j = y * new[j], [*after, j], j + 1
            else:
                break
        while i < len(old) and old[i] == 1 and (j >= len(new) or new[j] != 1):
            before, i = [*before, i], i + 1
        while j < len(new) and new[j] == 1 and (i >= len(old) or old[i] != 1):
            after, j = [*after, j], j + 1
        yield before, after
