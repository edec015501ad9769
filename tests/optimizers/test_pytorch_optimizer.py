"""Optimizers of the package pytorch_optimizer, where it is installed: none of them may be wrong without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp.distributed.functions import gather_parts
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout, even_widths
from lightning_autotp.optimizers.accept import accept_optimizers

NAMES = [
    "AdaFactor",
    "Adai",
    "AdamP",
    "ADOPT",
    "AdEMAMix",
    "CAME",
    "Conda",
    "DAdaptAdam",
    "Fromage",
    "GaLore",
    "Grams",
    "Kron",
    "Lamb",
    "LARS",
    "Lion",
    "MARS",
    "NovoGrad",
    "Prodigy",
    "Ranger",
    "ScalableShampoo",
    "ScheduleFreeAdamW",
    "SGDP",
    "Shampoo",
    "SignSGD",
    "SM3",
    "SOAP",
    "StableAdamW",
    "Tiger",
    "Yogi",
]
SHAPES = ((16, 12), (8, 12), (16,), (3, 10, 6))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_are_those_of_the_unsharded_optimizer(name: str) -> None:
    kind = getattr(pytest.importorskip("pytorch_optimizer"), name)

    def steps(mesh: Mesh | None = None) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        full = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        size = 1 if mesh is None else mesh.tp_size
        cuts = [(shape, max(0, len(shape) - 2)) for shape in SHAPES]
        layouts = [Layout.cut(shape, dim, size, [even_widths(shape[dim], size)]) for shape, dim in cuts]
        rank = 0 if mesh is None else mesh.tp_rank
        params = [nn.Parameter(layout.shard(f, rank).clone()) for layout, f in zip(layouts, full)]
        torch.manual_seed(0)
        optimizer: Any = kind(params)
        if mesh is not None:
            accept_optimizers([optimizer], dict(zip(params, layouts)), mesh, lambda: None)
        for step in range(10):
            for p, layout in zip(params, layouts):
                noise = torch.randn(layout.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 4 - 2)
                p.grad = layout.shard(noise, rank).clone()
            optimizer.step()
        found = [p.detach() for p in params]
        return found if mesh is None else [gather_parts(p, layout, mesh) for p, layout in zip(found, layouts)]

    want = steps()
    for size in (2, 4):
        for got in Lockstep[Any](size).run(steps):
            assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(got, want))
