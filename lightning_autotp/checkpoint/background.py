"""Saves that are written beside training, one after the other."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Optional

import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_autotp.checkpoint.saving import Write
from lightning_autotp.distributed.errors import Processes


class Background:
    """One thread that writes. Every process must make the same calls in the same order.

    The threads of the processes find each other through a group of their own, so that they may send in the middle of
    whatever training sends.
    """

    def __init__(self) -> None:
        self._pool: Optional[ThreadPoolExecutor] = None
        self._processes: Optional[Processes] = None
        self._saving: Optional[Future[None]] = None

    def open(self, timeout: Optional[timedelta] = None) -> None:
        """Make the group, unless there is one: not where training would wait for it.

        Args:
            timeout: how long processes may wait for each other.
        """
        if self._processes is None:
            self._processes = Processes(dist.new_group(backend="gloo", timeout=timeout))
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="autotp-checkpoint")  # Python waits for it at exit

    def start(self, write: Write) -> None:
        """Have ``write``, which a ``prepare_...`` has returned, called; the last one must have been waited for."""
        assert self._processes is not None and self._pool is not None
        self._saving = self._pool.submit(write, self._processes)

    @property
    def is_saving(self) -> bool:
        """Whether there is a save that has not been waited for."""
        return self._saving is not None

    def then(self, work: Callable[[], Any]) -> None:
        """Call ``work`` once the save that goes on stands; never if it fails. An error of it is a warning."""
        saving = self._saving
        assert saving is not None and self._pool is not None

        def after() -> None:
            if saving.exception() is None:
                try:
                    work()
                except Exception as error:
                    rank_zero_warn(f"after a checkpoint was written: {type(error).__name__}: {error}")

        self._pool.submit(after)

    def wait(self) -> None:
        """Wait for the save that goes on and what is to come after it, if there is one.

        Raises:
            RuntimeError: if it failed; on all processes alike, once.
        """
        if self._saving is None or self._pool is None:
            return
        saving, self._saving = self._saving, None
        self._pool.submit(lambda: None).result()  # one after the other: what was to come after it has been done
        saving.result()
