"""The first event of a step that the ranks compute in no placement of the unsharded one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from lightning_autotp.proof.events import Events, Key
from lightning_autotp.proof.relation import Relation, relate


def first_difference(full: Events, ranks: Sequence[Events]) -> str:
    """Name, in a sentence, the first value that differs, or else the first gradient that does; empty if none is found.

    A value is right if it is replicated, sharded in some way, a partial sum, or tokens of its own.
    """
    relations: dict[Key, Optional[Relation]] = {}
    for key, value in full.values.items():
        local = [rank.values[key] for rank in ranks if key in rank.values]
        if len(local) < len(ranks):
            continue
        relations[key] = relate(value, local)
        if relations[key] is None:
            shapes = f"{list(value.shape)}; the ranks hold {_shapes(local)}"
            read = list(dict.fromkeys(str(one) for one in full.operands.get(key, ())))
            of = f" It reads what {', '.join(read)} made." if read else ""
            return f"the first value that differs is that of {key}, {shapes}, no part and no partial sum of it.{of}"
    largest = max((float(g.abs().max()) for g in full.gradients.values() if g.numel()), default=0.0)
    for key, gradient in full.gradients.items():
        local = [rank.gradients[key] for rank in ranks if key in rank.gradients]
        if len(local) < len(ranks) or relations.get(key) is None:
            continue
        if relate(gradient, local, relations[key], 1e-6 * largest) is None:
            return f"the first gradient that differs, in the order of the backward pass, is that of {key}."
    return ""


def _shapes(tensors: Sequence[object]) -> str:
    shapes = list(dict.fromkeys(str(list(t.shape)) for t in tensors))  # type: ignore[attr-defined]
    return " and ".join(shapes)
