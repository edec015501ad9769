"""What a model computes, event by event, so that runs whose layers differ can be compared.

An event is a torch function that code which is not this package's calls, or the output of a module that a plan
converts. Its key is its place in the code (module, line, function, how often before), which needs no common order:
grouped columns, replaced experts and losses, and backward passes in another order align by themselves. The gradient of
an event is taken from a hook on its output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_autotp.compat import tree_leaves
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.source import calling_line

_SKIPPED = {
    *("__get__", "__set__", "requires_grad_", "register_hook", "size", "dim", "stride", "is_floating_point"),
    *("is_complex", "data_ptr", "numel", "backward", "_assert_async", "item", "tolist", "__bool__", "detach"),
    "copy_",
}


_SIZES = {getattr(Tensor.shape, "__get__"), Tensor.size}  # noqa: B009 - mypy knows no such attribute


class Key(NamedTuple):
    """Where an event is: the module's path, the line, the function and how often it was called there before."""

    module: str
    line: str
    function: str
    time: int

    def __str__(self) -> str:
        """The place in words."""
        at = f" at {self.line}" if self.line else ""
        again = f" (call {self.time + 1})" if self.time else ""
        return f"`{self.function}` in {self.module or 'the step'}{at}{again}"


def opaque_modules(plan: ShardingPlan) -> list[str]:
    """The modules whose insides are this package's own in a sharded model."""
    converted = [e.module for e in plan.parameters.values() if e.kind != "whole" or e.partial_outputs]
    return [path for path in dict.fromkeys([*converted, *(b.module for b in plan.boundaries)]) if path]


class Events(TorchFunctionMode):
    """The events of one run.

    Args:
        model: what is run.
        opaque: paths of modules whose insides are not looked at.
    """

    def __init__(self, model: nn.Module, opaque: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.values: dict[Key, Tensor] = {}
        self.gradients: dict[Key, Tensor] = {}
        """In the order of the backward pass."""
        self.operands: dict[Key, list[Key]] = {}
        """The events that made what an event reads."""
        self.numbers: dict[Key, list[float]] = {}
        """The fractions that an event computes with."""
        self.sizes: dict[Key, tuple[int, ...]] = {}
        """The shapes that code reads."""
        self.written: dict[str, list[Key]] = {}
        """By path of a module, the events that write its parameters in place."""
        self.failed: list[Key] = []
        """The events that made what the operator read that failed."""
        self._entered: list[list[Key]] = []
        self._opaque = {id(model.get_submodule(path)) for path in opaque}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._memory = {
            parameter.untyped_storage().data_ptr(): name
            for name, module in model.named_modules()
            for parameter in module.parameters(recurse=False)
        }
        self._stack, self._inside, self._paused = [""], 0, False
        self._count: Counter[tuple[str, str, str]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if func in _SIZES and not (self._paused or self._inside):
            self._note_size(args[0])
        if self._paused or self._inside or name in _SKIPPED or "empty" in name:
            return func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        made_by = [leaf._event for leaf in leaves if hasattr(leaf, "_event")]
        try:
            out = func(*args, **(kwargs or {}))
        except Exception:
            self.failed = made_by
            raise
        written = args[0] if name == "__setitem__" else out
        tensors = [written] if isinstance(written, Tensor) else list(out) if isinstance(out, (tuple, list)) else []
        line = calling_line() if any(isinstance(t, Tensor) for t in tensors) else None
        if line is not None:
            for place, tensor in enumerate(tensors):
                if isinstance(tensor, Tensor):
                    key = self._note(self._stack[-1], line, f"{name}{place or ''}", tensor)
                    self.operands[key] = made_by
                    self.numbers[key] = [leaf for leaf in leaves if isinstance(leaf, float)]
                    if name.endswith("_") and args and isinstance(args[0], Tensor):
                        self._note_written(args[0], key)
        return out

    def _note_written(self, tensor: Tensor, key: Key) -> None:
        owner = None if tensor.layout != torch.strided else self._memory.get(tensor.untyped_storage().data_ptr())
        if owner is not None:
            self.written.setdefault(owner, []).append(key)

    def _note_size(self, tensor: Tensor) -> None:
        line = calling_line(2)
        if line is not None:
            place = (self._stack[-1], line, "shape")
            self.sizes[Key(*place, self._count[place])] = tuple(tensor.shape)
            self._count[place] += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what the model computes is noted."""
        hooks = []
        for module in self.model.modules():
            hooks.append(module.register_forward_pre_hook(self._enter))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._names.get(id(module), "?"))
        self._entered.append([leaf._event for leaf in tree_leaves(args) if hasattr(leaf, "_event")])
        self._inside += id(module) in self._opaque

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path, made_by = self._stack.pop(), self._entered.pop()
        self._inside -= id(module) in self._opaque
        if not self._inside and id(module) in self._opaque and isinstance(output, Tensor):
            self.operands[self._note(path, "", "output", output)] = made_by

    def _note(self, module: str, line: str, function: str, tensor: Tensor) -> Key:
        place = (module, line, function)
        key = Key(*place, self._count[place])
        self._count[place] += 1
        self._paused, before = True, self._paused
        try:
            self.values[key] = tensor.detach().clone()
            if tensor.requires_grad and tensor.is_floating_point() and not tensor.is_leaf:
                tensor.register_hook(lambda gradient: self._take(key, gradient))
            tensor._event = key  # type: ignore[attr-defined]
        finally:
            self._paused = before
        return key

    def _take(self, key: Key, gradient: Optional[Tensor]) -> None:
        self._paused, before = True, self._paused
        try:
            if gradient is not None:
                self.gradients[key] = gradient.detach().clone()
        finally:
            self._paused = before
