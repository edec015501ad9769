"""What a sharded model keeps of how it was made."""

from dataclasses import dataclass, replace
from typing import Optional

from torch import nn

from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.parallel.column_group import ColumnGroup
from lightning_autotp.parallel.overlap import Overlap
from lightning_autotp.parallel.saved_activations import SavedActivations
from lightning_autotp.parallel.sequence_parallel import Batch
from lightning_autotp.plans.plan import ShardingPlan

SHARDED = "_autotp_sharded"


@dataclass(frozen=True)
class Sharded:
    """What a sharded model keeps of how it was made."""

    plan: ShardingPlan
    mesh: Mesh
    columns: tuple[ColumnGroup, ...]
    batch: Batch
    overlap: Overlap
    saved: Optional[SavedActivations] = None

    def settle(self) -> None:
        """To be called between steps: column linears learn which of them share an input."""
        self.batch.seen.clear()
        for group in self.columns:
            group.settle()


def with_plan(model: nn.Module, plan: ShardingPlan) -> Sharded:
    """Put another plan in the place of that of a sharded model: one that says more of its gradients."""
    found = sharded(model)
    assert found is not None
    found = replace(found, plan=plan)
    setattr(model, SHARDED, found)
    return found


def sharded(model: nn.Module) -> Optional[Sharded]:
    """How ``model`` was sharded, or None if it was not."""
    return getattr(model, SHARDED, None)
