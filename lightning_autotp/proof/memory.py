"""The values of tensors, by number: what is written in place, or shows what was written, is another value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from lightning_autotp.proof.recorded import HIDDEN, Leaf, Ref

NUMBER = "_autotp_number"
"""The attribute of a tensor that a run has seen: the object that gave it a number, and the number of its value."""

_FEW = 64
"""How many numbers of an index tensor are looked at."""

MOVES = {"clone", "alias", "detach", "contiguous", "lift_fresh", "lift_fresh_copy"}
"""Operators whose output is their input."""


class Memory:
    """What views of one another share: the number of the base's value now, and how often it was written."""

    __slots__ = ("current", "version")

    def __init__(self, current: int) -> None:
        self.current, self.version = current, 0


class View(NamedTuple):
    """One step from a base to a view of it."""

    name: str
    arguments: dict[str, Any]
    source: str
    base: Ref
    made: Ref
    at: int


@dataclass
class Value:
    """What is known of a number: its memory, how it is a view of its base, and the version of the memory it shows."""

    memory: Memory
    views: tuple[View, ...]
    version: int
    ref: Ref


class Numbers:
    """Gives values their numbers.

    A tensor carries the number of its value. Memory that is shared is followed as if nothing were written in place: a
    write makes a new value of the base, and a view that was made before it is taken again where it is used.

    Args:
        names: the names of tensors that the model holds, by their ``id``.
        record: is given the name, arguments and outputs of an operator that nobody called, and what it is for.
    """

    def __init__(
        self, names: dict[int, str], record: Callable[[str, dict[str, Any], tuple[Ref, ...], str], None]
    ) -> None:
        self.leaves: dict[int, Leaf] = {}
        self.entries: dict[int, list[int]] = {}
        """The numbers in index tensors that are constants."""
        self.given: list[Tensor] = []
        self._values: dict[int, Value] = {}
        self._next = 0
        self._named, self._record = names, record

    def new(self) -> int:
        """A number that no value has."""
        self._next += 1
        return self._next

    def ref(self, tensor: Tensor) -> Ref:
        """The value of ``tensor`` now."""
        found = getattr(tensor, NUMBER, None)
        if found is None or found[0] is not self:
            return self._given_from_outside(tensor)
        number = found[1]
        if number == HIDDEN:
            return Ref(HIDDEN, tuple(tensor.shape), tensor.dtype)
        value = self._values[number]
        if value.version != value.memory.version:
            number = self._shown_again(value)
            found[1] = number
            value = self._values[number]
        return Ref(value.ref.number, tuple(tensor.shape), tensor.dtype)

    def knows(self, tensor: Tensor) -> bool:
        """Whether this trace has seen ``tensor``."""
        found = getattr(tensor, NUMBER, None)
        return found is not None and found[0] is self

    def _given_from_outside(self, tensor: Tensor) -> Ref:
        ref = self.numbered(tensor)
        if tensor.ndim == 1 and tensor.device.type == "cpu" and tensor.dtype == torch.long and len(tensor) <= _FEW:
            self.entries[ref.number] = tensor.tolist()
        self.leaves[ref.number] = Leaf(self._named.get(id(tensor)), tensor)
        self.given.append(tensor)
        return ref

    def numbered(self, tensor: Tensor, like: Optional[Ref] = None) -> Ref:
        """Give ``tensor``, which is new memory, a number of its own; ``like``: it is the same value as that."""
        number = self.new()
        ref = Ref(number if like is None else like.number, tuple(tensor.shape), tensor.dtype)
        memory = Memory(number)
        self._values[number] = Value(memory, (), 0, ref)
        setattr(tensor, NUMBER, [self, number])
        return ref

    def hide(self, tensor: Tensor) -> None:
        """Say that no rule follows the value of ``tensor``."""
        setattr(tensor, NUMBER, [self, HIDDEN])

    def is_hidden(self, tensor: Tensor) -> bool:
        """Whether no rule follows the value of ``tensor``, which has a number."""
        return bool(getattr(tensor, NUMBER)[1] == HIDDEN)

    def fresh(self, ref: Ref) -> None:
        """Know a value before it is known whose it is."""
        self._values[ref.number] = Value(Memory(ref.number), (), 0, ref)

    def forget(self) -> None:
        """Take the numbers off what was given from outside, and will live on."""
        for tensor in self.given:
            if hasattr(tensor, NUMBER):
                delattr(tensor, NUMBER)

    def with_data(self, tensor: Tensor, data: Any) -> None:
        """Remember the numbers that a tensor was made of."""
        ref = self.ref(tensor)
        leaf = self.leaves.get(ref.number)
        if leaf is not None:
            self.leaves[ref.number] = Leaf(leaf.name, leaf.tensor, data)

    def view(self, tensor: Tensor, of: Tensor, name: str, arguments: dict[str, Any], source: str, at: int) -> Ref:
        """Give ``tensor`` the number of a view of ``of``, which is the argument ``source`` of the operator ``name``."""
        base = self._values[getattr(of, NUMBER)[1]]
        number = self.new()
        moved = is_move(name, arguments.get(source), tensor)
        ref = Ref(arguments[source].number if moved else number, tuple(tensor.shape), tensor.dtype)
        step = View(name, arguments, source, arguments[source], ref, at)
        self._values[number] = Value(base.memory, (*base.views, step), base.memory.version, ref)
        setattr(tensor, NUMBER, [self, number])
        return ref

    def _shown_again(self, value: Value) -> int:
        """The number of a view of memory that was written since it was made: it is taken again."""
        current = self._values[value.memory.current].ref
        steps = []
        for step in value.views:
            if is_move(step.name, step.base, step.made):
                made = Ref(current.number, step.made.shape, step.made.dtype)
            else:
                outputs = [Ref(self.new(), step.made.shape, step.made.dtype)]
                made = outputs[0]
                outputs = [made] * (step.at + 1)
                self._record(step.name, {**step.arguments, step.source: current}, tuple(outputs), "again")
            steps.append(step._replace(base=current, made=made))
            current = made
        number = self.new()
        self._values[number] = Value(value.memory, tuple(steps), value.memory.version, current)
        return number

    def write(self, tensor: Tensor, ref: Ref) -> None:
        """``tensor`` was written: it is ``ref`` now, and what shares its memory shows it."""
        found = getattr(tensor, NUMBER, None)
        if found is None or found[0] is not self or found[1] == HIDDEN:
            setattr(tensor, NUMBER, [self, HIDDEN])
            return
        value = self._values[found[1]]
        memory, steps, written = value.memory, [], ref
        for step in reversed(value.views):
            steps.append(step._replace(made=written))
            if is_move(step.name, step.base, step.made):
                written = Ref(written.number, step.base.shape, step.base.dtype)
                continue
            back = Ref(self.new(), step.base.shape, step.base.dtype)
            name, arguments = _written_back(step, written)
            self._record(name, arguments, (back,), "into")
            written = back
        root = self.new()
        memory.version += 1
        memory.current = root
        self._values[root] = Value(memory, (), memory.version, written)
        if value.views:
            views = tuple(reversed(steps))
            number = self.new()
            self._values[number] = Value(memory, views, memory.version, ref)
            found[1] = number
        else:
            found[1] = root


