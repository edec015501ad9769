"""What a rank does with batches of any size and with any number of blocks, from traces of few of both.

What an op of a step computes, and what is alive after it, is affine in the sequences of a batch: a constant for the
weights, and so much a sequence. Two sizes of a batch are matched op by op, and each op is continued for itself, so that
the most that is alive and the roofline of each op follow where they change hands. Ops that only one of the two has (a
loss that is computed a few rows at a time has more rounds) are added up by name.

A model with one more block, or one more of each kind in turn, does in both passes what the smaller one does and a
stretch more. The activations that a block keeps are there in all that comes between its forward and its backward pass,
its gradients in all that comes after that. So a model of any depth has four kinds of moments: in front of that
stretch, behind it (both affine in the depth), and in its first and its last copy.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import NamedTuple, Optional, TypeVar

from lightning_autotp.distributed.recording import Collective
from lightning_autotp.estimation.step import Held, Seen, Step
from lightning_autotp.estimation.trace import Attention, Event, Trace, Work

T = TypeVar("T")


class NotAffineError(ValueError):
    """Two traces do not have the same ops in the same order where they must."""


class _Line(NamedTuple):
    """A line through values at ``first`` and ``second``, at ``at``."""

    first: float
    second: float
    at: float

    def of(self, first: float, second: float) -> int:
        return round(first + (second - first) * (self.at - self.first) / (self.second - self.first))


def at_batch(small: Seen, large: Seen, sizes: tuple[int, int], size: float) -> Seen:
    """What was seen with batches of two sizes, for one of ``size``, which need not be whole."""
    line = _Line(*sizes, size)
    trace = Trace(
        tuple(_phase(small.trace.forward, large.trace.forward, line)),
        tuple(_phase(small.trace.backward, large.trace.backward, line)),
        tuple(_grown(kernel, size / sizes[0]) for kernel in small.trace.attention),
    )
    sent = (_pooled(getattr(small, name), getattr(large, name), line) for name in ("collectives", "once"))
    return Seen(small.held, line.of(small.tokens, large.tokens), trace, *sent)


def _grown(kernel: Attention, times: float) -> Attention:
    heads, key_heads, *sizes = kernel
    return Attention(heads, key_heads, *(round(size * times) for size in sizes))


def _phase(small: Sequence[Event], large: Sequence[Event], line: _Line) -> Iterator[Event]:
    before, after = _alike(small, large, lambda event: event.name)
    yield from (_event(*pair, line) for pair in zip(small[:before], large[:before]))
    few, many = small[before : len(small) - after], large[before : len(large) - after]
    if few or many:
        yield from _middle(few, many, _most(small), _most(large), line)
    if after:
        yield from (_event(*pair, line) for pair in zip(small[-after:], large[-after:]))


def _event(small: Event, large: Event, line: _Line) -> Event:
    work = None
    if small.work is not None and large.work is not None:
        one, two = small.work, large.work
        work = Work(line.of(one.flops, two.flops), line.of(one.moved, two.moved), one.fp32)
    return Event(small.name, work, line.of(small.others, large.others), line.of(small.gradients, large.gradients))


def _middle(
    few: Sequence[Event], many: Sequence[Event], most: dict[int, int], more: dict[int, int], line: _Line
) -> Iterator[Event]:
    """What is not matched: the most that is alive for each state of the gradients, and work by name."""
    for gradients in sorted({event.gradients for event in (*few, *many)}):
        first, second = most.get(gradients), more.get(gradients)
        first, second = (second, second) if first is None else (first, first) if second is None else (first, second)
        assert first is not None and second is not None
        yield Event("", None, line.of(first, second), gradients)
    sums, larger = _sums(few), _sums(many)
    gradients = (few or many)[0].gradients
    for key in sorted(sums.keys() | larger.keys()):
        (flops, moved), (more_flops, more_moved) = sums.get(key, (0, 0)), larger.get(key, (0, 0))
        work = Work(line.of(flops, more_flops), line.of(moved, more_moved), key[1])
        yield Event(key[0], work, 0, gradients)


def _most(events: Iterable[Event]) -> dict[int, int]:
    found: dict[int, int] = {}
    for event in events:
        found[event.gradients] = max(event.others, found.get(event.gradients, 0))
    return found


def _sums(events: Iterable[Event]) -> dict[tuple[str, bool], tuple[int, int]]:
    found: dict[tuple[str, bool], tuple[int, int]] = {}
    for event in events:
        if event.work is not None:
            flops, moved = found.get((event.name, event.work.fp32), (0, 0))
            found[(event.name, event.work.fp32)] = flops + event.work.flops, moved + event.work.moved
    return found


def _pooled(small: Counter[Collective], large: Counter[Collective], line: _Line) -> Counter[Collective]:
    """By kind and ranks: as many, of the mean size."""
    sums: list[dict[tuple[str, int], list[int]]] = []
    for counts in (small, large):
        sums.append(defaultdict(lambda: [0, 0]))
        for (kind, ranks, size), count in counts.items():
            found = sums[-1][(kind, ranks)]
            found[0] += count
            found[1] += count * size
    pooled: Counter[Collective] = Counter()
    for kind, ranks in sums[0].keys() | sums[1].keys():
        (few, size), (many, larger) = sums[0][(kind, ranks)], sums[1][(kind, ranks)]
        count = max(1, line.of(few, many))
        pooled[Collective(kind, ranks, max(0, line.of(size, larger)) // count)] += count
    return pooled


def at_depth(few: Seen, more: Seen, periods: int) -> Step:
    """What a model does that has ``periods`` times as many blocks more than the first as the second has.

    Raises:
        NotAffineError: if the second does not do what the first does, and a stretch more.
    """
    forward = _Deeper(few.trace.forward, more.trace.forward, periods)
    backward = _Deeper(few.trace.backward, more.trace.backward, periods)
    kept = more.trace.kept - few.trace.kept
    gradients = max((event.gradients for event in more.trace.backward), default=0) - max(
        (event.gradients for event in few.trace.backward), default=0
    )
    most = max([e.others for e in forward.around()] + [e.others for e in forward.copy(others=kept)], default=0)
    moments = [*backward.around(), *backward.copy(others=kept), *backward.copy(gradients=gradients)]
    work = _times(few.trace.work, more.trace.work, periods)
    sent = _times(few.collectives, more.collectives, periods)
    line = _Line(0, 1, periods)
    return Step(
        held=_held(few.held, more.held, line),
        tokens=few.tokens,
        forward=most,
        kept=line.of(few.trace.kept, more.trace.kept),
        backward=_most(moments),
        work=work,
        collectives=sent,
        once=_times(few.once, more.once, periods),
        attention=_times(Counter(few.trace.attention), Counter(more.trace.attention), periods),
    )


class _Deeper:
    """One pass of a model, and of one that is deeper by a period; what it is in one of ``periods`` more."""

    def __init__(self, few: Sequence[Event], more: Sequence[Event], periods: int) -> None:
        self._line = _Line(0, 1, periods)
        self._periods = periods
        longer = len(more) - len(few)
        before, _ = _alike(few, more, lambda event: event.name)
        rest, longer_rest = few[before:], more[before + longer :] if longer >= 0 else ()
        if longer < 0 or [event.name for event in rest] != [event.name for event in longer_rest]:
            raise NotAffineError("a deeper model does not do what a shallower one does, and a stretch more.")
        self._pairs = [*zip(few[:before], more[:before]), *zip(rest, longer_rest)]
        self._stretch = more[before : before + longer]

    def around(self) -> Iterator[Event]:
        """What is in front of the stretch and behind it."""
        return (_event(*pair, self._line) for pair in self._pairs)

    def copy(self, *, others: int = 0, gradients: int = 0) -> Iterator[Event]:
        """The copy of the stretch that has the most of ``others``, or of gradients, so much a period."""
        times = self._periods - 1
        for event in self._stretch:
            yield event._replace(others=event.others + times * others, gradients=event.gradients + times * gradients)


def _times(few: Counter[T], more: Counter[T], periods: int) -> Counter[T]:
    found: Counter[T] = Counter()
    for key in {**few, **more}:
        found[key] = few[key] + periods * (more[key] - few[key])
    return found


def _held(few: Held, more: Held, line: _Line) -> Held:
    found = {field.name: line.of(getattr(few, field.name), getattr(more, field.name)) for field in fields(Held)}
    return Held(**{**found, "block": more.block, "trained_block": more.trained_block})


def with_head(seen: Seen, own: Seen, other: Seen) -> Seen:
    """A step with another loss.

    Args:
        seen: the step.
        own: one that ends its forward pass and begins its backward pass in the same way.
        other: the latter, but for the loss.

    Raises:
        NotAffineError: if these are not as they should be.
    """

    def same(event: Event) -> Hashable:
        return event.name, event.work

    before, _ = _alike(own.trace.forward, other.trace.forward, same)
    _, after = _alike(own.trace.backward, other.trace.backward, same)
    head, begun = own.trace.forward[before:], own.trace.backward[: len(own.trace.backward) - after]
    forward, backward = seen.trace.forward, seen.trace.backward
    kept = len(forward) - len(head)
    if [*map(same, forward[kept:])] != [*map(same, head)] or [*map(same, backward[: len(begun)])] != [
        *map(same, begun)
    ]:
        raise NotAffineError("two models do not compute their losses alike.")
    deeper = forward[kept - 1].others - own.trace.forward[before - 1].others if kept and before else 0

    def moved(events: Iterable[Event]) -> Iterator[Event]:
        return (event._replace(others=event.others + deeper) for event in events)

    began = other.trace.backward[: len(other.trace.backward) - after]
    trace = Trace(
        (*forward[:kept], *moved(other.trace.forward[before:])),
        (*moved(began), *backward[len(begun) :]),
        seen.trace.attention,
    )
    sent = [_exchanged(*(getattr(one, name) for one in (seen, own, other))) for name in ("collectives", "once")]
    return replace(seen, trace=trace, collectives=sent[0], once=sent[1])


def _exchanged(seen: Counter[Collective], own: Counter[Collective], other: Counter[Collective]) -> Counter[Collective]:
    found = seen.copy()
    found.subtract(own)
    found.update(other)
    return +found


def _alike(one: Sequence[T], two: Sequence[T], key: Callable[[T], Hashable]) -> tuple[int, int]:
    """How many items at the beginning, and how many of the others at the end, are the same."""
    shorter = min(len(one), len(two))
    before = _first_difference(map(key, one), map(key, two))
    before = shorter if before is None else before
    after = _first_difference(map(key, reversed(one)), map(key, reversed(two)))
    return before, min(shorter - before, shorter if after is None else after)


def _first_difference(one: Iterable[Hashable], two: Iterable[Hashable]) -> Optional[int]:
    return next((at for at, (mine, other) in enumerate(zip(one, two)) if mine != other), None)
