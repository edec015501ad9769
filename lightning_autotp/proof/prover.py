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
from lightning_autotp.proof.claims import NEEDS_SUM
from lightning_autotp.proof.compared import Proof
from lightning_autotp.proof.context import few_tokens, prove_context, prove_small, shorter, unknown
from lightning_autotp.proof.copying import empty_copy, fill, own_copy
from lightning_autotp.proof.dataflow_proof import prove_flow
from lightning_autotp.proof.live import Attributes, as_live, attributes, flags
from lightning_autotp.proof.processes import WithoutProcesses
from lightning_autotp.proof.repair import proved_or_repaired
from lightning_autotp.proof.shorten import restricted, shorten
from lightning_autotp.proof.step import LightningStep, Seen, Step, first_rows, loss_step
from lightning_autotp.proof.values import NotRunError, prove_values, quiet
from lightning_autotp.proof.verdict import Verdict, worst
from lightning_autotp.proof.watched import Decisions
from lightning_autotp.randomness.sites import Sites

LARGEST = 32_000_000
"""Parameters that a model may have to be proved by values, which takes 8 bytes for each of them, twice."""

LARGEST_SPLIT = 100_000_000
"""Those of a model, with fewer blocks, that is run where ranks split its tokens, and that no config describes."""

MOST_WORK = 6e10
"""Parameters times tokens up to which a step is proved by values: some seconds on one core."""

REPAIRED_IN = 10.0
"""Seconds in which numbers that are per rank are looked for in a large model: some twenty tries."""

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
    own: bool = True
    """Whether it is a step of the run, and not one that stands in for it."""

    @property
    def kind(self) -> Key:
        """What steps have in common that a verdict on one of them holds for."""
        return self.stage, self.call, self.args[2:], structure(self.args[0])


