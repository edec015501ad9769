"""All that changes a model: its parameters and layers, how its loss is computed, what its blocks keep."""

from collections.abc import Callable
from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.losses.loss_parallel import set_loss_parallel
from lightning_autotp.parallel.context_parallel import apply_context
from lightning_autotp.parallel.saved_activations import SavedActivations
from lightning_autotp.planning.blocks import shared_blocks
from lightning_autotp.planning.context_parallel import blocks_of, refuse_heads
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.sharding.apply import apply_plan
from lightning_autotp.sharding.pretrained_methods import speak_for_the_full_model
from lightning_autotp.sharding.state import SHARDED, Sharded, sharded


def shard(
    model: nn.Module,
    plan: ShardingPlan,
    mesh: Mesh,
    switches: TPTrainingConfig,
    *,
    device: torch.device,
    training: bool = True,
    compare: Optional[Callable[[str, Tensor], None]] = None,
) -> Sharded:
    """Shard ``model`` in place and move it to ``device``; every process must call it.

    A model that is sharded already stays as it is, but for ``loss_parallel`` and ``shard_saved_activations``, which are
    set anew. Compiling and data parallelism come after this.

    Args:
        model: the unsharded model, or one that an earlier call has sharded.
        plan: what to do with it; of no meaning for a model that is sharded already.
        mesh: this process's place.
        switches: the config, of which ``tp_overlap_comm``, ``loss_parallel`` and ``shard_saved_activations`` count.
        device: where to put this rank's part.
        training: whether training steps follow, for which ``shard_saved_activations`` is.
        compare: raises on all ranks unless a tensor, given with the name of its place, is the same on all of them; of
            what checkpointed blocks keep, the first of each place is given to it. None compares nothing.

    Raises:
        ValueError: if the plan has blockers, if the model was sharded for another size, if a module on the meta device
            has no way to initialize itself, or if a switch cannot be exact for this model.
    """
    found = sharded(model)
    if found is None:
        blocks = blocks_of(model) if mesh.cp_size > 1 else ()
        if blocks:
            refuse_heads(model, blocks[0], mesh.tp_size, mesh.cp_size)
        found = apply_plan(model, plan, mesh, device, overlap=switches.tp_overlap_comm)
        if blocks:
            found = replace(found, context=apply_context(model, blocks, mesh))
        speak_for_the_full_model(model, found)
    elif (found.mesh.tp_size, found.mesh.tp_rank) != (mesh.tp_size, mesh.tp_rank):
        raise ValueError(
            f"this model was sharded for a tensor parallel size of {found.mesh.tp_size} by an earlier run, and"
            f" autotp_size is now {mesh.tp_size}; build a new model and load its checkpoint."
        )
    elif (found.mesh.cp_size, found.mesh.cp_rank) != (mesh.cp_size, mesh.cp_rank):
        raise ValueError(
            f"an earlier run has split this model's tokens over {found.mesh.cp_size} ranks, and context_parallel_size"
            f" is now {mesh.cp_size}; build a new model and load its checkpoint."
        )
    set_loss_parallel(model, found.plan, switches.loss_parallel)
    if found.saved is not None:
        found.saved.remove()
    saved = None
    if training and switches.shard_saved_activations and mesh.tp_size > 1:
        saved = SavedActivations(shared_blocks(model, found.plan), mesh, compare or _nothing)
    found = replace(found, saved=saved)
    setattr(model, SHARDED, found)
    return found


def _nothing(place: str, x: Tensor) -> None:
    pass
