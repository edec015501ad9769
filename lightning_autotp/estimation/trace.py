"""What one rank was seen to do in a step, event by event, and the sums of it that costs are made of."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple, Optional


class Work(NamedTuple):
    """An op: floating-point operations, the bytes it reads and writes, and whether it multiplies fp32 matrices."""

    flops: int
    moved: int
    fp32: bool


class Event(NamedTuple):
    """An op, or the arrival of a gradient.

    Args:
        name: of the op.
        work: what it computes, None for nothing.
        others: bytes alive after it, besides what was there before the step and gradients of parameters.
        gradients: bytes of gradients of parameters after it.
    """

    name: str
    work: Optional[Work]
    others: int
    gradients: int


class Attention(NamedTuple):
    """An attention kernel of the forward pass.

    Args:
        heads, key_heads: query heads, and key and value heads.
        query, key, value, output: bytes of its inputs and of its output.
    """

    heads: int
    key_heads: int
    query: int
    key: int
    value: int
    output: int


@dataclass(frozen=True)
class Trace:
    """A step in the order in which it happened.

    Args:
        forward, backward: the events of the two passes.
        attention: the attention kernels of the forward pass.
    """

    forward: tuple[Event, ...]
    backward: tuple[Event, ...]
    attention: tuple[Attention, ...] = ()

    @property
    def most_forward(self) -> int:
        """Bytes, the most that was alive in the forward pass."""
        return max((event.others for event in self.forward), default=0)

    @property
    def kept(self) -> int:
        """Bytes that were alive at the end of the forward pass, for the backward pass."""
        return self.backward[0].others if self.backward else 0

    @property
    def most_backward(self) -> dict[int, int]:
        """By bytes of gradients there, the most bytes besides them that were alive in the backward pass."""
        found: dict[int, int] = {}
        for event in self.backward:
            found[event.gradients] = max(event.others, found.get(event.gradients, 0))
        return found

    @property
    def work(self) -> Counter[Work]:
        """How often each kind of op ran."""
        return Counter(event.work for event in (*self.forward, *self.backward) if event.work is not None)
