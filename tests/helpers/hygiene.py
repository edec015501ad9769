"""What one test must not leave behind for the next: used around every test, in the main process and in the ranks."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
import torch._dynamo
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only
from torch.distributed.device_mesh import _mesh_resources

# Advice that small CPU runs always trigger. Matched at the start of the message, as Python's own filters do.
LIGHTNING_NOISE: tuple[str, ...] = (
    r".*does not have many workers",
    r".*GPU available but not used",
    r".*is smaller than the logging interval",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)

# Lightning keeps the rank as an attribute of this function, and has had two copies of it.
_RANK_ZERO_ONLY: tuple[Any, ...] = (fabric_rank_zero_only, utilities_rank_zero_only)


def lightning_rank() -> int:
    """Which rank Lightning believes this process to be."""
    return int(getattr(_RANK_ZERO_ONLY[0], "rank", 0))


def set_lightning_rank(rank: int) -> None:
    """Tell Lightning which rank this process is."""
    for function in _RANK_ZERO_ONLY:
        function.rank = rank


def seed_everything(seed: int = 0) -> None:
    """Seed Python, numpy and torch, without the environment variables that Lightning's own helper sets."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def leave_process_group() -> None:
    """Destroy a left-over default process group and forget the device meshes entered on it."""
    _mesh_resources.mesh_stack.clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def isolated(seed: int = 0) -> Iterator[None]:
    """Seed the random generators, and on leaving put back the process-wide state that tests and Trainers change."""
    seed_everything(seed)
    _clear_warning_caches()
    rank, environ = lightning_rank(), dict(os.environ)
    restore_signals, restore_torch = _signal_restorer(), _torch_restorer()
    try:
        with warnings.catch_warnings():
            for message in LIGHTNING_NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        restore_torch()
        restore_signals()
        set_lightning_rank(rank)
        torch._dynamo.reset()  # or a function compiled in many tests would reach the limit on recompiling it
        if dict(os.environ) != environ:
            os.environ.clear()
            os.environ.update(environ)


def _clear_warning_caches() -> None:
    """Lightning warns once per process; a test that expects a warning must not depend on the tests before it."""
    for name, module in list(sys.modules.items()):
        cache = getattr(module, "warning_cache", None) if name.startswith("lightning.") else None
        if isinstance(cache, set):
            cache.clear()


def _signal_restorer() -> Callable[[], None]:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def restore() -> None:
        for number, handler in handlers.items():
            # None stands for a handler that was not installed from Python and so cannot be put back.
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)

    return restore


def _torch_restorer() -> Callable[[], None]:
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    precision = torch.get_float32_matmul_precision()

    def restore() -> None:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.set_float32_matmul_precision(precision)

    return restore
