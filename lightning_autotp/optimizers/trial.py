"""Found out by trying: which optimizers are elementwise, and what the others must see to step as unsharded.

Names say nothing: any class may be a user's own. So copies of the optimizer, with the user's options, take steps on
small parameters, whole, and on the parts that two ranks would hold, and must come to the same bits. What is not proved
elementwise is tried as it will run: whole tensors on the rank that owns them.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.compat import TorchDispatchMode
from lightning_autotp.optimizers.compare import same, same_options, same_state, same_value
from lightning_autotp.optimizers.samples import Kind, Sample, gradient, samples_of
from lightning_autotp.optimizers.surroundings import as_before, own_methods
from lightning_autotp.optimizers.twin import CopyError, family, per_parameter, twin

_LEAST, _MOST = 30, 260
"""Steps of a trial; more than the least where an option counts more steps than that, as long as there is time."""

_SECONDS = 0.3


class Sees(IntEnum):
    """What an optimizer must see to step one element of a parameter."""

    ELEMENT = 0
    TENSOR = 1
    EVERYTHING = 2


@dataclass(frozen=True)
class Verdict:
    """What trying has shown of an optimizer.

    Args:
        sees: what each param group must see.
        closure_first: whether ``step`` calls its closure before anything else, and once.
        needs_closure: whether ``step`` cannot do without one.
        methods: other methods that change parameters or state, as ``first_step`` of SAM does.
        wrong: why it cannot be used, if so.
    """

    sees: tuple[Sees, ...] = ()
    closure_first: bool = True
    needs_closure: bool = False
    methods: tuple[str, ...] = ()
    wrong: str = ""


class _SendsError(Exception):
    """The optimizer sends something between processes."""


class _NoSending(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise _SendsError(f"it sends tensors between processes by itself ({func})")
        return func(*args, **(kwargs or {}))


@dataclass
class _Run:
    """Copies of the optimizer that stand for ranks, and their parameters by group; None where a rank has it not."""

    optimizers: list[Any]
    params: list[list[list[Optional[nn.Parameter]]]] = field(default_factory=list)


def tried(optimizer: Any, kinds: Sequence[Sequence[Kind]], *, with_state: bool = True) -> Verdict:
    """Try ``optimizer``, which stays as it is; random number generators, too.

    Args:
        optimizer: an optimizer of a sharded model.
        kinds: for each param group, the kinds of parameters in it.
        with_state: whether copies begin with state like that which is there.
    """
    cut = [any(kind.sharded for kind in group) for group in kinds]
    verdict = Verdict(tuple(Sees.ELEMENT for _ in kinds))
    # layerwise rates are often off while nothing decays, and a user may turn decay on at any time
    decays = (False, True) if _has_no_decay(optimizer) else (False,)
    with as_before([kind.device for group in kinds for kind in group]):
        try:
            for large, decaying in ((large, decaying) for large in (False, True) for decaying in decays):
                left = [here and not sees for here, sees in zip(cut, verdict.sees)]
                if any(left):
                    larger = [large and here for here in left]
                    found = _Trial(optimizer, kinds, decaying, larger, with_state).verdict()
                    if found.wrong:
                        return found
                    verdict = _both(verdict, found)
        except CopyError as error:
            return Verdict(wrong=f"it cannot be copied to be tried: {error}")
        except _SendsError as error:
            return Verdict(wrong=str(error))
        except Exception as error:
            return Verdict(wrong=f"its step raises on small tensors ({type(error).__name__}: {error})")
    return verdict


def _both(a: Verdict, b: Verdict) -> Verdict:
    """What two trials have shown, the stricter of it."""
    sees = tuple(map(max, a.sees, b.sees))
    if Sees.EVERYTHING in sees:
        sees = (Sees.EVERYTHING,) * len(sees)
    return replace(b if any(b.sees) else a, sees=sees, needs_closure=a.needs_closure or b.needs_closure)


def _has_no_decay(optimizer: Any) -> bool:
    return any(value == 0 for group in optimizer.param_groups for _, value in _decays(group))


def _decays(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((k, v) for k, v in group.items() if "decay" in k and type(v) in (int, float))


class _Trial:
    def __init__(
        self,
        optimizer: Any,
        kinds: Sequence[Sequence[Kind]],
        decaying: bool,
        large: Sequence[bool],
        with_state: bool,
    ) -> None:
        self.with_state = with_state
        self.optimizer, self.decaying = optimizer, decaying
        self.generator = torch.Generator().manual_seed(2)
        self.samples = [samples_of(g, self.generator, large=more) for g, more in zip(kinds, large)]
        self.sharded = [any(kind.sharded for kind in group) for group in kinds]
        self.with_closure = self.sparse = False
        counts = [v for group in optimizer.param_groups for v in group.values() if type(v) is int]
        counts += [v for member in family(optimizer) for v in vars(member).values() if type(v) is int]
        self.steps = min(_MOST, max([_LEAST, *(count + 3 for count in counts)]))

    def verdict(self) -> Verdict:
        self._choose_a_call()
        everyone = [[True] * len(group) for group in self.samples]
        whole = self._run([self._holding(everyone)])
        parts = self._run([self._holding(everyone, part) for part in (0, 1)])
        differ = self._compare(whole, parts, by_part=True)
        sees = [Sees(int(wrong and cut)) for wrong, cut in zip(differ, self.sharded)]
        if not any(sees):
            return Verdict(tuple(sees), needs_closure=self.with_closure)
        # as it will run: of what must be whole, one rank has this, another one that, and a third one nothing
        ranks = []
        for rank in range(3):
            has = [
                [not (whole_ and s.kind.sharded) or number % 2 == rank for number, s in enumerate(group)]
                for group, whole_ in zip(self.samples, sees)
            ]
            ranks.append(self._holding(has, rank % 2, sees))
        try:
            apart = any(self._compare(self._run([self._holding(everyone)]), self._run(ranks), sees=sees))
        except _SendsError:
            raise
        except Exception:  # a rank without a parameter of some group is more than some can do
            apart = True
        if apart:
            sees = [Sees.EVERYTHING] * len(sees)
        held = [v for member in family(whole.optimizers[0]) for s in member.state.values() for v in _values(s)]
        for value in held:
            if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter):
                kind = type(value).__name__
                return Verdict(
                    wrong=f"its state is of a class of its own ({kind}), which checkpoints cannot hold whole"
                )
        return Verdict(tuple(sees), self._closure_first(everyone), self.with_closure, self._methods(everyone))

    # -- making and stepping ------------------------------------------------------------------------------------------

    def _holding(
        self, has: Sequence[Sequence[bool]], part: Optional[int] = None, sees: Optional[Sequence[Sees]] = None
    ) -> list[list[Optional[nn.Parameter]]]:
        """The parameters of a rank: its ``part`` of those that are not whole, or (None) all whole."""
        return [
            [
                sample.parameter(
                    sample.value if part is None or (sees is not None and sees[at]) else sample.cut(sample.value)[part]
                )
                if holds
                else None
                for sample, holds in zip(group, has[at])
            ]
            for at, group in enumerate(self.samples)
        ]

    def _run(self, ranks: list[list[list[Optional[nn.Parameter]]]]) -> _Run:
        return _Run([self._copy(params) for params in ranks], ranks)

    def _copy(self, params: Sequence[Sequence[Optional[nn.Parameter]]]) -> Any:
        made = twin(
            self.optimizer,
            [
                [(p, sample.kind.place) for p, sample in zip(group, samples) if p is not None]
                for group, samples in zip(params, self.samples)
            ],
            with_state=self.with_state,
        )
        for member in family(made):
            for group in member.param_groups:
                rate = group.get("lr")
                if isinstance(rate, (float, int, Tensor)) and float(rate) < 1e-2:  # steps must not vanish in rounding
                    group["lr"] = torch.full_like(rate, 1e-2) if isinstance(rate, Tensor) else 1e-2
                if self.decaying:
                    group.update({key: 0.1 for key, value in _decays(group) if value == 0})
        return made

    def _choose_a_call(self) -> None:
        """Find a way to call ``step``: without a closure or with one, with dense gradients or sparse ones."""
        failed: list[Exception] = []
        for self.sparse in (False, True):
            for self.with_closure in (False, True):
                run = self._run([self._holding([[True] * len(group) for group in self.samples])])
                try:
                    with _NoSending():
                        self._step(run, self._gradients(0, run))
                except _SendsError:
                    raise
                except Exception as error:
                    failed.append(error)
                else:
                    return
        raise failed[0]

    def _gradients(self, step: int, whole: _Run) -> list[list[Tensor]]:
        return [
            [
                gradient(step, sample, sample.value if p is None else p, self.generator)
                for sample, p in zip(samples, group)
            ]
            for samples, group in zip(self.samples, whole.params[0])
        ]

    def _give(self, run: _Run, gradients: list[list[Tensor]], step: int) -> None:
        for rank, params in enumerate(run.params):
            for samples, group, grads in zip(self.samples, params, gradients):
                for sample, p, grad in zip(samples, group, grads):
                    if p is not None:
                        whole = p.shape == grad.shape
                        p.grad = grad.clone() if whole else sample.cut(grad)[rank % 2]
                        if self.sparse and p.ndim:
                            p.grad = _sparse(p.grad, sample, None if whole else rank % 2, step)

    def _step(self, run: _Run, gradients: list[list[Tensor]], step: int = 0) -> None:
        self._give(run, gradients, step)
        for optimizer in run.optimizers:
            torch.manual_seed(step)
            random.seed(step)
            if self.with_closure:
                optimizer.step(lambda: torch.ones(()))
            else:
                optimizer.step()

    # -- comparing ----------------------------------------------------------------------------------------------------

    def _compare(
        self, whole: _Run, other: _Run, *, by_part: bool = False, sees: Optional[Sequence[Sees]] = None
    ) -> list[bool]:
        """Of each group, whether the ranks of ``other`` have come to something else than ``whole``."""
        differ = [False] * len(self.samples)
        began = time.monotonic()
        for step in range(self.steps):
            gradients = self._gradients(step, whole)
            with _NoSending():
                self._step(whole, gradients, step)
            self._step(other, gradients, step)
            for at, samples in enumerate(self.samples):
                if not differ[at]:
                    last = step in (0, 1, 5, 11) or step == self.steps - 1
                    differ[at] = not self._alike(at, samples, whole, other, state=last, sees=sees)
            late = time.monotonic() - began > _SECONDS
            if all(d or not cut for d, cut in zip(differ, self.sharded)) or (sees and any(differ)):
                break
            if late and step >= (_LEAST if by_part else 12):
                break
        return differ

    def _alike(
        self, at: int, samples: list[Sample], whole: _Run, other: _Run, *, state: bool, sees: Optional[Sequence[Sees]]
    ) -> bool:
        full = whole.params[0][at]
        for number, sample in enumerate(samples):
            p = full[number]
            assert p is not None
            ranks = [(rank, q) for rank, q in enumerate(run[at][number] for run in other.params) if q is not None]
            as_whole = sees is not None and bool(sees[at])
            for rank, q in ranks:
                want = p if as_whole else sample.cut(p)[rank % 2]
                unclear = not as_whole and not torch.isfinite(p).all()
                if unclear or not same(want.detach(), q.detach()):
                    return False
            if state:
                for own, *theirs in zip(family(whole.optimizers[0]), *map(family, other.optimizers)):
                    held = [theirs[rank].state.get(q, {}) for rank, q in ranks]
                    mine = own.state.get(p, {})
                    if as_whole:
                        if not all(same_value(mine, one) for one in held):
                            return False
                    elif len(held) > 1 and not same_state(mine, held[:2], sample):
                        return False
        for own, *theirs in zip(family(whole.optimizers[0]), *map(family, other.optimizers)):
            if at < len(own.param_groups):
                group = own.param_groups[at]
                but = per_parameter(group)
                if not all(same_options(group, one.param_groups[at], but) for one in theirs):
                    return False
            mine = _numbers(own)
            if not all(same_value(mine, _numbers(one)) for one in theirs):
                return False
        return True

    # -- what else there is to know -----------------------------------------------------------------------------------

    def _closure_first(self, everyone: Sequence[Sequence[bool]]) -> bool:
        run = self._run([self._holding(everyone)])
        gradients = self._gradients(0, run)
        held = [p for group in run.params[0] for p in group if p is not None]
        before = [p.detach().clone() for p in held]
        calls: list[bool] = []

        def closure() -> Tensor:
            calls.append(all(map(same, (p.detach() for p in held), before)))
            return torch.ones(())

        with suppress(Exception):
            for p, grad in zip(held, (g for group in gradients for g in group)):
                p.grad = grad
            run.optimizers[0].step(closure)
        return calls == [True]

    def _methods(self, everyone: Sequence[Sequence[bool]]) -> tuple[str, ...]:
        """Public methods, callable without arguments, that change parameters or state."""
        found = []
        for name in own_methods(type(self.optimizer)):
            run = self._run([self._holding(everyone)])
            gradients = self._gradients(0, run)
            with suppress(Exception):
                self._step(run, gradients)
            self._give(run, gradients, 0)  # a step may have zeroed them
            made = run.optimizers[0]
            before = [(p, p.detach().clone()) for group in run.params[0] for p in group if p is not None]
            state = _versions(made)
            with suppress(Exception):
                getattr(made, name)()
            if _versions(made) != state or not all(same(p.detach(), old) for p, old in before):
                found.append(name)
        return tuple(found)


def _versions(optimizer: Any) -> list[tuple[int, int, int]]:
    found = []
    for member in family(optimizer):
        for p, state in member.state.items():
            found += [(id(p), id(v), v._version) for v in _values(state) if isinstance(v, Tensor)]
    return found


def _values(state: Any) -> list[Any]:
    return list(state.values()) if isinstance(state, Mapping) else []


def _numbers(optimizer: Any) -> dict[str, Any]:
    """The attributes of an optimizer that are numbers, or single numbers in tensors."""
    held = vars(optimizer).items()
    return {
        name: value
        for name, value in held
        if type(value) in (int, float, bool) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def _sparse(grad: Tensor, sample: Sample, part: Optional[int], step: int) -> Tensor:
    """``grad`` as an embedding has it: the rows of a batch, which all ranks that hold them have alike."""
    first, end = 0, sample.value.shape[0]
    if part is not None and sample.kind.sharded and sample.dim == 0:
        first, end = ((0, sample.at), (sample.at, end))[part]
    rows = torch.tensor([row - first for row in range(first, end) if row % 3 == step % 3], device=grad.device)
    return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape).coalesce()
