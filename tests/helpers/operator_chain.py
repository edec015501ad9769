"""A function run on full tensors and on each rank's, operator by operator, its placements followed by the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lightning_autotp.dataflow.event import Event, Operand, RankCall, bound
from lightning_autotp.dataflow.operators.registry import propagate
from lightning_autotp.dataflow.placement import Placement
from tests.helpers.operator_rows import tensors_of

Step = Callable[..., Sequence[Tensor]]


COPIES = ("clone", "alias", "detach", "lift_fresh")
"""Which of these there are depends on strides."""


class Recorder(TorchDispatchMode):
    """Keeps all calls of operators, with their arguments and results; copies are as good as what they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any], list[Tensor]]] = []
        self.copies: dict[int, tuple[int, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        made = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in COPIES:
            self.copies[id(made)] = self.origin(args[0]), made  # kept, so that no other tensor gets its id
        else:
            self.calls.append((name.removeprefix("_unsafe_"), bound(func, args, kwargs or {}), tensors_of(made)))
        return made

    def origin(self, tensor: Tensor) -> int:
        """What identifies a tensor and its copies."""
        return self.copies.get(id(tensor), (id(tensor), tensor))[0]


def recorded(step: Step, inputs: Sequence[Tensor]) -> tuple[Recorder, Sequence[Tensor]]:
    """The calls that ``step`` makes, and what it returns."""
    with Recorder() as recorder:
        results = step(*inputs)
    return recorder, results


def followed(
    step: Step, full: Sequence[Tensor], placements: Sequence[Placement], local: Sequence[Sequence[Tensor]]
) -> list[tuple[Placement, Tensor, list[Tensor]]]:
    """What the rules say of each result of ``step``, with the full tensor and the ranks'."""
    recorder, results = recorded(step, full)
    ranks = [recorded(step, mine) for mine in local]
    known = dict(zip(map(id, full), placements))

    def given(arguments: Any, mine: Any) -> Any:
        return tree_map(
            lambda a, b: (
                Operand(tuple(a.shape), known.get(recorder.origin(a), Placement.replicated(a.ndim)), a.dtype)
                if isinstance(a, Tensor)
                else b
            ),
            arguments,
            mine,
        )

    for at, (name, arguments, outputs) in enumerate(recorder.calls):
        calls = [rank.calls[at] for rank, _ in ranks]
        assert {call[0] for call in calls} == {name}
        event = Event(
            name,
            given(arguments, arguments),
            tuple(tuple(t.shape) for t in outputs),
            tuple(RankCall(given(arguments, its), tuple(tuple(t.shape) for t in out)) for _, its, out in calls),
        )
        known.update(zip(map(id, outputs), propagate(event)))
    made = [[mine[at] for _, mine in ranks] for at in range(len(results))]
    return [(known[recorder.origin(result)], result, mine) for result, mine in zip(results, made)]
