"""The one door for what ranks send one another: layers, losses and gradients call the object that their mesh holds.

There are four kinds: :class:`~lightning_autotp.distributed.live.LiveCollectives` between processes,
:class:`~lightning_autotp.distributed.silent.SilentCollectives` of one rank that nobody answers,
:class:`~lightning_autotp.distributed.recording.RecordingCollectives` around another kind, whose calls it counts, and
those of :class:`~lightning_autotp.distributed.lockstep.Lockstep`, which runs all ranks in one process. Only the live
ones need process groups, and the others work beside them in the middle of a job.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Union

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

Over = Union[Literal["tp", "cp", "dp", "batch", "replicas", "world", "host"], tuple[int, ...]]
"""Which ranks take part: those that share this rank's model (``"tp"``), those that hold the same shards of it and split
the tokens of its batch (``"cp"``), or have batches of their own (``"dp"``), both of these (``"replicas"``), all that
see this rank's batch (``"batch"``, tp x cp; ``"host"`` for what is on the CPU, which no GPU waits for), all of the run
(``"world"``), or some of those that share this rank's model, by their tensor parallel ranks."""

Operation = Literal["sum", "max"]


class Collectives(ABC):
    """Collectives of one rank. No autograd: see :mod:`lightning_autotp.distributed.functions`.

    Every rank of ``over`` must make the same calls in the same order, with tensors of one shape and dtype.

    Attributes:
        world_rank: this rank's number among all of the run.
        tp_source: the number, among all of the run, of the first rank that shares this rank's model.
        batch_source: that of the first rank that sees this rank's batch.
        sends_between_gpus: whether ranks may share their GPUs' memory (NCCL), so that fused forms are worth a try.
    """

    world_rank: int
    tp_source: int
    batch_source: int
    sends_between_gpus = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Collectives":
        # sharded modules refer to their collectives, and process groups cannot be copied
        return self

    @abstractmethod
    def size(self, over: Over = "tp") -> int:
        """The number of ranks of ``over``."""

    @abstractmethod
    def all_reduce(self, x: Tensor, over: Over = "tp", *, op: Operation = "sum") -> Tensor:
        """Sum ``x`` over the ranks, or take the largest; ``x`` itself is overwritten if it is contiguous."""

    @abstractmethod
    def all_gather(self, x: Tensor, over: Over = "tp") -> Tensor:
        """Every rank's ``[R, ...]``, contiguous, as ``[n * R, ...]``."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor, over: Over = "tp") -> Tensor:
        """This rank's ``[R, ...]`` of the sum over the ranks of ``x`` ``[n * R, ...]``, contiguous."""

    @abstractmethod
    def broadcast(self, x: Tensor, over: Over = "world") -> Tensor:
        """Overwrite ``x``, contiguous, with that of the first rank."""

    @abstractmethod
    def exchange(self, parts: Sequence[Tensor], lengths: Sequence[int], over: Over = "tp") -> list[Tensor]:
        """Send ``parts[r]``, 1-D, to rank r, and return what the ranks have sent here, of ``lengths`` elements each."""

    @abstractmethod
    def gather_objects(self, value: Any, over: Over = "tp") -> list[Any]:
        """Every rank's ``value``, pickled where it travels, in the order of the ranks."""

    def broadcast_object(self, value: Any, over: Over = "tp") -> Any:
        """The first rank's ``value``."""
        return self.gather_objects(value, over)[0]

    def start_all_reduce(self, x: Tensor, over: Over = "tp") -> Callable[[], Tensor]:
        """Start to sum ``x``; the call that is returned waits for it. ``x`` must not be used before."""
        reduced = self.all_reduce(x, over)
        return lambda: reduced

    def start_reduce_scatter(self, x: Tensor, over: Over = "tp") -> Callable[[], Tensor]:
        """Start a :meth:`reduce_scatter`; the call that is returned waits for it. ``x`` must not change before."""
        scattered = self.reduce_scatter(x, over)
        return lambda: scattered

    def start_all_gather(self, x: Tensor, over: Over = "tp") -> Callable[[], Tensor]:
        """Start an :meth:`all_gather`; the call that is returned waits for it. ``x`` must not change before."""
        gathered = self.all_gather(x, over)
        return lambda: gathered

    def all_gather_matmul(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Gather the rows ``X`` of every ``x [R, K]`` and multiply ``X w_i^T``, ``w_i [N_i, K]``, fused if possible."""
        full = self.all_gather(x.contiguous())
        return full, [F.linear(full, weight) for weight in weights]

    def matmul_reduce_scatter(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply ``x w^T``, ``x [n * R, K]``, ``w [N, K]``, and reduce-scatter its rows, fused if possible."""
        return self.reduce_scatter(F.linear(x, weight))

    def add_groups(self, members: Iterable[tuple[int, ...]]) -> None:  # noqa: B027 - only processes need groups
        """Prepare for calls over these sets of tensor parallel ranks, alike on all; every rank of the run must call it.

        Where ranks are no processes, there is nothing to prepare.
        """

    def process_group(self, over: Over = "tp") -> ProcessGroup:
        """The process group of ``over``, for engines that send by themselves.

        Raises:
            RuntimeError: if there are no processes, or no group of those ranks.
        """
        raise RuntimeError(
            f"{type(self).__name__} joins ranks that are no processes, and {over!r} has no process group; build the"
            " mesh with `build_mesh` in processes that torchrun or a Trainer started."
        )
