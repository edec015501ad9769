"""A digest of everything that a derivation looks at: equal in two processes only where they would derive the same.

What cannot be told apart (objects whose state is written in C, loggers, random numbers) is left out. A digest that is
equal by mistake does no harm: a plan out of the cache is proved like any other before the first step.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import platform
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, range, slice)

_OPAQUE = (Dataset, DataLoader, Sampler, Trainer, LightningDataModule)
"""What a model may keep, and no derivation reads."""

_SKIPPED = frozenset(
    (
        "_trainer",
        "_fabric",
        "__dict__",
        "__weakref__",
        "__doc__",
        "__module__",
        "__annotations__",
        "_abc_impl",
        "sample_batch",
        "example_input_array",
        "_example_input_array",
    )
)

_HASH = re.compile(r"_+(\w+_)?hash(_\w+)?")
"""Names of what Python's ``hash`` gave, which is another number in each process."""

_INSTALLED = ("site-packages", "dist-packages")

_VERSIONED = (
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "lightning_autotp",
    "transformers",
    "numpy",
)
"""Packages whose functions are known by a version and a file, wherever they are installed."""

_MOST = 4096
"""Numbers of a tensor, and entries of a container, up to which all of them count."""


def digest_of(*values: Any) -> str:
    """Make one digest of models, functions with the code that they reach, settings and plain values.

    Weights do not count, only their names, shapes and dtypes; nor do data sets and Trainers.
    """
    made = _Digest()
    made.add([*values, _versions(), torch.get_default_dtype()])
    return made.hash.hexdigest()


