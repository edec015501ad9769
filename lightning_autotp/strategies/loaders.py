"""Loaders of ranks that share a model: one order, the same ends and errors; or batches that one of them loads.

A loader stays what it is, a copy of another class, so that samplers, workers and states are where Lightning looks.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any, Optional

import numpy
import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from lightning_autotp.compat import collect_random_state, set_random_state
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.same import AT, require_same
from lightning_autotp.training.batches import Sender, meet_batch

_FIX = "Ranks that share a model must have the same loaders, of the same length"


def shared_loader(loader: Any, mesh: Mesh, config: TPTrainingConfig, name: str) -> Any:
    """A loader like ``loader`` for ranks that share a model; all of them must call it.

    Each epoch starts with the random state of the first of them, of samplers and generators, too. With
    ``check_agreement`` a batch that not all ranks have, or of another structure, and an error of one rank are errors on
    all. With ``broadcast_batch`` the first rank loads, and the others' loaders are not iterated.

    Raises:
        DisagreementError: on all of them, if their loaders or lengths differ.
    """
    length = _length(loader)
    facts = {AT: f"{name} is made", f"the class of {name}": type(loader).__qualname__}
    if not config.broadcast_batch:
        facts |= _facts(loader, name, length)
    if config.check_agreement:
        require_same(facts, _FIX, mesh)
    if config.broadcast_batch:
        length = mesh.collectives.broadcast_object(length, "host")
    made: Any = type(type(loader).__name__, (_Iterable,), {})(loader)
    if isinstance(loader, DataLoader):
        made = DataLoader.__new__(_class_of(type(loader)))
        vars(made).update(vars(loader))
        vars(made)["_iterator"] = None
    vars(made)["_autotp"] = _Shared(mesh, config, name, length)
    return made


def _facts(loader: Any, name: str, length: Optional[int]) -> dict[str, str]:
    facts = {f"the length of {name}": str(length)}
    for key in ("batch_size", "drop_last", "num_workers"):
        if isinstance(loader, DataLoader):
            facts[f"{key} of {name}"] = str(getattr(loader, key))
    for key in ("sampler", "batch_sampler", "dataset"):
        facts[f"{key} of {name}"] = type(getattr(loader, key, None)).__qualname__
    return facts


def _length(loader: Any) -> Optional[int]:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


class _Shared:
    """What a loader knows of the ranks that share it."""

    def __init__(self, mesh: Mesh, config: TPTrainingConfig, name: str, length: Optional[int]) -> None:
        self.mesh, self.name, self.length = mesh, name, length
        self.checks, self.broadcasts = config.check_agreement, config.broadcast_batch

    def iterate(self, loader: Any, own: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """The batches of an epoch; ``own`` begins this rank's own."""
        return (_Received if self.broadcasts else _Met)(self, loader, own)

    def share_random_state(self, loader: Any) -> None:
        if self.checks:
            require_same({AT: f"{self.name} begins"}, _FIX, self.mesh)
        mine = collect_random_state(include_cuda=False), [_state(one) for one in _generators(loader)]
        state, own = self.mesh.collectives.broadcast_object(mine, "host")
        if not self.mesh.is_first:
            set_random_state(state)
            for generator, saved in zip(_generators(loader), own):
                _set_state(generator, saved)


class _Met(Iterator[Any]):
    """The batches of a loader that each rank iterates, begun with the same random state."""

    def __init__(self, shared: _Shared, loader: Any, own: Callable[[], Iterator[Any]]) -> None:
        self.shared, self.number = shared, 0
        self.batches: Iterator[Any] = iter(())
        self.error: Optional[Exception] = None
        shared.share_random_state(loader)
        try:
            self.batches = own()
        except Exception as error:  # the others are told where they wait for this one's first batch
            self.error = error

    def __next__(self) -> Any:
        batch, ended = None, False
        if self.error is None:
            try:
                batch = next(self.batches)
            except StopIteration:
                ended = True
            except Exception as error:
                self.error = error
        if self.shared.checks:
            meet_batch(self.shared.mesh, f"batch {self.number} of {self.shared.name}", batch, ended, self.error)
        self.number += 1
        if self.error is not None:
            raise self.error
        if ended:
            raise StopIteration
        return batch


class _Received(Iterator[Any]):
    """The batches of a loader that one rank iterates, which sends them."""

    def __init__(self, shared: _Shared, loader: Any, own: Callable[[], Iterator[Any]]) -> None:
        self.loader, self.loads = loader, shared.mesh.is_first
        self.batches: Iterator[Any] = iter(())
        self.error: Optional[Exception] = None
        try:
            self.batches = own() if self.loads else self.batches
        except Exception as error:
            self.error = error
        shared.share_random_state(None)  # which beginning has drawn from
        self.sender = Sender(shared.mesh, shared.name)

    def _load(self) -> Any:
        if self.error is not None:
            raise self.error
        return next(self.batches)

    def __next__(self) -> Any:
        made = self.sender.next(self._load if self.loads else None, lambda: _seen(self.loader))
        if made is None:
            raise StopIteration
        batch, seen = made
        if not self.loads and seen is not None:
            self.loader.batch_sampler.seen_batch_indices = seen  # which samples a prediction is of
        return batch


def _seen(loader: Any) -> Any:
    return getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", None)


def _generators(loader: Any) -> list[Any]:
    """The random number generators of a loader and its samplers, in an order that is the same on all ranks."""
    kinds = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)
    found, waiting, seen = [], [loader], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        for value in vars(one).values() if hasattr(one, "__dict__") else ():
            if isinstance(value, kinds) and id(value) not in seen:
                seen.add(id(value))
                found.append(value)
            elif isinstance(value, (Sampler, BatchSampler)):
                waiting.append(value)
    return found


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, numpy.random.Generator) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


_classes: dict[type, type] = {}


def _class_of(kind: type[DataLoader[Any]]) -> type:
    """The class of ``kind`` with batches that ranks share."""
    if "_autotp" in vars(kind):
        return kind
    if kind not in _classes:

        def __iter__(self: Any) -> Iterator[Any]:
            return self._autotp.iterate(self, lambda: kind.__iter__(self))

        def __len__(self: Any) -> int:
            if self._autotp.length is None or not self._autotp.broadcasts:
                return kind.__len__(self)
            return self._autotp.length

        _classes[kind] = type(kind.__name__, (kind,), {"__iter__": __iter__, "__len__": __len__, "_autotp": None})
    return _classes[kind]


class _Iterable:
    """Any other iterable with batches that ranks share; what else it has is there, too."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        shared: _Shared = self._autotp
        return shared.iterate(self, lambda: iter(self.inner))

    def __len__(self) -> int:
        shared: _Shared = self._autotp
        return len(self.inner) if shared.length is None or not shared.broadcasts else shared.length

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "_autotp") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)
