"""A pool of worker processes, one per rank, that outlives the tests run on it.

Starting a rank costs seconds of imports; here a fork server imports them once and every rank is forked from it. A test
gets a fresh process group through a ``FileStore`` (tens of milliseconds). A rank that raises, dies or hangs costs the
pool, which is forked anew in a fraction of a second, and not the session.

Inside a rank the environment is that of the main process plus what a process launcher sets (RANK, WORLD_SIZE, ...).
Lightning takes the presence of LOCAL_RANK to mean that processes are launched by someone else, so
``Trainer(accelerator="cpu", strategy=..., devices=n)`` just runs, on the process group that is already there or, with
``pg="none"``, on one it initialises itself.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from tests.helpers.hygiene import isolated, leave_process_group, seed_everything, set_lightning_rank

ProcessGroupMode = Literal["reinit", "keep", "none"]
Status = Literal["passed", "skipped", "failed", "died", "hung"]

DEVICE_VARIABLE = "AUTOTP_TEST_DEVICE"
PRELOAD: tuple[str, ...] = (
    "pytest",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "lightning.pytorch",
    "lightning.pytorch.demos.boring_classes",
    "transformers.models.llama.modeling_llama",
    "lightning_autotp",
)
_OUTPUT_LIMIT = 20_000
_STACKS_TIMEOUT = 2.0


class RankFailure(AssertionError):
    """At least one rank raised, died or hung; the message holds each rank's traceback and output."""


def default_device() -> str:
    """Where ranks run unless a test says otherwise: ``"cpu"``, or ``"cuda"`` through AUTOTP_TEST_DEVICE."""
    return os.environ.get(DEVICE_VARIABLE, "cpu")


def rank_device() -> torch.device:
    """The device of the rank that calls this."""
    if default_device() == "cuda":
        return torch.device("cuda", int(os.environ["RANK"]))
    return torch.device("cpu")


def run_ranks(
    n: int,
    fn: Callable[..., Any],
    *args: Any,
    pg: ProcessGroupMode = "reinit",
    timeout: float = 60.0,
    device: str | None = None,
    nodes: int = 1,
) -> list[Any]:
    """Run ``fn(*args)`` on ``n`` ranks and return what each returned, tensors moved to the CPU.

    ``fn`` must be importable (a module-level function, or a ``functools.partial`` of one).

    Args:
        n: number of ranks.
        fn: what each rank calls.
        *args: pickled once and given to every rank.
        pg: ``"reinit"`` for a fresh process group, ``"keep"`` for the last job's if it had as many ranks and was kept,
            ``"none"`` to leave initialising it to ``fn``.
        timeout: seconds until the ranks count as hung.
        device: ``"cpu"`` (gloo) or ``"cuda"`` (nccl, rank i on GPU i); AUTOTP_TEST_DEVICE decides if None.
        nodes: how many nodes the environment variables shall pretend; ranks are dealt to them in blocks.

    Raises:
        RankFailure: if a rank raised, died, or did not answer in time.
        pytest.skip.Exception: if a rank skipped and none failed.

    """
    return session_pool().run(fn, args, world=n, pg=pg, timeout=timeout, device=device, nodes=nodes)


@functools.lru_cache(maxsize=1)
def session_pool() -> RankPool:
    """The pool that all tests of this session share."""
    return RankPool()


def call_test(module: str, name: str, arguments: dict[str, Any], monkeypatch: bool) -> None:
    """Call a test function in a rank; ``monkeypatch`` cannot travel between processes, so a rank makes its own."""
    function = getattr(importlib.import_module(module), name)
    with pytest.MonkeyPatch.context() as patch:
        function(**arguments, **({"monkeypatch": patch} if monkeypatch else {}))


