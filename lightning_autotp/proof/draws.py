"""What a step draws, seen in the unsharded run and on all ranks: how each tensor of random numbers is sharded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.relation import Relation, relate
from lightning_autotp.randomness.cut import Cut, memory_order
from lightning_autotp.randomness.functions import ATTENTION
from lightning_autotp.randomness.places import Chain, Walk, names_of
from lightning_autotp.randomness.sites import Drawn, Site, Sites

_CLOSE = 1e-4


@dataclass(frozen=True)
class Noted:
    """A draw of one run.

    Args:
        function: the name of what draws.
        chain: the calls that lead to it.
        counts: see :class:`~lightning_autotp.randomness.sites.Drawn`.
        shape: of the tensor for which is drawn.
        order: how its dims lie in memory.
        value: it, as far as it says where in the full one it belongs.
    """

    function: str
    chain: Chain
    counts: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    value: Optional[Tensor]


class Draws:
    """The draws of one run of a model, in their order."""

    def __init__(self, model: nn.Module) -> None:
        self.noted: list[Noted] = []
        self._model, self._names = model, names_of(model)
        self._calls: Counter[str] = Counter()
        self._counts: Counter[tuple[str, Chain, str, int]] = Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, calls of modules are counted."""
        handles = [module.register_forward_pre_hook(self._called, prepend=True) for module in self._model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, module: nn.Module, args: Any) -> None:
        self._calls[self._names.get(id(module), "")] += 1

    def note(self, function: str, tensor: Tensor, *, has_values: bool) -> None:
        """Note a draw for every entry of ``tensor``, which itself has values that count, or has not."""
        chain = tuple(Walk(self._names))
        counts = []
        for path in dict.fromkeys(item.path for item in chain if item.path is not None):
            key = (function, chain, path, self._calls[path])
            counts.append((path, self._counts[key]))
            self._counts[key] += 1
        value = tensor.detach().clone() if has_values and tensor.is_floating_point() else None
        shape, order = tuple(tensor.shape), memory_order(tensor)
        self.noted.append(Noted(function, chain, tuple(counts), shape, order, value))


def sites_of(full: Draws, ranks: Sequence[Draws], plan: ShardingPlan) -> Optional[Sites]:
    """How what is drawn is sharded; None if ranks do not draw in the places where the unsharded model does."""
    own = [_by_place(rank) for rank in ranks]
    if any(list(one) != list(_by_place(full)) for one in own):
        return None
    found = []
    for key, noted in _by_place(full).items():
        site = _site(noted, [one[key] for one in own], plan)
        found.append(Drawn(noted.function, noted.chain, noted.counts, site))
    return Sites(tuple(dict.fromkeys(found)))


def _by_place(draws: Draws) -> dict[tuple[str, Chain, int], Noted]:
    times: Counter[tuple[str, Chain]] = Counter()
    found = {}
    for one in draws.noted:
        place = (one.function, one.chain)
        found[one.function, one.chain, times[place]] = one
        times[place] += 1
    return found


def _site(full: Noted, ranks: Sequence[Noted], plan: ShardingPlan) -> Site:
    shapes = [one.shape for one in ranks]
    if all(shape == full.shape for shape in shapes):
        return Site()
    cut = _cut(full, ranks, plan)
    if cut is None or full.function == ATTENTION and cut.dim + max(len(cut.sizes), 1) > cut.ndim - 2:
        return Site(own=True)
    return Site(cut, order=() if full.function == ATTENTION or cut.tokens else full.order)


def _cut(full: Noted, ranks: Sequence[Noted], plan: ShardingPlan) -> Optional[Cut]:
    guessed = _in_order(full, [one.shape for one in ranks], plan)
    values = [one.value for one in ranks if one.value is not None]
    if full.value is None or len(values) < len(ranks):
        return guessed
    if guessed is not None and _fits(guessed, full.value, values):
        return guessed
    return _as_cut(relate(full.value, values), full.value)


def _in_order(full: Noted, shapes: Sequence[tuple[int, ...]], plan: ShardingPlan) -> Optional[Cut]:
    """The cut by which ranks have neighbouring parts in their order, as far as shapes tell."""
    ndim = len(full.shape)
    if any(len(shape) != ndim for shape in shapes):
        return None
    if plan.sequence is not None and _are_tokens(full.shape, shapes, plan.tp_size):
        return Cut(ndim, dim=int(ndim > 2), tokens=True)
    differ = [dim for dim in range(ndim) if any(shape[dim] != full.shape[dim] for shape in shapes)]
    if len(differ) != 1:
        return None
    dim, starts = differ[0], [0]
    for shape in shapes:
        starts.append(starts[-1] + shape[dim])
    if starts[-1] != full.shape[dim]:
        return None
    parts = tuple(tuple(range(a, b)) for a, b in zip(starts, starts[1:]))
    return Cut(ndim, dim, (full.shape[dim],), parts)


def _are_tokens(full: Sequence[int], shapes: Sequence[tuple[int, ...]], tp_size: int) -> bool:
    if len(full) < 2:
        return False
    lead = 1 if len(full) == 2 else 2
    tokens = full[0] if lead == 1 else full[0] * full[1]
    want = (*((1,) if lead == 2 else ()), -(-tokens // tp_size), *full[lead:])
    return all(shape == want for shape in shapes)


def _fits(cut: Cut, full: Tensor, values: Sequence[Tensor]) -> bool:
    tokens = full.shape[0] if full.ndim == 2 else full.shape[:2].numel()
    finite = full[torch.isfinite(full)].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    for rank, value in enumerate(values):
        part = cut.of(value.shape, rank, len(values), tokens)
        want = part.take(full.reshape(part.full), value.shape)
        held = want.shape[part.dim] if not cut.tokens else part.index.stop - part.index.start  # type: ignore[union-attr]
        mine, want = value.narrow(part.dim, 0, held), want.narrow(part.dim, 0, held)
        if not torch.allclose(mine, want, rtol=0, atol=_CLOSE * scale, equal_nan=True):
            return False
    return True


def _as_cut(relation: Optional[Relation], full: Tensor) -> Optional[Cut]:
    if relation is None or relation.kind != "sharded" or relation.dim is None:
        return None
    sizes = (full.shape[relation.dim],)
    highest = max((int(at.max()) for at in relation.indices if len(at)), default=0)
    parts = tuple(tuple(at.tolist()) for at in relation.indices)
    if highest >= sizes[0] or not any(len(part) <= sizes[0] for part in parts):
        return None
    return Cut(full.ndim, relation.dim, sizes, parts)
