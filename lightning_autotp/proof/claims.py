"""What must hold in the end: the loss is replicated, and each gradient is placed as its parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

from torch import nn

from lightning_autotp.dataflow.placement import Placement
from lightning_autotp.diagnostics import Diagnostic
from lightning_autotp.plans.plan import ParameterPlan, ShardingPlan
from lightning_autotp.proof.flow import Flow, Known, Mixed, Poison
from lightning_autotp.proof.markers import Marked
from lightning_autotp.proof.recorded import HIDDEN, Ref

NEEDS_SUM = "Its rule needs grad_allreduce."
"""The fix of a replicated parameter whose gradient is a partial sum on each rank."""


def check_loss(flow: Flow) -> Iterator[Poison]:
    """What is wrong or unknown of the loss."""
    loss = flow.full.loss
    assert loss is not None
    value = flow.values.get(loss.number)
    if isinstance(value, Mixed):
        yield value.poison
    elif isinstance(value, Poison):
        yield value
    elif value is None:
        yield _poison("unknown", "the loss", "it was computed inside of this package's layers, and cannot be followed.")
    elif not value.placement.is_replicated and not value.placement.zero:
        through = f", through {value.origin}" if value.origin else ""
        yield _poison("wrong", "the loss", f"it is {value.placement} on the ranks{through}, and must be replicated.")
    else:
        yield from _same(flow, loss, [run.loss for run in flow.runs], "the loss")


def _same(flow: Flow, full: Ref, ranks: list[Optional[Ref]], what: str) -> Iterator[Poison]:
    for number, (counterparts, mine) in enumerate(zip(flow.counterparts, ranks)):
        held = counterparts.held.get(full.number)
        leaf = full.number in flow.full.leaves
        if mine is None or not leaf and (held is None or held.number != mine.number):
            rank = flow.kinds.index(number)
            yield _poison("unknown", what, f"rank {rank}'s could not be found among what it computes.")


def check_gradient(flow: Flow, entry: ParameterPlan, opaque: tuple[str, ...]) -> Iterator[Poison]:
    """What is wrong or unknown of the gradient of a parameter.

    Args:
        flow: the placements.
        entry: the parameter's plan.
        opaque: the paths of the opaque modules that own it.
    """
    gradient = flow.full.gradients[entry.name]
    assert gradient is not None
    terms = flow.full.terms.get(gradient.number, (gradient.number,))
    for number in dict.fromkeys(terms):
        if number == HIDDEN:
            if not opaque:
                yield _poison("unknown", entry.name, "what computes its gradient cannot be followed.")
            for path in opaque:
                poison = flow.of_parameters(path)
                if poison is not None:
                    yield poison
            tokens = any(flow.marked[path].tokens for path in opaque) and entry.layout.is_replicated
            if tokens and not entry.grad_allreduce:
                said = "its gradient is a sum over each rank's own tokens."
                yield _poison("wrong", entry.name, said, NEEDS_SUM)
            elif entry.grad_allreduce and entry.layout.is_replicated and not tokens:
                yield _whole(entry)
            continue
        value = flow.values.get(number)
        if value is None:
            yield _poison("unknown", entry.name, "what computes its gradient cannot be followed.")
        elif isinstance(value, Mixed):
            yield value.poison
        elif isinstance(value, Poison):
            yield value
        else:
            yield from _placed(entry, value)
    if gradient.number == HIDDEN:
        missing = [run for run in flow.runs if run.gradients.get(entry.name) is None]
        if missing:
            yield _poison("unknown", entry.name, "some rank has no gradient of it.")
    else:
        yield from _same(flow, gradient, [run.gradients.get(entry.name) for run in flow.runs], entry.name)


def check_layouts(plan: ShardingPlan, model: nn.Module, marked: dict[str, Marked]) -> Iterator[Poison]:
    """What is wrong with layouts by themselves: parameters of one layer, or names of one parameter, that disagree."""
    known: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = known.setdefault(id(parameter), name)
        if plan.parameters[first].layout != plan.parameters[name].layout:
            yield _poison("wrong", name, f"it is the same parameter as {first}, which is sharded otherwise.")
    for path, mark in marked.items():
        if mark.layout is None:
            continue
        bias = plan.parameters.get(f"{path}.bias" if path else "bias")
        if bias is None:
            continue
        if mark.kind == "column" and bias.layout.parts != mark.layout.parts:
            yield _poison("wrong", bias.name, f"it is not sharded as the outputs of {path}.weight are.")
        elif mark.kind != "column" and not bias.layout.is_replicated:
            yield _poison("wrong", bias.name, f"it must be replicated: it is added after the sum of {path}.")


def _placed(entry: ParameterPlan, value: Known) -> Iterator[Poison]:
    held, want = value.placement, Placement.from_layout(entry.layout)
    if held.zero and held.dims == want.dims:
        return
    through = f", through {value.origin}" if value.origin and value.origin != entry.name else ""
    if held.dims != want.dims:
        said = f"its gradient is {held}{through}, and it is {want}."
        yield _poison("wrong", entry.name, said)
    elif entry.layout.is_replicated:
        if held.partial and not entry.grad_allreduce:
            said = f"its gradient is a partial sum on each rank{through}."
            yield _poison("wrong", entry.name, said, NEEDS_SUM)
        elif not held.partial and entry.grad_allreduce:
            yield _whole(entry)
    elif held.partial != entry.layout.overlaps:
        said = "ranks that share a part of it would sum gradients of it that are full on each"
        said = f"its gradient is {held}{through}" if held.partial else said
        yield _poison("wrong", entry.name, f"{said}.")


def _whole(entry: ParameterPlan) -> Poison:
    said = "grad_allreduce would sum its gradient, which is full on every rank, over the ranks."
    return _poison("wrong", entry.name, said, "Its rule must not have grad_allreduce.")


def _poison(kind: str, where: str, said: str, fix: str = "") -> Poison:
    if kind == "wrong":
        return Poison("wrong", Diagnostic("error", where, said, fix))
    return Poison("unknown", Diagnostic("warning", where, said, fix))
