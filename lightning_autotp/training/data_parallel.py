"""torch's data parallelism beside tensor parallelism: what it cannot do, and what its errors mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_autotp.distributed.mesh import Mesh


@dataclass(frozen=True)
class GatherOverDP:
    """torchmetrics' ``dist_sync_fn``: a metric's state from all data parallel ranks, and from them only.

    Ranks that share a model see the same data. A metric's own ``process_group`` would do the same, but a metric that
    holds a group cannot be cloned.
    """

    mesh: Mesh

    def __call__(self, result: Tensor, group: Any = None) -> list[Tensor]:
        return gather_all_tensors(result, self.mesh.dp_group)


def refuse_for_ddp(module: LightningModule, options: Mapping[str, Any]) -> None:
    """Refuse what torch's DDP cannot do, before it says so in its own terms.

    Raises:
        ValueError: naming what to change.
    """
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train.")
    if options.get("static_graph") and module.trainer.accumulate_grad_batches > 1:
        raise ValueError("static_graph: it does not go with gradient accumulation in torch's DDP; leave it out.")


def explain_ddp_error(exception: BaseException, module: nn.Module) -> None:
    """Add to an error of DDP's what it means here."""
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
    else:
        return
    exception.args = (f"{exception.args[0] if exception.args else ''}\n{sentence}", *exception.args[1:])
