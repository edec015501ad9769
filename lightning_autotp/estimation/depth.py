"""The repeated blocks of a model: how few of them a step need be traced with."""

from collections.abc import Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.shorten import keep_blocks, kinds_of_blocks


@dataclass(frozen=True)
class Depth:
    """Two shallower models that say what the whole one does.

    Args:
        few: by the path of a list, how many of its first blocks are in the smaller one.
        period: how many the larger one has more; these are of all kinds that follow.
        periods: how many times as many the whole model has more than the smaller one.
    """

    few: dict[str, int]
    period: dict[str, int]
    periods: int

    def model(self, whole: nn.Module, *, larger: bool) -> nn.Module:
        """A copy of one of the two; the whole model is not changed."""
        lists = {path: whole.get_submodule(path) for path in self.few}
        before = {path: dict(blocks._modules) for path, blocks in lists.items()}
        try:
            for path, count in self.few.items():
                keep_blocks(whole, path, count + (self.period[path] if larger else 0))
            return copied(whole)
        finally:
            for path, blocks in lists.items():
                blocks._modules.update(before[path])


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model of fake tensors, which copy their mode where Python copies them."""
    memo: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        own = torch.empty_like(tensor, requires_grad=False)
        trains = tensor.requires_grad
        memo[id(tensor)] = nn.Parameter(own, requires_grad=trains) if isinstance(tensor, nn.Parameter) else own
    return deepcopy(model, memo)


def depth_of(model: nn.Module, plan: ShardingPlan) -> Optional[Depth]:
    """How the blocks of a model repeat; None where tracing all of them is as good."""
    found: dict[str, tuple[int, int, int]] = {}
    for path, kinds in kinds_of_blocks(model, plan, outermost=True):
        repeat = _repeat(kinds)
        if repeat is not None:
            found[path] = (len(kinds), *repeat)
    if not found:
        return None
    periods = min((length - start) // period for length, start, period in found.values())
    few = {path: length - periods * period for path, (length, _, period) in found.items()}
    return Depth(few, {path: period for path, (_, _, period) in found.items()}, periods)


def _repeat(kinds: Sequence[Hashable]) -> Optional[tuple[int, int]]:
    """Where a list begins to repeat itself, not before its second block, and after how many blocks each time.

    None if that is not for three times.
    """
    numbers = [kinds.index(kind) for kind in kinds]
    best: Optional[tuple[int, int]] = None
    for period in range(1, len(numbers) // 3 + 1):
        start = len(numbers) - period
        while start > 0 and numbers[start - 1] == numbers[start - 1 + period]:
            start -= 1
        start = max(start, 1)
        if (len(numbers) - start) // period < 3:
            continue
        if best is None or 2 * start + period < 2 * best[0] + best[1]:
            best = (start, period)
    return best
