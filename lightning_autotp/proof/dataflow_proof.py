"""Does a plan give the numbers of the unsharded model: one step on the meta device, every tensor with its placement.

The full model runs once, and one rank of each kind, made by the very function that shards models; what they compute is
matched by its place in the code, and what the ranks hold of it is followed from the parameters to the loss and on to
each gradient. Needs no values, no process groups, and nobody else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_autotp.compat import hide_values_from_transformers
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.diagnostics import Diagnostic
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.losses.loss_parallel import set_loss_parallel
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.claims import check_gradient, check_layouts, check_loss
from lightning_autotp.proof.copying import alias_copy
from lightning_autotp.proof.flow import Flow, Poison
from lightning_autotp.proof.markers import Marked, Markers, marked_modules, without_collectives
from lightning_autotp.proof.own_forward import own_parameters
from lightning_autotp.proof.recorded import HIDDEN, Ref, Trace
from lightning_autotp.proof.shorten import fewer_blocks, restricted
from lightning_autotp.proof.trace import Tracer
from lightning_autotp.proof.verdict import Verdict
from lightning_autotp.sharding.shard import shard

Step = Callable[[nn.Module], Tensor]
"""Runs one step of a model and returns its loss."""


def prove_flow(
    model: nn.Module, plan: ShardingPlan, switches: TPTrainingConfig, call: Step, *, backward: bool = True
) -> Verdict:
    """Prove that ``plan`` gives the numbers of the unsharded ``model`` in the step that ``call`` runs.

    Args:
        model: an unsharded copy on the meta device, which is left as it is.
        plan: the plan.
        switches: the config, as for :func:`~lightning_autotp.sharding.shard.shard`.
        call: runs one step of the model that it is given and returns the loss.
        backward: whether gradients are claimed, too.
    """
    try:
        with as_traced():
            return _shortened(model, plan, switches, call, backward) or _proved(model, plan, switches, call, backward)
    except Exception as error:
        said = f"the step could not be followed: {type(error).__name__}: {error}"
        return Verdict("unknown", (Diagnostic("warning", "", said),))


@contextmanager
def as_traced() -> Iterator[None]:
    """Inside, no code looks for values, or takes a form of attention that is one operator; Python's draws are alike."""
    before = random.getstate()
    try:
        with hide_values_from_transformers(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        random.setstate(before)


def _shortened(
    model: nn.Module, plan: ShardingPlan, switches: TPTrainingConfig, call: Step, backward: bool
) -> Optional[Verdict]:
    """The verdict of the model with fewer blocks; None if there are none to leave out, or it does not run so."""
    with fewer_blocks(model, plan) as left_out:
        if not left_out:
            return None
        try:
            return _proved(model, restricted(plan, model), switches, call, backward, shortened=True)
        except Exception:
            return None


def _proved(
    model: nn.Module,
    plan: ShardingPlan,
    switches: TPTrainingConfig,
    call: Step,
    backward: bool,
    *,
    shortened: bool = False,
) -> Verdict:
    kinds = _kinds_of_ranks(plan)
    ranks = [_sharded(model, plan, switches, kinds.index(kind)) for kind in range(max(kinds) + 1)]
    marked = marked_modules(ranks[0], plan)
    full = alias_copy(model)
    trace = _traced(full, plan, marked, call, backward, full=True)
    runs = [_traced(rank, plan, marked, call, backward, full=False) for rank in ranks]
    if trace.error is not None:
        failed = [run for run in runs if run.error is not None]
        if not failed or shortened or plan.sequence is None:
            raise trace.error
        # the full model was given tokens in a way that suits it no more than the ranks
        said = f"a rank cannot run the step: {type(failed[0].error).__name__}: {failed[0].error}"
        return Verdict("refuted", (Diagnostic("error", str(failed[0].error_place), said),))
    flow = Flow(plan, marked, trace, runs, kinds)
    flow.follow()
    found = [*check_layouts(plan, full, marked), *check_loss(flow), *flow.unread]
    unproved = []
    owners = _owners(full, marked)
    for name, gradient in trace.gradients.items():
        if gradient is None:
            unproved.append(name)
        else:
            found += check_gradient(flow, plan.parameters[name], owners.get(name, ()))
    return _verdict(found, flow, tuple(unproved))


def _verdict(found: list[Poison], flow: Flow, unproved: tuple[str, ...]) -> Verdict:
    wrong = [poison.finding for poison in found if poison.kind == "wrong"]
    unknown = [poison.finding for poison in found if poison.kind == "unknown"]
    findings = tuple(dict.fromkeys(wrong or unknown))
    kind = "refuted" if wrong else "unknown" if unknown else "proved"
    return Verdict(kind, findings, tuple(flow.assumed), unproved, tuple(flow.random))  # type: ignore[arg-type]


def _kinds_of_ranks(plan: ShardingPlan) -> list[int]:
    """For each rank the number of its kind: ranks of one kind have the same shapes and the same attributes."""
    found: dict[object, int] = {}
    kinds = []
    layouts = list({entry.layout: None for entry in plan.parameters.values()})
    for rank in range(plan.tp_size):
        shapes = tuple(layout.local_shape(rank) for layout in layouts)
        attributes = tuple(attribute.local[rank] for attribute in plan.attributes)
        heads = tuple(given.parts[rank][1] for given in plan.head_inputs)
        kinds.append(found.setdefault((shapes, attributes, heads), len(found)))
    return kinds


def _sharded(model: nn.Module, plan: ShardingPlan, switches: TPTrainingConfig, rank: int) -> nn.Module:
    made = alias_copy(model)
    shard(made, plan, silent_mesh(plan.tp_size, rank), switches, device=torch.device("meta"))
    if switches.loss_parallel:  # a fused loss computes what this one does; only whether it may be is its own affair
        set_loss_parallel(made, plan, True)
    without_collectives(made)
    return made


def _traced(
    model: nn.Module, plan: ShardingPlan, marked: dict[str, Marked], call: Step, backward: bool, *, full: bool
) -> Trace:
    """One run of a step. What it raises is kept as the trace's error."""
    tracer = Tracer(model)
    trace = tracer.trace
    Markers(model, tracer, marked, plan, full=full)
    random.seed(0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = None
    try:
        with tracer.running():
            loss = call(model)
            trace.loss = tracer.numbers.ref(loss)
            if backward and trained:
                loss.backward()
                for name, parameter in trained.items():
                    grad = parameter.grad
                    trace.gradients[name] = None if grad is None else _gradient(tracer, grad)
    except Exception as error:
        trace.error = error
    return trace


def _gradient(tracer: Tracer, grad: Tensor) -> Ref:
    return tracer.numbers.ref(grad) if tracer.numbers.knows(grad) else Ref(HIDDEN, tuple(grad.shape), grad.dtype)


def _owners(model: nn.Module, marked: dict[str, Marked]) -> dict[str, tuple[str, ...]]:
    """By parameter, the paths of the opaque modules that it belongs to."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[str, ...]] = {}
    for path, mark in marked.items():
        if mark.layout is None:
            continue
        for parameter in own_parameters(model.get_submodule(path)).values():
            name = names[id(parameter)]
            found[name] = (*found.get(name, ()), path)
    return found