class _Digest:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is one object's only as long as it lives
        self._left: list[Any] = []

    def add(self, value: Any) -> None:
        """Add a value and everything that can be reached from it."""
        self._left.append(value)
        while self._left:
            self._one(self._left.pop())

    def _note(self, *words: object) -> None:
        self.hash.update(repr(words).encode("utf-8", "backslashreplace"))

    def _then(self, values: Iterable[Any]) -> None:
        self._left.extend(reversed(list(values)))

    def _named(self, kind: str, values: Mapping[Any, Any]) -> None:
        kept = ((n, v) for n, v in values.items() if n not in _SKIPPED and not _HASH.fullmatch(n))
        held = sorted(kept, key=itemgetter(0))
        self._note(kind, [name for name, _ in held])
        self._then(value for _, value in held)

    def _one(self, value: Any) -> None:
        if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
            self._note(type(value).__name__, value)
            return
        if id(value) in self._seen:
            self._note("again", self._seen[id(value)])
            return
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, type):
            self._class(value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, enum.Enum):
            self._note("enum", type(value).__qualname__, value.name)
        elif isinstance(value, dict):
            self._note("dict", len(value))
            self._then(one for pair in list(value.items())[:_MOST] for one in pair)
        elif isinstance(value, (list, tuple)):
            self._note(type(value).__name__, len(value))
            self._then(value[:_MOST])
        elif isinstance(value, (set, frozenset)):
            self._note("set", len(value), sorted(repr(one) for one in value if isinstance(one, _PLAIN)))
        elif isinstance(value, np.ndarray):
            self._note("array", value.shape, str(value.dtype), value.tolist() if value.size <= _MOST else ())
        elif isinstance(value, os.PathLike):
            self._note("path", os.fspath(value))
        else:
            self._other(value)

    def _other(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._note("method")
            self._then((value.__func__, value.__self__))
        elif isinstance(value, (staticmethod, classmethod)):
            self._then((value.__func__,))
        elif isinstance(value, (property, functools.cached_property)):
            self._note("property")
            self._then(getattr(value, name, None) for name in ("func", "fget", "fset"))
        elif isinstance(value, partial):
            self._note("partial")
            self._then((value.func, value.args, value.keywords))
        elif isinstance(value, types.ModuleType):
            self._note("module", value.__name__)
        elif hasattr(value, "__wrapped__") and not hasattr(value, "__dict__"):
            self._then((value.__wrapped__,))
        else:
            self._object(value)

    def _object(self, value: Any) -> None:
        kind: Any = type(value)
        if isinstance(value, _OPAQUE) or kind.__module__.partition(".")[0] in ("threading", "logging", "weakref"):
            self._note("opaque", kind.__qualname__)
            return
        self._note("object", getattr(value, "__module__", ""), getattr(value, "__qualname__", ""))
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._named("attributes", attributes)
        self._left.append(kind)

    def _tensor(self, value: Tensor) -> None:
        values = None
        counts = not value.is_floating_point() and not value.is_complex()
        if counts and not isinstance(value, nn.Parameter) and not value.is_meta and value.numel() <= _MOST:
            values = value.detach().cpu().tolist()
        self._note("tensor", tuple(value.shape), str(value.dtype), value.is_meta, value.requires_grad, values)
        if type(value) not in (Tensor, nn.Parameter):
            self._then((type(value),))

    def _module(self, value: nn.Module) -> None:
        held = dict(vars(value))
        for name, hooks in held.items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                held[name] = list(hooks.values())  # their keys count all hooks of the process
        self._left.append(type(value))
        self._named("module", held)

    # -- code ---------------------------------------------------------------------------------------------------------

    def _class(self, value: type) -> None:
        self._note("class", value.__module__, value.__qualname__)
        if is_installed(value.__module__):
            self._note(_file(value.__module__))
            self._then(each for base in value.__mro__ for each in _put_in(base))
            return
        self._then(base for base in value.__mro__[1:] if base is not object)
        self._named("body", dict(vars(value)))

    def _function(self, value: types.FunctionType) -> None:
        self._note("function", value.__module__, value.__qualname__)
        if is_installed(value.__module__ or ""):
            self._note(_file(value.__module__))
        else:
            self._note(_code(value.__code__))
            self._then(_reached(value))
        cells = [_contents(cell) for cell in value.__closure__ or ()]
        self._then((value.__defaults__, value.__kwdefaults__, *cells))


def _put_in(base: type) -> Iterator[Any]:
    """Functions that somebody else has put into an installed class."""
    for _, held in sorted(vars(base).items()):
        if isinstance(held, types.FunctionType) and not is_installed(held.__module__ or ""):
            yield held


def _reached(function: types.FunctionType) -> Iterator[Any]:
    """What a function's code names outside of it: functions, classes, numbers, and what it takes from modules."""
    names = sorted(set(_names(function.__code__)))
    for name in names:
        held = function.__globals__.get(name)
        if isinstance(held, types.ModuleType) and not is_installed(held.__name__):
            for inner in names:
                yield from _of_code(vars(held).get(inner))
        else:
            yield from _of_code(held)


def _of_code(held: Any) -> Iterator[Any]:
    small = isinstance(held, (list, tuple, dict)) and len(held) <= _MOST
    if isinstance(held, (types.FunctionType, type, partial, enum.Enum, *_PLAIN)) or small:
        yield held
    elif hasattr(held, "__wrapped__"):  # functools.cache and the like
        yield held.__wrapped__


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _code(code: types.CodeType) -> Any:
    constants = [_code(one) if isinstance(one, types.CodeType) else _constant(one) for one in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants


def _constant(value: Any) -> str:
    # the order of a set of strings is another one in each process
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


# -- packages ---------------------------------------------------------------------------------------------------------


@cache
def is_installed(module: str) -> bool:
    """Whether a module is one of a package that is installed, whose code does not change but with its file."""
    top = module.partition(".")[0]
    if top in _VERSIONED or top in sys.stdlib_module_names and top != "__main__":
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return any(folder in Path(file).parts for folder in _INSTALLED)


@cache
def _file(module: str) -> tuple[Any, ...]:
    """The version of a module's package, and size and time of its file."""
    top = getattr(sys.modules.get(module.partition(".")[0]), "__version__", None)
    try:
        told = os.stat(getattr(sys.modules.get(module), "__file__", None) or "")
        return str(top), told.st_size, told.st_mtime_ns
    except OSError:
        return (str(top),)


def _versions() -> tuple[str, ...]:
    packages = [sys.modules.get(name) for name in _VERSIONED]
    found = [f"{one.__name__} {getattr(one, '__version__', '')}" for one in packages if one is not None]
    return (platform.python_version(), platform.python_implementation(), *found, _own_source())


@cache
def _own_source() -> str:
    """A digest of this package's code."""
    made = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        made.update(path.read_bytes())
    return made.hexdigest()
