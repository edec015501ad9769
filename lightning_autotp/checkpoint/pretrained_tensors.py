"""Tensors that lie in files, and what transformers makes of them when it loads: nothing is read until asked for.

transformers' conversions run on a :class:`StoredTensor`, which only notes what is done. Joining, stacking, splitting
and transposing keep their geometry, so that a box of the result is read as boxes of what is in the files; everything
else is computed from all that it needs, and freed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Optional

import torch
from torch import Tensor

from lightning_autotp.checkpoint.pretrained_files import Files
from lightning_autotp.compat import make_wrapper_subclass, tree_map
from lightning_autotp.layout.layout import Box

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Stored(ABC):
    """A full tensor of ``shape`` and ``dtype`` that can be read box by box."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        """Copy each of ``boxes`` into the tensor of its size in ``out``, whatever its strides, dtype and device."""

    def full(self) -> Tensor:
        """All of it, contiguous, on the CPU."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read([Box.full(self.shape)], [out])
        return out


@dataclass(frozen=True, eq=False)
class InFile(Stored):
    """A tensor of a safetensors file."""

    files: Files
    file: str
    key: str

    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        for box, tensor in zip(boxes, out):
            tensor.copy_(self.files.view(self.file, self.key, box))


@dataclass(frozen=True, eq=False)
class InMemory(Stored):
    """A tensor that is there, as those of files that torch maps."""

    tensor: Tensor

    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        for box, tensor in zip(boxes, out):
            tensor.copy_(box.view(self.tensor))


@dataclass(frozen=True, eq=False)
class Joined(Stored):
    """Tensors one behind the other along ``dim``."""

    parts: tuple[Stored, ...]
    dim: int

    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        starts = accumulate((part.shape[self.dim] for part in self.parts), initial=0)
        for part, start in zip(self.parts, starts):
            held = Box(_at(self.dim, start, self.shape), _at(self.dim, part.shape[self.dim], self.shape, self.shape))
            inside, into = [], []
            for box, tensor in zip(boxes, out):
                common = held.overlap(box)
                if common is not None:
                    inside.append(_moved(common, self.dim, -start))
                    into.append(common.view(tensor, box))
            if inside:
                part.read(inside, into)


@dataclass(frozen=True, eq=False)
class Stacked(Stored):
    """Tensors of one shape, side by side along a new ``dim``."""

    parts: tuple[Stored, ...]
    dim: int

    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        for number, part in enumerate(self.parts):
            inside, into = [], []
            for box, tensor in zip(boxes, out):
                first, length = box.offset[self.dim], box.size[self.dim]
                if first <= number < first + length:
                    inside.append(Box(_without(box.offset, self.dim), _without(box.size, self.dim)))
                    into.append(tensor.select(self.dim, number - first))
            if inside:
                part.read(inside, into)


@dataclass(frozen=True, eq=False)
class Narrowed(Stored):
    """A run of a tensor, from ``start`` along ``dim``."""

    of: Stored
    dim: int
    start: int

    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        self.of.read([_moved(box, self.dim, self.start) for box in boxes], out)


@dataclass(frozen=True, eq=False)
class Transposed(Stored):
    """A tensor with two of its dims exchanged."""

    of: Stored
    dims: tuple[int, int]

    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        turned = [Box(_exchanged(box.offset, self.dims), _exchanged(box.size, self.dims)) for box in boxes]
        self.of.read(turned, [tensor.transpose(*self.dims) for tensor in out])


@dataclass(frozen=True, eq=False)
class Cast(Stored):
    """A tensor in another dtype."""

    of: Stored

    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        for box, tensor in zip(boxes, out):
            if tensor.dtype == self.dtype:
                self.of.read([box], [tensor])
            else:  # rounded to this dtype first, as if it had been loaded
                rounded = torch.empty(box.size, dtype=self.dtype)
                self.of.read([box], [rounded])
                tensor.copy_(rounded)


@dataclass(frozen=True, eq=False)
class Computed(Stored):
    """What an operator gives, of which no part can be had without all."""

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: Optional[int] = None
    """Which of its results it is, if it gives several."""

    def full(self) -> Tensor:
        with torch.no_grad():
            result = self.operator(*in_memory(self.args), **in_memory(self.kwargs))
        found: Tensor = result if self.number is None else result[self.number]
        return found.contiguous()

    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        full = self.full()
        for box, tensor in zip(boxes, out):
            tensor.copy_(box.view(full))


def in_memory(values: Any) -> Any:
    """``values``, any nested containers, with what is stored read in full."""
    return tree_map(lambda value: value.stored.full() if isinstance(value, StoredTensor) else value, values)


