"""What a Lightning strategy knows of where its process stands, and over which processes it reduces."""

from typing import Any, Optional

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from lightning_autotp.distributed.mesh import Mesh


class MeshStrategy(DDPStrategy):
    """Splits data and reduces metrics over data parallel replicas: ranks that share a model see the same data."""

    _mesh: Optional[Mesh] = None

    @property
    def mesh(self) -> Mesh:
        """The process groups and this process's place in them; known once processes run."""
        if self._mesh is None:
            raise RuntimeError("the process groups are made when the Trainer starts; they cannot be asked for before.")
        return self._mesh

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def tp_size(self) -> int:
        """The tensor parallel size."""
        return self.mesh.tp_size

    @property
    def tp_rank(self) -> int:
        """This process's rank among those that share its model."""
        return self.mesh.tp_rank

    @property
    def dp_size(self) -> int:
        """The data parallel size."""
        return self.mesh.dp_size

    @property
    def dp_rank(self) -> int:
        """This process's rank among those that hold the same part of the model."""
        return self.mesh.dp_rank

    @property
    def cp_size(self) -> int:
        """The context parallel size."""
        return self.mesh.cp_size

    @property
    def cp_rank(self) -> int:
        """This process's rank among those that split the tokens of its batches."""
        return self.mesh.cp_rank

    @property
    @override
    def is_distributed(self) -> bool:
        return True

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.dp_size, "rank": self.dp_rank}

    @override
    def reduce(self, tensor: Any, group: Optional[Any] = None, reduce_op: Any = "mean") -> Any:
        # metrics are alike on the ranks that share a model: only data parallel replicas add to them
        return super().reduce(tensor, self.mesh.dp_group if group is None else group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return bool(votes == dist.get_world_size()) if all else bool(votes)
