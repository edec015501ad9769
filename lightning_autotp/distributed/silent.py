"""Collectives that nobody answers: one rank of any size by itself, for shapes and for what a rank computes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_autotp.distributed.collectives import Collectives, Operation, Over
from lightning_autotp.distributed.mesh import Mesh


class SilentCollectives(Collectives):
    """Results have the right shape and dtype, and no value that means anything: for meta and fake tensors.

    Args:
        tp_size: how many ranks share a model.
        dp_size: how many models there are.
        world_rank: this rank's number among all.
    """

    def __init__(self, tp_size: int, dp_size: int = 1, world_rank: int = 0) -> None:
        self.world_rank = world_rank
        self.tp_source = self.batch_source = world_rank - world_rank % tp_size
        self._sizes = {"tp": tp_size, "host": tp_size, "batch": tp_size, "cp": 1}
        self._sizes |= {"dp": dp_size, "replicas": dp_size, "world": tp_size * dp_size}

    def size(self, over: Over = "tp") -> int:
        return len(over) if isinstance(over, tuple) else self._sizes[over]

    def all_reduce(self, x: Tensor, over: Over = "tp", *, op: Operation = "sum") -> Tensor:
        return x.contiguous()

    def all_gather(self, x: Tensor, over: Over = "tp") -> Tensor:
        return x.new_empty(self.size(over) * x.shape[0], *x.shape[1:])

    def reduce_scatter(self, x: Tensor, over: Over = "tp") -> Tensor:
        return x.new_empty(x.shape[0] // self.size(over), *x.shape[1:])

    def broadcast(self, x: Tensor, over: Over = "world") -> Tensor:
        return x

    def exchange(self, parts: Sequence[Tensor], lengths: Sequence[int], over: Over = "tp") -> list[Tensor]:
        return [parts[0].new_empty(length) for length in lengths]

    def gather_objects(self, value: Any, over: Over = "tp") -> list[Any]:
        return [value] * self.size(over)


def silent_mesh(tp_size: int, tp_rank: int = 0, dp_size: int = 1, dp_rank: int = 0) -> Mesh:
    """Make the mesh of one rank of any size, without processes.

    Raises:
        ValueError: if there is no such rank.
    """
    if not (0 <= tp_rank < tp_size and 0 <= dp_rank < dp_size):
        raise ValueError(f"there is no rank {tp_rank} of {tp_size} x {dp_rank} of {dp_size}; ranks count from 0.")
    return Mesh(tp_rank, tp_size, dp_rank, dp_size, SilentCollectives(tp_size, dp_size, dp_rank * tp_size + tp_rank))
