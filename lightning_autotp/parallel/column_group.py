"""Column parallel linears that read one input, computed together, so that they share its collective."""

from collections.abc import Sequence
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from lightning_autotp.compat import autocast_dtype
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.twice_differentiable import is_transformed
from lightning_autotp.layout.layout import Layout
from lightning_autotp.parallel.linear_functions import ColumnLinears, ColumnLinearsPlainly, GatherColumns
from lightning_autotp.parallel.overlap import Overlap, form_of

_RIDE = "_autotp_columns"
"""The attribute of an input tensor on which results wait while ``torch.compile`` traces."""


class ColumnMember(Protocol):
    """What a column parallel linear tells its group."""

    mesh: Mesh
    layout: Layout
    overlap: bool
    reduces: bool
    bias: Any

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[N_r, K]``."""


class ColumnGroup:
    """Column linears that may read one tensor, so that its gradient is all-reduced once and not once per linear.

    The first one called computes all of them; the others take their result if they are called with the same object,
    unchanged, under the same autocast. Which linears really share an input is learned: those seen to read another
    tensor leave the others' company at the next :meth:`settle`, and not before, because a checkpointed region must
    compute the same again. A miss costs a collective, never correctness.

    Args:
        members: the linears.
        steady: whether nothing changes their input in place between their calls, which a graph that is traced cannot
            see; unless they are steady, each computes alone there.
    """

    def __init__(self, members: Sequence[ColumnMember], steady: bool = True) -> None:
        self.members, self.steady = members, steady
        sizes = [member.layout.shape[member.layout.dim or 0] for member in members]
        self.form = form_of("gather", members[0].matrix.shape[1], sizes)
        self.company = [0] * len(members)  # members with one number are computed together
        self.leaving: set[int] = set()
        self.input: Optional[Tensor] = None
        self.state: tuple[Any, ...] = ()
        self.results: dict[int, Tensor] = {}
        self.offered = False  # whether the results were computed before anyone asked
        self.declined = False
        self.takes_offers = True

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """The local output of member ``place`` on ``x``."""
        if torch.compiler.is_compiling():
            return self._traced(place, x)
        state = _state(x)
        if place in self.results:
            if self.input is x and self.state == state:
                return self._take(place)
            if self.offered:
                self.declined = True
            elif self.input is not x:
                self.leaving |= self.results.keys()
        self.results = self._compute(place, x, self)
        self.input, self.state, self.offered = x, state, False
        return self._take(place)

    def gather(self, x: Tensor, overlap: Overlap, length: int, rows: int) -> Optional[Tensor]:
        """All tokens ``[B, S, K]`` of every rank's ``x [1, T_r, K]``; the members' outputs on them wait to be taken.

        None where members do not take them, or no gradient of ``x`` is recorded; ``length`` is S and ``rows`` B. Under
        autocast what comes back has its dtype, in which all members read it anyway and half as much travels.
        """
        alike = self.steady and len(set(self.company)) == 1 and self.takes_offers
        if not alike or not (torch.is_grad_enabled() and x.requires_grad):
            return None
        tracing = torch.compiler.is_compiling()
        columns = None if tracing else self
        x, weights, biases = self._cast(x, self.members)
        full, *outputs = GatherColumns.apply(
            x, columns, overlap, self.form, length, rows, len(self.members), *weights, *biases
        )
        results = dict(enumerate(outputs))
        if tracing:
            setattr(full, _RIDE, (self, _autocast(full), results))
        else:
            self.input, self.state, self.results, self.offered = full, _state(full), results, True
        gathered: Tensor = full
        return gathered

    def __getstate__(self) -> dict[str, Any]:
        # of a copy: what waits belongs to a graph
        return vars(self) | {"input": None, "state": (), "results": {}}

    def settle(self) -> None:
        """Between steps: drop what nobody asked for, and part those who read different tensors."""
        self.forget()
        self.takes_offers &= not self.declined
        if self.leaving:
            apart = max(self.company) + 1
            self.company = [apart if at in self.leaving else number for at, number in enumerate(self.company)]
            self.leaving = set()

    def forget(self) -> None:
        """Drop results that wait to be taken, and the input they are of."""
        self.input, self.results = None, {}

    def _take(self, place: int) -> Tensor:
        result = self.results.pop(place)
        if not self.results:
            self.input = None
        return result

    def _traced(self, place: int, x: Tensor) -> Tensor:
        # a module's state must not change in a region that is checkpointed while it is traced; a tensor's may
        if not self.steady:
            return self._compute(place, x, None, alone=True)[place]
        owner, autocast, waiting = getattr(x, _RIDE, None) or (None, None, {})
        if owner is not self or place not in waiting or autocast != _autocast(x):
            waiting = self._compute(place, x, None)
            setattr(x, _RIDE, (self, _autocast(x), waiting))
        result = waiting.pop(place)
        if not waiting:  # x may be an input of the graph and live on
            setattr(x, _RIDE, None)
        return result

    @staticmethod
    def _cast(x: Tensor, members: Sequence[ColumnMember]) -> tuple[Tensor, list[Tensor], list[Optional[Tensor]]]:
        """``x`` and the members' weights and biases, in autocast's dtype where it is on."""
        weights, biases = [m.matrix for m in members], [m.bias for m in members]
        dtype = autocast_dtype(x.device.type)
        if dtype is not None:
            x = x.to(dtype)
            weights = [w.to(dtype) for w in weights]
            biases = [None if b is None else b.to(dtype) for b in biases]
        return x, weights, biases

    def _compute(
        self, place: int, x: Tensor, columns: Optional["ColumnGroup"], alone: bool = False
    ) -> dict[int, Tensor]:
        places = [other for other, company in enumerate(self.company) if company == self.company[place]]
        places = [place] if alone else places
        members = [self.members[other] for other in places]
        x, weights, biases = self._cast(x, members)
        first = members[0]
        mesh = first.mesh if first.reduces else None
        outputs = (ColumnLinears if is_transformed() else ColumnLinearsPlainly).apply(
            x, columns, mesh, first.overlap, len(members), *weights, *biases
        )
        return dict(zip(places, outputs))


def _state(x: Tensor) -> tuple[Any, ...]:
    """What a result depends on besides the object ``x``."""
    return x._version, _autocast(x)


def _autocast(x: Tensor) -> Optional[torch.dtype]:
    return autocast_dtype(x.device.type)
