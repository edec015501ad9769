"""Facts that must be the same on all ranks: one error on every one of them that names what differs, and where."""

import hashlib
from collections.abc import Mapping
from typing import Optional

import torch

from lightning_autotp.distributed.errors import Processes
from lightning_autotp.distributed.mesh import Mesh

_MOST = 8
"""Differences that an error shows."""

_LONGEST = 200
"""Characters of a value that an error shows."""

AT = "where the ranks are"
"""The fact that says it."""

Facts = Mapping[str, str]
"""What a rank has, by what it is called."""


class DisagreementError(RuntimeError):
    """Tensor parallel ranks hold different values where they must hold the same."""


def require_same(facts: Facts, fix: str, mesh: Optional[Mesh] = None) -> None:
    """Compare ``facts`` on all processes of the run, or with ``mesh`` on those that share a model.

    Every one of them must call it. It sends a checksum; the facts themselves only where they differ.

    Raises:
        DisagreementError: on all of them alike, with what differs, the values and their ranks, and ``fix``.
    """
    if mesh is not None:
        told = meet(facts, mesh)
    else:
        everyone = Processes()
        apart = len(set(everyone.gather(checksum(facts)))) > 1
        told = everyone.gather((everyone.rank, dict(facts), None)) if apart else []
    if told:
        raise DisagreementError(f"{different(told)}. {fix}")


Told = list[tuple[int, dict[str, str], Optional[str]]]
"""Of each rank its number, its facts, and why it failed if it did."""


def meet(facts: Facts, mesh: Mesh, failure: Optional[str] = None) -> Told:
    """What all ranks that share a model tell if their ``facts`` differ or one has failed; nothing if they are alike.

    Every one of them must call it, with a fact that says where it is: so ranks that have come to different places meet,
    too. It sends two numbers from host to host, and all facts only where they differ.
    """
    mine = dict(facts) if failure is None else {**facts, "failed": failure}
    words = torch.frombuffer(bytearray(checksum(mine)), dtype=torch.int64)
    everyones = mesh.collectives.all_gather(words, "host").view(-1, 2)
    if failure is None and bool((everyones == everyones[0]).all()):
        return []
    return mesh.collectives.gather_objects((mesh.collectives.world_rank, mine, failure), "host")


def checksum(facts: Facts) -> bytes:
    """Sixteen bytes of ``facts``, whatever their order."""
    return hashlib.blake2b(repr(sorted(facts.items())).encode(errors="replace"), digest_size=16).digest()


def different(everyones: Told) -> str:
    """What differs between the facts of ranks: ``name: 'this' on rank 0, 'that' on rank 1``."""
    names = dict.fromkeys(name for _, facts, _ in everyones for name in facts)
    found = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, facts, _ in everyones:
            ranks.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            found.append(f"{name} is " + ", ".join(f"{_short(value)} on {on(held)}" for value, held in ranks.items()))
    shown = "; ".join(found[:_MOST]) + (f"; and {len(found) - _MOST} more differ" if len(found) > _MOST else "")
    return f"the ranks are not set up alike: {shown}"


def on(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0, 1``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:16]))}{', ...' if len(ranks) > 16 else ''}"


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
