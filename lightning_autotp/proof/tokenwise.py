"""May a module see all tokens of a batch as one sequence: only if it treats each of them by itself.

Under sequence parallelism modules that are no attention are given them so, in the full run as in the ranks': both
would mix the same. So such a module is looked at alone, its weights replicated, its tokens sharded.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.dataflow.placement import Placement, shards
from lightning_autotp.diagnostics import Diagnostic
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.counterparts import Held
from lightning_autotp.proof.flow import Flow, Known, Mixed, Poison
from lightning_autotp.proof.recorded import Ref, Trace
from lightning_autotp.proof.trace import Tracer

_RANKS, _EACH = 3, 4


def check_tokenwise(model: nn.Module, plan: ShardingPlan, full: Trace) -> Iterator[Poison]:
    """What is wrong or unknown of regions that are given all tokens as one sequence.

    Args:
        model: the unsharded model.
        plan: its plan.
        full: the run of the full model, in which the regions were called.
    """
    seen: set[int] = set()
    experts = {boundary.module for boundary in plan.boundaries}
    for region in plan.sequence.regions if plan.sequence is not None else ():
        module = model.get_submodule(region.module)
        given = _given(full, region.module)
        if region.mixes or region.module in experts or id(module) in seen or given is None:
            continue
        seen.add(id(module))
        inside = [path.removeprefix(f"{region.module}.") for path in experts if path.startswith(f"{region.module}.")]
        yield from _looked_at(module, region.module, inside, given)


def _given(full: Trace, path: str) -> Optional[Ref]:
    """What a region was given in the full model's run."""
    for event in full.events:
        crossing = event.crossing
        if crossing is not None and crossing.path == f"{path}(all tokens)" and crossing.leaves and event.outputs:
            return event.outputs[0]
    return None


def _looked_at(module: nn.Module, path: str, experts: list[str], given: Ref) -> Iterator[Poison]:
    full = _run(module, experts, _RANKS * _EACH, given)
    local = _run(module, experts, _EACH, given)
    flow = Flow(ShardingPlan(_RANKS, {}), {}, full[0], [local[0]], [0] * _RANKS)
    own = shards(_RANKS * _EACH, [[(rank * _EACH, _EACH)] for rank in range(_RANKS)])
    for mine, theirs in zip(full[1], local[1]):
        flow.values[mine.number] = Known(Placement((None, own, None)))
        flow.counterparts[0].held[mine.number] = Held(theirs.number, theirs.shape)
    flow.follow()
    out = full[0].loss
    value = None if out is None else flow.values.get(out.number)
    why = "It is given all tokens of a batch as one sequence, and must treat each by itself."
    if isinstance(value, (Poison, Mixed)):
        poison = value.poison if isinstance(value, Mixed) else value
        found = poison.finding
        yield Poison(poison.kind, Diagnostic(found.level, f"{path}, {found.where}", found.message, why))
    elif value is None or value.placement.partial or [dim for dim in value.placement.dims if dim is not None] != [own]:
        held = "not known" if value is None else str(value.placement)
        yield Poison("unknown", Diagnostic("warning", path, f"its output is {held}.", why))


def _run(module: nn.Module, experts: list[str], tokens: int, like: Ref) -> tuple[Trace, list[Ref]]:
    """Run a module on a number of tokens; what routes tokens inside is known to treat each by itself."""
    made = copy.deepcopy(module)
    for path in experts:
        made.get_submodule(path).forward = _passing
    x = torch.empty(1, tokens, like.shape[-1], dtype=like.dtype, device="meta")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    needed = [one for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    given = [x, *(torch.empty_like(x) for _ in needed)]
    tracer = Tracer(made)
    with tracer.running():
        refs = [tracer.numbers.ref(one) for one in given]
        output = made(*given)
        first = output[0] if isinstance(output, tuple) else output
        tracer.trace.loss = tracer.numbers.ref(first)
    return tracer.trace, refs


def _passing(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden * 1
