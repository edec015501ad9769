"""The places in a model's code where random numbers are drawn, and how what is drawn there is sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Optional, Union

from lightning_autotp.randomness.cut import Cut
from lightning_autotp.randomness.places import Chain, Item, starred


@dataclass(frozen=True)
class Site:
    """What a place draws.

    Args:
        cut: how the ranks share it; None if every rank draws it all.
        own: instead, a part of it that is not known: each rank draws numbers of its own.
        order: how its dims lie in memory in the unsharded model, the outermost first.
    """

    cut: Optional[Cut] = None
    own: bool = False
    order: tuple[int, ...] = ()

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different parts."""
        return self.own or self.cut is not None


@dataclass(frozen=True)
class Drawn:
    """One draw of a step.

    Args:
        function: the name of what draws.
        chain: the calls that lead to it, the innermost first.
        counts: for the modules of the chain, how many draws there were at this place since the module was called.
        site: what is drawn.
    """

    function: str
    chain: Chain
    counts: tuple[tuple[str, int], ...]
    site: Site


@dataclass(frozen=True)
class InTurn:
    """Sites that one line draws in turn, counted from when the module at ``path`` is called."""

    path: str
    sites: Mapping[int, Site]


Found = Union[Site, InTurn]
Key = tuple[object, ...]
"""The name of a function, and the beginning of a chain."""


@dataclass(frozen=True)
class Sites:
    """All draws that are known."""

    drawn: tuple[Drawn, ...] = ()

    def __bool__(self) -> bool:
        """Whether ranks hold different parts of anything that is drawn."""
        return any(one.site.is_sharded for one in self.drawn)

    def with_more(self, more: Sites) -> Sites:
        """These and others."""
        return Sites(tuple(dict.fromkeys((*self.drawn, *more.drawn))))

    @cached_property
    def modules(self) -> frozenset[str]:
        """The paths, with stars, of the innermost modules that draw something of which ranks hold different parts."""
        found = (path_of(one.chain) for one in self.drawn if one.site.is_sharded)
        return frozenset(star for path in found if (star := starred(path)) is not None)

    @cached_property
    def counted(self) -> frozenset[str]:
        """The paths, with stars, of modules whose draws are told apart by their number."""
        found = (one for tree in self._trees for one in tree.leaves.values() if isinstance(one, InTurn))
        return frozenset(star for one in found if (star := starred(one.path)) is not None)

    @cached_property
    def functions(self) -> frozenset[str]:
        """The names of what draws."""
        return frozenset(one.function for one in self.drawn)

    def find(self, function: str, chain: Iterator[Item]) -> tuple[Optional[Found], Key]:
        """What ``function`` draws at ``chain``, and as much of that as tells it; None if it is not known.

        Looked for is the very place, or else one in a block that is alike.
        """
        here: list[Item] = []
        for tree, change in zip(self._trees, (_same, _alike)):
            key: Key = (function,)
            for item in chain_again(here, chain):
                key = (*key, change(item))
                if key in tree.leaves:
                    return tree.leaves[key], key
                if key not in tree.inner:
                    break
        return None, (function, *here)

    @cached_property
    def _trees(self) -> tuple[_Tree, _Tree]:
        return _tree(self.drawn, _same), _tree(self.drawn, _alike)


def path_of(chain: Chain) -> Optional[str]:
    """The path of the innermost module."""
    return next((item.path for item in chain if item.path is not None), None)


def chain_again(here: list[Item], rest: Iterator[Item]) -> Iterator[Item]:
    """What was taken from a chain before, then the rest of it, which is remembered."""
    yield from list(here)
    for item in rest:
        here.append(item)
        yield item


def _same(item: Item) -> Item:
    return item


def _alike(item: Item) -> Item:
    return Item(starred(item.path), item.line)


@dataclass(frozen=True)
class _Tree:
    """The shortest beginnings of chains that tell what is drawn, and those that do not tell it yet."""

    leaves: Mapping[Key, Found]
    inner: frozenset[Key]


def _tree(drawn: Iterable[Drawn], change: Callable[[Item], Item]) -> _Tree:
    waiting: dict[Key, list[tuple[Drawn, Chain]]] = {}
    for one in drawn:
        waiting.setdefault((one.function,), []).append((one, tuple(map(change, one.chain))))
    leaves: dict[Key, Found] = {}
    inner: set[Key] = set()
    while waiting:
        key, group = waiting.popitem()
        depth = len(key) - 1
        sites = {one.site for one, _ in group}
        if depth and len(sites) == 1:
            leaves[key] = sites.pop()
        elif any(len(chain) == depth for _, chain in group):
            found = _in_turn([one for one, _ in group])
            if found is not None:
                leaves[key] = found
        else:
            inner.add(key)
            for one, chain in group:
                waiting.setdefault((*key, chain[depth]), []).append((one, chain))
    return _Tree(leaves, frozenset(inner))


def _in_turn(group: Sequence[Drawn]) -> Optional[InTurn]:
    """The sites of one place by their number since the call of the innermost module for which that tells them."""
    for path, _ in group[0].counts:
        sites: dict[int, set[Site]] = {}
        for one in group:
            number = dict(one.counts).get(path)
            if number is None:
                break
            sites.setdefault(number, set()).add(one.site)
        else:
            if all(len(found) == 1 for found in sites.values()):
                return InTurn(path, {number: found.pop() for number, found in sites.items()})
    return None
