"""Verdicts of all ranks, taken together and acted on alike: an error, a warning, or gradients that are put right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.same import require_same
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.compared import Proof
from lightning_autotp.proof.prover import Look, Prover, structure
from lightning_autotp.proof.repair import Repairs
from lightning_autotp.proof.verdict import Verdict, worst
from lightning_autotp.recipe.facts import SAME_PLAN, plan_facts
from lightning_autotp.recipe.found import Planned
from lightning_autotp.training.random_state import warn_of_dropout


class PlanRefutedError(ValueError):
    """The sharded model would not compute what the unsharded one does."""


def prover_of(model: nn.Module, planned: Planned, config: TPTrainingConfig, mesh: Mesh) -> Optional[Prover]:
    """A prover of the steps of ``model``, which is still unsharded; None if there is nothing to prove."""
    if config.proof == "off" or mesh.batch_ranks == 1:
        return None
    # one rank of those that see the same batches proves for all of them
    prover = Prover(model if mesh.is_first else None, planned.plan, config)
    prover.known, prover.advice = planned.proof, planned.advice
    return prover


def prove_together(prover: Prover, model: nn.Module, look: Look, mesh: Mesh) -> Repairs:
    """Prove a step, exchange the verdicts, and act on them as the config says; every rank must call it.

    The first training step is proved by all ranks of the job, so that none waits for one that has raised; any other by
    those that see the same batches.

    Returns:
        what the plan lacks, and is to be repaired.

    Raises:
        PlanRefutedError: on all ranks, if the step is refuted, or not proved where ``proof="require"``.
    """
    together = look.stage == "training" and prover.trained == 1
    proof = prover.prove(model, look) if mesh.is_first else Proof(Verdict("proved"))
    told = mesh.collectives.gather_objects((proof, structure(look.args[0])), "world" if together else "batch")
    _require_one_structure([found for _, found in told], look)
    repairs = next((found.repairs for found, _ in told if found.repairs), Repairs())
    for found, _ in told:
        prover.sites = prover.sites.with_more(found.sites)
    verdict = worst(found.verdict for found, _ in told)
    act_on(verdict, look, prover.switches, prover.advice)
    if verdict.kind == "unknown" and look.stage == "training":
        warn_of_dropout(model, prover.plan)
    elif verdict.random:
        rank_zero_warn(
            f"what the ranks draw in the {look.stage} step is not, or not known to be, what the unsharded model draws:"
            f" {', '.join(verdict.random)}."
        )
    if repairs:
        require_same(plan_facts(repairs.plan(prover.plan)), SAME_PLAN, None if together else mesh)
        rank_zero_info(f"lightning_autotp: as the {look.stage} step shows, {'; '.join(repairs.sentences())}.")
    return repairs


def prove_sample(prover: Prover, model: nn.Module, look: Look, mesh: Mesh) -> ShardingPlan:
    """Prove a step of a sample before anything is sharded; the plan, completed by what was found.

    Raises:
        PlanRefutedError: see :func:`prove_together`.
    """
    prover.is_new(model, look)
    prover.plan = prove_together(prover, model, look, mesh).plan(prover.plan)
    return prover.plan


def act_on(verdict: Verdict, look: Look, switches: TPTrainingConfig, advice: str = "") -> None:
    """Raise, warn or say nothing, as ``switches.proof`` says; a refutation is told with ``advice``.

    Raises:
        PlanRefutedError: see :func:`prove_together`.
    """
    step = f"the {look.stage} step"
    if verdict.kind == "refuted":
        text = f"{step} of the sharded model does not compute what that of the unsharded model does.\n{verdict.listed}"
        text += f"\n{advice}" if advice else ""
        if switches.proof != "warn":
            raise PlanRefutedError(
                f"{text}\nMend the rules or the code that is named; `proof='warn'` would train all the same."
            )
        rank_zero_warn(text)
    elif verdict.kind == "unknown" and (verdict.findings or switches.proof == "require"):
        text = f"it is not proved that {step} computes what that of the unsharded model does.\n{verdict.listed}"
        if switches.proof == "require":
            raise PlanRefutedError(f"{text}\nproof='require' asks for it; 'on' would go on with a warning.")
        rank_zero_warn(text)


def _require_one_structure(found: Sequence[object], look: Look) -> None:
    if len(set(map(repr, found))) > 1:
        kinds = "\n".join(f"- {one}" for one in dict.fromkeys(map(repr, found)))
        raise PlanRefutedError(
            f"the ranks' first batches of the {look.stage} step differ in their keys, dtypes or dims:\n{kinds}\nBatches"
            " must be alike on all ranks; see to what the collate function returns."
        )
