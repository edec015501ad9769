"""How long checkpoints take: ours beside plain DCP of the same tensors, and how long a save in the background pauses.

    python -m tests.benchmarks.checkpoint_speed [--gigabytes 1] [--ranks 2] [--times 5] [--directory DIR] [--cuda]

The tensors are those of a sharded net and its AdamW: weights and two moments, in fp32. Ours and DCP's alternate, and
medians are told. DCP writes with its defaults, which have the files on the disk before it returns, as ours have.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor

from lightning_autotp.checkpoint.background import Background
from lightning_autotp.checkpoint.distributed import load_directory
from lightning_autotp.checkpoint.host_copies import HostCopies
from lightning_autotp.checkpoint.saving import prepare_directory, save_directory
from lightning_autotp.checkpoint.state_dict import Placement
from lightning_autotp.config.training_config import TPConfig
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.layout.layout import Layout, even_widths

WIDTH = 2048


def layers_for(total: float) -> int:
    """How many layers of two matrices ``[4 x WIDTH, WIDTH]``, thrice, make ``total`` bytes over all ranks."""
    return max(1, math.ceil(total / (3 * 2 * 4 * WIDTH * WIDTH * 4)))


def make(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], list[list[str]], Placement]:
    """A Lightning checkpoint of this rank's parts."""
    mesh = build_mesh(options.ranks, TPConfig())
    layouts: dict[str, Layout] = {}
    weights: dict[str, Tensor] = {}
    for number in range(layers_for(options.gigabytes * 1e9)):
        for name, shape, dim in (("up", (4 * WIDTH, WIDTH), 0), ("down", (WIDTH, 4 * WIDTH), 1)):
            full = f"layers.{number}.{name}.weight"
            layouts[full] = Layout.cut(shape, dim, options.ranks, [even_widths(shape[dim], options.ranks)])
            weights[full] = torch.randn(layouts[full].local_shape(mesh.tp_rank), device=device)
    state = {
        at: {"step": torch.tensor(1.0), "exp_avg": torch.randn_like(w), "exp_avg_sq": torch.randn_like(w)}
        for at, w in enumerate(weights.values())
    }
    group = {"lr": 0.1, "params": list(range(len(weights)))}
    checkpoint = {
        "epoch": 0,
        "global_step": 1,
        "state_dict": weights,
        "optimizer_states": [{"state": state, "param_groups": [group]}],
    }
    return checkpoint, [list(weights)], Placement(layouts, mesh)


def plain(checkpoint: dict[str, Any], rank: int) -> dict[str, Tensor]:
    """The same tensors, each rank's under names of its own, as DCP takes them without knowing of shards."""
    flat = {f"{rank}.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    for number, entries in checkpoint["optimizer_states"][0]["state"].items():
        flat |= {f"{rank}.{number}.{entry}": tensor for entry, tensor in entries.items()}
    return flat


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of the slowest rank, and those that the ranks' CPUs were at it, all threads together."""
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (time.perf_counter() - start, time.process_time() - busy))
    return max(seconds for seconds, _ in everyones), sum(busy for _, busy in everyones)


def worker(rank: int, options: argparse.Namespace, port: int) -> None:
    """Measure on one rank; the first one prints."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if options.cuda else torch.device("cpu")
    if options.cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if options.cuda else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=options.ranks)
    checkpoint, names, placement = make(options, device)
    flat = plain(checkpoint, rank)
    total = sum(t.nbytes for t in flat.values())
    folder = Path(options.directory)
    ours, theirs = folder / "ours", folder / "dcp"
    background, copies = Background(), HostCopies()
    background.open()
    found: dict[str, list[tuple[float, float]]] = {}

    def note(what: str, work: Callable[[], Any]) -> None:
        found.setdefault(what, []).append(timed(work, device))

    def fresh() -> None:
        dist.barrier()
        if rank == 0:
            for path in (ours, theirs):
                shutil.rmtree(path, ignore_errors=True)
            os.sync()
        dist.barrier()

    def pause() -> None:
        background.wait()
        background.start(prepare_directory(copies.of(checkpoint), names, placement, ours))

    target = {name: torch.empty_like(tensor, device="cpu") for name, tensor in flat.items()}
    for again in range(options.times + 1):
        pairs = [
            ("save", lambda: save_directory(checkpoint, names, placement, ours)),
            ("save, DCP", lambda: dcp.save(flat, checkpoint_id=theirs)),
        ]
        for what, work in pairs if again % 2 else pairs[::-1]:
            fresh()
            note(what, work)
        fresh()
        dcp.save(flat, checkpoint_id=theirs)
        save_directory(checkpoint, names, placement, ours)
        pairs = [
            ("load", lambda: load_directory(ours, placement)),
            ("load, DCP", lambda: dcp.load({n: torch.empty_like(t) for n, t in target.items()}, checkpoint_id=theirs)),
        ]
        for what, work in pairs if again % 2 else pairs[::-1]:
            note(what, work)
        note("load, all checksums", lambda: load_directory(ours, placement, all_bytes=True))
        fresh()
        note("pause", pause)
        note("the rest, in the background", background.wait)
    first = {what: times.pop(0)[0] for what, times in found.items()}  # not counted: caches, and memory to be had
    if rank == 0:
        seconds = {what: [round(wall, 3) for wall, _ in times] for what, times in found.items()}
        medians = {what: statistics.median(wall) for what, wall in seconds.items()}
        busy = {what: round(statistics.median(cpu for _, cpu in times), 3) for what, times in found.items()}

        def ratios(of: Callable[[str], float]) -> dict[str, float]:
            pairs = (("save", "save, DCP"), ("load", "load, DCP"), ("pause", "save"))
            return {f"{one} / {other}": round(of(one) / of(other), 3) for one, other in pairs}

        said = {
            "gigabytes": round(total * options.ranks / 1e9, 3),
            "ranks": options.ranks,
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {'cuda' if options.cuda else 'cpu'}",
            "busy with": os.getloadavg(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "seconds": seconds,
            "ratios of medians": ratios(medians.__getitem__),
            "ratios of the fastest": ratios(lambda what: min(seconds[what])),
            "CPU seconds": busy,
            "ratios of CPU seconds": ratios(busy.__getitem__),
            "first pause": round(first["pause"], 3),
        }
        print(json.dumps(said, indent=1))
    dist.destroy_process_group()


def main() -> int:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of all tensors together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--directory", help="where to write; a temporary one by default")
    parser.add_argument("--cuda", action="store_true", help="one GPU a rank")
    options = parser.parse_args()
    made = tempfile.mkdtemp(prefix="checkpoint-speed-", dir=options.directory)
    options.directory = made
    try:
        mp.spawn(worker, (options, 20000 + os.getpid() % 10000), nprocs=options.ranks)
    finally:
        shutil.rmtree(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
