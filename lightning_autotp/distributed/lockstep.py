"""All ranks of a small run in one process: a thread a rank, one of them running at a time, with real results.

    losses = Lockstep(4).run(lambda mesh: train(copy.deepcopy(model), mesh))

A rank runs until it reaches a collective, then the next one does; when all that take part have come, the result is
computed and they go on. So what a run does is the same every time, and ranks that ask for different collectives are an
error at once, and not after a timeout. There are no process groups, and none that is there is touched: it works in the
middle of a job.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Optional, TypeVar

import torch
from torch import Tensor

from lightning_autotp.compat import collect_random_state, set_random_state
from lightning_autotp.distributed.collectives import Collectives, Operation, Over
from lightning_autotp.distributed.mesh import Mesh

T = TypeVar("T")

_ROOM = str(Path(__file__).parent)


class CollectiveMismatchError(RuntimeError):
    """Ranks asked for different collectives, or one ended where others wait for it."""


class _StoppedError(BaseException):
    """Ends the thread of a rank that waits for others that have failed; no ``except Exception`` must catch it."""


@dataclass(frozen=True)
class _Call:
    """A collective that a rank waits in: its kind, among which ranks of the world, of what, and from which line."""

    kind: str
    members: tuple[int, ...]
    value: Any
    line: str

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same on all of its ranks."""
        alike = (tuple(self.value.shape), self.value.dtype) if isinstance(self.value, Tensor) else ()
        return (self.kind, *alike)

    def __str__(self) -> str:
        of = f" of {list(self.value.shape)} {self.value.dtype}" if isinstance(self.value, Tensor) else ""
        return f"waits in {self.kind}{of} of ranks {list(self.members)} at {self.line}"


@dataclass
class _Rank(Generic[T]):
    random_state: Any
    turn: threading.Event = field(default_factory=threading.Event)
    call: Optional[_Call] = None
    answer: Any = None
    ended: bool = False
    result: Optional[T] = None
    error: Optional[BaseException] = None

    def __str__(self) -> str:
        return str(self.call) if self.call is not None else "has ended"


class Lockstep(Generic[T]):
    """Runs the ranks of a ``tp_size`` x ``cp_size`` x ``dp_size`` mesh in turns.

    Dispatch modes, autocast and grad mode are a thread's own: enter them in what is run. The states of random number
    generators are each rank's own, and afterwards what they were before.
    """

    def __init__(self, tp_size: int, dp_size: int = 1, cp_size: int = 1) -> None:
        self.tp_size, self.cp_size, self.dp_size = tp_size, cp_size, dp_size
        self._ranks: list[_Rank[T]] = []
        self._back = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failed = False

    def run(self, work: Callable[[Mesh], T]) -> list[T]:
        """Do ``work`` on every rank, and return what it gave, by global rank.

        Raises:
            CollectiveMismatchError: if ranks ask for different collectives, with the line of each.
            Exception: the error of the first rank that failed, as it is.
        """
        before = collect_random_state(include_cuda=torch.cuda.is_initialized())
        self._ranks = [_Rank(before) for _ in range(self.tp_size * self.cp_size * self.dp_size)]
        self._failed = False
        self._threads = threads = [
            threading.Thread(target=self._serve, args=(number, work), name=f"rank {number}", daemon=True)
            for number in range(len(self._ranks))
        ]
        for thread in threads:
            thread.start()
        try:
            self._schedule()
        finally:
            self._failed = True
            for number, rank in enumerate(self._ranks):
                while not rank.ended:  # it may catch what stops it, and wait again
                    self._go(number)
            for thread in threads:
                thread.join()
            self._threads = []
            set_random_state(before)
        results = [rank.result for rank in self._ranks]
        self._ranks = []  # a mesh that is kept must not keep what all ranks returned
        return results  # type: ignore[return-value]  # no rank failed

    def _schedule(self) -> None:
        while not all(rank.ended for rank in self._ranks):
            ready = [number for number, rank in enumerate(self._ranks) if not rank.ended and rank.call is None]
            for number in ready:  # though one fails: others go on to where they wait for it
                self._go(number)
            for rank in self._ranks:
                if rank.error is not None:
                    raise rank.error
            if not self._exchange() and not all(rank.ended for rank in self._ranks):
                states = "; ".join(f"rank {number} {rank}" for number, rank in enumerate(self._ranks))
                raise CollectiveMismatchError(f"ranks wait for each other for ever: {states}.")

    def _go(self, number: int) -> None:
        """Let a rank run until it waits in a collective or ends."""
        rank = self._ranks[number]
        set_random_state(rank.random_state)
        self._back.clear()
        rank.turn.set()
        self._back.wait()
        rank.random_state = collect_random_state(include_cuda=torch.cuda.is_initialized())

    def _exchange(self) -> bool:
        """Answer the calls that all their ranks have come to; whether there was one."""
        answered = False
        for rank in self._ranks:
            if rank.call is None:
                continue
            members = rank.call.members
            calls = [self._ranks[member].call for member in members]
            # one that waits among other ranks comes here later, or never, which is found when nobody can go on
            waiting = [call for call in calls if call is not None and call.members == members]
            if len(waiting) < len(members):
                continue
            if len({call.signature for call in waiting}) > 1:
                states = "; ".join(f"rank {member} {self._ranks[member]}" for member in members)
                raise CollectiveMismatchError(f"ranks ask for different collectives: {states}.")
            answers = _KINDS[rank.call.kind]([call.value for call in waiting])
            for member, answer in zip(members, answers):
                self._ranks[member].answer, self._ranks[member].call = answer, None
            answered = True
        return answered

    def _serve(self, number: int, work: Callable[[Mesh], T]) -> None:
        """The thread of a rank."""
        rank = self._ranks[number]
        rank.turn.wait()
        rank.turn.clear()
        try:
            # backward passes run in the rank's own thread, which has its turn
            with torch.autograd.set_multithreading_enabled(False):
                if not self._failed:
                    rank.result = work(self._mesh(number))
        except _StoppedError:
            pass
        except BaseException as error:  # raised by `run`
            rank.error = error
        rank.ended, rank.call = True, None
        self._back.set()

    def ask(self, number: int, call: _Call) -> Any:
        """Wait, in the thread of rank ``number``, until all ranks of a collective have come; returns its result."""
        if threading.current_thread() not in self._threads:
            raise RuntimeError(
                f"{call.kind}: the ranks of this lockstep run have ended, and nobody answers; do what sends inside of"
                " `Lockstep.run`."
            )
        rank = self._ranks[number]
        if self._failed:
            raise _StoppedError
        rank.call = call
        self._back.set()
        rank.turn.wait()
        rank.turn.clear()
        if self._failed:
            raise _StoppedError
        answer, rank.answer = rank.answer, None
        return answer

    def _mesh(self, number: int) -> Mesh:
        replica, tp_rank = divmod(number, self.tp_size)
        dp_rank, cp_rank = divmod(replica, self.cp_size)
        collectives = LockstepCollectives(self, number)
        return Mesh(tp_rank, self.tp_size, dp_rank, self.dp_size, collectives, cp_rank, self.cp_size)


