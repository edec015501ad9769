"""Errors that every rank raises."""

from collections.abc import Callable
from typing import Optional, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def raised_together(work: Callable[[], T]) -> T:
    """What ``work`` returns, on every process that calls this, or its error on all of them if it fails on one.

    Raises:
        RuntimeError: where another process failed; an error of this one's own is raised as it is.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    everyones: list[Optional[str]] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(everyones):
        if text is not None:
            raise RuntimeError(f"rank {rank} failed: {text}")
    return result  # type: ignore[return-value]
