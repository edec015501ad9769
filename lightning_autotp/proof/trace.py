"""What a step computes, operator by operator, forward and backward, with the place in the code that calls each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_autotp.compat import TorchDispatchMode, in_backward
from lightning_autotp.dataflow.event import bound
from lightning_autotp.dataflow.operators.registry import is_random
from lightning_autotp.proof.assumed import assumed_result
from lightning_autotp.proof.memory import MOVES, NUMBER, Numbers, as_slice
from lightning_autotp.proof.nodes import Nodes
from lightning_autotp.proof.places import Place, calling_line
from lightning_autotp.proof.recorded import HIDDEN, Call, Crossing, Key, Recorded, Ref, Trace


@dataclass(frozen=True)
class _Behaviour:
    """What an operator does to memory: the arguments that it writes, the one of which its outputs are views."""

    written: tuple[str, ...]
    viewed: Optional[str]
    random: bool


@cache
def _behaviour(func: torch._ops.OpOverload) -> _Behaviour:
    written, read = [], {}
    for argument in func._schema.arguments:
        if argument.alias_info is not None:
            if argument.alias_info.is_write:
                written.append(argument.name)
            else:
                read[frozenset(argument.alias_info.before_set)] = argument.name
    viewed = None
    for result in func._schema.returns:
        if result.alias_info is not None and not result.alias_info.is_write:
            viewed = next(iter(read.values()), None)
    return _Behaviour(tuple(written), viewed, is_random(func))


_SAME = {"_unsafe_view": "view", "_reshape_alias": "view", "lift": "lift_fresh"}


class Tracer(TorchDispatchMode):
    """Records what happens inside :meth:`running`.

    Args:
        model: the model that runs: an own copy, whose modules get hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.model = model
        self.stack: list[str] = []
        self.nodes = Nodes()
        self.numbers = Numbers(_names_of_tensors(model), self._synthetic)
        self.trace.leaves = self.numbers.leaves
        self._counts: Counter[Key] = Counter()
        self._quiet = 0

    def _path(self) -> str:
        return self.stack[-1] if self.stack else ""

    def _at(self, name: str, *more: str) -> tuple[Place, Key]:
        """The place and key of what happens now."""
        owner, line = calling_line(2)
        if in_backward() and not self.stack:
            base = self.nodes.evaluated()
            place = self._differentiated(base)
            where: Key = ("backward", base if owner != "user" else line, name, *more)
        else:
            place = Place(self._path(), line)
            where = (place.path, line, name, *more)
        return place, self._counted(where)

    def _counted(self, where: Key) -> Key:
        self._counts[where] += 1
        return (*where, self._counts[where])

    def _differentiated(self, key: Optional[Key]) -> Place:
        """The place of the forward event whose gradient is computed now."""
        event = self.trace.by_key.get(key) if key is not None else None
        if event is None:
            return Place("" if key is None else str(key[0]), "" if key is None else str(key[1]), True)
        return Place(event.place.path, event.place.line, True)

    def _synthetic(self, name: str, arguments: dict[str, Any], outputs: tuple[Ref, ...], why: str) -> None:
        place, key = self._at(name, why)
        self.trace.add(Recorded(key, name, arguments, outputs, place))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        owner, line = calling_line(1)
        differentiates = in_backward() and not self.stack
        engine = differentiates and owner != "user"  # otherwise a recompute, or somebody's own backward
        hidden = self.nodes.inside or owner == "layers" or engine and self.nodes.is_hidden()
        keeps = engine and not hidden and self.nodes.stores_gradient()
        name = func._overloadpacket.__name__
        name = _SAME.get(name, name)
        behaviour = _behaviour(func)
        if behaviour.written and not name.endswith("__"):
            name = name.removesuffix("_")
        if hidden:
            if not in_backward() and not self.nodes.inside:
                self.nodes.note(None)
            out = func(*args, **kwargs)
            self._note_hidden(name, behaviour, args, out)
            return out
        given = bound(func, args, kwargs)
        if keeps and name in ("copy", "new_empty_strided"):
            out = func(*args, **kwargs)
            if name == "copy":
                self.numbers.numbered(out, self.numbers.ref(given["src"]))
            return out
        self._quiet += 1
        try:
            arguments: dict[str, Any] = {n: self._referred(value) for n, value in given.items()}
        finally:
            self._quiet -= 1
        if engine:
            base = self.nodes.evaluated()
            place = self._differentiated(base)
            key = self._counted(("backward", base, name))
        elif differentiates:
            place = Place("", line, True)
            key = self._counted(("backward", None, line, name))
            self.nodes.note(key)
        else:
            place = Place(self._path(), line)
            key = self._counted((place.path, line, name))
            self.nodes.note(key)
        try:
            out, reads = assumed_result(func, args, kwargs)
        except (RuntimeError, IndexError, ValueError) as error:
            self.trace.add(Recorded(key, name, arguments, None, place, behaviour.random))
            self.trace.error_place = place
            raise error
        self._note(key, name, behaviour, given, arguments, out, place, reads, engine)
        return out

    def _referred(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.numbers.ref(value)
        if isinstance(value, (list, tuple)):
            return [self.numbers.ref(one) if isinstance(one, Tensor) else one for one in value]
        return value

    def _note_hidden(self, name: str, behaviour: _Behaviour, args: Any, out: Any) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        outs = [out] if isinstance(out, Tensor) else [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if behaviour.written:
            for tensor in tree_leaves(args):
                if isinstance(tensor, Tensor) and any(tensor is one for one in outs):
                    self.numbers.write(tensor, Ref(HIDDEN, tuple(tensor.shape), tensor.dtype))
            return
        for one in outs:
            if self.numbers.knows(one):
                continue
            if first is not None and (name in MOVES or name == "view") and first.shape == one.shape:
                ref = self.numbers.ref(first)
                if ref.number != HIDDEN:
                    self.numbers.numbered(one, ref)
                    continue
            self.numbers.hide(one)

    def _note(
        self,
        key: Key,
        name: str,
        behaviour: _Behaviour,
        given: dict[str, Any],
        arguments: dict[str, Any],
        out: Any,
        place: Place,
        reads: bool,
        engine: bool,
    ) -> None:
        outs = [out] if isinstance(out, Tensor) else [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name, arguments = self._by_constants(key, name, arguments)
        if name == "as_strided":
            name, arguments = as_slice(given["self"], arguments)
        if name == "_to_copy" and arguments["self"].number in self.numbers.entries:
            self.numbers.entries[self.numbers.numbered(outs[0]).number] = self.numbers.entries[arguments["self"].number]
        if name == "view" and "stride" in arguments:
            arguments = {n: value for n, value in arguments.items() if n != "stride"}
        if behaviour.written:
            written = [given[n] for n in behaviour.written if isinstance(given[n], Tensor)]
            refs = tuple(Ref(self.numbers.new(), tuple(t.shape), t.dtype) for t in outs)
            for ref in refs:
                self.numbers.fresh(ref)
            self.trace.add(Recorded(key, name, arguments, refs, place, behaviour.random))
            if engine and name == "add":
                self._sum(arguments, refs[0])
            for tensor in written:
                at = next((at for at, one in enumerate(outs) if one is tensor), None)
                self.numbers.write(
                    tensor, refs[at] if at is not None else Ref(HIDDEN, tuple(tensor.shape), tensor.dtype)
                )
            return
        if behaviour.viewed is not None and isinstance(given[behaviour.viewed], Tensor):
            of = given[behaviour.viewed]
            if self.numbers.is_hidden(of):
                for one in outs:
                    self.numbers.hide(one)
                return
            refs = tuple(
                self.numbers.view(one, of, name, arguments, behaviour.viewed, at) for at, one in enumerate(outs)
            )
            if len(refs) == 1 and refs[0].number == arguments[behaviour.viewed].number:
                return
        elif name in MOVES:
            source = arguments["self"]
            if source.number == HIDDEN:
                self.numbers.hide(outs[0])
            else:
                self.numbers.numbered(outs[0], source)
            return
        else:
            refs = tuple(self.numbers.numbered(one) for one in outs)
        if engine and name == "add" and len(refs) == 1:
            self._sum(arguments, refs[0])
        self.trace.add(Recorded(key, name, arguments, refs, place, behaviour.random, reads))

    def _by_constants(self, key: Key, name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """An event with the entries that a constant list of indices names, and with what a gradient was taken of."""
        made = self.trace.by_key.get(key[1]) if key[0] == "backward" and isinstance(key[1], tuple) else None
        if name == "index":
            chosen = [(at, index) for at, index in enumerate(arguments["indices"]) if index is not None]
            if len(chosen) == 1 and chosen[0][1].number in self.numbers.entries:
                entries = self.numbers.entries[chosen[0][1].number]
                return "index_entries", {"self": arguments["self"], "dim": chosen[0][0], "entries": entries}
        elif made is not None and made.name == "index_entries" and name in ("index_put", "_index_put_impl"):
            others = {"dim": made.arguments["dim"], "entries": made.arguments["entries"]}
            return "entries_gradient", {"grad": arguments["values"], "of": made.arguments["self"], **others}
        elif made is not None and made.name == "slice" and name == "slice_backward":
            return name, {**arguments, "of": made.arguments["self"]}
        return name, arguments

    def _sum(self, arguments: dict[str, Any], made: Ref) -> None:
        """Gradients are added in any order: a sum is known by its terms."""
        terms: list[int] = []
        for operand in (arguments["self"], arguments["other"]):
            if not isinstance(operand, Ref):
                return
            terms += self.trace.terms.get(operand.number, (operand.number,))
        self.trace.terms[made.number] = tuple(sorted(terms))
        self.trace.by_terms[tuple(sorted(terms))] = made.number

    def cross(self, tensor: Tensor, made: Tensor, crossing: Crossing) -> Ref:
        """Record that ``tensor`` crosses into or out of a module and is ``made`` on the other side."""
        source = self.numbers.ref(tensor)
        direction = ("leaves" if crossing.leaves else "enters", "backward" if crossing.backward else "forward")
        key = self._counted(("crossing", crossing.path, *direction))
        if not crossing.backward:
            self.nodes.note(key)
        ref = self.numbers.numbered(made)
        if not crossing.backward:
            crossing.made.append(ref.number)
        place = Place(crossing.path, "", crossing.backward)
        self.trace.add(Recorded(key, " ".join(direction), {"self": source}, (ref,), place, crossing=crossing))
        return ref

    def note_written(self, call: Call, parameters: dict[str, Tensor]) -> None:
        """Record what an opaque call's parameters are, where something was written into them."""
        refs = {name: self.numbers.ref(parameter) for name, parameter in parameters.items()}
        written = {name: ref for name, ref in refs.items() if ref.number not in self.trace.leaves}
        if written:
            call.written += [(name, ref.number) for name, ref in written.items()]
            key = self._counted(("parameters", call.path))
            self.trace.add(Recorded(key, "parameters", dict(written), (), Place(call.path, "")))

    def alias(self, tensor: Tensor, made: Tensor) -> None:
        """``made`` shows the memory of ``tensor``, which no operator told."""
        ref = self.numbers.ref(tensor)
        if ref.number != HIDDEN:
            self.numbers.view(made, tensor, "alias", {"self": ref}, "self", 0)

    def replace(self, tensor: Tensor, by: Tensor) -> None:
        """``tensor`` was given the memory of ``by``."""
        self.numbers.ref(by)
        setattr(tensor, NUMBER, getattr(by, NUMBER))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, nothing is recorded."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record what happens inside."""
        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(path), prepend=True))
            handles.append(module.register_forward_hook(self._left, always_call=True))
        try:
            with saved_tensors_hooks(self._pack, self._unpack), _Constants(self), self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.numbers.forget()

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(path)

        return enter

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.stack:
            self.stack.pop()

    def _pack(self, tensor: Tensor) -> Any:
        # what autograd gives back is another object, without attributes; what it keeps is the value of now
        with self.quiet():
            self.numbers.ref(tensor)
        return tensor, list(getattr(tensor, NUMBER))

    def _unpack(self, packed: Any) -> Tensor:
        tensor, number = packed
        with self.quiet():
            fresh: Tensor = tensor.detach()
        setattr(fresh, NUMBER, list(number))
        return fresh


class _Constants(TorchFunctionMode):
    """Remembers the numbers that tensors are made of, which tensors on the meta device do not keep."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INDEXED and len(args) > 1:
            args = (args[0], self._with_numbers(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        if func is _DATA.__get__ and isinstance(out, Tensor):
            self.tracer.alias(args[0], out)
        elif func is _DATA.__set__:
            self.tracer.replace(args[0], args[1])
        if func in _MADE_OFNUMBERS and isinstance(out, Tensor) and args and not isinstance(args[0], Tensor):
            with self.tracer.quiet():
                self.tracer.numbers.with_data(out, args[0])
        return out

    def _with_numbers(self, index: Any) -> Any:
        """An index with its lists as tensors that keep their numbers: torch would make them on the meta device."""
        if isinstance(index, tuple):
            return tuple(self._with_numbers(one) for one in index)
        if isinstance(index, list) and index and all(type(one) is int for one in index):
            with self.tracer.quiet():
                return torch.tensor(index)
        return index


_DATA: Any = Tensor.data

_INDEXED: set[Any] = {Tensor.__getitem__, Tensor.__setitem__}

_MADE_OFNUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}


def _names_of_tensors(model: nn.Module) -> dict[int, str]:
    """The names of all tensors that modules hold: parameters, buffers, other attributes."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, value in [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]:
            for at, one in enumerate(_held(value)):
                if isinstance(one, Tensor):
                    found.setdefault(id(one), f"{path}.{name}.{at}")
    return found


def _held(value: Any) -> Sequence[Any]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return value
    return list(value.values()) if isinstance(value, dict) else []
