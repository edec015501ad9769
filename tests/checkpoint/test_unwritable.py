"""Saves that cannot be: one error on all ranks with the directory, the rank and what stands, and nobody waits."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_autotp.checkpoint.tensors import open_checkpoint
from tests.helpers.checkpoints import Scheduled
from tests.helpers.small_nets import everyones, strategy, trainer

NOBODY = 65534


@contextmanager
def without_permission(directory: Path) -> Iterator[None]:
    """This thread may read ``directory`` and not write in it, root or not."""
    if os.geteuid() == 0:  # root may do anything: be somebody to whom the directory does not belong
        library = ctypes.CDLL(None)
        gc.collect()  # groups of earlier tests remove their files when they are collected, and end the process if not
        library.setfsuid(NOBODY)
        try:
            yield
        finally:
            library.setfsuid(0)
    else:
        directory.chmod(0o555)
        try:
            yield
        finally:
            directory.chmod(0o777)


@contextmanager
def without_space() -> Iterator[None]:
    """No file of this process may become longer than a kilobyte."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("why", "ranks", "directory", "before"),
    [
        ("permission", (0,), True, True),
        ("permission", (1,), True, True),
        ("permission", (0, 1), True, False),
        ("permission", (0, 1), False, True),
        ("space", (0,), True, False),
        ("space", (1,), True, True),
        ("space", (0, 1), False, True),
    ],
)
@pytest.mark.ranks(2, timeout=120)
def test_every_rank_hears_why_a_save_was_not_made_and_what_stands(
    why: str, ranks: tuple[int, ...], directory: bool, before: bool, tmp_path: Path
) -> None:
    rank = dist.get_rank()
    folder = tmp_path / "run"
    if rank == 0:
        for parent in takewhile(lambda at: at != Path(tempfile.gettempdir()), [tmp_path, *tmp_path.parents]):
            parent.chmod(0o755)  # pytest makes them for nobody else
        folder.mkdir()
        folder.chmod(0o755 if os.geteuid() == 0 else 0o777)
    dist.barrier()
    model, run = Scheduled(), trainer(strategy(2, save_distributed_checkpoint=directory), max_epochs=1)
    run.fit(model)
    path = folder / "last.ckpt"
    # one is saved in any case: at its first use a process group may read files of its own
    run.save_checkpoint(path if before else tmp_path / "elsewhere")
    dist.barrier()
    error: Any = None
    trouble: Any = without_permission(folder) if why == "permission" else without_space()
    with trouble if rank in ranks else nullcontext():
        try:
            run.save_checkpoint(path)
        except RuntimeError as caught:
            error = str(caught)
    said = everyones(error)
    assert said[0] == said[1] and said[0] is not None
    named = set(ranks) if directory else {0}  # the first rank writes the file
    assert {r for r in (0, 1) if f"rank {r}: " in said[0]} == named, said[0]
    assert said[0].startswith(f"{path} could not be written")
    assert ("Permission denied" if why == "permission" else "File too large") in said[0]
    stands = "the checkpoint that was there before, whole" if before else "nothing, as before"
    assert said[0].endswith(f"What has this name is {stands}.")
    assert [entry.name for entry in folder.iterdir()] == ["last.ckpt"] * before
    if before:
        assert open_checkpoint(path, all_bytes=True).rest["global_step"] == 4
    run.save_checkpoint(path)  # the ranks are still in step
    assert open_checkpoint(path, all_bytes=True).rest["global_step"] == 4
