"""Plans of models that have no rules: derived on one rank from a sample's step, and the same on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.derive import Derived, derive
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.planning.rules import has_rules
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.prover import Look
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
    found = derive(model, look, config, tp_size)
    _require_something(model, found)
    rank_zero_info(f"lightning_autotp: {_told(found)}")
    plan = found.plan
    return parallel_sequence(model, plan) if config.sequence_parallel else plan


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