def is_move(name: str, base: Any, made: Any) -> bool:
    """Whether a view shows its base as it is."""
    return name in MOVES or name == "view" and tuple(base.shape) == tuple(made.shape) and base.dtype == made.dtype


def as_slice(base: Tensor, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The slice or entry that ``as_strided`` takes of ``base``, if it is one: autograd writes them so."""
    size, stride, offset = list(arguments["size"]), list(arguments["stride"]), arguments["storage_offset"]
    offset = (0 if offset is None else offset) - base.storage_offset()
    shape, steps = list(base.shape), list(base.stride())
    own = {"self": arguments["self"]}
    if stride == steps and offset >= 0:
        cut = [dim for dim in range(len(shape)) if size[dim] != shape[dim]]
        if not cut and not offset:
            return "view", {**own, "size": size}
        if len(cut) == 1 and steps[cut[0]] and not offset % steps[cut[0]]:
            start = offset // steps[cut[0]]
            if start + size[cut[0]] <= shape[cut[0]]:
                return "slice", {**own, "dim": cut[0], "start": start, "end": start + size[cut[0]], "step": 1}
    for dim in range(len(shape)):
        left = [*shape[:dim], *shape[dim + 1 :]], [*steps[:dim], *steps[dim + 1 :]]
        if (size, stride) == left and steps[dim] and not offset % steps[dim] and 0 <= offset // steps[dim] < shape[dim]:
            return "select", {**own, "dim": dim, "index": offset // steps[dim]}
    return "as_strided", arguments


_BACK: dict[str, Callable[[View], dict[str, Any]]] = {
    "view": lambda step: {"size": list(step.base.shape)},
    "unsqueeze": lambda step: {"size": list(step.base.shape)},
    "squeeze": lambda step: {"size": list(step.base.shape)},
    "transpose": lambda step: {"dim0": step.arguments["dim0"], "dim1": step.arguments["dim1"]},
    "t": lambda step: {},
    "permute": lambda step: {"dims": _inverse(step.arguments["dims"])},
}


def _inverse(dims: Sequence[int]) -> list[int]:
    order = [dim % len(dims) for dim in dims]
    return [order.index(at) for at in range(len(order))]


def _written_back(step: View, written: Ref) -> tuple[str, dict[str, Any]]:
    """The operator that puts what a view was overwritten with into its base."""
    if step.name in _BACK:
        name = "view" if step.name in ("unsqueeze", "squeeze") else step.name
        return name, {"self": written, **_BACK[step.name](step)}
    others = {name: value for name, value in step.arguments.items() if name != step.source}
    return f"{step.name}_scatter", {"self": step.base, "src": written, **others, **({"at": step.at} if step.at else {})}
