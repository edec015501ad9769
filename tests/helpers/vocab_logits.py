"""Logits over a sharded vocabulary, and torch's own loss of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp import TPConfig, cross_entropy
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.layout.layout import Layout, even_widths
from lightning_autotp.parallel.linear import ColumnParallelLinear
from tests.helpers.closeness import assert_close
from tests.helpers.rank_pool import rank_device

VOCABULARY = 131  # no number of ranks divides it


def sharded_head(width: int = 3, vocabulary: int = VOCABULARY) -> Any:
    """A head that is cut over all ranks of the test and keeps its part of the logits."""
    size = dist.get_world_size()
    head = nn.Linear(width, vocabulary, bias=False).to(rank_device())
    layout = Layout.cut((vocabulary, width), 0, size, [even_widths(vocabulary, size)])
    mesh = build_mesh(size, TPConfig())
    head.weight.data = layout.shard(head.weight.data, mesh.tp_rank)
    return ColumnParallelLinear.convert(head, mesh, layout, overlap=False, gather=True)


def part(head: Any, logits: Tensor) -> Tensor:
    ((start, length),) = head.layout.parts[head.mesh.tp_rank]
    return logits.detach()[..., start : start + length].clone().requires_grad_()


def drawn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits ``[*shape, V]`` and targets ``shape``, of which every fifth does not count."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64)
    target = torch.randint(VOCABULARY, shape, generator=generator)
    target.view(-1)[::5] = -100
    return logits.to(rank_device(), dtype), target.to(rank_device())


def wanted(
    logits: Tensor, target: Tensor, z_loss: float = 0.0, reduction: str = "mean", **options: Any
) -> tuple[Tensor, Tensor]:
    """torch's loss, and its gradient ``[..., V]``, in the dtype of the logits."""
    whole = logits.detach().clone().requires_grad_()
    rows = whole.flatten(0, -2)
    losses = F.cross_entropy(rows, target.flatten(), reduction="none", **options)
    counts = target.flatten() != options.get("ignore_index", -100)
    losses = losses + z_loss * rows.logsumexp(1).square() * counts
    loss = {"mean": losses.sum() / counts.sum(), "sum": losses.sum(), "none": losses.view(target.shape)}[reduction]
    (loss * weights(loss)).sum().backward()
    assert whole.grad is not None
    return loss.detach(), whole.grad


def weights(loss: Tensor) -> Tensor:
    """Gradients that differ from token to token."""
    return torch.linspace(1.0, 2.0, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape)


def check(logits: Tensor, target: Tensor, tol: float, **options: Any) -> Tensor:
    """Loss and gradient of this rank's part are torch's, and the loss has the same bits everywhere."""
    head = sharded_head()
    mine = part(head, logits)
    loss = cross_entropy(mine, target, head, **options)
    (loss * weights(loss)).sum().backward()
    want, grad = wanted(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options)
    assert loss.dtype == want.dtype and mine.grad is not None and mine.grad.dtype == logits.dtype
    assert_close({"loss": loss}, {"loss": want}, tol, "loss")
    rounding = torch.finfo(logits.dtype).eps
    assert_close({"logits": mine.grad.to(grad.dtype)}, {"logits": part(head, grad)}, max(tol, rounding))
    assert_same_bits(loss)
    return loss


def assert_same_bits(tensor: Tensor) -> None:
    first = tensor.detach().clone()
    dist.broadcast(first, src=0)
    assert torch.equal(first, tensor)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "all": {"label_smoothing": 0.3, "z_loss": 1e-2, "reduction": "none"},
    "ignored-is-an-id": {"ignore_index": 7, "label_smoothing": 0.1},
}
