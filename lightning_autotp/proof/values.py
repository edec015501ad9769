"""The proof by values: a step of the unsharded model, and of all ranks in lockstep in this process, compared in fp64.

It needs no rule for any operator. Parameters are changed a little at random before, so that one which is zero, one, or
like another by initialization hides no mistake: two polynomials that agree at a random point are the same.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_autotp.compat import grouped_experts_in_fp64, tree_map, without_autocast
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.diagnostics import Diagnostic
from lightning_autotp.distributed.lockstep import CollectiveMismatchError, Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.compared import Compared, Proof
from lightning_autotp.proof.copying import alias_copy, own_copy
from lightning_autotp.proof.draws import Draws, sites_of
from lightning_autotp.proof.error_metrics import (
    Errors,
    Precision,
    comparable,
    largest_errors,
    model_norm,
    ratio,
    tensor_error,
    tensor_errors,
)
from lightning_autotp.proof.events import Events, opaque_modules
from lightning_autotp.proof.first_difference import before_the_failure, first_difference
from lightning_autotp.proof.processes import WithoutProcesses
from lightning_autotp.proof.randomness import attention_guarded, without_randomness
from lightning_autotp.proof.repair import proved_or_repaired
from lightning_autotp.proof.rounded import Rounded
from lightning_autotp.proof.source import failing_line
from lightning_autotp.proof.step import Gradients, Seen, Step
from lightning_autotp.proof.verdict import Kind, Verdict
from lightning_autotp.randomness.mode import RandomNumbers
from lightning_autotp.randomness.sites import Sites
from lightning_autotp.sharding.shard import shard
from lightning_autotp.training.gradients import TPGradients
from lightning_autotp.training.norms import Norms

PARTIAL_SUM = "On each rank it is a partial sum"

_SHOWN = 6
"""How many parameters whose gradients differ are named."""


class NotRunError(Exception):
    """The unsharded step does not run; says why."""


def prove_values(model: nn.Module, plan: ShardingPlan, switches: TPTrainingConfig, step: Step) -> Proof:
    """Run ``step`` on ``model`` and on each of its ranks, and compare losses, gradients and outputs.

    Where a plan is refuted, repairs of it are looked for (see :class:`Repairs`).

    Args:
        model: an unsharded copy with values, on the CPU; it is changed.
        plan: how it is to be sharded.
        switches: the config, whose switches count.
        step: the step; it is run on copies.
    """
    disturb(model)

    looked_at: list[tuple[ShardingPlan, Compared]] = []

    def prove(plan: ShardingPlan) -> tuple[Verdict, tuple[str, ...]]:
        compared = run(model, plan, switches, step)
        looked_at.append((plan, compared))
        verdict = replace(judge(compared, plan), random=compared.random, draws=bool(compared.random))
        return verdict, tuple(one.where for one in verdict.findings if one.fix.startswith(PARTIAL_SUM))

    try:
        verdict, repairs = proved_or_repaired(model, plan, prove)
        if verdict.kind == "proved" and verdict.random:
            repaired = repairs.plan(plan) if repairs else plan
            compared = next(compared for looked, compared in reversed(looked_at) if looked == repaired)
            return with_randomness(Proof(verdict, repairs), compared, repaired, switches, step)
        if repairs:
            return Proof(verdict, repairs)
        if verdict.kind != "proved" or not verdict.compared:
            precision: Precision = run(model, plan, switches, step).precision
            verdict = _explained(verdict, model, plan, switches, step, precision)
    except NotRunError as error:
        verdict = Verdict("unknown", (Diagnostic("warning", "the step", str(error)),))
    return Proof(verdict)


def with_randomness(
    proof: Proof, compared: Compared, plan: ShardingPlan, switches: TPTrainingConfig, step: Step
) -> Proof:
    """The proof of a step without its random numbers, and with them if ranks take their part of the unsharded ones.

    Args:
        proof: without.
        compared: the runs of it.
        plan: the plan of these.
        switches: the config.
        step: the step.
    """
    sites = compared.sites
    if sites is None:
        return proof
    if sites:
        try:
            exact = judge(_run(compared.model, plan, switches, step, compared.precision, sites=sites), plan)
        except NotRunError:
            return replace(proof, sites=sites)
        if exact.kind != "proved":
            return replace(proof, sites=sites)
    return replace(proof, verdict=replace(proof.verdict, random=()), sites=sites)


def _explained(
    verdict: Verdict, model: nn.Module, plan: ShardingPlan, switches: TPTrainingConfig, step: Step, precision: Precision
) -> Verdict:
    """The verdict with the first event that differs as its first finding, found by running all of it once more.

    A step that neither returns nor logs anything is judged by its events.
    """
    seen = _run(model, plan, switches, step, precision, watched=True).events
    ranks = seen[1:]
    cause: tuple[Diagnostic, ...] = ()
    if len(ranks) == plan.tp_size:  # no rank failed while it was sharded
        first = first_difference(seen[0], ranks) or before_the_failure(ranks)
        cause = (Diagnostic("error", "the step", first),) if first else ()
    named = verdict.findings[:_SHOWN]
    more = len(verdict.findings) - len(named)
    rest = (Diagnostic("error", "", f"and {more} more gradients differ."),) if more else ()
    kind: Kind = "refuted" if cause and not verdict.compared else verdict.kind
    return replace(verdict, kind=kind, findings=cause + named + rest)


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Change every parameter a little: each entry by some percent, entries that are zero by a small number."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
        parameter.copy_(torch.where(parameter == 0, 0.02 * noise, parameter * (1 + 0.1 * noise.clamp(-3, 3))))


def run(model: nn.Module, plan: ShardingPlan, switches: TPTrainingConfig, step: Step) -> Compared:
    """Run ``step`` unsharded and on all ranks, in fp64 or, where the unsharded model cannot, in the model's dtypes.

    Raises:
        NotRunError: if the unsharded step fails or its loss is not finite.
    """
    reasons = []
    precisions: tuple[Precision, ...] = ("fp64", "fp32")
    for precision in precisions:
        try:
            return _run(model, plan, switches, step, precision)
        except NotRunError as error:
            reasons.append(str(error))
    raise NotRunError(reasons[-1])


def _run(
    model: nn.Module,
    plan: ShardingPlan,
    switches: TPTrainingConfig,
    step: Step,
    precision: Precision,
    watched: bool = False,
    sites: Optional[Sites] = None,
) -> Compared:
    cast = _double if precision == "fp64" else _single
    lines: list[str] = []
    rounded = Rounded()
    events: dict[int, Events] = {}
    draws: list[Draws] = []
    of_ranks: dict[int, Draws] = {}

    def watching(model: nn.Module, place: int) -> AbstractContextManager[None]:
        if not watched:
            return nullcontext()
        events[place] = Events(model, opaque_modules(plan))
        return events[place].watching()

    def unsharded(mesh: Mesh) -> Seen:
        seen = Seen(own_copy(model), cast=lambda batch: tree_map(cast, batch))
        draws.append(Draws(seen.model))
        settled = attention_guarded() if sites is not None else without_randomness(lines, draws[0])
        with WithoutProcesses(), settled, watching(seen.model, 0), rounded:
            step(seen)
        return seen

    def sharded(mesh: Mesh) -> Seen:
        copy = alias_copy(model)
        flags = [module.training for module in copy.modules()]
        found = shard(copy, plan, mesh, switches, device=torch.device("cpu"), training=True)
        for module, flag in zip(copy.modules(), flags):
            module.training = flag
        for parameter in copy.parameters():  # a step may change them, and other ranks must not see it
            parameter.data = parameter.data.clone()
        gradients = TPGradients(copy, found)
        seen = Seen(copy, gradients.complete, lambda batch: tree_map(cast, batch), norms=Norms(copy, gradients))
        saving = nullcontext() if found.saved is None else found.saved.step()
        of_ranks[mesh.tp_rank] = Draws(copy)
        numbers = RandomNumbers(copy, mesh, found.batch.tokens)
        numbers.learn(sites or Sites())
        settled = numbers.active() if sites is not None else without_randomness([], of_ranks[mesh.tp_rank])
        with WithoutProcesses(), settled, saving, watching(copy, 1 + mesh.tp_rank):
            step(seen)
        gradients.remove()
        return seen

    with quiet(), _computing_in(precision):
        _cast_model(model, cast)
        try:
            (full,) = Lockstep[Seen](1).run(unsharded)
        except Exception as error:
            raise NotRunError(f"it cannot be run on a copy: {_message(error)}") from error
        if not all(bool(torch.isfinite(loss).all()) for loss in full.losses):
            raise NotRunError("its loss is not finite.")
        made = partial(Compared, model, precision, full, random=tuple(dict.fromkeys(lines)), double=not rounded.found)
        try:
            ranks = Lockstep[Seen](plan.tp_size).run(sharded)
        except Exception as error:
            return made(ranks=(), error=error, events=_in_order(events))
    found = sites_of(draws[0], [of_ranks[rank] for rank in sorted(of_ranks)], plan)
    return made(ranks=tuple(ranks), error=None, events=_in_order(events), sites=found)


def _in_order(events: Mapping[int, Events]) -> tuple[Events, ...]:
    return tuple(events[place] for place in sorted(events))


def judge(compared: Compared, plan: ShardingPlan) -> Verdict:
    """What the two runs say of the plan."""
    if compared.error is not None:
        return Verdict("refuted", (_failure(compared.error),))
    findings: list[tuple[float, Diagnostic]] = []
    full, (bounds, wrong) = compared.full, compared.bounds
    strict = bounds.tensors / bounds.loss
    for at, loss in enumerate(full.losses):
        others = [rank.losses[at] if at < len(rank.losses) else None for rank in compared.ranks]
        error = max(_relative(other, loss) for other in others)
        message = f"it differs from the unsharded one by {error:.0e}."
        findings.append((error * strict, Diagnostic("error", "the loss", message)))
    for name, value in full.outputs.items():
        error = max(_relative(rank.outputs.get(name), value) for rank in compared.ranks)
        message = f"it differs from the unsharded model's by {error:.0e}."
        findings.append((error * strict, Diagnostic("error", name, message)))
    for at, gradients in enumerate(full.gradients):
        of_ranks = [rank.gradients[at] if at < len(rank.gradients) else {} for rank in compared.ranks]
        before = [rank.incomplete[min(at, len(rank.incomplete) - 1)] for rank in compared.ranks if rank.incomplete]
        findings += _of_gradients(gradients, of_ranks, before, plan)
    bad = sorted(((error, one) for error, one in findings if not error <= bounds.tensors), key=lambda pair: -pair[0])
    diagnostics = tuple(dict.fromkeys(one for _, one in bad))
    unproved = _unproved(compared)
    if any(not error <= wrong for error, _ in bad):
        return Verdict("refuted", diagnostics, unproved=unproved)
    return Verdict("unknown" if bad else "proved", diagnostics, unproved=unproved, compared=bool(findings))


def _of_gradients(
    full: Gradients, ranks: Sequence[Gradients], before: Sequence[Gradients], plan: ShardingPlan
) -> list[tuple[float, Diagnostic]]:
    norm = model_norm(full)
    errors = largest_errors([_errors(full, mine, norm, plan, rank) for rank, mine in enumerate(ranks)])
    found = []
    for name, (error, _) in errors.items():
        fix = _fix(name, full, before, plan, norm) if not error <= 1e-3 else ""
        found.append((error, Diagnostic("error", name, f"its gradient differs by {error:.0e}.", fix)))
    return found


def _errors(full: Gradients, mine: Gradients, norm: float, plan: ShardingPlan, rank: int) -> Errors:
    want = {name: plan.layouts[name].shard(gradient, rank) for name, gradient in full.items()}
    fits = {name: gradient for name, gradient in mine.items() if name not in want or want[name].shape == gradient.shape}
    return tensor_errors(fits, want, norm)


def _fix(name: str, full: Gradients, before: Sequence[Gradients], plan: ShardingPlan, norm: float) -> str:
    """What the ranks' own gradients say of a replicated parameter."""
    entry = plan.parameters[name]
    if name not in full or not entry.layout.is_replicated or not before or any(name not in rank for rank in before):
        return ""
    mine = [rank[name] / (len(before) if entry.grad_allreduce else 1) for rank in before]
    if not entry.grad_allreduce and tensor_error(torch.stack(mine).sum(0), full[name], norm)[0] < 1e-4:
        pattern = f"^{name.replace('.', '[.]')}$"
        rule = f"{{'patterns': [{pattern!r}], 'partition_type': 'skip', 'grad_allreduce': true}}"
        return f"{PARTIAL_SUM}: add a rule for it, {rule}."
    if entry.grad_allreduce and all(tensor_error(one, full[name], norm)[0] < 1e-4 for one in mine):
        return "It is complete on every rank: remove `grad_allreduce: true` from the rule for it."
    return ""


