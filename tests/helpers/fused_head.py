"""A sharded head and the input it is given, for its loss in one function, and torch's own loss of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from lightning_autotp import TPConfig, linear_cross_entropy
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.layout.layout import Layout, even_widths
from lightning_autotp.losses import vocab_parallel_linear_cross_entropy as room
from lightning_autotp.parallel.linear import ColumnParallelLinear
from tests.helpers.closeness import assert_close
from tests.helpers.rank_pool import rank_device
from tests.helpers.vocab_logits import VOCABULARY, assert_same_bits

WIDTH = 5
FEW = 260
"""Logits a run of tokens: 3 tokens by the widest part of two, but 4 by the other one, whose 65 would fit so often."""

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "all": {"label_smoothing": 0.3, "z_loss": 1e-2, "reduction": "sum"},
    "ignored-is-an-id": {"ignore_index": 7, "label_smoothing": 0.1},
}


def whole_head(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        nn.init.normal_(head.weight)
    return head.to(rank_device(), dtype)


def cut_head(dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any) -> Any:
    """The same head, cut over all ranks of the test."""
    size = dist.get_world_size()
    head = whole_head(dtype, bias)
    layout = Layout.cut((VOCABULARY, WIDTH), 0, size, [even_widths(VOCABULARY, size)])
    mesh = build_mesh(size, TPConfig())
    for parameter in head.parameters():
        parameter.data = part(parameter.data, layout, mesh.tp_rank)
    return ColumnParallelLinear.convert(head, mesh, layout, **{"overlap": False, "gather": True} | options)


def part(full: Tensor, layout: Layout, rank: int) -> Tensor:
    ((start, length),) = layout.parts[rank]
    return full[start : start + length].clone()


def drawn(*shape: int, dtype: torch.dtype = torch.float32, ignored: int = -100) -> tuple[Tensor, Tensor]:
    """What a head is given, ``[*shape, H]``, and targets ``shape``, of which every fifth does not count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randint(VOCABULARY, shape, generator=generator)
    target.view(-1)[::5] = ignored
    return hidden.to(rank_device(), dtype).requires_grad_(), target.to(rank_device())


def wanted(logits: Tensor, target: Tensor, z_loss: float = 0.0, reduction: str = "mean", **options: Any) -> Tensor:
    """torch's loss of all logits ``[..., V]``."""
    rows = logits.flatten(0, -2)
    counts = target.flatten() != options.get("ignore_index", -100)
    losses = F.cross_entropy(rows, target.flatten(), reduction="none", **options)
    total = (losses + z_loss * rows.logsumexp(1).square() * counts).sum()
    return total if reduction == "sum" else total / counts.sum()


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> dict[str, Tensor]:
    """Of the input of a head and its parameters."""
    named = {"hidden": hidden, **dict(head.named_parameters())}
    trained = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))


def of_rank(head: Any, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of full gradients."""
    return {n: g if n == "hidden" else part(g, head.layout, head.mesh.tp_rank) for n, g in full.items()}


def check(dtype: torch.dtype, tol: float, *, bias: bool = True, overlap: bool = False, **options: Any) -> None:
    """The loss, bit-equal on all ranks, and every gradient are the unsharded head's; so are their collectives."""
    hidden, target = drawn(4, 9, dtype=dtype, ignored=options.get("ignore_index", -100))
    full, head = whole_head(dtype, bias), cut_head(dtype, bias, overlap=overlap)
    with CommDebugMode() as forward:
        loss = linear_cross_entropy(hidden, target, head, **options)
    with CommDebugMode() as backward:
        grads = gradients(3 * loss, hidden, head)
    rows = max(1, room._CHUNK // head.layout.widths[0])
    assert (forward.get_total_counts(), backward.get_total_counts()) == (-(-36 // rows), 1)
    want = wanted(full(hidden), target, **options)
    assert loss.dtype == want.dtype and loss.shape == ()
    assert_close({"loss": loss}, {"loss": want}, tol, "loss")
    assert_same_bits(loss)
    assert_close(grads, of_rank(head, gradients(3 * want, hidden, full)), tol)
    assert_same_bits(grads["hidden"])
