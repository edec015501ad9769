"""What runs in the ranks, which are in this process: a model is built, trained, compared with the unsharded run."""

import hashlib
import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_autotp.compat import grouped_experts_in_fp64, tree_map
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.diagnostics import Diagnostic
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.layout.layout import Layout
from lightning_autotp.model_sources.factory import from_factory, loss_of
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.compared import Proof
from lightning_autotp.proof.error_metrics import (
    BOUNDS,
    Errors,
    Precision,
    comparable,
    largest_errors,
    model_norm,
    ratio,
    tensor_error,
    tensor_errors,
)
from lightning_autotp.proof.prover import Look
from lightning_autotp.proof.step import loss_of_batch, loss_step
from lightning_autotp.proof.values import prove_values
from lightning_autotp.proof.verdict import Verdict
from lightning_autotp.recipe.engine import plan_once
from lightning_autotp.sharding.shard import shard
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.gradients import TPGradients

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """What is verified, and how: the arguments of :func:`~lightning_autotp.verification.verify`."""

    source: str
    tp_size: int
    config: TPTrainingConfig
    steps: int
    kv_heads: int


@dataclass
class Run:
    """What was seen of a model that was trained."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)
    """What modules put out in the first step, in the order in which they ended."""

    @property
    def parts(self) -> list[dict[str, Tensor]]:
        """The gradients of every step, then the weights."""
        return [*self.gradients, self.weights]


@dataclass(frozen=True)
class Measured:
    """What one rank found: its errors, and a digest of every value that other ranks hold as well."""

    loss: float
    gradients: list[Errors]
    weights: Errors
    digests: dict[tuple[int, str, int], bytes]
    decided: dict[str, tuple[str, str, str]]
    layouts: dict[str, Layout]
    share: float
    forward: str
    warnings: tuple[str, ...]


class Refused(Exception):
    """Making the plan, or sharding by it, raised a ValueError."""


class NotNewError(Exception):
    """A factory returned parameters that it has returned before."""


def _build(case: Case) -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    if ":" in case.source:
        return from_factory(case.source)
    from lightning_autotp.model_sources.small import small_batches, small_config, small_model

    config = small_config(case.source, kv_heads=case.kv_heads)
    return small_model(config), small_batches(config, case.steps)


def _train(model: nn.Module, batches: list[dict[str, Any]], steps: int) -> Run:
    """The run itself, the same for a whole and for a sharded model."""
    run, found = Run(), sharded(model)
    gradients = TPGradients(model, found) if found is not None else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-5)
    model.train()
    hooks = [module.register_forward_hook(_recorder(name, run)) for name, module in model.named_modules()]
    for step in range(steps):
        torch.manual_seed(step)
        with nullcontext() if found is None or found.saved is None else found.saved.step():
            loss = loss_of(model(**batches[step % len(batches)]))
        for hook in hooks:
            hook.remove()
        loss.backward()
        if gradients is not None:
            gradients.complete()
        run.losses.append(float(loss.detach()))
        run.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        if found is not None:
            found.settle()
    run.weights = {name: p.detach() for name, p in model.named_parameters()}
    return run


def _recorder(name: str, run: Run) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        of_many = output if isinstance(output, (tuple, list)) else output.values() if isinstance(output, dict) else ()
        tensors = [output] if isinstance(output, Tensor) else [value for value in of_many if isinstance(value, Tensor)]
        if tensors and tensors[0].is_floating_point():
            run.outputs.append((name, tensors[0].detach().clone()))

    return record


def _first_difference(got: Sequence[tuple[str, Tensor]], want: Sequence[tuple[str, Tensor]], bound: float) -> str:
    """The innermost module whose output is the first that differs, among modules inside none whose output is right.

    What is cut has another shape and says nothing; partial sums are put right by a module around them.
    """
    expected: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in want:
        expected[name].append(tensor)
    errors: dict[str, float] = {}
    for name, tensor in got:
        other = expected[name].pop(0) if expected[name] else None
        if other is not None and other.shape == tensor.shape:
            errors[name] = max(errors.get(name, 0.0), comparable(tensor_error(tensor, other, 0.0)[0]))
    right = {name for name, error in errors.items() if error <= bound}
    wrong = (name for name in errors if name not in right)
    return next((n for n in wrong if not any(o == "" or n.startswith(f"{o}.") for o in right if o != n)), "")


def run_unsharded(case: Case, precision: Precision) -> Run:
    """The unsharded run.

    Raises:
        Exception: what building or training the model raises.
    """
    (run,) = _on_ranks(case, 1, precision, lambda mesh, model, batches: _train(model, batches, case.steps))
    if not all(map(math.isfinite, run.losses)):
        raise ValueError(f"its losses are {run.losses}")
    return run


def plan_and_prove(case: Case) -> tuple[ShardingPlan, Proof]:
    """The plan that a run with this config would train by, and the proof of its first step.

    It is what a run's setup makes: by rules, filled by what is derived of the first batch, or derived from it. A proof
    that cannot be made says nothing.

    Raises:
        Refused: if the plan is refused.
        Exception: what building the model raises.
    """

    def work(mesh: Mesh, model: nn.Module, batches: list[dict[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
        return model, batches[0]

    ((model, batch),) = _on_ranks(case, 1, "fp32", work)
    _prepare(case, model)
    look = Look("training", (batch,), call=loss_of_batch)
    try:
        planned = plan_once(model, case.config, silent_mesh(case.tp_size), lambda: look)
    except ValueError as error:
        raise Refused(str(error)) from error
    plan = planned.plan
    if planned.proof is not None:
        return plan, Proof(planned.proof[1], planned.repairs)
    if case.config.proof == "off" or case.tp_size == 1:
        return plan, Proof(Verdict("unknown"))
    try:
        proof = prove_values(model, plan, case.config, loss_step(loss_of_batch, batch))
    except (Exception, SystemExit) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        proof = Proof(Verdict("unknown", (Diagnostic("warning", "the step", message),)))
    return proof.repairs.plan(plan), proof


def run_sharded(case: Case, plan: ShardingPlan, unsharded: Run, precision: Precision) -> list[Measured]:
    """The sharded run, compared with the unsharded one; one result a rank.

    Raises:
        Refused: if the plan is refused.
        Exception: what a rank raises.
    """

    def work(mesh: Mesh, model: nn.Module, batches: list[dict[str, Any]]) -> Measured:
        return _measure(case, plan, unsharded, precision, mesh, model, batches)

    return _on_ranks(case, case.tp_size, precision, work)


def _on_ranks(
    case: Case,
    ranks: int,
    precision: Precision,
    work: Callable[[Mesh, nn.Module, list[dict[str, Any]]], T],
) -> list[T]:
    """Do ``work`` on every rank with a model of its own; all of them begin with the same random numbers."""
    if ":" in case.source:  # what the import draws, which is done once, must not be missing from the next model
        Lockstep[Any](1).run(lambda mesh: importlib.import_module(case.source.partition(":")[0]))
    built = [
        Lockstep[tuple[nn.Module, list[dict[str, Any]]]](1).run(lambda mesh: _build(case))[0] for _ in range(ranks)
    ]
    parameters = [id(parameter) for model, _ in built for parameter in model.parameters()]
    if len(set(parameters)) < len(parameters):
        raise NotNewError(
            f"{case.source} returns the same parameters every time it is called; let it build a new model."
        )
    with _computing_in(precision):
        if precision == "fp64":
            built = [(model.double(), tree_map(_double, batches)) for model, batches in built]
        return Lockstep[T](ranks).run(lambda mesh: work(mesh, *built[mesh.tp_rank]))


@contextmanager
def _computing_in(precision: Precision) -> Iterator[None]:
    """Inside, what names no dtype is of this one; entered around all ranks, which share the default."""
    if precision == "fp32":
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with grouped_experts_in_fp64():
            yield
    finally:
        torch.set_default_dtype(before)


def _prepare(case: Case, model: nn.Module) -> None:
    """Group the experts of a model if it is one of transformers'."""
    if ":" not in case.source:
        from lightning_autotp.model_sources.small import group_experts

        group_experts(model)


