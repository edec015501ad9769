"""Drawn at random: layouts of tensors, and how ranks share heads."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# No deadline: the machine is shared with other work, and a slow moment is no failure.
properties = settings(deadline=None, max_examples=80)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor whose elements all differ."""
    return torch.arange(prod(shape)).reshape(shape)


@dataclass(frozen=True)
class Sharing:
    """``queries`` heads in groups of ``queries // keys`` each, over ``tp_size`` ranks."""

    queries: int
    keys: int
    tp_size: int


@st.composite
def sharings(draw: st.DrawFn) -> Sharing:
    keys, group = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    return Sharing(keys * group, keys, draw(st.integers(1, keys * group)))
