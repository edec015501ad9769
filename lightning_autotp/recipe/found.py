"""What is found of a step before anything is sharded: by the first rank, for all, and kept for later runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Optional

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_autotp.compat import tree_map
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.cache import cached
from lightning_autotp.derivation.digest import digest_of
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.prover import Look
from lightning_autotp.proof.repair import Repairs
from lightning_autotp.proof.verdict import Verdict

Sample = Callable[[], Optional[Look]]
"""A step to look at; None if there is nothing to make one of."""

WAYS = (
    "Give a `sample_batch` (an argument of AutoTPStrategy and of parallelize, or an attribute or method of the module),"
    " or rules (`preset_model` or `partition_config`)"
)

NOT_SEEN = Verdict("unknown")


@dataclass(frozen=True)
class Planned:
    """A plan, and what is known of it before anything is sharded.

    Args:
        plan: the plan.
        proof: a step that was proved with it in this process, and the verdict; None where none was.
        advice: what an error of a later proof is to say besides.
        repairs: what of the plan a proof has found missing.
    """

    plan: ShardingPlan
    proof: Optional[tuple[Look, Verdict]] = None
    advice: str = ""
    repairs: Repairs = Repairs()


@dataclass(frozen=True)
class Found:
    """What one rank found of a step; kept in the cache where it is proved.

    Args:
        plan: the plan.
        verdict: of the step, with this plan.
        said: what people should know.
        repairs: what of the plan the proof has found missing.
    """

    plan: ShardingPlan
    verdict: Verdict = NOT_SEEN
    said: tuple[str, ...] = ()
    repairs: Repairs = Repairs()

    def proof_for(self, look: Optional[Look]) -> Optional[tuple[Look, Verdict]]:
        """The step and its verdict, if it was proved in this process and stands for no other step.

        What a step draws is looked at again when it is taken: how that is sharded is not kept.
        """
        if look is None or not look.own or self.verdict.kind != "proved" or self.verdict.draws or self.verdict.random:
            return None
        return look, self.verdict


Looked = tuple[Optional[Look], Optional[Found], str]
"""This rank's step, what the first rank found of it (None without a step), and why that failed, if it did."""


def looked_together(mesh: Mesh, sample: Sample, find: Callable[[Look], tuple[Found, bool]]) -> Looked:
    """Take the sample on all ranks, and look at it on the first one of the job; every rank of the job must call it.

    Args:
        mesh: this process's place.
        sample: the step to look at.
        find: looks at it; what it found, and whether that is of an earlier run.
    """
    look: Optional[Look] = None
    told: tuple[Optional[Found], bool, str] = (None, False, "")
    try:
        look = sample()
        if look is not None and mesh.tp_rank == mesh.cp_rank == mesh.dp_rank == 0:
            told = (*find(look), "")
    except Exception as error:
        told = (None, False, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
    everyones: list[tuple[Optional[Found], bool, str]] = mesh.collectives.gather_objects(told, "world")
    failed = next((f"rank {rank}: {text}" if rank else text for rank, (*_, text) in enumerate(everyones) if text), "")
    found, of_cache = next(((one, old) for one, old, _ in everyones if one is not None), (None, False))
    if failed or found is None:
        return look, None, failed
    for one in found.said:
        rank_zero_info(f"lightning_autotp: {one}")
    if of_cache:  # what is proved of it is proved before the first step, live
        found = replace(found, verdict=NOT_SEEN)
    return look, found, ""


def kept(
    model: nn.Module, look: Look, config: TPTrainingConfig, tp_size: int, plan: object, find: Callable[[], Found]
) -> tuple[Found, bool]:
    """What ``find`` finds, or found in an earlier run of the same; and whether that is so.

    Without a proof to come, which would show a mistake, it is always found anew.

    Args:
        model: the unsharded model.
        look: the step.
        config: the config.
        tp_size: the tensor parallel size, which a config need not say.
        plan: what is planned for the model already.
        find: looks at the step; what is not proved is not kept.
    """
    if config.proof == "off":
        return find(), False

    def key() -> str:
        switches = config.model_dump(mode="json", exclude={"tensor_parallel"})
        return digest_of(model, look.stage, look.call, look.own, _shapes(look.args[0]), tp_size, switches, repr(plan))

    return cached(Found, key, find, lambda found: found.verdict.kind == "proved")


def _shapes(batch: Any) -> Any:
    """A batch with a word for each tensor."""
    words = tree_map(lambda one: f"{one.dtype} {tuple(one.shape)}" if isinstance(one, Tensor) else one, batch)
    return words