def _measure(
    case: Case,
    plan: ShardingPlan,
    want: Run,
    precision: Precision,
    mesh: Mesh,
    model: nn.Module,
    batches: list[dict[str, Any]],
) -> Measured:
    """One rank's sharded run, compared with the unsharded one."""
    _prepare(case, model)
    full = {name: p.numel() for name, p in model.named_parameters()}
    try:
        shard(model, plan, mesh, case.config, device=torch.device("cpu"))
    except ValueError as error:
        raise Refused(str(error)) from error
    got, layouts = _train(model, batches, case.steps), plan.layouts
    if got.weights.keys() != want.weights.keys():
        raise RuntimeError(f"the parameters' names differ: {sorted(got.weights.keys() ^ want.weights.keys())}")
    errors, digests = [], {}
    for at, (ours, theirs) in enumerate(zip(got.parts, want.parts)):
        parts = {name: layouts[name].shard(tensor, mesh.tp_rank) for name, tensor in theirs.items()}
        errors.append(tensor_errors(ours, parts, model_norm(theirs)))
        for name, tensor in ours.items():
            digests.update({(at, name, index): _digest(t) for index, t in _common(tensor, layouts[name], mesh.tp_rank)})
    return Measured(
        max(comparable(ratio(abs(ours - theirs), abs(theirs))) for ours, theirs in zip(got.losses, want.losses)),
        errors[:-1],
        errors[-1],
        digests,
        {name: (e.kind, e.rule, e.source) for name, e in plan.parameters.items() if name in full},
        {name: layouts[name] for name in full},
        sum(p.numel() for p in model.parameters()) / sum(full.values()),
        _first_difference(got.outputs, want.outputs, BOUNDS[precision].tensors),
        plan.warnings,
    )


def rounding_noise(single: Run, double: Run, layouts: Mapping[str, Layout], tp_size: int) -> list[dict[str, float]]:
    """The errors of the unsharded fp32 run against the fp64 one, the largest over all ranks' parts."""
    found = []
    for ours, theirs in zip(single.parts, double.parts):
        norm, of_ranks = model_norm(theirs), []
        for part in range(tp_size):
            got, want = ({n: layouts[n].shard(t, part) for n, t in tensors.items()} for tensors in (ours, theirs))
            of_ranks.append(tensor_errors(got, want, norm))
        found.append({name: error for name, (error, _) in largest_errors(of_ranks).items()})
    return found


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _common(local: Tensor, layout: Layout, rank: int) -> Iterator[tuple[int, Tensor]]:
    """What other ranks may hold as well: all of a replicated tensor, or slices by their index along the cut dim."""
    if layout.is_replicated:
        yield 0, local
    elif layout.overlaps:
        assert layout.dim is not None
        held = [index for start, length in layout.parts[rank] for index in range(start, start + length)]
        yield from zip(held, local.unbind(layout.dim))


def _digest(tensor: Tensor) -> bytes:
    positive = (tensor.detach() + 0.0).contiguous()  # -0.0 becomes 0.0, which it equals
    return hashlib.blake2b(positive.view(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
