"""A plan for a model that nobody wrote rules for: derived from a run of it, and proved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from lightning_autotp.compat import tree_map
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.assign import Ranks, assign_ranks
from lightning_autotp.derivation.features import Component, Features, components, features_of_run
from lightning_autotp.derivation.plan import derived_plan
from lightning_autotp.introspection.names import folded
from lightning_autotp.plans.plan import ParameterPlan, ShardingPlan
from lightning_autotp.proof.copying import own_copy
from lightning_autotp.proof.dataflow_proof import as_traced
from lightning_autotp.proof.processes import WithoutProcesses
from lightning_autotp.proof.prover import Look, Prover, few_rows, step_of, to_meta
from lightning_autotp.proof.randomness import without_randomness
from lightning_autotp.proof.shorten import shorten
from lightning_autotp.proof.step import Seen, first_rows
from lightning_autotp.proof.values import quiet
from lightning_autotp.proof.verdict import Verdict


@dataclass(frozen=True)
class Derived:
    """A derived plan.

    Args:
        plan: the plan, completed by what its proof found.
        verdict: what the proof says of it.
        groups: names of parameters, layer numbers folded, that are sharded together or not at all.
        dropped: linears that stand apart in the run, but whose sharding was refuted, and why.
        given_up: operators that no rule follows: what they read is replicated.
    """

    plan: ShardingPlan
    verdict: Verdict
    groups: tuple[frozenset[str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    given_up: tuple[str, ...] = ()


def derive(model: nn.Module, look: Look, switches: TPTrainingConfig, tp_size: int) -> Derived:
    """Derive a plan of ``model``, without any rules or names, and prove it.

    Args:
        model: the unsharded model, which may be on the meta device; it is left as it is.
        look: the step to look at.
        switches: the config that the proof is for.
        tp_size: the tensor parallel size.

    Raises:
        ValueError: if the step does not run on a copy of the model.
    """
    prover = Prover(model, ShardingPlan(tp_size, {}), switches)
    prover.sharded(model)
    try:
        features = _features(model, prover, look, tp_size)
    except Exception as error:
        raise ValueError(
            f"no plan could be derived for {type(model).__name__}: a step of a copy of it fails"
            f" ({type(error).__name__}: {error}). Give `preset_model` or `partition_config` rules."
        ) from error
    ranks = assign_ranks(features, tp_size)
    return _Search(model, features, ranks, tp_size, look, prover).found()


def _features(model: nn.Module, prover: Prover, look: Look, tp_size: int) -> Features:
    """The classes of features in a few rows of the step, on a copy with values or, of a large model, on meta."""
    kept = prover.kept
    if kept is None:
        raise ValueError("it cannot be copied")
    batch = first_rows(look.args[0], few_rows(tp_size))
    step = step_of(model, replace(look, args=(batch, *look.args[1:])))
    if kept.values is not None:
        copy = own_copy(kept.values)
    else:
        assert kept.meta is not None
        copy = own_copy(kept.meta)
        shorten(copy, prover.plan)

    def run(model: nn.Module) -> Any:
        seen = Seen(model, backward=False)
        if kept.values is None:
            seen.cast = partial(tree_map, to_meta)
        step(seen)
        return seen.losses, seen.outputs

    traced = nullcontext() if kept.values is not None else as_traced()
    with quiet(), traced, WithoutProcesses(), without_randomness([]):
        return features_of_run(copy.requires_grad_(False), run, tp_size)


class _Search:
    """Proofs of a plan, and where it is refuted, of its kinds of layers one by one."""

    def __init__(
        self, model: nn.Module, features: Features, ranks: Ranks, tp_size: int, look: Look, prover: Prover
    ) -> None:
        self.model, self.features, self.ranks, self.tp_size = model, features, ranks, tp_size
        self.look, self.prover = look, prover

    def found(self) -> Derived:
        plan, verdict = self._proved(self._plan(self.ranks))
        kinds, dropped = self._kinds(), {}
        if verdict.kind == "refuted":
            good: Ranks = {}
            repaired: list[ShardingPlan] = []
            for names, alike in kinds.items():
                held = frozenset().union(*(component.classes for component in alike))
                ranks = {one: of for one, of in self.ranks.items() if one in held}
                alone, of_kind = self._proved(self._plan(ranks, gather=False))
                if of_kind.kind == "refuted":
                    dropped[names] = of_kind.reason
                else:
                    good |= ranks
                    repaired.append(alone)
            plan, verdict = self._proved(_completed(self._plan(good), repaired))
            if verdict.kind == "refuted":
                plan, verdict = self._proved(_completed(self._plan(good, gather=False), repaired))
        groups = tuple(self._parameters(alike) for names, alike in kinds.items() if names not in dropped)
        told = tuple((", ".join(names), why) for names, why in dropped.items())
        return Derived(_reasoned(plan, dropped), verdict, groups, told, self.features.given_up)

    def _parameters(self, alike: list[Component]) -> frozenset[str]:
        """The names of all parameters of components of one kind, with their layer numbers folded."""
        linears = {folded(path) for one in alike for path in (*one.columns, *one.rows)}
        entries = {folded(name) for one in alike for name in one.entries}
        names = (folded(name) for name, _ in self.model.named_parameters(remove_duplicate=False))
        return frozenset(n for n in names if n in entries or n in linears or n.rpartition(".")[0] in linears)

    def _plan(self, ranks: Ranks, *, gather: bool = True) -> ShardingPlan:
        return derived_plan(self.model, self.features, ranks, self.tp_size, gather=gather)

    def _proved(self, plan: ShardingPlan) -> tuple[ShardingPlan, Verdict]:
        self.prover.plan = plan
        proof = self.prover.prove(self.model, self.look)
        return proof.repairs.plan(plan), proof.verdict

    def _kinds(self) -> dict[tuple[str, ...], list[Component]]:
        """Components that are alike but for layer numbers, by the names of their layers."""
        kinds: dict[tuple[str, ...], list[Component]] = defaultdict(list)
        for component in components(self.features):
            kinds[tuple(dict.fromkeys(map(folded, (*component.columns, *component.rows))))].append(component)
        return kinds


def _reasoned(plan: ShardingPlan, dropped: Mapping[tuple[str, ...], str]) -> ShardingPlan:
    """``plan`` with what was refuted at the layers whose features every rank has for that."""
    why = {name: text for names, text in dropped.items() for name in names}

    def of(entry: ParameterPlan) -> ParameterPlan:
        text = why.get(folded(entry.module))
        if text is None:
            return entry
        return replace(
            entry, reason="; ".join(filter(None, (entry.reason, f"its features stay together, since apart {text}")))
        )

    return replace(plan, parameters={name: of(entry) for name, entry in plan.parameters.items()})


def _completed(plan: ShardingPlan, others: list[ShardingPlan]) -> ShardingPlan:
    """``plan`` with what proofs found to be missing in plans of parts of it."""
    summed = {name for one in others for name, entry in one.parameters.items() if entry.grad_allreduce}
    entries = {
        name: replace(entry, grad_allreduce=True) if name in summed and entry.layout.is_replicated else entry
        for name, entry in plan.parameters.items()
    }
    attributes = tuple(dict.fromkeys(one for other in others for one in other.attributes))
    return replace(plan, parameters=entries, attributes=attributes)