@dataclass(frozen=True)
class _Job:
    """What one rank is asked to do. The payload stays pickled until ``path`` makes its modules importable."""

    payload: bytes
    world: int
    nodes: int
    port: int
    store: str | None  # where to meet for a new process group; None: make none
    device: str
    path: list[str]
    cwd: str
    environ: dict[str, str]

    def rank_environ(self, rank: int) -> dict[str, str]:
        """The variables that torchrun sets, for this rank."""
        per_node = self.world // self.nodes
        node = str(rank // per_node)
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(rank % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "NODE_RANK": node,
            "GROUP_RANK": node,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "OMP_NUM_THREADS": "1",
            DEVICE_VARIABLE: self.device,
        }


@dataclass(frozen=True)
class _Answer:
    """How a job ended on one rank: its pickled return value, or the reason or traceback as text."""

    status: Status
    value: bytes = b""
    text: str = ""


@dataclass(frozen=True)
class _Rank:
    process: BaseProcess
    connection: Connection  # jobs there, answers back
    control: Connection  # asks the rank's watching thread for its stacks, whatever its main thread is at
    log: Path

    def output(self) -> str:
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _OUTPUT_LIMIT))
            return file.read().decode(errors="replace")


class RankPool:
    """Worker processes, started as they are first needed and kept between jobs.

    Args:
        grace: seconds that the other ranks get to answer after one has failed. Those left waiting in a collective
            never will.

    """

    def __init__(self, grace: float = 1.0) -> None:
        self.fresh = False
        self._grace = grace
        self._ranks: dict[int, _Rank] = {}
        self._kept: tuple[int, str] | None = None
        self._jobs = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        # Ranks are no daemons (those may not have DataLoader workers), so multiprocessing would wait for them at exit.
        atexit.register(self.kill)

    def warm_up(self) -> None:
        """Start the fork server's imports, without waiting for them."""
        from multiprocessing import forkserver

        forkserver.ensure_running()

    def run(
        self,
        fn: Callable[..., Any],
        args: Iterable[Any] = (),
        *,
        world: int,
        pg: ProcessGroupMode = "reinit",
        timeout: float = 60.0,
        device: str | None = None,
        nodes: int = 1,
    ) -> list[Any]:
        """See ``run_ranks``."""
        if world < 1 or world % nodes:
            raise ValueError(f"{world} ranks cannot be dealt evenly to {nodes} nodes.")
        device = device or default_device()
        if device == "cuda" and nodes > 1:
            raise ValueError("Ranks of pretended nodes would share GPUs, which NCCL refuses: use nodes=1 on CUDA.")
        payload = _pickle_call(fn, tuple(args))
        if self.fresh:
            self.kill()
        try:
            ranks = self._start(world)
            self._send(ranks, payload, pg, device, nodes)
            answers = self._collect(ranks, timeout)
        except BaseException:
            self.kill()  # a rank may be in the middle of a job whose answer nobody will read
            raise
        return self._finish(ranks, answers, pg)

    def kill(self) -> None:
        """End all ranks; the next job forks new ones."""
        for rank in self._ranks.values():
            rank.process.kill()
            rank.connection.close()
            rank.control.close()
        for rank in self._ranks.values():
            rank.process.join()
        self._ranks, self._kept = {}, None

    def _start(self, world: int) -> list[_Rank]:
        if any(not rank.process.is_alive() for rank in self._ranks.values()):
            self.kill()
        for number in range(len(self._ranks), world):
            (jobs, their_jobs), (control, their_control) = self._context.Pipe(), self._context.Pipe()
            log = Path(self._directory.name, f"rank{number}.log")
            arguments = (number, their_jobs, their_control, str(log))
            process = self._context.Process(target=_serve, args=arguments, name=f"rank{number}")
            process.start()
            their_jobs.close()
            their_control.close()
            self._ranks[number] = _Rank(process, jobs, control, log)
        return [self._ranks[number] for number in range(world)]

    def _send(self, ranks: list[_Rank], payload: bytes, pg: ProcessGroupMode, device: str, nodes: int) -> None:
        wanted = (len(ranks), device)
        if self._kept is not None and (pg != "keep" or self._kept != wanted):
            self._reset(self._kept[0])
            self._kept = None
        store = None
        if pg == "reinit" or (pg == "keep" and self._kept is None):
            self._jobs += 1
            store = str(Path(self._directory.name, f"store{self._jobs}"))
        self._kept = wanted if pg == "keep" else None
        job = _Job(
            payload, len(ranks), nodes, _free_port(), store, device, list(sys.path), os.getcwd(), dict(os.environ)
        )
        for rank in ranks:
            rank.connection.send(job)

    def _collect(self, ranks: list[_Rank], timeout: float) -> dict[int, _Answer]:
        """Each rank's answer, in the order in which they came."""
        answers: dict[int, _Answer] = {}
        waiting = dict(enumerate(ranks))
        deadline, reason = time.monotonic() + timeout, f"no answer within {timeout:g} s"
        while waiting:
            handles = [handle for rank in waiting.values() for handle in (rank.connection, rank.process.sentinel)]
            if not wait(handles, max(0.0, deadline - time.monotonic())):
                break
            failed = _failures(answers)
            for number, rank in list(waiting.items()):
                answer = _poll(rank)
                if answer is not None:
                    answers[number] = answer
                    del waiting[number]
            if not failed and _failures(answers) and deadline - time.monotonic() > self._grace:
                deadline = time.monotonic() + self._grace
                reason = f"no answer {self._grace:g} s after another rank had failed"
        return answers | _hung(waiting, reason)

    def _finish(self, ranks: list[_Rank], answers: dict[int, _Answer], pg: ProcessGroupMode) -> list[Any]:
        failures = _failures(answers)
        outputs = {number: ranks[number].output() for number in answers}
        if failures:
            self.kill()
            raise RankFailure(_report(answers, outputs))
        if pg != "keep":
            self._reset(len(ranks))
        _show(outputs)
        for answer in answers.values():
            if answer.status == "skipped":
                pytest.skip(answer.text)
        return [_load(answers[number].value) for number in range(len(ranks))]

    def _reset(self, world: int) -> None:
        # Only now have all ranks left the job: a rank that closed its connections earlier could fail a slower one.
        for number in range(world):
            self._ranks[number].connection.send(None)


