"""What the ranks hold of every tensor of a step: placements, followed through what all of the runs have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Optional, Union

from lightning_autotp.dataflow.event import Event, Operand, RankCall, Unknown, Wrong
from lightning_autotp.dataflow.placement import Placement
from lightning_autotp.diagnostics import Diagnostic
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.axioms import crosses
from lightning_autotp.proof.counterparts import Counterparts, Differs, Held, NotMatched
from lightning_autotp.proof.entries import follow
from lightning_autotp.proof.markers import Marked
from lightning_autotp.proof.recorded import Call, Recorded, Ref, Trace, replaced


@dataclass(frozen=True)
class Known:
    """What the ranks hold of a value, and the parameter or module whose sharding it comes from."""

    placement: Placement
    origin: str = ""


@dataclass(frozen=True)
class Poison:
    """Why it is not known, or why it is wrong, what the ranks hold of a value."""

    kind: Literal["wrong", "unknown"]
    finding: Diagnostic


@dataclass(frozen=True)
class Mixed:
    """A value that is a partial sum in some pieces of a dim, and not in others: ``pieces`` are (size, placement)."""

    dim: int
    pieces: tuple[tuple[int, Placement], ...]
    poison: Poison
    """What it is to whoever does not know such values."""


Value = Union[Known, Poison, Mixed]


@dataclass
class Flow:
    """Placements of all values of a full model's run.

    Args:
        plan: the plan.
        marked: the modules whose edges are marked.
        full: the full model's run.
        runs: the runs of one rank of each kind.
        kinds: the number of the run that is each rank's.
    """

    plan: ShardingPlan
    marked: dict[str, Marked]
    full: Trace
    runs: Sequence[Trace]
    kinds: Sequence[int]
    values: dict[int, Value] = field(default_factory=dict)
    returned: dict[int, list[Value]] = field(default_factory=dict)
    """By call (its ``id``), what is known of its outputs' gradients."""
    assumed: dict[str, None] = field(default_factory=dict)
    random: dict[str, None] = field(default_factory=dict)
    unread: list[Poison] = field(default_factory=list)
    """Values that Python reads, and that are not known to be replicated."""

    def __post_init__(self) -> None:
        """Pair the runs."""
        self.counterparts = [Counterparts(self.full, run, only=len(self.runs) == 1) for run in self.runs]
        for number, leaf in self.full.leaves.items():
            self.values[number] = self._of_leaf(leaf.name, tuple(leaf.tensor.shape))

    def _of_leaf(self, name: Optional[str], shape: tuple[int, ...]) -> Value:
        entry = self.plan.parameters.get((name or "").rpartition(".")[0].removeprefix("."))
        if entry is None:
            return Known(Placement.replicated(len(shape)))
        return Known(Placement.from_layout(entry.layout), "" if entry.layout.is_replicated else entry.name)

    def follow(self) -> None:
        """Find the placement of every value."""
        for event in self.full.events:
            if event.crossing is not None:
                self._cross(event)
            elif event.name == "parameters":
                self._note_written(event)
            else:
                self._step(event)

    def _calls(self, event: Recorded) -> Union[tuple[RankCall, ...], Poison]:
        """How each rank calls the operator of ``event``."""
        found: list[RankCall] = []
        poison: Optional[Poison] = None
        for number, counterparts in enumerate(self.counterparts):
            try:
                found.append(counterparts.of(event))
            except NotMatched as error:
                rank, run = self.kinds.index(number), self.runs[number]
                if isinstance(error, Differs) and self._is_whole(event):
                    said = f"{event.name}: rank {rank} differs: {error}."
                    poison = poison or Poison("wrong", Diagnostic("error", str(event.place), said))
                elif run.error is not None and event.key not in run.by_key:
                    said = f"rank {rank} cannot run the step: {_first_line(run.error)}"
                    poison = poison or Poison("wrong", Diagnostic("error", str(run.error_place), said))
                else:
                    said = f"{event.name}: rank {rank} cannot be followed here: {error}."
                    poison = poison or Poison("unknown", Diagnostic("warning", str(event.place), said))
        return tuple(found[number] for number in self.kinds) if poison is None else poison

    def _is_whole(self, event: Recorded) -> bool:
        """Whether some operand is replicated: of that no rank may have less, or other numbers."""
        values = [self.values.get(ref.number) for ref in event.operands]
        return any(isinstance(value, Known) and value.placement.is_replicated for value in values)

    def _step(self, event: Recorded) -> None:
        calls = self._calls(event)
        mixed = None if isinstance(calls, Poison) else self._mixed(event)
        if mixed is not None:
            self.values[(event.outputs or ())[0].number] = mixed
            return
        poison = self._poisoned(event.operands, calls if isinstance(calls, Poison) else None)
        known = [value for ref in event.operands if isinstance(value := self.values.get(ref.number), Known)]
        origin = next((value.origin for value in known if value.origin), "")
        if event.reads:
            self._read(event, known, poison)
        if poison is None and not isinstance(calls, Poison):
            if event.random and not all(value.placement.is_replicated for value in known):
                self.random[str(event.place)] = None
            try:
                made = follow(self._placed(event, calls))
            except Wrong as error:
                poison = self._found("wrong", event, origin, str(error))
            except Unknown as error:
                poison = self._found("unknown", event, origin, str(error))
            except Exception as error:
                poison = self._found("unknown", event, origin, f"its rule fails: {_first_line(error)}")
            else:
                for ref, placement in zip(event.outputs or (), made):
                    self.values[ref.number] = Known(placement, "" if placement.is_replicated else origin)
                return
        assert poison is not None
        for ref in event.outputs or ():
            self.values[ref.number] = poison

    def _placed(self, event: Recorded, calls: tuple[RankCall, ...]) -> Event:
        """The event with placements; a slice's gradient as that of entries, if ranks have their own."""
        arguments = replaced(event.arguments, self._operand)
        if event.name != "slice_backward":
            return Event(event.name, arguments, _shapes(event), calls)
        of: Operand = arguments.pop("of", None)
        dim = arguments["dim"] % len(arguments["input_sizes"])
        if of is None or of.placement.dims[dim] is None:
            calls = tuple(RankCall(_without(call.arguments, "of"), call.outputs) for call in calls)
            return Event(event.name, arguments, _shapes(event), calls)
        calls = tuple(RankCall(_as_entries(call.arguments, dim), call.outputs) for call in calls)
        return Event("entries_gradient", {**_as_entries(arguments, dim), "of": of}, _shapes(event), calls)

    def _mixed(self, event: Recorded) -> Optional[Mixed]:
        """What a gradient is that is put together from partial sums and others."""
        if not event.place.backward or event.name not in ("cat", "add", "slice_backward"):
            return None
        values = [self.values.get(ref.number) for ref in event.operands]
        if event.name == "cat":
            known = [value.placement for value in values if isinstance(value, Known)]
            dim = event.arguments["dim"] % len(event.operands[0].shape)
            differ = len({placement.partial for placement in known if not placement.zero}) > 1
            if len(known) == len(values) and differ and all(not any(placement.dims) for placement in known):
                sizes = [ref.shape[dim] for ref in event.operands]
                return self._as_mixed(event, dim, list(zip(sizes, known)))
        return None

    def _as_mixed(self, event: Recorded, dim: int, pieces: Sequence[tuple[int, Placement]]) -> Mixed:
        said = f"dim {dim} is a partial sum on each rank in one part, and not in another."
        return Mixed(dim, tuple(pieces), self._found("unknown", event, "", said))

    def _poisoned(self, operands: Sequence[Ref], also: Optional[Poison] = None) -> Optional[Poison]:
        """The poison of operands, the wrong before the unknown."""
        return _worst([*(self._value(ref) for ref in operands), *([] if also is None else [also])])

    def _value(self, ref: Ref) -> Value:
        found = self.values.get(ref.number)
        if found is None:
            said = "what this package's layers compute inside is read from outside, which cannot be followed."
            return Poison("unknown", Diagnostic("warning", "", said))
        return found

    def _operand(self, ref: Ref) -> Operand:
        value = self.values[ref.number]
        assert isinstance(value, Known)
        return Operand(ref.shape, value.placement, ref.dtype)

    def _found(self, kind: Literal["wrong", "unknown"], event: Recorded, origin: str, why: str) -> Poison:
        shapes = ", ".join(str(list(ref.shape)) for ref in event.operands)
        said = f"{event.name} of {shapes}" if shapes else event.name
        said += f", sharded by {origin}: " if origin else ": "
        level: Literal["error", "warning"] = "error" if kind == "wrong" else "warning"
        return Poison(kind, Diagnostic(level, str(event.place), said + why))

    def _read(self, event: Recorded, known: Sequence[Known], poison: Optional[Poison]) -> None:
        """Python reads a value, which must be replicated."""
        if poison is None and all(value.placement.is_replicated for value in known):
            self.assumed[str(event.place)] = None
        elif poison is not None:
            self.unread.append(poison)
        else:
            held = next(str(value.placement) for value in known if not value.placement.is_replicated)
            self.unread.append(self._found("unknown", event, "", f"Python reads the value of what is {held}."))

    # -- what crosses

    def _cross(self, event: Recorded) -> None:
        crossing = event.crossing
        assert crossing is not None and event.outputs is not None
        mark, source, made = self.marked[crossing.path], event.arguments["self"], event.outputs[0]
        mark = replace(mark, moves=False) if crossing.part else mark
        emerges = mark.kind != "reduced" and crossing.leaves != crossing.backward
        completed: Optional[Value] = None
        calls = self._calls_across(event) if emerges else self._calls(event)
        if emerges:
            poison = self._poison_inside(crossing.calls, crossing.backward)
            held = Placement.replicated(len(source.shape))
            entered = self.values.get(crossing.made[0]) if crossing.backward and mark.kind == "loss" else None
            held = replace(entered.placement, zero=False) if isinstance(entered, Known) else held
        else:
            value = self._value(source)
            if isinstance(value, Mixed) and mark.kind == "partial outputs":
                completed = self._completed(event, value, mark)
            poison = value if isinstance(value, Poison) else value.poison if isinstance(value, Mixed) else None
            held = value.placement if isinstance(value, Known) else Placement.replicated(len(source.shape))
        result: Value
        if completed is not None:
            result = completed
        elif poison is not None:
            result = poison
        elif isinstance(calls, Poison):
            result = calls
        else:
            result = self._across(event, mark, held, calls)
        self.values[made.number] = result
        if crossing.backward and crossing.leaves:
            for call in crossing.calls:
                self.returned.setdefault(id(call), []).append(result)

    def _completed(self, event: Recorded, value: Mixed, mark: Marked) -> Value:
        """The gradient of a linear some of whose outputs' gradients are summed: the last ones."""
        ndim = len(event.arguments["self"].shape)
        if value.dim == ndim - 1:
            last = 0
            for size, placement in reversed(value.pieces):
                if placement.zero or placement.partial == (last < mark.count):
                    last += size
                    continue
                break
            else:
                return Known(Placement.replicated(ndim))
        said = f"the gradients of the last {mark.count} outputs are summed over the ranks, but others are partial sums."
        return self._found("wrong", event, "", said)

    def _across(self, event: Recorded, mark: Marked, held: Placement, calls: tuple[RankCall, ...]) -> Value:
        crossing, source = event.crossing, event.arguments["self"]
        assert crossing is not None
        origin = f"{mark.path}.weight"
        try:
            floating = source.dtype.is_floating_point
            shape = (event.outputs or ())[0].shape
            placement = crosses(mark, crossing.leaves, crossing.backward, held, source.shape, shape, floating)
            for rank, call in enumerate(calls):
                want = placement.local_shape(shape, rank)
                outside = crossing.leaves != crossing.backward or mark.kind == "reduced"
                if outside and call.outputs is not None and call.outputs[0] != want:
                    raise Wrong(f"rank {rank} has {list(call.outputs[0])} where {placement} would be {list(want)}.")
        except Wrong as error:
            return self._found("wrong", event, "", str(error))
        except Unknown as error:
            return self._found("unknown", event, "", str(error))
        return Known(placement, "" if placement.is_replicated else origin)

    def _calls_across(self, event: Recorded) -> Union[tuple[RankCall, ...], Poison]:
        """How the ranks put out what their own layers computed inside."""
        outputs = event.outputs or ()
        for number, counterparts in enumerate(self.counterparts):
            mine = self.runs[number].by_key.get(event.key)
            if mine is None or not mine.outputs:
                return self._calls(event)
            counterparts.held[outputs[0].number] = Held(mine.outputs[0].number, mine.outputs[0].shape)
        return tuple(RankCall({}, (self.counterparts[number].held[outputs[0].number].shape,)) for number in self.kinds)

    def _note_written(self, event: Recorded) -> None:
        """An opaque module's parameters were written in this step: they must still be placed as their layouts."""
        calls = self._calls(event)
        for name, ref in event.arguments.items():
            entry = self.plan.parameters[f"{event.place.path}.{name}".removeprefix(".")]
            value = self.values.get(ref.number)
            if isinstance(calls, Poison) and isinstance(value, Known):
                self.values[ref.number] = calls
            elif isinstance(value, Known) and value.placement != Placement.from_layout(entry.layout):
                said = f"{entry.name} is written, and is {value.placement} then."
                self.values[ref.number] = self._found("wrong", event, "", said)

    def _poison_inside(self, calls: Sequence[Call], backward: bool) -> Optional[Poison]:
        """Why what comes out of opaque calls is not known, if it is not."""
        found = [self.values[number] for call in calls for number in call.entered]
        found += [self.values[number] for call in calls for _, number in call.written if number in self.values]
        for call in calls:
            if call.written_between:
                said = "it is written after the first of the column linears that read this input was called, which"
                finding = Diagnostic("error", f"{call.path}.weight", f"{said} computes all of them.")
                found.append(Poison("wrong", finding))
        if backward:
            found += [value for call in calls for value in self.returned.get(id(call), [])]
        return _worst(found)

    def of_parameters(self, path: str) -> Optional[Poison]:
        """Why the gradients of an opaque module's parameters are not known, if they are not."""
        return self._poison_inside(self.full.calls.get(path, []), True)


def _worst(values: Sequence[Value]) -> Optional[Poison]:
    """The poison among values, the wrong before the unknown."""
    found = [value.poison if isinstance(value, Mixed) else value for value in values if not isinstance(value, Known)]
    return min(found, key=lambda poison: poison.kind != "wrong", default=None)


def _shapes(event: Recorded) -> tuple[tuple[int, ...], ...]:
    return tuple(ref.shape for ref in event.outputs or ())


def _without(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in arguments.items() if other != name}


def _as_entries(arguments: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """A slice's gradient as that of the entries it took."""
    size = arguments["input_sizes"][dim]
    entries = list(range(*slice(arguments["start"], arguments["end"], arguments["step"]).indices(size)))
    return {"grad": arguments["grad_output"], "dim": dim, "entries": entries}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
