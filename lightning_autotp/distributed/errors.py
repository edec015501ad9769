"""Errors that every rank raises."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional, TypeVar

import torch.distributed as dist

T = TypeVar("T")

Explain = Callable[[Mapping[int, str]], Exception]
"""Makes an error of what each rank that failed says, by its number."""


@dataclass(frozen=True)
class Processes:
    """The processes that do something together: those of ``group``, all of the run, or this one where none run.

    Each of them must make the same calls in the same order.
    """

    group: Optional[dist.ProcessGroup] = None

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return dist.get_rank(self.group) if _run() else 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no processes that could send one another anything."""
        return not _run()

    @property
    def size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group) if _run() else 1

    def gather(self, value: T) -> list[T]:
        """``value`` of each of them, by rank."""
        everyones: list[Any] = [value] * self.size
        if _run():
            dist.all_gather_object(everyones, value, group=self.group)
        return everyones

    def first(self, value: T) -> T:
        """``value`` of the first of them."""
        return self.gather(value)[0]

    def raised_together(self, work: Callable[[], T], explain: Optional[Explain] = None) -> T:
        """What ``work`` returns, or an error on all of them if it fails on one.

        Args:
            work: what to call.
            explain: makes the error that all of them raise, from this one's own where it has one.

        Raises:
            RuntimeError: where another process failed and there is no ``explain``; an error of this one's own is raised
                as it is.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        everyones = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        failures = {rank: text for rank, text in enumerate(everyones) if text is not None}
        if failures and explain is not None:
            raise explain(failures) from error
        if error is not None:
            raise error
        for rank, text in failures.items():
            raise RuntimeError(f"rank {rank} failed: {text}")
        return result  # type: ignore[return-value]


def raised_together(work: Callable[[], T]) -> T:
    """What ``work`` returns, on every process of the run, or its error on all of them if it fails on one.

    Raises:
        RuntimeError: where another process failed; an error of this one's own is raised as it is.
    """
    return Processes().raised_together(work)


def _run() -> bool:
    return dist.is_available() and dist.is_initialized()
