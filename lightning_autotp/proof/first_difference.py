"""The first event of a step that the ranks compute in no placement of the unsharded one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_autotp.proof.events import Events, Key
from lightning_autotp.proof.relation import Relation, relate

_SHOWN = 6
"""How many events before the first that differs are named."""


def first_difference(full: Events, ranks: Sequence[Events]) -> str:
    """Name, in sentences, the first value that differs, or else what makes gradients differ; empty if nothing is found.

    A value is right if it is replicated, sharded in some way, a partial sum, or tokens of its own.
    """
    relations: dict[Key, Relation] = {}
    for key, value in full.values.items():
        local = [rank.values[key] for rank in ranks if key in rank.values]
        if len(local) < len(ranks):
            continue
        found = relate(value, local)
        if found is None:
            where = f"the first value that differs is that of {key}, {list(value.shape)}"
            what = f"the ranks hold {_shapes(local)}, no part and no partial sum of it."
            came = f"{_comes_of(full.operands.get(key, ()), full)}{_sizes(key, full, ranks)}{_written(key, full)}"
            return f"{where}; {what}{_numbers(key, full, ranks)}{came}{_of_a_norm(key, value)}"
        relations[key] = found
    return _gradient(full, ranks, relations)


def _of_a_norm(key: Key, value: Tensor) -> str:
    """What to call where code takes the norm of weights or gradients itself."""
    if value.ndim or "norm" not in key.function:
        return ""
    return (
        " It is a norm of what a rank holds: `trainer.strategy.grad_norm()` gives that of the whole model's gradient,"
        " `grad_norms()` those of all parameters, `parameter_norm()` that of its weights; `self.clip_gradients()` and"
        " `gradient_clip_val` clip by it."
    )


def before_the_failure(ranks: Sequence[Events]) -> str:
    """Say what made that which the operator read that failed on a rank; empty if none did."""
    failed = next((rank for rank in ranks if rank.failed), None)
    return "" if failed is None else _comes_of(failed.failed, failed).strip()


def _gradient(full: Events, ranks: Sequence[Events], relations: dict[Key, Relation]) -> str:
    """The first gradient that differs, and where one became a partial sum of which the value is replicated."""
    largest = max((float(g.abs().max()) for g in full.gradients.values() if g.numel()), default=0.0)
    partial: list[Key] = []
    for key, gradient in full.gradients.items():
        local = [rank.gradients[key] for rank in ranks if key in rank.gradients]
        if len(local) < len(ranks) or key not in relations:
            continue
        found = relate(gradient, local, relations[key], 1e-6 * largest)
        if found is None:
            where = f"the first gradient that differs, in the order of the backward pass, is that of {key}."
            return where + _read_by("It", key, full) + _partly(partial, full)
        if found.kind == "partial" and relations[key].kind == "replicated":
            partial.append(key)
    return _partly(partial, full).strip()


def _partly(keys: Sequence[Key], events: Events) -> str:
    """Which gradients are partial sums, from where they become that on, one event a line of code."""
    if not keys:
        return ""
    lines: dict[tuple[str, str], Key] = {}
    for key in keys:
        lines.setdefault((key.module, key.line), key)
    shown = list(lines.values())[:_SHOWN]
    said = f" Replicated, but with gradients that are partial sums on each rank: {', '.join(map(str, shown))}."
    return said + _read_by("The first", keys[0], events)


def _comes_of(keys: Iterable[Key], events: Events) -> str:
    """What led to ``keys``, the nearest first, one event a line of code."""
    found: dict[tuple[str, str], Key] = {}
    seen: set[Key] = set()
    waiting = list(keys)
    while waiting and len(found) < _SHOWN:
        key = waiting.pop(0)
        if key not in seen:
            seen.add(key)
            found.setdefault((key.module, key.line), key)
            waiting += events.operands.get(key, ())
    return f" It comes of {', '.join(map(str, found.values()))}." if found else ""


def _read_by(what: str, key: Key, events: Events) -> str:
    readers = [str(other) for other, operands in events.operands.items() if key in operands]
    return f" {what} is read by {', '.join(readers[:_SHOWN])}." if readers else ""


def _numbers(key: Key, full: Events, ranks: Sequence[Events]) -> str:
    """Where ranks compute with other numbers."""
    mine = full.numbers.get(key)
    for place, rank in enumerate(ranks):
        theirs = rank.numbers.get(key)
        if mine and theirs and mine != theirs:
            return f" Rank {place} computes with {theirs}, the full model with {mine}."
    return ""


def _sizes(key: Key, full: Events, ranks: Sequence[Events]) -> str:
    """Where code of the same module reads sizes that are a rank's own."""
    lines = [
        read.line
        for read, shape in full.sizes.items()
        if read.module == key.module and any(rank.sizes.get(read, shape) != shape for rank in ranks)
    ]
    shown = ", ".join(list(dict.fromkeys(lines))[:_SHOWN])
    return f" Sizes that are a rank's own are read at {shown}." if lines else ""


def _written(key: Key, full: Events) -> str:
    """Where parameters of the module are written in this step: other layers may have computed with them before."""
    shown = ", ".join(map(str, full.written.get(key.module, ())[:_SHOWN]))
    return f" Its parameters are written in the step by {shown}." if shown else ""


def _shapes(tensors: Sequence[Tensor]) -> str:
    return " and ".join(dict.fromkeys(str(list(tensor.shape)) for tensor in tensors))
