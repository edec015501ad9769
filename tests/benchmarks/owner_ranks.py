"""Step time and memory of optimizers on owner ranks, beside AdamW: two processes, CPU.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.benchmarks.owner_ranks
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_autotp.config.training_config import TPConfig
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.layout.layout import Layout, even_widths
from lightning_autotp.optimizers.accept import accept_optimizers
from tests.helpers.own_optimizers import SingleFileMuon

SIZE, COUNT, STEPS = 512, 8, 3


def main() -> None:
    """Print a line for each optimizer: seconds a step, and MiB of its state on the first rank."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    mesh = build_mesh(dist.get_world_size(), TPConfig())
    optimizers: dict[str, Any] = {
        "AdamW": torch.optim.AdamW,
        "Adafactor": torch.optim.Adafactor,
        "Muon": SingleFileMuon,  # torch's computes in bfloat16, which many CPUs only emulate
    }
    for name, kind in optimizers.items():
        layout = Layout.cut((SIZE, SIZE), 0, mesh.tp_size, [even_widths(SIZE, mesh.tp_size)])
        params = [nn.Parameter(torch.randn(layout.local_shape(mesh.tp_rank))) for _ in range(COUNT)]
        optimizer = kind(params)
        began = time.perf_counter()
        accept_optimizers([optimizer], dict.fromkeys(params, layout), mesh, lambda: None)
        trial = time.perf_counter() - began
        for step in range(STEPS + 1):
            for p in params:
                p.grad = torch.randn_like(p)
            if step == 1:
                dist.barrier()
                began = time.perf_counter()
            optimizer.step()
        seconds = (time.perf_counter() - began) / STEPS
        state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
        if mesh.tp_rank == 0:
            print(f"{name}: trial {trial:.2f} s, step {seconds:.3f} s, state {state / 2**20:.1f} MiB on rank 0")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
