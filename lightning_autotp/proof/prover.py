"""The looks of a run: each new kind of step is proved on a copy of the unsharded model before it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.compat import tree_map
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.diagnostics import Diagnostic
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.copying import empty_copy, fill, own_copy
from lightning_autotp.proof.live import Attributes, attributes, carry_over, flags
from lightning_autotp.proof.step import LightningStep, Step, first_rows, loss_step
from lightning_autotp.proof.values import Proof, prove_values
from lightning_autotp.proof.verdict import Verdict, worst
from lightning_autotp.proof.watched import Decisions

LARGEST = 32_000_000
"""Parameters that a model may have to be proved by values, which takes 8 bytes for each of them, twice."""

MOST_WORK = 6e10
"""Parameters times tokens up to which a step is proved by values: some seconds on one core."""

_MOST_BRANCHES = 4
"""How many decisions by a step's number are looked at from their other side."""

Key = tuple[Any, ...]
"""What must not change for a verdict to stand."""


@dataclass(frozen=True)
class Look:
    """A step that is to be proved.

    Args:
        stage: ``training``, ``validation``, ``test`` or ``predict``.
        args: what the step is called with, the batch first.
        trainer: the run's Trainer; None for a loop without one.
        call: the loss of a loop of one's own, of the model and a batch; None for a LightningModule's steps.
    """

    stage: str
    args: tuple[Any, ...]
    trainer: Any = None
    call: Optional[Callable[[nn.Module, Any], Tensor]] = None


class Prover:
    """Proves the steps of a model that is sharded after this was made.

    Args:
        model: the unsharded model; None where another rank proves for this one.
        plan: how it will be sharded.
        switches: the config.
    """

    def __init__(self, model: Optional[nn.Module], plan: ShardingPlan, switches: TPTrainingConfig) -> None:
        self.plan, self.switches = plan, switches
        self._copy: Optional[nn.Module] = None
        self._reason = ""
        self._before: Attributes = {}
        self._seen: set[Key] = set()
        self.trained = 0
        """How many kinds of training steps were seen."""
        try:
            self._copy, self._reason = (None, "") if model is None else _kept(model)
        except Exception as error:  # a proof that cannot be made must not stop a run
            self._reason = f"the model cannot be copied ({type(error).__name__}: {error})"

    def sharded(self, model: nn.Module) -> None:
        """Remember what the model looks like once it is sharded."""
        self._before = attributes(model)

    def is_new(self, model: nn.Module, look: Look) -> bool:
        """Whether no step of this kind was seen before; it is from now on."""
        key = (look.stage, look.args[1:] and look.args[2:], structure(look.args[0]), flags(model))
        if key in self._seen:
            return False
        self._seen.add(key)
        self.trained += look.stage == "training"
        return True

    def prove(self, model: nn.Module, look: Look) -> Proof:
        """Prove the step of the live, sharded ``model``; an error of the proof itself is an unknown verdict."""
        if self._copy is None:
            return Proof(_unknown(self._reason))
        try:
            with torch.inference_mode(False), torch.enable_grad():  # a Trainer evaluates without
                return self._prove(self._copy, model, look)
        except Exception as error:
            return Proof(_unknown(f"the proof failed ({type(error).__name__}: {error})"))

    def _prove(self, kept: nn.Module, model: nn.Module, look: Look) -> Proof:
        made = own_copy(kept)
        carry_over(model, self._before, made)
        batch, proof = look.args[0], Proof(Verdict("proved"))
        for rows in _rows(batch, self.plan.tp_size):
            shortened = batch if rows is None else first_rows(batch, rows)
            if _work(made, shortened) > MOST_WORK:
                proof = Proof(_unknown("the step is too large to be proved by values"))
                continue
            proof = self._of_batch(made, model, replace(look, args=(shortened, *look.args[1:])))
            if proof.verdict.kind != "unknown" and not _is_failure_of_rows(proof.verdict, rows):
                return proof
        return proof

    def _of_batch(self, made: nn.Module, model: nn.Module, look: Look) -> Proof:
        """The proof of a step, and of what it would do if decisions by its number were taken the other way."""
        if look.call is not None:
            return self._values(made, loss_step(look.call, look.args[0]), self.plan)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decisions = Decisions()
        step = LightningStep(look.stage, look.args, look.trainer, names, decisions)
        proof = self._values(made, step, self.plan)
        if look.stage == "training" and proof.verdict.kind == "proved":
            step = replace(step, counters=tuple(decisions.changed))
        plan = proof.repairs.plan(self.plan)
        if step.counters:
            proof = replace(proof, verdict=self._values(made, step, plan).verdict)
        found, made_first = [proof.verdict], list(decisions.made)
        first = sorted({made_first.index(line) for line in made_first})
        for place in first[:_MOST_BRANCHES] if proof.verdict.kind != "refuted" else ():
            line = made_first[place]
            other = self._values(made, replace(step, decisions=Decisions(frozenset({place}))), plan).verdict
            if other.kind == "unknown":
                other = _unknown(f"{line}, and what it does otherwise could not be followed")
            found.append(_said_of(other, line))
        return replace(proof, verdict=worst(found))

    def _values(self, made: nn.Module, step: Step, plan: ShardingPlan) -> Proof:
        return prove_values(own_copy(made), plan, self.switches, step)


def structure(batch: Any) -> Any:
    """What a batch is made of: containers, keys, dtypes and numbers of dims."""
    if isinstance(batch, Tensor):
        return str(batch.dtype), batch.ndim
    if isinstance(batch, Mapping):
        return tuple((str(key), structure(value)) for key, value in batch.items())
    if isinstance(batch, (list, tuple)):
        made = tuple(structure(value) for value in batch)
        return made if len(made) < 64 else (made[:1], "...")
    return type(batch).__name__


def _kept(model: nn.Module) -> tuple[Optional[nn.Module], str]:
    made = empty_copy(model)
    size = sum(parameter.numel() for parameter in made.parameters())
    if size > LARGEST:
        return None, f"it has {size:,} parameters, too many to be proved by values"
    fill(made, model)
    return made.to("cpu"), ""  # a LightningModule remembers where it was


def _rows(batch: Any, tp_size: int) -> list[Optional[int]]:
    """How many rows of a batch to look at: first a few that the ranks do not divide, then all of them."""
    few = next(rows for rows in range(3, 3 + tp_size + 2) if rows % tp_size)
    return [few, None]


def _work(model: nn.Module, batch: Any) -> float:
    """Parameters times tokens."""
    tokens: list[int] = [1]

    def count(value: Any) -> Any:
        if isinstance(value, Tensor):
            tokens.append(prod(value.shape[:-1]) if value.is_floating_point() else value.numel())
        return value

    tree_map(count, batch)
    return float(max(tokens)) * sum(parameter.numel() for parameter in model.parameters())


def _is_failure_of_rows(verdict: Verdict, rows: Optional[int]) -> bool:
    """Whether ranks failed on a batch of another size than the run's, of which they may ask something."""
    return rows is not None and any("the sharded step fails" in one.message for one in verdict.findings)


def _unknown(reason: str) -> Verdict:
    return Verdict("unknown", (Diagnostic("warning", "the step", f"it could not be proved: {reason}."),))


def _said_of(verdict: Verdict, line: str) -> Verdict:
    findings = tuple(
        replace(one, message=f"(where {line}, and takes the other branch) {one.message}") for one in verdict.findings
    )
    return replace(verdict, findings=findings)