class LockstepCollectives(Collectives):
    """Those of one rank of a :class:`Lockstep`."""

    def __init__(self, lockstep: Lockstep[Any], number: int) -> None:
        self.world_rank = number
        self._lockstep = lockstep
        tp_size, batch = lockstep.tp_size, lockstep.tp_size * lockstep.cp_size
        everyone = range(batch * lockstep.dp_size)
        self._tp = tuple(rank for rank in everyone if rank // tp_size == number // tp_size)
        of_batch = tuple(rank for rank in everyone if rank // batch == number // batch)
        self.tp_source, self.batch_source = self._tp[0], of_batch[0]
        self._named: dict[Over, tuple[int, ...]] = {
            "tp": self._tp,
            "cp": tuple(rank for rank in of_batch if rank % tp_size == number % tp_size),
            "dp": tuple(rank for rank in everyone if rank % batch == number % batch),
            "batch": of_batch,
            "host": of_batch,
            "replicas": tuple(rank for rank in everyone if rank % tp_size == number % tp_size),
            "world": tuple(everyone),
        }

    def _members(self, over: Over) -> tuple[int, ...]:
        if isinstance(over, tuple):
            return tuple(self._tp[rank] for rank in over)
        return self._named[over]

    def _ask(self, kind: str, over: Over, value: Any) -> Any:
        return self._lockstep.ask(self.world_rank, _Call(kind, self._members(over), value, _line()))

    def size(self, over: Over = "tp") -> int:
        return len(self._members(over))

    def all_reduce(self, x: Tensor, over: Over = "tp", *, op: Operation = "sum") -> Tensor:
        x = x.contiguous()
        with torch.no_grad():
            return x.copy_(self._ask(f"all-reduce ({op})", over, x.detach()))

    def all_gather(self, x: Tensor, over: Over = "tp") -> Tensor:
        gathered: Tensor = self._ask("all-gather", over, x.detach()).clone()
        return gathered

    def reduce_scatter(self, x: Tensor, over: Over = "tp") -> Tensor:
        if x.shape[0] % self.size(over):
            raise ValueError(f"reduce-scatter: {x.shape[0]} rows do not divide among {self.size(over)} ranks.")
        scattered: Tensor = self._ask("reduce-scatter", over, x.detach())
        return scattered

    def broadcast(self, x: Tensor, over: Over = "world") -> Tensor:
        with torch.no_grad():
            return x.copy_(self._ask("broadcast", over, x.detach()))

    def exchange(self, parts: Sequence[Tensor], lengths: Sequence[int], over: Over = "tp") -> list[Tensor]:
        received = self._ask("all-to-all", over, [part.detach() for part in parts])
        return [part[self._members(over).index(self.world_rank)].clone() for part in received]

    def gather_objects(self, value: Any, over: Over = "tp") -> list[Any]:
        return list(self._ask("all-gather of objects", over, (value,)))


def _line() -> str:
    """Where the collective was asked for: the innermost line outside of this room."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_ROOM):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@torch.no_grad()
def _sum(values: list[Tensor]) -> list[Tensor]:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return [total] * len(values)


@torch.no_grad()
def _largest(values: list[Tensor]) -> list[Tensor]:
    total = values[0].clone()
    for value in values[1:]:
        total = torch.maximum(total, value)
    return [total] * len(values)


_KINDS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "all-reduce (sum)": _sum,
    "all-reduce (max)": _largest,
    "all-gather": lambda values: [torch.cat(values)] * len(values),
    "reduce-scatter": lambda values: [part.clone() for part in _sum(values)[0].chunk(len(values))],
    "broadcast": lambda values: [values[0].clone()] * len(values),
    "all-to-all": lambda values: [values] * len(values),
    "all-gather of objects": lambda values: [[value for (value,) in values]] * len(values),
}
"""What the ranks of a collective get of what they gave, in their order."""