class StoredTensor(Tensor):
    """What transformers sees of a tensor in a file: its shape and dtype, and operators that are noted, not done."""

    stored: Stored

    @staticmethod
    def __new__(cls, stored: Stored) -> "StoredTensor":
        made: StoredTensor = make_wrapper_subclass(cls, stored.shape, dtype=stored.dtype, device="cpu")
        made.stored = stored
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredTensor({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME:
            return cls(args[0].stored)
        if func in _GEOMETRY:
            found = _GEOMETRY[func](*args, **kwargs)
            if found is not None:
                return [cls(part) for part in found] if isinstance(found, list) else cls(found)
        if func._schema.is_mutable:
            if isinstance(args[0], StoredTensor):
                raise RuntimeError(
                    f"{func} would write into a tensor of a checkpoint, which is not read yet; change it after setup."
                )
            return func(*in_memory(args), **in_memory(kwargs))
        return _computed(func, args, kwargs)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of any operator, not computed yet where its shape is known without."""
    shapes = tree_map(_shape_of, (args, kwargs))
    try:
        with torch.no_grad():
            result = func(*shapes[0], **shapes[1])
    except Exception:  # depends on values, or mixes them with tensors that are there
        return func(*in_memory(args), **in_memory(kwargs))
    if isinstance(result, Tensor):
        return StoredTensor(Computed(tuple(result.shape), result.dtype, func, args, kwargs))
    if isinstance(result, (list, tuple)) and all(isinstance(one, Tensor) for one in result):
        return [
            StoredTensor(Computed(tuple(one.shape), one.dtype, func, args, kwargs, number))
            for number, one in enumerate(result)
        ]
    return func(*in_memory(args), **in_memory(kwargs))


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


# -- operators whose geometry is kept ----------------------------------------------------------------------------------

_SAME = frozenset((aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default))


def _cast(x: Any, *, dtype: Optional[torch.dtype] = None, **_: Any) -> Stored:
    stored: Stored = x.stored
    return stored if dtype in (None, stored.dtype) else Cast(stored.shape, dtype or stored.dtype, stored)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Optional[Stored]:
    parts = _parts(tensors)
    if not all(part.shape for part in parts) or len({part.dtype for part in parts}) > 1:
        return None
    shape = list(parts[0].shape)
    dim %= len(shape)
    if any(len(part.shape) != len(shape) for part in parts):
        return None
    shape[dim] = sum(part.shape[dim] for part in parts)
    return Joined(tuple(shape), parts[0].dtype, parts, dim)


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Optional[Stored]:
    parts = _parts(tensors)
    shape = parts[0].shape
    if any((part.shape, part.dtype) != (shape, parts[0].dtype) for part in parts):
        return None
    dim %= len(shape) + 1
    return Stacked((*shape[:dim], len(parts), *shape[dim:]), parts[0].dtype, parts, dim)


def _split_sizes(x: Any, sizes: Sequence[int], dim: int = 0) -> list[Stored]:
    stored: Stored = x.stored
    dim %= len(stored.shape)
    starts = accumulate(sizes, initial=0)
    return [_narrowed(stored, dim, start, size) for start, size in zip(starts, sizes)]


def _split(x: Any, size: int, dim: int = 0) -> list[Stored]:
    total = x.shape[dim]
    return _split_sizes(x, [min(size, total - start) for start in range(0, total, size)], dim)


def _slice(
    x: Any, dim: int = 0, start: Optional[int] = None, end: Optional[int] = None, step: int = 1
) -> Optional[Stored]:
    if step != 1:
        return None
    first, stop, _ = slice(start, end).indices(x.shape[dim])
    return _narrowed(x.stored, dim % x.ndim, first, max(0, stop - first))


def _transposed(x: Any, first: int, second: int) -> Stored:
    stored: Stored = x.stored
    dims = (first % len(stored.shape), second % len(stored.shape))
    return Transposed(_exchanged(stored.shape, dims), stored.dtype, stored, dims)


def _t(x: Any) -> Optional[Stored]:
    return _transposed(x, 0, 1) if x.ndim == 2 else None


_GEOMETRY: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _cast,
    aten.cat.default: _joined,
    aten.stack.default: _stacked,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.slice.Tensor: _slice,
    aten.transpose.int: _transposed,
    aten.t.default: _t,
}


def _narrowed(stored: Stored, dim: int, start: int, size: int) -> Stored:
    return Narrowed((*stored.shape[:dim], size, *stored.shape[dim + 1 :]), stored.dtype, stored, dim, start)


def _parts(tensors: Sequence[Tensor]) -> tuple[Stored, ...]:
    return tuple(
        tensor.stored if isinstance(tensor, StoredTensor) else InMemory(tuple(tensor.shape), tensor.dtype, tensor)
        for tensor in tensors
    )


def _at(dim: int, value: int, shape: Sequence[int], others: Optional[Sequence[int]] = None) -> tuple[int, ...]:
    """``value`` at ``dim``, and at other dims those of ``others``, or 0."""
    return tuple(value if at == dim else (others[at] if others is not None else 0) for at in range(len(shape)))


def _moved(box: Box, dim: int, by: int) -> Box:
    return Box(tuple(start + by * (at == dim) for at, start in enumerate(box.offset)), box.size)


def _without(values: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*values[:dim], *values[dim + 1 :])


def _exchanged(values: Sequence[int], dims: tuple[int, int]) -> tuple[int, ...]:
    turned = list(values)
    turned[dims[0]], turned[dims[1]] = values[dims[1]], values[dims[0]]
    return tuple(turned)
