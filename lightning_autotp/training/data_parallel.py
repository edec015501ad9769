"""torch's data parallelism beside tensor parallelism: what it cannot do, and what its errors mean."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.sharding.zero import zero_of

_OF_ROWS = re.compile("mixed torch.Tensor and DTensor|data is not allocated yet")


@dataclass(frozen=True)
class GatherOverDP:
    """torchmetrics' ``dist_sync_fn``: a metric's state from all data parallel ranks, and from them only.

    Ranks that share a model see the same data. A metric's own ``process_group`` would do the same, but a metric that
    holds a group cannot be cloned.
    """

    mesh: Mesh

    def __call__(self, result: Tensor, group: Any = None) -> list[Tensor]:
        return gather_all_tensors(result, self.mesh.dp_group)


def statistics_over_dp(model: nn.Module, mesh: Mesh) -> None:
    """Make metrics and synchronized batch norms in ``model`` add over data parallel ranks, and over them only."""
    for module in model.modules():
        if isinstance(module, Metric) and module.process_group is None and module.dist_sync_fn is None:
            module.dist_sync_fn = GatherOverDP(mesh)
        elif isinstance(module, nn.SyncBatchNorm) and module.process_group is None:
            module.process_group = mesh.dp_group


def hook_state_over_dp(state: Any, mesh: Mesh) -> Any:
    """The state of a DDP communication hook, with a group: the hook would average different parts of the model else."""
    if state is None:
        return mesh.replica_group
    if getattr(state, "process_group", mesh) is None:
        state.process_group = mesh.replica_group
    return state


def refuse_for_ddp(model: nn.Module, options: Mapping[str, Any], *, accumulates: bool = False) -> None:
    """Refuse what torch's DDP cannot do, before it says so in its own terms.

    Args:
        model: what is to be trained.
        options: the arguments of ``DistributedDataParallel``.
        accumulates: whether gradients of several batches are known to be added up.

    Raises:
        ValueError: naming what to change.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train.")
    if options.get("static_graph") and accumulates:
        raise ValueError("static_graph: it does not go with gradient accumulation in torch's DDP; leave it out.")


def replicate(model: nn.Module, mesh: Mesh, device: torch.device, options: Mapping[str, Any]) -> nn.Module:
    """``model``, whose gradients are averaged over its replicas in the backward pass, if it has any.

    Args:
        model: a model on ``device``.
        mesh: this process's place.
        device: the device.
        options: more arguments of ``DistributedDataParallel``.

    Raises:
        ValueError: if torch's DDP cannot train it.
    """
    if mesh.replicas == 1 or zero_of(model) is not None:
        return model
    refuse_for_ddp(model, options)
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, process_group=mesh.replica_group, **options)


def explain_error(exception: BaseException, module: nn.Module) -> None:
    """Add to an error of torch's DDP or FSDP2 what it means here."""
    if "finished reduction in the prior iteration" in str(exception):
        unused = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        sentence = (
            f"These parameters took no part in the loss of the last step: {', '.join(unused) or 'unknown'}. Freeze"
            " them, or set AutoTPStrategy(find_unused_parameters=True)."
        )
    elif "ready only once" in str(exception):
        sentence = (
            "find_unused_parameters does not go with reentrant activation checkpointing: use `use_reentrant=False`, or"
            " leave find_unused_parameters out."
        )
    elif zero_of(module) is not None and _OF_ROWS.search(str(exception)):
        sentence = (
            "With zero_stage a parameter has all its rows only while its own module runs: read it in the `forward` of"
            " that module, or use zero_stage=0."
        )
    else:
        return
    exception.args = (f"{exception.args[0] if exception.args else ''}\n{sentence}", *exception.args[1:])