def _unproved(compared: Compared) -> tuple[str, ...]:
    """Parameters that train and got no gradient, or only zeros."""
    seen = {name for gradients in compared.full.gradients for name, gradient in gradients.items() if gradient.any()}
    if not compared.full.losses:
        return ()
    return tuple(n for n, p in compared.full.model.named_parameters() if p.requires_grad and n not in seen)


def _relative(got: Optional[Tensor], want: Tensor) -> float:
    """The largest difference, as a part of the largest value; infinity for another shape."""
    if got is None or got.shape != want.shape:
        return float("inf")
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    keep = torch.isfinite(want)
    if not torch.equal(keep, torch.isfinite(got)):
        return float("inf")
    if not bool(keep.any()):
        return 0.0
    difference, largest = float((got - want)[keep].double().abs().max()), float(want[keep].double().abs().max())
    return comparable(ratio(difference, max(largest, 1e-30)))


def _failure(error: BaseException) -> Diagnostic:
    where = failing_line(error) or "the step"
    if isinstance(error, CollectiveMismatchError):
        return Diagnostic("error", where, f"the ranks would wait for each other for ever: {error}")
    return Diagnostic("error", where, f"the sharded step fails where the unsharded one runs: {_message(error)}")


def _message(error: BaseException) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"


def _double(value: Any) -> Any:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return _on_cpu(value).double() if is_real else _on_cpu(value)


def _single(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return _on_cpu(value).float() if is_half else _on_cpu(value)


def _on_cpu(value: Any) -> Any:
    # a clone, because a tensor that was made in inference mode is of no use outside of it
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _cast_model(model: nn.Module, cast: Callable[[Any], Any]) -> None:
    """Parameters, buffers and tensors that are neither, to the dtype to compute in."""
    model.to(torch.float64 if cast is _double else torch.float32)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[name] = cast(value)


@contextmanager
def computing(model: nn.Module, precision: Precision) -> Iterator[Callable[[Any], Any]]:
    """Inside, ``model`` is of ``precision``, and what names no dtype as well; gives what casts values of batches."""
    cast = _double if precision == "fp64" else _single
    with _computing_in(precision):
        _cast_model(model, cast)
        yield cast


@contextmanager
def _computing_in(precision: Precision) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if precision == "fp64" else torch.float32)
    try:
        # the CPU's flash attention leaves its memory where k and v have different tokens, which a wrong plan may cause
        with grouped_experts_in_fp64(), without_autocast(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing warns or prints: the step that follows will."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
