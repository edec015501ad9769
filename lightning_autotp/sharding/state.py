"""What a sharded model keeps of how it was made."""

from dataclasses import dataclass, replace
from typing import Optional

from torch import nn

from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout
from lightning_autotp.parallel.column_group import ColumnGroup
from lightning_autotp.parallel.context_parallel import Context
from lightning_autotp.parallel.overlap import Overlap
from lightning_autotp.parallel.saved_activations import SavedActivations
from lightning_autotp.parallel.sequence_parallel import Batch
from lightning_autotp.plans.plan import ShardingPlan

SHARDED = "_autotp_sharded"
INSIDE = "_autotp_inside"


@dataclass(frozen=True)
class Sharded:
    """What a sharded model keeps of how it was made."""

    plan: ShardingPlan
    mesh: Mesh
    columns: tuple[ColumnGroup, ...]
    batch: Batch
    overlap: Overlap
    saved: Optional[SavedActivations] = None
    context: Optional[Context] = None

    def settle(self) -> None:
        """To be called between steps: column linears learn which of them share an input."""
        self.batch.seen.clear()
        if self.context is not None:
            self.context.seen.clear()
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


@dataclass(frozen=True)
class Inside:
    """What a Hugging Face model inside a sharded one keeps: the layouts of its parameters, by its own names for them.

    Args:
        layouts: a layout for every name that its ``named_parameters(remove_duplicate=False)`` gives.
        mesh: where this process stands.
    """

    layouts: dict[str, Layout]
    mesh: Mesh


def inside(model: nn.Module) -> Optional[Inside]:
    """What ``model`` keeps if it is a Hugging Face model inside a sharded one, or that itself; else None."""
    return vars(model).get(INSIDE)
