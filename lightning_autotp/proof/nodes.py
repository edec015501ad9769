"""Which forward event made the node of the autograd graph that is evaluated now."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Optional

import torch

from lightning_autotp.proof.recorded import Key

_LAST = 1 << 62
"""Above all numbers of nodes that operators made: those of what stores gradients."""


class Nodes:
    """Autograd numbers its nodes in the order in which they are made; here it is known during which event.

    What was made inside of this package's layers is hidden: in opaque calls, whatever they record, or elsewhere.
    """

    def __init__(self) -> None:
        self.inside = 0
        """How many calls of opaque modules are under way."""
        self._ends: list[int] = []
        self._keys: list[Optional[Key]] = []
        self._opaque: list[tuple[int, int]] = []
        self._starts: list[int] = []

    def note(self, key: Optional[Key]) -> None:
        """An event is under way, hidden if ``key`` is None: nodes made since the one before are its own."""
        self._ends.append(torch._C._autograd._get_sequence_nr())
        self._keys.append(key)

    def evaluated(self) -> Optional[Key]:
        """The key of the forward event whose node is evaluated now; None if there is none or it is not known."""
        node = _current()
        return None if node is None else self._key(node._sequence_nr())

    def _key(self, number: int) -> Optional[Key]:
        at = bisect_right(self._ends, number)
        return self._keys[at] if at < len(self._keys) else None

    def is_hidden(self) -> bool:
        """Whether the node that is evaluated now was made inside of this package's layers."""
        node = _current()
        if node is None:
            return False
        number = node._sequence_nr()
        at = bisect_right(self._starts, number) - 1
        if at >= 0 and number < self._opaque[at][1]:
            return True
        return bisect_right(self._ends, number) < len(self._keys) and self._key(number) is None

    @staticmethod
    def stores_gradient() -> bool:
        """Whether the gradient of a parameter is stored now, maybe as a copy."""
        node = _current()
        return node is not None and node._sequence_nr() >= _LAST

    def enter_opaque(self) -> None:
        """A call of an opaque module begins."""
        if not self.inside:
            start = torch._C._autograd._get_sequence_nr()
            self._starts.append(start)
            self._opaque.append((start, _LAST))
        self.inside += 1

    def leave_opaque(self) -> None:
        """A call of an opaque module ends."""
        self.inside -= 1
        if not self.inside:
            start, _ = self._opaque[-1]
            self._opaque[-1] = (start, torch._C._autograd._get_sequence_nr())


def _current() -> Any:
    return torch._C._current_autograd_node()
