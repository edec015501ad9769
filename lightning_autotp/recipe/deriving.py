"""Plans of models that have no rules: derived on one rank from a sample's step, and the same on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.derive import Derived, derive
from lightning_autotp.derivation.fill import filled, gaps
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.planning.rules import has_rules
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.prover import Look, Prover
from lightning_autotp.proof.verdict import Verdict

Sample = Callable[[], Optional[Look]]
"""A step to derive a plan from; None if there is nothing to make one of."""

WAYS = (
    "Give a `sample_batch` (an argument of AutoTPStrategy and of parallelize, or an attribute or method of the module),"
    " or rules (`preset_model` or `partition_config`)"
)


def is_derived(model: nn.Module, config: TPTrainingConfig) -> bool:
    """Whether the plan of ``model`` is to be derived: ``preset_model`` is "auto", or there are no rules for it."""
    return config.preset_model == "auto" or not has_rules(model, config)


def derive_together(model: nn.Module, config: TPTrainingConfig, mesh: Mesh, sample: Sample) -> ShardingPlan:
    """Derive the plan of ``model`` on the first rank and hand it to all; every rank of the job must call it.

    Args:
        model: the unsharded model.
        config: the config.
        mesh: this process's place.
        sample: the step to look at.

    Raises:
        ValueError: on all ranks, if there is no sample, if its step fails, or if nothing can be sharded.
    """
    try:
        look = sample()
        found: tuple[Optional[ShardingPlan], str] = (None, "" if look is not None else _no_sample(model, config))
        if look is not None and mesh.tp_rank == mesh.dp_rank == 0:
            found = (_derived(model, look, config, mesh.tp_size), "")
    except Exception as error:
        found = (None, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
    told: list[tuple[Optional[ShardingPlan], str]] = mesh.collectives.gather_objects(found, "world")
    failed = next((f"rank {rank}: {text}" if rank else text for rank, (_, text) in enumerate(told) if text), None)
    if failed is not None:
        raise ValueError(failed)
    return next(plan for plan, _ in told if plan is not None)


def _derived(model: nn.Module, look: Look, config: TPTrainingConfig, tp_size: int) -> ShardingPlan:
    found = derive(model, look, config.model_copy(update=_PLAIN), tp_size)
    _require_something(model, found)
    rank_zero_info(f"lightning_autotp: {_told(found)}")
    plan = found.plan
    return parallel_sequence(model, plan) if config.sequence_parallel else plan


def may_fill(model: nn.Module, plan: ShardingPlan, config: TPTrainingConfig) -> bool:
    """Whether what ``plan`` leaves replicated may be sharded by a derived one: only beside rules that are not all the
    user's own, and where it can be proved.
    """
    own = config.partition_config is not None and (config.preset_model is None or not _uses_defaults(config))
    return plan.tp_size > 1 and config.proof != "off" and not own and not plan.blockers and bool(gaps(model, plan))


def fill_together(
    model: nn.Module, plan: ShardingPlan, config: TPTrainingConfig, mesh: Mesh, sample: Sample
) -> ShardingPlan:
    """Shard what ``plan`` leaves replicated, where a derived plan shards it and the proof holds; else ``plan``.

    Every rank of the job must call it.
    """
    told: tuple[Optional[ShardingPlan], str] = (None, "")
    try:
        look = sample()
        if look is None:
            told = None, f"there is no sample to derive a plan from. {WAYS}."
        elif mesh.tp_rank == mesh.dp_rank == 0:
            told = _filled(model, plan, look, config)
    except Exception as error:  # it trains without, too
        told = None, f"{type(error).__name__}: {error}"
    found: list[tuple[Optional[ShardingPlan], str]] = mesh.collectives.gather_objects(told, "world")
    failed = next((text for _, text in found if text), "")
    names = ", ".join(gaps(model, plan))
    if failed:
        rank_zero_info(f"lightning_autotp: no rule says anything of {names}, which stay replicated: {failed}")
        return plan
    rank_zero_info(f"lightning_autotp: no rule says anything of {names}: what can be sharded of them was derived.")
    return next(plan for plan, _ in found if plan is not None)


def _filled(
    model: nn.Module, plan: ShardingPlan, look: Look, config: TPTrainingConfig
) -> tuple[Optional[ShardingPlan], str]:
    """The plan, filled and proved, or why there is none."""
    found = filled(model, plan, derive(model, look, config.model_copy(update=_PLAIN), plan.tp_size))
    if found == plan:
        return None, "a step of the model shows nothing of it that could be sharded."
    if config.sequence_parallel:
        found = parallel_sequence(model, found)
    prover = Prover(model, found, config)
    prover.sharded(model)
    proof = prover.prove(model, look)
    if proof.verdict.kind != "proved":
        return None, f"sharding them is not proved: {proof.verdict.listed}"
    return proof.repairs.plan(found), ""


_PLAIN = {"sequence_parallel": False, "loss_parallel": False}
"""The switches with which a plan is derived; those of the run are proved with it at its first step."""


def _uses_defaults(config: TPTrainingConfig) -> bool:
    return config.rules is not None and config.rules.use_default_specs


def _require_something(model: nn.Module, found: Derived) -> None:
    if found.verdict.kind == "refuted":
        raise ValueError(
            f"no plan for {type(model).__name__} could be derived that computes what the unsharded model does.\n"
            f"{found.verdict.listed}\nGive `partition_config` rules."
        )
    if all(entry.layout.is_replicated for entry in found.plan.parameters.values()):
        operators = f" (operators that no rule follows: {', '.join(found.given_up)})" if found.given_up else ""
        raise ValueError(
            f"nothing of {type(model).__name__} can be sharded: none of its linears has features that stand"
            f" apart{operators}. Give `partition_config` rules, or train it without tensor parallelism."
        )


def _told(found: Derived) -> str:
    """What was derived, in words."""
    sharded = [entry for entry in found.plan.parameters.values() if not entry.layout.is_replicated]
    text = f"the plan was derived from a step: {len(sharded)} of {len(found.plan.parameters)} parameters are sharded"
    if found.dropped:
        names = "; ".join(name for name, _ in found.dropped)
        text += f"; replicated or gathered, since sharding them was refuted: {names}"
    if found.verdict.kind != "proved":
        text += f". It is not proved: {Verdict(found.verdict.kind, found.verdict.findings)}"
    return f"{text}."


def _no_sample(model: nn.Module, config: TPTrainingConfig) -> str:
    why = 'preset_model="auto" asks for it' if config.preset_model == "auto" else "there are no rules for it"
    return f"the plan of {type(model).__name__} has to be derived ({why}), and there is no sample to run. {WAYS}."
