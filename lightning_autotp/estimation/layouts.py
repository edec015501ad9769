"""The layouts that so many GPUs allow, and why others are none."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from lightning_autotp.estimation.hardware import Machine
from lightning_autotp.estimation.wanted import Wanted
from lightning_autotp.layout.heads import Heads


@dataclass
class LeftOut:
    """Why some layouts are none.

    Attributes:
        reasons: what they are, by reason, in the order in which they were found.
    """

    reasons: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, what: str) -> None:
        """Note that ``what`` is left out for a reason; once is as good as twice."""
        found = self.reasons.setdefault(reason, [])
        if what not in found:
            found.append(what)


def divisors(number: int) -> list[int]:
    """All of them, the smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def tp_sizes(wanted: Wanted, machine: Machine, config: Any, left_out: LeftOut) -> Iterator[int]:
    """Tensor parallel sizes: inside a node, and divisors of the query heads."""
    heads = heads_of(config)
    for tp in divisors(wanted.gpus):
        if wanted.tp not in (None, tp):
            continue
        if not _inside(tp, wanted, machine):
            left_out.add("tensor parallel ranks would lie in several nodes", f"TP {tp}")
        elif heads is not None and heads.q % tp:
            left_out.add(f"{heads.q} query heads do not divide", f"TP {tp}")
        else:
            yield tp


def cp_sizes(tp: int, wanted: Wanted, machine: Machine, config: Any, seq: int, left_out: LeftOut) -> Iterator[int]:
    """Context parallel sizes beside ``tp``: inside a node, and such as share tokens and heads evenly."""
    heads = heads_of(config)
    for cp in divisors(wanted.gpus // tp):
        if wanted.cp not in (None, cp) or cp > 1 and not seq:
            continue
        mine = (heads.q // tp, max(1, heads.kv // tp)) if heads is not None else (cp, cp)
        if not _inside(tp * cp, wanted, machine):
            left_out.add("ranks that share a sequence would lie in several nodes", f"TP {tp} x CP {cp}")
        elif cp > 1 and tp > 1 and wanted.sequence_parallel is not False:
            left_out.add("context parallelism goes without sequence_parallel, which is on there", f"TP {tp} x CP {cp}")
        elif seq % cp:
            left_out.add(f"{seq} tokens of a sequence do not divide", f"CP {cp}")
        elif mine[0] % cp or mine[1] % cp and cp % mine[1]:
            left_out.add("heads of a tensor parallel rank do not divide", f"TP {tp} x CP {cp}")
        elif wanted.dp in (None, wanted.gpus // tp // cp):
            yield cp


def zero_stages(
    tp: int, cp: int, wanted: Wanted, machine: Machine, left_out: LeftOut
) -> Iterator[tuple[int, Optional[int]]]:
    """ZeRO stages and group sizes: all data parallel ranks, or those of a node where they lie in several."""
    dp = wanted.gpus // tp  # ranks that hold the same shards, cp of them a batch
    asked, group = 2 if wanted.zero == 1 else wanted.zero, wanted.zero_group
    if asked and dp == 1:
        left_out.add("ZeRO needs several data parallel ranks", f"TP {tp} x CP {cp}")
    elif group is not None and dp % group:
        left_out.add(f"zero_group {group} does not divide data parallel ranks", f"DP {dp}")
    groups: list[Optional[int]] = [group]
    if group is None and not _inside(wanted.gpus, wanted, machine):
        groups += [size for size in divisors(dp) if 1 < size < dp and _inside(tp * size, wanted, machine)][-1:]
    if asked in (None, 0) and group is None:
        yield 0, None
    for zero in (2, 3):  # 1 is stored as 2
        if asked in (None, zero) and dp > 1 and (group is None or dp % group == 0):
            yield from ((zero, size) for size in groups)


def heads_of(config: Any) -> Optional[Heads]:
    """The heads of a model's text, if its config speaks of them."""
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return Heads.from_config(text)


def _inside(ranks: int, wanted: Wanted, machine: Machine) -> bool:
    """Whether neighbouring ranks are always in one node."""
    return ranks == 1 or machine.link(ranks, 1, wanted.gpus)[0] == "NVLink"
