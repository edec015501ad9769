"""What draws the unsharded model's random numbers while a sharded one runs, where it is known to need them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_autotp.compat.recompute import FollowingMode, modes_on
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.randomness.cut import Part
from lightning_autotp.randomness.draw import NotDrawnError, draw, tensors_of
from lightning_autotp.randomness.functions import draws, name_if_random
from lightning_autotp.randomness.own_stream import own_stream
from lightning_autotp.randomness.places import Item, Walk, names_of, starred
from lightning_autotp.randomness.sites import InTurn, Key, Site, Sites


class RandomNumbers:
    """The random numbers of a sharded model.

    Args:
        model: the model.
        mesh: this process's place.
        tokens: how many tokens the batch under way has, for sequence parallelism.
        note: is told, once for each place, in words what is not the unsharded model's; None tells nobody.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        tokens: Callable[[], int] = lambda: 0,
        note: Optional[Callable[[Key, str], None]] = None,
    ) -> None:
        self.model, self.mesh, self.tokens = model, mesh, tokens
        self.names = names_of(model)
        self.sites = Sites()
        self._note, self._noted = note, set[Key]()
        self._handles: list[RemovableHandle] = []
        self._counts: Counter[Key] = Counter()
        self._of_module: dict[str, set[Key]] = {}
        self._local = threading.local()

    def learn(self, sites: Sites) -> None:
        """Take over what is known of draws, and watch the modules that need it."""
        if sites == self.sites:
            return
        self.remove()
        self.sites = sites
        for path, module in self.model.named_modules():
            if starred(path) in sites.counted:
                self._handles.append(module.register_forward_pre_hook(self._begins(path), prepend=True))
            if sites and starred(path) in sites.modules:
                self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, what is drawn is seen wherever it is drawn: in a step itself, outside of modules."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomNumbers:
        return self  # hooks of a copied model refer to it

    # -- around modules

    def _enter(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        is_on = any(isinstance(mode, _Mode) for mode in modes_on())
        modes: list[Optional[_Mode]] = self._local.__dict__.setdefault("modes", [])
        modes.append(_Mode(self) if self.sites and not is_on else None)  # a second one would see what the first draws
        if modes[-1] is not None:
            modes[-1].__enter__()

    def _leave(self, *_: Any) -> None:
        modes: list[Optional[_Mode]] = self._local.__dict__.get("modes", [])
        mode = modes.pop() if modes and not torch.compiler.is_compiling() else None
        if mode is not None:
            mode.__exit__(None, None, None)

    def _begins(self, path: str) -> Callable[..., None]:
        def begin(module: nn.Module, args: Any) -> None:
            for key in self._of_module.pop(path, ()):
                del self._counts[key]

        return begin

    # -- a draw

    def drawn(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What ``func`` returns, with this rank's part of what the unsharded model draws, if that is known."""
        site = self._site(name)
        if site is None or not site.is_sharded:
            return func(*args, **kwargs)
        try:
            if site.cut is None:
                raise NotDrawnError("it is not known what part of it a rank has")
            return draw(func, name, args, kwargs, self._finder(site), site.order)
        except NotDrawnError as error:
            if self._note is not None:
                key: Key = (name, *list(Walk(self.names)))
                if key not in self._noted:
                    self._noted.add(key)
                    self._note(key, str(error))
        with own_stream(_device(args, kwargs), self.mesh.tp_rank, kwargs.get("generator")):
            return func(*args, **kwargs)

    def _site(self, name: str) -> Optional[Site]:
        walk = Walk(self.names)
        found, key = self.sites.find(name, walk)
        if not isinstance(found, InTurn):
            return found
        key = (*key, *walk)  # a recompute is counted by itself
        path = next((str(item.path) for item in key if isinstance(item, Item) and _is_at(item, found.path)), found.path)
        number = self._counts[key]
        self._counts[key] += 1
        self._of_module.setdefault(path, set()).add(key)
        return found.sites.get(number % len(found.sites))

    def _finder(self, site: Site) -> Callable[[Sequence[int]], Part]:
        assert site.cut is not None
        cut = site.cut
        return lambda shape: cut.of(shape, self.mesh.tp_rank, self.mesh.tp_size, self.tokens())


class _Mode(FollowingMode):
    def __init__(self, numbers: RandomNumbers) -> None:
        super().__init__()
        self.numbers = numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_if_random(func)
        if name and draws(name, args, kwargs):
            return self.numbers.drawn(func, name, args, kwargs)
        return func(*args, **kwargs)


def _is_at(item: Any, path: str) -> bool:
    return item.path is not None and starred(item.path) == starred(path)


def _device(args: Any, kwargs: Any) -> torch.device:
    tensors: list[Tensor] = tensors_of(args, kwargs)
    return tensors[0].device if tensors else torch.device(kwargs.get("device") or torch.get_default_device())
