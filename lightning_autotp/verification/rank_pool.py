"""The processes that verification runs in."""

import contextlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import nn

from lightning_autotp.verification import error_metrics as errors
from lightning_autotp.verification import rank_run as run
from lightning_autotp.verification.rank_run import Case, Refused, reference

_COLLECTIVE_LIMIT = timedelta(seconds=30)

_GRACE = 3.0
"""Seconds that ranks get to answer after one has failed; those that wait for it in a collective never will."""

_PRELOAD = [
    "lightning_autotp.verification",
    "lightning_autotp.model_sources.small",
    "transformers.models.llama.modeling_llama",
]


class RankError(Exception):
    """A rank refused its plan, raised, died or hung."""

    def __init__(self, message: str, details: str = "", refused: bool = False) -> None:
        super().__init__(message)
        self.message, self.details, self.refused = message, details, refused


@dataclass(frozen=True)
class _Rank:
    process: BaseProcess
    connection: Connection


class Pool:
    """Worker processes, one a rank, started as they are first needed and kept between models.

    A rank that raises, dies or hangs costs the pool: the next model gets new ranks. They are forked from a server that
    has done the imports, where the platform has one.
    """

    def __init__(self) -> None:
        server = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: BaseContext = multiprocessing.get_context("forkserver" if server else "spawn")
        if server:
            self._context.set_forkserver_preload(_PRELOAD)
        self._ranks: list[_Rank] = []
        self._directory = tempfile.mkdtemp(prefix="autotp-verify-")
        self._jobs = 0
        self._last: tuple[Any, Union[str, RankError]] = ((), "")

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """End all ranks."""
        for rank in self._ranks:
            rank.process.kill()
            rank.connection.close()
        for rank in self._ranks:
            rank.process.join()
        self._ranks = []

    def reference(self, case: Case, timeout: float) -> str:
        """Where the unsharded run is; that of the last model is kept, for other tensor parallel sizes.

        Raises:
            RankError: if it failed.
        """
        key, found = self._last
        if key != case.unsharded:
            found = path = str(Path(self._directory, "reference.pt"))
            try:
                self.run(1, reference, case, path, timeout=timeout)
            except RankError as error:
                found = error
            self._last = case.unsharded, found
        if isinstance(found, RankError):
            raise found
        return found

    def run(self, count: int, work: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
        """What ``work(rank, *args)`` returns on each of ``count`` ranks, which share a process group if they are many.

        Raises:
            RankError: the first failure, if a rank failed or did not answer in time.
        """
        if any(not rank.process.is_alive() for rank in self._ranks):
            self.kill()
        while len(self._ranks) < count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)  # type: ignore[attr-defined]
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours))
        self._jobs += 1
        store = str(Path(self._directory, f"store{self._jobs}")) if count > 1 else None
        ranks = self._ranks[:count]
        try:
            for number, rank in enumerate(ranks):
                rank.connection.send((number, count, store, [*sys.path, os.getcwd()], work, args))
            answers, failure = _collect(ranks, timeout)
        except BaseException:
            self.kill()  # a rank may be in the middle of a job whose answer nobody will read
            raise
        if failure is not None:
            if len(answers) < count or count > 1 and not failure.refused:
                self.kill()
            raise failure
        return [answers[number] for number in range(count)]


def _collect(ranks: Sequence[_Rank], timeout: float) -> tuple[dict[int, Any], Optional[RankError]]:
    """The answers that came, and the first failure."""
    answers: dict[int, Any] = {}
    failure: Optional[RankError] = None
    deadline = time.monotonic() + timeout
    while len(answers) < len(ranks):
        waiting = {rank.connection: number for number, rank in enumerate(ranks) if number not in answers}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = ", ".join(map(str, sorted(waiting.values())))
            return answers, failure or RankError(f"no answer from rank {silent} within {timeout:g} s")
        for connection in ready:
            number = waiting[connection]  # type: ignore[index]
            try:
                answers[number] = ranks[number].connection.recv()
            except (EOFError, OSError):
                ranks[number].process.join(_GRACE)
                answers[number] = RankError(f"rank {number} died (exit code {ranks[number].process.exitcode})")
            if isinstance(answers[number], RankError) and failure is None:
                failure = answers[number]
                deadline = min(deadline, time.monotonic() + _GRACE)
    return answers, failure


def _serve(connection: Connection) -> None:
    """A rank: does what it is sent until its pool is gone."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers").logging.set_verbosity_error()
    while True:
        try:
            rank, count, store, path, work, args = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        sys.path[:] = path
        try:
            if dist.is_initialized():  # only now has every rank left the last job
                dist.destroy_process_group()
            if store is not None:
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=_COLLECTIVE_LIMIT
                )
            answer = work(rank, *args)
        except Refused as refused:
            answer = RankError(str(refused), refused=True)
        except Exception as error:
            answer = RankError(" ".join(f"{type(error).__name__}: {error}".split()), _frames(error))
        connection.send(answer)


def _frames(error: Exception) -> str:
    """Where an error was raised, without our own frames and those of ``nn.Module``."""
    ours = __file__, run.__file__, errors.__file__, sys.modules[nn.Module.__module__].__file__
    return "".join(
        traceback.format_list([f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours])
    )
