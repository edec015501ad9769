"""Atoms: the output features of linears and the entries of small parameters, in classes that must be on one rank.

Union-find over whole arrays. Atoms have a level: *own* ones are dealt out to the ranks; *shared* ones (the outputs of
linears that too few ranks could share, entries of parameters) follow, each to every rank that needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

EVERY = 0
"""The atom of what every rank must have all of."""

OWN, SHARED, ENTRY, WHOLE = 0, 1, 2, 3
"""Levels: of features that are dealt out, of those that follow, of entries of parameters, of what every rank has."""


class Atoms:
    """All atoms of one run, the classes they are in, and which atoms need which others."""

    def __init__(self) -> None:
        self._parent: Ids = np.zeros(1, np.int64)
        self._level: Ids = np.zeros(1, np.int64)
        self._mark: Ids = np.zeros(1, np.int64)
        self._needs: list[Ids] = []

    def fresh(self, levels: Ids) -> Ids:
        """New atoms, one for each of ``levels``."""
        ids = np.arange(len(self._parent), len(self._parent) + len(levels))
        whole = levels == WHOLE
        self._parent = np.concatenate([self._parent, ids])
        self._level = np.concatenate([self._level, levels])
        self._mark = np.concatenate([self._mark, np.zeros_like(ids)])
        self._parent[ids[whole]] = EVERY
        return ids

    def find(self, ids: Any) -> Ids:
        """The class of each atom: the smallest atom in it."""
        found: Ids = np.asarray(ids)
        while True:
            up = self._parent[found]
            if np.array_equal(up, found):
                return found
            self._parent[found] = self._parent[up]
            found = up

    def join(self, a: Any, b: Any) -> None:
        """Put atoms that stand at one place of ``a`` and ``b`` (broadcast) into one class."""
        a, b = np.broadcast_arrays(a, b)
        pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
        while True:
            a, b = self.find(pairs[0]), self.find(pairs[1])
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))
            pairs = pairs[:, apart]

    def meet(self, a: Any, b: Any) -> Ids:
        """Where atoms of one level meet they are joined; where not, the lower one, which stays, needs the other."""
        a, b = np.broadcast_arrays(a, b)
        level_a, level_b = self._level[a], self._level[b]
        every = (self.find(a) == EVERY) | (self.find(b) == EVERY)
        alike = (level_a == level_b) | every
        if alike.any():
            self.join(a[alike], b[alike])
        if alike.all():
            return np.array(a)
        lower, higher = np.where(level_a <= level_b, a, b), np.where(level_a <= level_b, b, a)
        self._needs.append(np.unique(np.stack([lower[~alike], higher[~alike]]), axis=1))
        return lower

    def along(self, ids: Ids, dim: int) -> Ids:
        """Put all atoms along ``dim`` on one rank; what is left has size 1 there."""
        if ids.shape[dim] == 1:
            return ids
        lowest = np.argmin(self._level[ids], axis=dim)
        kept = np.take_along_axis(ids, np.expand_dims(lowest, dim), dim)
        self.meet(np.broadcast_to(kept, ids.shape), ids)
        return kept

    def are_own(self, ids: Ids) -> bool:
        """Whether all of these atoms are dealt out."""
        return bool((self._level[ids] == OWN).all())

    def has_own(self, ids: Ids) -> bool:
        """Whether some of these atoms are dealt out."""
        return bool(((self._level[ids] == OWN) & (self.find(ids) != EVERY)).any())

    def everywhere(self, *arrays: Ids) -> None:
        """Make atoms ones that every rank must have."""
        for ids in arrays:
            self.join(ids, EVERY)

    def mark(self, ids: Ids, sign: int) -> None:
        """Note that an operator took these atoms and not their neighbours; ``sign`` tells it from others."""
        ids = np.unique(ids)
        self._mark[ids] = (self._mark[ids] * 1_000_003 + sign) % (1 << 61)

    def marks(self, ids: Ids) -> Ids:
        """What :meth:`mark` noted: equal for atoms that were always taken together."""
        return self._mark[ids]

    def needed(self) -> Iterable[tuple[int, int]]:
        """Pairs of classes of which the first needs the second, directly."""
        if not self._needs:
            return []
        pairs = self.find(np.concatenate(self._needs, axis=1))
        kept = pairs[:, pairs[0] != pairs[1]]
        return [(int(a), int(b)) for a, b in np.unique(kept, axis=1).T]