class Prover:
    """Proves the steps of a model that is sharded after this was made.

    Args:
        model: the unsharded model; None where another rank proves for this one.
        plan: how it will be sharded.
        switches: the config.
    """

    def __init__(self, model: Optional[nn.Module], plan: ShardingPlan, switches: TPTrainingConfig) -> None:
        self.plan, self.switches = plan, switches
        self.kept: Optional[Kept] = None
        self._reason = ""
        self._before: Attributes = {}
        self._trains: Key = ()
        self._seen: set[Key] = set()
        self.sites = Sites()
        """How what the steps draw is sharded, as far as they were seen."""
        self.trained = 0
        """How many kinds of training steps were seen."""
        self.known: Optional[tuple[Look, Verdict]] = None
        """A step that was proved before the model was sharded, which need not be proved again while nothing changes."""
        self.advice = ""
        """What an error is to say besides."""
        try:
            splits = switches.context_parallel_size > 1
            self.kept = None if model is None else keep(model, plan, LARGEST_SPLIT if splits else LARGEST)
        except Exception as error:  # a proof that cannot be made must not stop a run
            self._reason = f"the model cannot be copied ({type(error).__name__}: {error})"

    def sharded(self, model: nn.Module) -> None:
        """Remember what the model looks like once it is sharded."""
        self._before, self._trains = attributes(model), _trains(model)

    def is_new(self, model: nn.Module, look: Look) -> bool:
        """Whether no step of this kind was seen before; it is from now on."""
        key = (*look.kind, flags(model))
        if key in self._seen:
            return False
        self._seen.add(key)
        self.trained += look.stage == "training"
        return True

    def prove(self, model: nn.Module, look: Look) -> Proof:
        """Prove the step of the live, sharded ``model``; an error of the proof itself is an unknown verdict."""
        proof = self._proof(model, look) if self.plan.tp_size > 1 else Proof(Verdict("proved"))
        splits = self.switches.context_parallel_size > 1 and look.stage == "training"
        if splits and proof.verdict.kind != "refuted":
            of_tokens = self._of_tokens(model, look, proof.repairs.plan(self.plan))
            return replace(proof, verdict=worst([proof.verdict, of_tokens]))
        return proof

    def _of_tokens(self, model: nn.Module, look: Look, plan: ShardingPlan) -> Verdict:
        """Whether the step may split its tokens."""
        if self.kept is None:
            return unknown(f"{self._reason}.")
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return self._proof_of_tokens(self.kept, model, look, plan)
        except NotRunError as error:
            return unknown(str(error))
        except Exception as error:
            return unknown(f"the proof failed ({type(error).__name__}: {error}).")

    def _proof_of_tokens(self, kept: Kept, model: nn.Module, look: Look, plan: ShardingPlan) -> Verdict:
        made, tokens = kept.values or kept.split, few_tokens(self.switches.context_parallel_size)
        if kept.values is None:
            assert kept.meta is not None
            try:
                return prove_small(kept.meta, self.switches)
            except NotRunError:
                if made is None:
                    raise
        assert made is not None
        reason = NotRunError("the step is too large to be run on copies.")
        rows = first_rows(look.args[0], few_rows(max(2, self.plan.tp_size)))
        for batch in shorter(rows, tokens):
            if _work(made, batch) > MOST_WORK:
                continue
            step, _ = self._step(model, replace(look, args=(batch, *look.args[1:])))
            with as_live(model, self._before, made):
                try:
                    return prove_context(own_copy(made), restricted(plan, made), self.switches, step)
                except NotRunError as error:
                    reason = error
        raise reason

    def _proof(self, model: nn.Module, look: Look) -> Proof:
        if self.kept is None:
            return Proof(_unknown(self._reason))
        if self.known is not None and self.known[0].kind == look.kind and self._is_as_sharded(model):
            return Proof(self.known[1])
        try:
            with torch.inference_mode(False), torch.enable_grad():  # a Trainer evaluates without
                return self._prove(self.kept, model, look)
        except Exception as error:
            return Proof(_unknown(f"the proof failed ({type(error).__name__}: {error})"))

    def _is_as_sharded(self, model: nn.Module) -> bool:
        return attributes(model) == self._before and _trains(model) == self._trains

    def _prove(self, kept: Kept, model: nn.Module, look: Look) -> Proof:
        """By values if the model is small enough, or is with fewer blocks; else by the dataflow of a training step."""
        proof = Proof(Verdict("unknown"))
        if kept.values is not None:
            with as_live(model, self._before, kept.values):
                proof = self._by_values(kept.values, model, look)
            if proof.verdict.kind != "unknown":
                return replace(proof, repairs=proof.repairs.everywhere(kept.paths))
        if kept.meta is None or look.stage != "training":
            return proof
        with as_live(model, self._before, kept.meta):
            return self._by_dataflow(kept.meta, model, look)

    def _by_dataflow(self, made: nn.Module, model: nn.Module, look: Look) -> Proof:
        batch = first_rows(look.args[0], few_rows(self.plan.tp_size))
        step, _ = self._step(model, replace(look, args=(batch, *look.args[1:])))

        def loss(model: nn.Module) -> Tensor:
            seen = Seen(model, cast=lambda batch: tree_map(to_meta, batch), backward=False)
            step(seen)
            return torch.stack([one.float() for one in seen.losses]).sum() if len(seen.losses) > 1 else seen.losses[0]

        def prove(plan: ShardingPlan) -> tuple[Verdict, tuple[str, ...]]:
            verdict = prove_flow(made, plan, self.switches, loss)
            return verdict, tuple(one.where for one in verdict.findings if one.fix == NEEDS_SUM)

        with quiet(), WithoutProcesses():
            return Proof(*proved_or_repaired(made, self.plan, prove, REPAIRED_IN))

    def _by_values(self, made: nn.Module, model: nn.Module, look: Look) -> Proof:
        batch, proof = look.args[0], Proof(Verdict("unknown"))
        for rows in (few_rows(self.plan.tp_size), None):
            shortened = batch if rows is None else first_rows(batch, rows)
            if _work(made, shortened) > MOST_WORK:
                proof = Proof(_unknown("the step is too large to be proved by values"))
                continue
            proof = self._of_batch(made, model, replace(look, args=(shortened, *look.args[1:])))
            if proof.verdict.kind != "unknown" and (rows is None or not fails_on_ranks(proof.verdict)):
                return proof
        return proof

    def _step(self, model: nn.Module, look: Look) -> tuple[Step, Decisions]:
        """What is run, and what notes its decisions."""
        decisions = Decisions()
        return step_of(model, look, decisions), decisions

    def _of_batch(self, made: nn.Module, model: nn.Module, look: Look) -> Proof:
        """The proof of a step, and of what it would do if decisions by its number were taken the other way."""
        assert self.kept is not None
        short = self.kept.plan(self.plan)
        step, decisions = self._step(model, look)
        proof = self._values(made, step, short)
        if not isinstance(step, LightningStep):
            return proof
        if look.stage == "training" and proof.verdict.kind == "proved":
            step = replace(step, counters=tuple(decisions.changed))
        plan = proof.repairs.plan(short)
        if step.counters:
            proof = replace(proof, verdict=self._values(made, step, plan).verdict)
        found, made_first = [proof.verdict], list(decisions.made)
        first = sorted({made_first.index(line) for line in made_first})
        for place in first[:_MOST_BRANCHES] if proof.verdict.kind != "refuted" else ():
            line = made_first[place]
            of_other = self._values(made, replace(step, decisions=Decisions(frozenset({place}))), plan)
            proof, other = replace(proof, sites=proof.sites.with_more(of_other.sites)), of_other.verdict
            if other.kind == "unknown":
                other = _unknown(f"{line}, and what it does otherwise could not be followed")
            found.append(_said_of(other, line))
        return replace(proof, verdict=worst(found))

    def _values(self, made: nn.Module, step: Step, plan: ShardingPlan) -> Proof:
        return prove_values(own_copy(made), plan, self.switches, step)


