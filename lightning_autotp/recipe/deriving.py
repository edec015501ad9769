"""Plans of models that have no rules: derived on one rank from a sample's step, and the same on all."""

from __future__ import annotations

from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.derive import Derived, derive
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.planning.rules import has_rules
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.proof.prover import Look
from lightning_autotp.proof.verdict import Verdict
from lightning_autotp.recipe.found import WAYS, Found, Planned, Sample, kept, looked_together


def is_derived(model: nn.Module, config: TPTrainingConfig) -> bool:
    """Whether the plan of ``model`` is to be derived: ``preset_model`` is "auto", or there are no rules for it."""
    return config.preset_model == "auto" or not has_rules(model, config)


def derive_together(model: nn.Module, config: TPTrainingConfig, mesh: Mesh, sample: Sample) -> Planned:
    """Derive the plan of ``model`` on the first rank and hand it to all; every rank of the job must call it.

    Args:
        model: the unsharded model.
        config: the config.
        mesh: this process's place.
        sample: the step to look at.

    Raises:
        ValueError: on all ranks, if there is no sample, if its step fails, or if nothing can be sharded.
    """

    def find(look: Look) -> tuple[Found, bool]:
        return kept(model, look, config, mesh.tp_size, "", lambda: _derived(model, look, config, mesh.tp_size))

    look, found, failed = looked_together(mesh, sample, find)
    if found is None:
        raise ValueError(failed or _no_sample(model, config))
    plan = parallel_sequence(model, found.plan) if config.sequence_parallel else found.plan
    if config.sequence_parallel or config.loss_parallel:  # it was proved without
        return Planned(plan)
    return Planned(plan, found.proof_for(look))


def derived_plainly(model: nn.Module, look: Look, config: TPTrainingConfig, tp_size: int) -> Derived:
    """Derive and prove a plan without the switches of the run, which are proved with it at its first step.

    Raises:
        ValueError: if the step does not run on a copy of the model, if nothing can be sharded, or if no plan is right.
    """
    plain = {"sequence_parallel": False, "loss_parallel": False}
    found = derive(model, look, config.model_copy(update=plain), tp_size)
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
    return found


def told(found: Derived) -> str:
    """What was derived, in words."""
    sharded = [entry for entry in found.plan.parameters.values() if not entry.layout.is_replicated]
    text = f"the plan was derived from a step: {len(sharded)} of {len(found.plan.parameters)} parameters are sharded"
    if found.dropped:
        names = "; ".join(name for name, _ in found.dropped)
        text += f"; replicated or gathered, since sharding them was refuted: {names}"
    if found.verdict.kind != "proved":
        text += f". It is not proved: {Verdict(found.verdict.kind, found.verdict.findings)}"
    return f"{text}."


def _derived(model: nn.Module, look: Look, config: TPTrainingConfig, tp_size: int) -> Found:
    found = derived_plainly(model, look, config, tp_size)
    return Found(found.plan, found.verdict, (told(found),))


def _no_sample(model: nn.Module, config: TPTrainingConfig) -> str:
    why = 'preset_model="auto" asks for it' if config.preset_model == "auto" else "there are no rules for it"
    return f"the plan of {type(model).__name__} has to be derived ({why}), and there is no sample to run. {WAYS}."
