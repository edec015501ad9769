"""The plan of a model, with everything that the config asks of it. Pure: no process group, works on the meta device."""

from typing import Optional

from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.planning.planner import propose_plan
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.plans.plan import ShardingPlan


def make_plan(
    model: nn.Module, config: TPTrainingConfig, tp_size: Optional[int] = None, *, warn: bool = True
) -> ShardingPlan:
    """Decide for every parameter of ``model`` how it is cut, and where tokens are, under ``config``.

    Args:
        model: the unsharded model; its parameters may be on the meta device.
        config: the user's config.
        tp_size: the tensor parallel size; None takes the config's.
        warn: whether to warn of what the user should know, which is in the plan, too.

    Raises:
        ValueError: if the plan cannot be made, see :func:`~lightning_autotp.planning.planner.propose_plan`; or if
            ``sequence_parallel`` is on and the structure of the blocks is not known well enough for it.
    """
    plan = propose_plan(model, config, tp_size, warn=warn)
    return parallel_sequence(model, plan) if config.sequence_parallel and plan.tp_size > 1 else plan