def step_of(model: nn.Module, look: Look, decisions: Optional[Decisions] = None) -> Step:
    """The step of ``look``, for copies of ``model``; what it decides by numbers that change is noted."""
    if look.call is not None:
        return loss_step(look.call, look.args[0])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return LightningStep(look.stage, look.args, look.trainer, names, decisions or Decisions())


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


@dataclass(frozen=True)
class Kept:
    """What is kept of an unsharded model.

    Args:
        values: a copy with values, maybe with fewer blocks; None of a model that is too large even so.
        meta: a copy on the meta device; None where ``values`` has all blocks.
        paths: those of all modules.
        split: a copy with values and fewer blocks that is too large for ``values``, to prove that tokens may be split.
    """

    values: Optional[nn.Module]
    meta: Optional[nn.Module]
    paths: tuple[str, ...]
    split: Optional[nn.Module] = None

    def plan(self, plan: ShardingPlan) -> ShardingPlan:
        """The plan of what is left in ``values``."""
        return plan if self.values is None or self.meta is None else restricted(plan, self.values)


def keep(model: nn.Module, plan: ShardingPlan, largest_split: int = LARGEST) -> Kept:
    """Copy what is needed of ``model`` to prove its steps once it is sharded."""
    made, paths = empty_copy(model), tuple(path for path, _ in model.named_modules())
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):  # values come when it is sharded
        return Kept(None, made.to("meta"), paths)
    meta = None
    if _size(made) > LARGEST:
        meta = empty_copy(model).to("meta")
        shortened = bool(shorten(made, plan))
        if not shortened and largest_split == LARGEST or _size(made) > largest_split:
            return Kept(None, meta, paths)
        if _size(made) > LARGEST or not shortened:
            fill(made, model)
            return Kept(None, meta, paths, made.to("cpu"))
    fill(made, model)
    return Kept(made.to("cpu"), meta, paths)  # a LightningModule remembers where it was


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def to_meta(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def few_rows(tp_size: int) -> int:
    """A few rows, which the ranks do not divide."""
    return next(rows for rows in range(3, 3 + tp_size + 2) if rows % tp_size)


def _work(model: nn.Module, batch: Any) -> float:
    """Parameters times tokens."""
    tokens: list[int] = [1]

    def count(value: Any) -> Any:
        if isinstance(value, Tensor):
            tokens.append(prod(value.shape[:-1]) if value.is_floating_point() else value.numel())
        return value

    tree_map(count, batch)
    return float(max(tokens)) * sum(parameter.numel() for parameter in model.parameters())


def fails_on_ranks(verdict: Verdict) -> bool:
    """Whether ranks failed: with a batch of another size than the run's, of which they may ask something."""
    return any("the sharded step fails" in one.message for one in verdict.findings)


def _trains(model: nn.Module) -> Key:
    """Which modules are in training mode, and which parameters train."""
    return tuple(m.training for m in model.modules()), tuple(p.requires_grad for p in model.parameters())


def _unknown(reason: str) -> Verdict:
    return Verdict("unknown", (Diagnostic("warning", "the step", f"it could not be proved: {reason}."),))


def _said_of(verdict: Verdict, line: str) -> Verdict:
    findings = tuple(
        replace(one, message=f"(where {line}, and takes the other branch) {one.message}") for one in verdict.findings
    )
    return replace(verdict, findings=findings)
