"""Collectives between processes, over ``torch.distributed``."""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_autotp.compat import all_gather_single, functional_collectives, reduce_scatter_single
from lightning_autotp.distributed.collectives import Collectives, Operation, Over

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class LiveCollectives(Collectives):
    """Collectives of this process. While ``torch.compile`` traces they are the functional ones, which fit in a graph.

    Args:
        tp_group: the processes that share one model, each with its shard of it.
        dp_group: the processes that hold the same shards, each with its own data.
        cp_group: the processes that hold the same shards and split the tokens of one batch; None without any.
        batch_group: those that see the same batch, ``tp_group`` without any.
        replica_group: all that hold the same shards, ``dp_group`` without any.
        timeout: how long a collective may wait in groups that are made later; None for torch's default.
    """

    def __init__(
        self,
        tp_group: ProcessGroup,
        dp_group: ProcessGroup,
        timeout: Optional[timedelta] = None,
        *,
        cp_group: Optional[ProcessGroup] = None,
        batch_group: Optional[ProcessGroup] = None,
        replica_group: Optional[ProcessGroup] = None,
    ) -> None:
        self.world_rank, self.tp_source = dist.get_rank(), dist.get_global_rank(tp_group, 0)
        self._tp_group = tp_group
        self._timeout = timeout
        self.sends_between_gpus = "nccl" in str(dist.get_backend(tp_group))
        everyone = tuple(range(tp_group.size()))
        self._groups: dict[Over, Optional[ProcessGroup]] = {"tp": tp_group, everyone: tp_group, "dp": dp_group}
        batch_group = batch_group or tp_group
        self._groups |= {"cp": cp_group, "batch": batch_group, "replicas": replica_group or dp_group}
        self.batch_source = dist.get_global_rank(batch_group, 0)
        self._groups["host"] = self._on_hosts(batch_group)

    def _on_hosts(self, own: ProcessGroup) -> ProcessGroup:
        """A group of those in ``own`` that sends what is on the CPU; every rank of the run must call it."""
        if "gloo" in str(dist.get_backend(own)):
            return own
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, dist.get_process_group_ranks(own))
        models = sorted(set(map(tuple, everyones)))
        group, _ = dist.new_subgroups_by_enumeration(
            [list(model) for model in models], timeout=self._timeout, backend="gloo"
        )
        assert group is not None
        return group

    def process_group(self, over: Over = "tp") -> ProcessGroup:
        if over == "tp":  # what most calls ask for, and what a graph that is traced need not look up
            return self._tp_group
        if over == "world":
            world: Optional[ProcessGroup] = dist.group.WORLD
            assert world is not None
            return world
        group = self._groups.get(over)
        if group is None:
            raise RuntimeError(
                f"this rank is in no process group of the tensor parallel ranks {over}; every rank must call"
                " `add_groups` with them first."
            )
        return group

    def size(self, over: Over = "tp") -> int:
        return self.process_group(over).size()

    def all_reduce(self, x: Tensor, over: Over = "tp", *, op: Operation = "sum") -> Tensor:
        group = self.process_group(over)
        x = x.contiguous()
        if torch.compiler.is_compiling():
            return functional_collectives.wait_tensor(functional_collectives.all_reduce(x, op, group))
        dist.all_reduce(x, _OPERATIONS[op], group=group)
        return x

    def start_all_reduce(self, x: Tensor, over: Over = "tp") -> Callable[[], Tensor]:
        if torch.compiler.is_compiling():  # the compiler decides what runs beside it
            return super().start_all_reduce(x, over)
        x = x.contiguous()
        return partial(_waited, dist.all_reduce(x, group=self.process_group(over), async_op=True), x)

    def all_gather(self, x: Tensor, over: Over = "tp") -> Tensor:
        group = self.process_group(over)
        if torch.compiler.is_compiling():
            return functional_collectives.wait_tensor(functional_collectives.all_gather_tensor(x, 0, group))
        stacked = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        all_gather_single(stacked, x, group=group)
        return stacked

    def start_all_gather(self, x: Tensor, over: Over = "tp") -> Callable[[], Tensor]:
        if torch.compiler.is_compiling():
            return super().start_all_gather(x, over)
        group = self.process_group(over)
        stacked = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        return partial(_waited, all_gather_single(stacked, x, group=group, async_op=True), stacked)

    def reduce_scatter(self, x: Tensor, over: Over = "tp") -> Tensor:
        if torch.compiler.is_compiling():
            return self.start_reduce_scatter(x, over)()
        return self._reduce_scatter(x, over, async_op=False)()

    def start_reduce_scatter(self, x: Tensor, over: Over = "tp") -> Callable[[], Tensor]:
        if torch.compiler.is_compiling():
            started = functional_collectives.reduce_scatter_tensor(x, "sum", 0, self.process_group(over))
            return partial(functional_collectives.wait_tensor, started)
        return self._reduce_scatter(x, over, async_op=True)

    def _reduce_scatter(self, x: Tensor, over: Over, *, async_op: bool) -> Callable[[], Tensor]:
        group = self.process_group(over)
        local = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
        return partial(_waited, reduce_scatter_single(local, x, group=group, async_op=async_op), local)

    def broadcast(self, x: Tensor, over: Over = "world") -> Tensor:
        dist.broadcast(x, group=self.process_group(over), group_src=0)
        return x

    def exchange(self, parts: Sequence[Tensor], lengths: Sequence[int], over: Over = "tp") -> list[Tensor]:
        flat = torch.cat(list(parts))
        received = flat.new_empty(sum(lengths))
        sizes = [part.numel() for part in parts]
        dist.all_to_all_single(received, flat, list(lengths), sizes, group=self.process_group(over))
        return list(received.split(list(lengths)))

    def gather_objects(self, value: Any, over: Over = "tp") -> list[Any]:
        everyones: list[Any] = [None] * self.size(over)
        dist.all_gather_object(everyones, value, group=self.process_group(over))
        return everyones

    def broadcast_object(self, value: Any, over: Over = "tp") -> Any:
        handed = [value]
        dist.broadcast_object_list(handed, group=self.process_group(over), group_src=0)
        return handed[0]

    def all_gather_matmul(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        transposed = [weight.t() for weight in weights]
        name = self._tp_group.group_name
        full, products = torch.ops.symm_mem.fused_all_gather_matmul(x.contiguous(), transposed, 0, name)
        return full, products

    def matmul_reduce_scatter(self, x: Tensor, weight: Tensor) -> Tensor:
        name = self._tp_group.group_name
        scattered: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(x, weight.t(), "sum", 0, name)
        return scattered

    def add_groups(self, members: Iterable[tuple[int, ...]]) -> None:
        """Make a process group for each of ``members`` that has none, side by side for all models of the run."""
        missing = sorted(set(members) - self._groups.keys())
        if not missing:
            return
        mine = tuple(dist.get_process_group_ranks(self._tp_group))
        models = sorted(set(self.gather_objects(mine, "world")))
        for ranks in missing:
            owners = [[model[rank] for rank in ranks] for model in models]
            group, _ = dist.new_subgroups_by_enumeration(owners, timeout=self._timeout)
            self._groups[ranks] = group  # None on others than its members, which know alike that it is there


def _waited(work: Optional[dist.Work], result: Tensor) -> Tensor:
    if work is not None:
        work.wait()
    return result