def _pickle_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((fn, args))
    except Exception as error:
        message = f"Ranks are other processes: {fn!r} and its arguments must be picklable and importable ({error})."
        raise TypeError(message) from error


def _free_port() -> int:
    """A port for TCP stores, outside the range from which the system hands out ports to gloo's own connections."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def _poll(rank: _Rank) -> _Answer | None:
    alive = rank.process.is_alive()  # asked first: the answer of a rank that ended right after giving it still counts
    try:
        if rank.connection.poll():
            answer: _Answer = rank.connection.recv()
            return answer
    except (EOFError, OSError):
        alive = False
    if alive:
        return None
    rank.process.join()
    return _Answer("died", text=f"exit code {rank.process.exitcode}")


def _failures(answers: dict[int, _Answer]) -> bool:
    return any(answer.status not in ("passed", "skipped") for answer in answers.values())


def _hung(waiting: dict[int, _Rank], reason: str) -> dict[int, _Answer]:
    for rank in waiting.values():
        with contextlib.suppress(OSError):
            rank.control.send(None)
    for rank in waiting.values():
        with contextlib.suppress(OSError):
            rank.control.poll(_STACKS_TIMEOUT)
    return {number: _Answer("hung", text=f"{reason}; its stacks are at the end of its output") for number in waiting}


def _report(answers: dict[int, _Answer], outputs: dict[int, str]) -> str:
    """All ranks, the one that failed first on top: what follows is often only its consequence."""
    first = [number for number, answer in answers.items() if answer.status != "passed"]
    rest = [number for number in sorted(answers) if answers[number].status == "passed"]
    parts = []
    for number in first + rest:
        answer = answers[number]
        parts.append(f"--- rank {number} {answer.status}\n{answer.text}".rstrip())
        if outputs[number].strip():
            parts.append(f"--- rank {number} output\n{outputs[number]}".rstrip())
    return "\n".join(["", *parts])


def _show(outputs: dict[int, str]) -> None:
    for number, output in sorted(outputs.items()):
        if output.strip():
            print(f"--- rank {number} output\n{output.rstrip()}")


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(value: bytes) -> Any:
    # map_location: the main process stays out of CUDA
    return torch.load(io.BytesIO(value), map_location="cpu", weights_only=False)


# What follows runs in the ranks.


def _serve(rank: int, connection: Connection, control: Connection, log: str) -> None:
    _redirect_output(log)
    threading.Thread(target=_watch, args=(control,), daemon=True).start()
    _rewrite_asserts()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the main process's affair
    torch.set_num_threads(1)
    gc.freeze()  # what the fork server imported is never garbage; leaving it out makes collections cheap
    while True:
        try:
            job: _Job | None = connection.recv()
        except EOFError:
            os._exit(0)
        if job is None:
            _reset_rank()
        else:
            connection.send(_run_job(rank, job))


def _run_job(rank: int, job: _Job) -> _Answer:
    os.ftruncate(1, 0)
    sys.path[:] = job.path
    os.chdir(job.cwd)
    try:
        with isolated():
            os.environ.clear()
            os.environ.update(job.environ | job.rank_environ(rank))
            set_lightning_rank(rank)
            _join(rank, job)
            seed_everything()  # again: making the group may have drawn numbers
            fn, args = pickle.loads(job.payload)
            answer = _Answer("passed", _dump(fn(*args)))
    except pytest.skip.Exception as skipped:
        answer = _Answer("skipped", text=str(skipped))
    except BaseException as error:
        answer = _Answer("failed", text=_format(error))
    sys.stdout.flush()
    sys.stderr.flush()
    return answer


def _join(rank: int, job: _Job) -> None:
    """Take the rank's device and meet the others in a new process group, if the job asks for one."""
    device_id = None
    if job.device == "cuda":
        device_id = torch.device("cuda", rank)
        torch.cuda.set_device(device_id)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    if job.store is not None:
        dist.init_process_group(
            "nccl" if job.device == "cuda" else "gloo",
            init_method=f"file://{job.store}",
            rank=rank,
            world_size=job.world,
            device_id=device_id,
        )


