"""What is true of a plan, independent of its proof: weights after some optimizer steps, sharded and unsharded, in fp64.

It shares nothing with the proof but the sharded layers and lockstep: other weights, batches and rows; the weights that
SGD and AdamW come to are compared, and not gradients; nothing is looked for and nothing repaired.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_autotp.compat import grouped_experts_in_fp64, tree_map
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.model_sources.factory import loss_of
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.compared import Proof
from lightning_autotp.proof.step import loss_of_batch, loss_step
from lightning_autotp.proof.values import prove_values
from lightning_autotp.sharding.shard import shard
from lightning_autotp.sharding.state import Sharded
from lightning_autotp.training.gradients import TPGradients

Batch = Mapping[str, Any]

RIGHT = 5e-3
"""The largest error of a right plan. Models of fp64 alone are right to 1e-11, those that compute some in fp32 to 2e-3;
what a mistake makes is larger.
"""

Kind = Literal[
    "right, proved",
    "right, repaired",
    "right, refuted",
    "right, unknown",
    "wrong, refuted",
    "wrong, made right",
    "wrong, proved",
    "wrong, made wrong",
    "wrong, unknown",
]


class NotTrainableError(Exception):
    """The unsharded model does not train."""


@dataclass(frozen=True)
class Trial:
    """A model, a way to shard it, and what it is trained with.

    Args:
        model: the unsharded model; it is copied.
        plan: how to shard it.
        switches: the config.
        batches: one a step.
        ready: is done to each rank's copy before it is sharded.
        right: the largest error that is none.
        dtype: what is computed in.
    """

    model: nn.Module
    plan: ShardingPlan
    switches: TPTrainingConfig
    batches: Sequence[Batch]
    ready: Callable[[Any], None] = lambda model: None
    right: float = RIGHT
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Trained:
    """The losses, and what the steps of each optimizer changed of the weights."""

    losses: list[Tensor]
    changes: list[dict[str, Tensor]]


def unsharded(trial: Trial) -> Trained:
    """The training that is right.

    Raises:
        NotTrainableError: if it fails, gives losses that are not finite, or changes no weight.
    """
    with computing_in(trial.dtype):
        model = copy.deepcopy(trial.model).to(trial.dtype)
        try:
            (found,) = Lockstep[Trained](1).run(lambda mesh: _train(model, trial.batches, None))
        except Exception as error:
            raise NotTrainableError(f"{type(error).__name__}: {error}") from error
    if not all(math.isfinite(loss) for loss in found.losses):
        raise NotTrainableError(f"its losses are {found.losses}")
    if not any(bool(change.any()) for changes in found.changes[:1] for change in changes.values()):
        raise NotTrainableError("it learns nothing, so that all plans are right")
    return found


def error_of(trial: Trial, want: Trained) -> float:
    """The largest error of a loss, or of a weight's change, on any rank; infinity if the ranks fail."""
    with computing_in(trial.dtype):
        models = [copy.deepcopy(trial.model) for _ in range(trial.plan.tp_size)]
        for model in models:
            trial.ready(model)
            model.to(trial.dtype)
        try:
            errors = Lockstep[float](trial.plan.tp_size).run(lambda m: _rank_error(trial, models[m.tp_rank], m, want))
        except Exception:
            return math.inf
    return max(errors)


def _rank_error(trial: Trial, model: nn.Module, mesh: Mesh, want: Trained) -> float:
    found = shard(model, trial.plan, mesh, trial.switches, device=torch.device("cpu"))
    got = _train(model, trial.batches, found)
    errors = [_finite(float((g - w).abs() / w.abs().clamp_min(1e-30))) for g, w in zip(got.losses, want.losses)]
    for mine, full in zip(got.changes, want.changes):
        most = max(float(change.abs().max()) for change in full.values() if change.numel())
        for name, change in full.items():
            part = trial.plan.layouts[name].shard(change, mesh.tp_rank)
            if part.shape != mine[name].shape:
                return math.inf
            if part.numel():
                error = float((mine[name] - part).abs().max())
                errors.append(_finite(error / max(float(change.abs().max()), 1e-5 * most, 1e-30)))
    return max(errors)


def _train(model: nn.Module, batches: Sequence[Batch], found: Sharded | None) -> Trained:
    """Two steps of SGD with momentum, which shows the scale of gradients, and one of AdamW, which shows small ones."""
    with _WithHeads():
        return _train_steps(model, batches, found)


def _train_steps(model: nn.Module, batches: Sequence[Batch], found: Sharded | None) -> Trained:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = None if found is None else TPGradients(model, found)
    losses, changes = [], []
    for make, part in (
        (lambda: torch.optim.SGD(parameters, lr=0.02, momentum=0.9), batches[:2]),
        (lambda: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4), batches[2:]),
    ):
        optimizer: torch.optim.Optimizer = make()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for batch in part:
            loss = loss_of(model(**tree_map(_in_default_dtype, dict(batch))))
            optimizer.zero_grad()
            loss.backward()
            if gradients is not None:
                gradients.complete()
            optimizer.step()
            if found is not None:
                found.settle()
            losses.append(loss.detach())
        changes.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    return Trained(losses, changes)


def _in_default_dtype(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.get_default_dtype()) if is_float else value


def _finite(error: float) -> float:
    return error if error == error else math.inf


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, what names no dtype is of this one, and nothing warns."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings(), grouped_experts_in_fp64(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


class _WithHeads(TorchFunctionMode):
    """Refuses attention without any heads, as a rank of a wrong plan may ask for: torch 2.11 ends the process there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention and any(t.ndim > 2 and not t.shape[-3] for t in args[:3]):
            raise ValueError("attention without heads")
        return func(*args, **(kwargs or {}))


def proof_of(trial: Trial, batch: Batch) -> Proof:
    """The proof of a trial's plan with a batch of its own."""
    model = copy.deepcopy(trial.model)
    trial.ready(model)
    return prove_values(model, trial.plan, trial.switches, loss_step(loss_of_batch, batch))


def judged(trial: Trial, want: Trained, proof: Proof) -> Kind:
    """What a proof says beside what is true."""
    kind = proof.verdict.kind
    if error_of(trial, want) <= trial.right:
        if kind == "proved":
            return "right, repaired" if proof.repairs else "right, proved"
        return "right, refuted" if kind == "refuted" else "right, unknown"
    if kind != "proved":
        return "wrong, refuted" if kind == "refuted" else "wrong, unknown"
    if not proof.repairs:
        return "wrong, proved"
    repaired = replace(trial, plan=proof.repairs.plan(trial.plan))
    return "wrong, made right" if error_of(repaired, want) <= trial.right else "wrong, made wrong"


FALSE: tuple[Kind, ...] = ("right, refuted", "wrong, proved", "wrong, made wrong")
"""What must never be."""


def counted(found: Iterable[tuple[str, Kind]]) -> Counter[Kind]:
    """How many there are of each kind, printed with the names of all that are falsely judged or unknown."""
    pairs = list(found)
    counts = Counter(kind for _, kind in pairs)
    print(dict(counts.most_common()))
    for name, kind in pairs:
        if kind in FALSE or kind.endswith("unknown"):
            print(f"{kind}: {name}")
    return counts


def proved(counts: Counter[Kind]) -> int:
    """How many right ones are proved; gradients that are summed besides may be zero where they are judged."""
    return counts["right, proved"] + counts["right, repaired"]


def of(counts: Counter[Kind], truth: str) -> int:
    """How many are right, or wrong."""
    return sum(number for kind, number in counts.items() if kind.startswith(truth))
