"""A rank's tokens of what all ranks have alike, and all tokens of every rank's own, for context parallelism.

Gradients of a rank's own tokens are multiplied by the number of ranks; :mod:`.context_parallel` says why.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.once_differentiable import once_differentiable
from lightning_autotp.layout.layout import Interval, even_widths


@dataclass(frozen=True)
class Split:
    """How the tokens of sequences of ``length`` are split: neighbouring ones stay together, the first ranks have more.

    Args:
        length: S.
        mesh: this process's place.
    """

    length: int
    mesh: Mesh

    @property
    def parts(self) -> tuple[Interval, ...]:
        """Each rank's first token and number of tokens."""
        return even_widths(self.length, self.mesh.cp_size)

    @property
    def mine(self) -> Interval:
        """This rank's."""
        return self.parts[self.mesh.cp_rank]


class _SplitTokens(torch.autograd.Function):
    """Forward: a rank's tokens along a dim. Backward: all-gather, divided by what :class:`_JoinTokens` has put on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split, dim: int) -> Tensor:
        ctx.split, ctx.dim = split, dim
        return x.narrow(dim, *split.mine).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return _gathered(grads[0], ctx.split, ctx.dim) / ctx.split.mesh.cp_size, None, None


class _JoinTokens(torch.autograd.Function):
    """Forward: all-gather. Backward: a rank's tokens of the gradient, which all ranks share, times their number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return _gathered(x, split, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0].narrow(1, *ctx.split.mine) * ctx.split.mesh.cp_size, None


class _Beside(torch.autograd.Function):
    """Forward: what blocks read besides tokens, as it is. Backward: the average of its gradients over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        ctx.mesh = split.mesh
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return ctx.mesh.collectives.all_reduce(grads[0].clone(), "cp") / ctx.mesh.cp_size, None


def _gathered(x: Tensor, split: Split, dim: int) -> Tensor:
    """All tokens along ``dim``; shorter parts travel padded, which every backend supports."""
    longest = max(tokens for _, tokens in split.parts)
    first = x.movedim(dim, 0)
    padded = first.new_zeros(longest, *first.shape[1:])
    padded[: first.shape[0]] = first
    stacked = split.mesh.collectives.all_gather(padded, "cp").view(split.mesh.cp_size, longest, *first.shape[1:])
    full = torch.cat([stacked[rank, :tokens] for rank, (_, tokens) in enumerate(split.parts)])
    return full.movedim(0, dim).contiguous()


def split_tokens(x: Tensor, split: Split, dim: int = 1) -> Tensor:
    """This rank's tokens of ``x``, which all ranks share."""
    part: Tensor = _SplitTokens.apply(x, split, dim)
    return part


def join_tokens(x: Tensor, split: Split) -> Tensor:
    """All tokens ``[B, S, ...]`` of every rank's own ``[B, s, ...]``; what reads them does the same on every rank."""
    full: Tensor = _JoinTokens.apply(x, split)
    return full


def beside_tokens(x: Tensor, split: Split) -> Tensor:
    """What is read besides tokens, alike on all ranks, each of which knows a part of its gradient, times ``cp``."""
    same: Tensor = _Beside.apply(x, split)
    return same