def _reset_rank() -> None:
    leave_process_group()
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _format(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def _redirect_output(log: str) -> None:
    """Send everything the rank writes, C++ included, to its log."""
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    sys.stdout = open(1, "w", buffering=1, closefd=False, errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="replace")  # noqa: SIM115
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _rewrite_asserts() -> None:
    """Have asserts in test modules show their values, as pytest does in its own process."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    files = ["-o", "python_files=test_*.py tests/helpers/*.py"]
    pytest.Config.fromdictargs({}, ["--noconftest", "-c", os.devnull, "-p", "no:cacheprovider", *files])
    del os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]


def _watch(control: Connection) -> None:
    """Serve a rank whose main thread is stuck: print its stacks when asked to, and end it with the main process.

    A thread and not a signal handler, because Lightning puts back the signal handlers it knows of.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(EOFError, OSError):
        while parent.sentinel not in wait([parent.sentinel, control]):
            control.recv()
            _print_stacks()
            control.send(None)
    os._exit(1)


def _print_stacks() -> None:
    """Print where each other thread is, from the test's own frames on."""
    for thread, frame in sys._current_frames().items():
        if thread == threading.get_ident():
            continue
        stack = traceback.extract_stack(frame)
        start = max((i + 1 for i, entry in enumerate(stack) if entry.filename == __file__), default=0)
        print(
            f"Stack of thread {thread}:\n{''.join(traceback.format_list(stack[start:]))}", file=sys.stderr, flush=True
        )
