"""Plans of presets and of models themselves, looked at with a step before anything is sharded."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.fill import filled, gaps
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.planning.checks import left_whole
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.prover import Look, Prover, fails_on_ranks
from lightning_autotp.recipe.deriving import derived_plainly, told
from lightning_autotp.recipe.found import WAYS, Found, Planned, Sample, kept, looked_together
from lightning_autotp.recipe.proving import act_on

WITH_A_SAMPLE = (
    "With a `sample_batch` (an argument of AutoTPStrategy and of parallelize, or an attribute or method of the module)"
    " a plan that is right would be derived in place of this one, which no rule of yours has made."
)


def may_improve(model: nn.Module, plan: ShardingPlan, config: TPTrainingConfig) -> bool:
    """Whether a step could change ``plan``: it can be proved, and not all rules are the user's own."""
    own = config.partition_config is not None and (config.preset_model is None or not _uses_defaults(config))
    if plan.tp_size == 1 or config.proof == "off" or own:
        return False
    return _is_replaceable(plan) or not plan.blockers and bool(gaps(model, plan))


def improve_together(
    model: nn.Module, plan: ShardingPlan, config: TPTrainingConfig, mesh: Mesh, sample: Sample
) -> Planned:
    """Look at a step with the plan of a preset or of the model itself; every rank of the job must call it.

    What it leaves replicated is sharded where a derived plan does so and the proof holds; if it is refuted, a derived
    plan that is proved takes its place, unless the user's own rules have a part in it.

    Args:
        model: the unsharded model.
        plan: its plan by rules.
        config: the config.
        mesh: this process's place.
        sample: the step to look at.

    Raises:
        PlanRefutedError: on all ranks, if the plan is refuted and none that is right could be derived.
    """

    def find(look: Look) -> tuple[Found, bool]:
        return kept(model, look, config, plan.tp_size, plan, lambda: _improved(model, plan, look, config))

    look, found, failed = looked_together(mesh, sample, find)
    if found is None:
        names = ", ".join(gaps(model, plan))
        if names:
            why = failed or f"there is no sample to derive a plan from. {WAYS}."
            rank_zero_info(f"lightning_autotp: no rule says anything of {names}, which stay replicated: {why}")
        return Planned(plan, advice=WITH_A_SAMPLE if _is_replaceable(plan) and not failed else "")
    if look is not None and found.verdict.kind == "refuted":
        advice = "" if found.verdict.is_of_a_switch else found.said[-1]
        if config.proof != "warn" and not fails_on_ranks(found.verdict):
            act_on(found.verdict, look, config, advice)
        return Planned(plan, advice=advice)  # it may be right for the rows of the run
    return Planned(found.plan, found.proof_for(look), repairs=found.repairs)


def _improved(model: nn.Module, plan: ShardingPlan, look: Look, config: TPTrainingConfig) -> Found:
    said: tuple[str, ...] = ()
    names = "" if plan.blockers else ", ".join(gaps(model, plan))
    if names:
        found, why = _filled(model, plan, look, config)
        if found is not None:
            text = f"no rule says anything of {names}: what can be sharded of them was derived."
            of_rules = [one for one in plan.warnings if one not in left_whole(model, plan.parameters)]
            warnings = (*of_rules, *left_whole(model, found.plan.parameters))
            return replace(found, plan=replace(found.plan, warnings=warnings), said=(text, *found.said))
        said = (f"no rule says anything of {names}, which stay replicated: {why}",)
    if not _is_replaceable(plan) or not look.own:
        return Found(plan, said=said)
    if plan.blockers:
        return _replaced(model, Found(plan, said=said), look, config, plan.blockers[0])
    found = _proved(model, plan, look, config)
    found = replace(found, said=(*said, *found.said))
    if found.verdict.kind == "refuted" and not found.verdict.is_of_a_switch:
        return _replaced(model, found, look, config, found.verdict.reason)
    return found


def _replaced(model: nn.Module, found: Found, look: Look, config: TPTrainingConfig, why: str) -> Found:
    """A derived plan in place of one that is wrong, as ``why`` says; ``found`` if none is proved."""
    plan = found.plan
    sources = " and ".join(dict.fromkeys(entry.source for entry in plan.parameters.values() if entry.source))
    try:
        derived = derived_plainly(model, look, config, plan.tp_size)
        made = Found(derived.plan, derived.verdict)
        if config.sequence_parallel:
            made = _proved(model, parallel_sequence(model, made.plan), look, config)
        elif config.loss_parallel:
            made = _proved(model, made.plan, look, config)
        failed = "" if made.verdict.kind == "proved" else f"it is not proved: {made.verdict.listed}"
    except Exception as error:  # the error is that of the first plan
        failed = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if failed:
        return replace(found, said=(*found.said, f"In place of the plan of {sources} one was derived: {failed}"))
    text = f"the plan of {sources} is not right here, and is replaced: {why}\nInstead, {told(derived)}"
    return replace(made, plan=replace(made.plan, warnings=(text,)), said=(*found.said, *made.said))


def _filled(model: nn.Module, plan: ShardingPlan, look: Look, config: TPTrainingConfig) -> tuple[Optional[Found], str]:
    """The plan, filled and proved, or why there is none."""
    try:
        found = filled(model, plan, derived_plainly(model, look, config, plan.tp_size))
        if found == plan:
            return None, "a step of the model shows nothing of it that could be sharded."
        if config.sequence_parallel:
            found = parallel_sequence(model, found)
    except Exception as error:  # it trains without, too
        return None, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    proved = _proved(model, found, look, config)
    if proved.verdict.kind != "proved":
        return None, f"sharding them is not proved: {proved.verdict.listed}"
    return proved, ""


def _proved(model: nn.Module, plan: ShardingPlan, look: Look, config: TPTrainingConfig) -> Found:
    """``plan``, with what the proof of a step finds missing."""
    prover = Prover(model, plan, config)
    prover.sharded(model)
    proof = prover.prove(model, look)
    said = (f"as the {look.stage} step shows, {'; '.join(proof.repairs.sentences())}.",) if proof.repairs else ()
    return Found(proof.repairs.plan(plan), proof.verdict, said, proof.repairs)


def _is_replaceable(plan: ShardingPlan) -> bool:
    """Whether no rule of the user's own has decided of anything."""
    return all(entry.source != "user" for entry in plan.parameters.values())


def _uses_defaults(config: TPTrainingConfig) -> bool:
    return config.rules is not None and config.rules.use_default_specs
