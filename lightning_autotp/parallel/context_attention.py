"""Attention of tokens that are split over the context parallel ranks: each attends with its heads to all tokens.

Source: Jacobs et al., "DeepSpeed Ulysses" (arXiv:2309.14509). An all-to-all turns a rank's own tokens of all heads into
all tokens of its own heads, ``[B, h, s, D] -> [B, h / cp, S, D]``; the model's attention runs as it is, with its masks,
windows and packed sequences; another all-to-all turns its result back. Tokens may be split unevenly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_autotp.compat import around_attention_of_transformers
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.parallel.context_tokens import Split
from lightning_autotp.planning.context_parallel import uneven

FULL = "_autotp_all_tokens"
"""The attribute of a rank's part of an argument that holds all of it."""


@dataclass
class Active:
    """A block that is being computed of a rank's own tokens."""

    block: str
    split: Optional[Split]
    attended: Callable[[], None] = lambda: None
    owner: Any = None
    """The module that ends it."""
    mode: Optional[TorchFunctionMode] = None
    inside: bool = False
    """Whether attention is under way, which needs nothing more."""
    depth: int = 0
    """How many modules inside of the block are under way."""
    records: bool = field(default_factory=torch.is_grad_enabled)
    """Whether gradients were recorded when it began."""

    def check_checkpoint(self) -> None:
        """Refuse attention that is computed again where nobody is told of it.

        Raises:
            ValueError: in a reentrant checkpoint inside of a block's forward, outside of modules that are called in it.
        """
        if self.records and not torch.is_grad_enabled() and not self.depth:
            raise ValueError(
                f"context_parallel_size: {self.block} calls attention in its own forward and checkpoints a part of it:"
                " checkpoint whole blocks, make attention a module of its own, or use use_reentrant=False."
            )


class _Blocks(threading.local):
    """Those under way in this thread: recomputation runs in threads of its own, and a proof's ranks do."""

    def __init__(self) -> None:
        self.under_way: list[Active] = []


_blocks = _Blocks()


def enter(active: Active) -> None:
    """A block begins; attention in it is that of all tokens, if they are split."""
    around_attention_of_transformers(_around)
    _blocks.under_way.append(active)
    if active.split is not None:
        active.mode = _Attention(active)
        active.mode.__enter__()


def under_way(block: str) -> Optional[Active]:
    """The block at this path, if it is what is under way."""
    last = _blocks.under_way[-1] if _blocks.under_way else None
    return last if last is not None and last.block == block else None


def leave(owner: Any) -> Optional[Active]:
    """What has begun with ``owner`` ends; None if nothing has, because something before it raised."""
    if not _blocks.under_way or _blocks.under_way[-1].owner is not owner:
        return None
    active = _blocks.under_way.pop()
    if active.mode is not None:
        active.mode.__exit__(None, None, None)
    return active


class _Attention(TorchFunctionMode):
    """Takes calls of torch's attention, which models make themselves."""

    def __init__(self, active: Active) -> None:
        super().__init__()
        self.active = active

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.active.inside:
            return func(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            raise ValueError(
                f"context_parallel_size: {self.active.block} has an nn.MultiheadAttention, whose inside is not known;"
                " call F.scaled_dot_product_attention in a module of your own, or leave it at 1 for this model."
            )
        if func is F.scaled_dot_product_attention:
            return _attend_by_torch(self.active, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _around(own: Callable[..., Any]) -> Callable[..., Any]:
    """What a Hugging Face model is to call for its attention function ``own``."""
    active = _blocks.under_way[-1] if _blocks.under_way else None
    if active is None or active.split is None or active.inside:
        return own
    return partial(_attend_by_interface, active, own)


def _attend_by_interface(
    active: Active,
    own: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **given: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: ``[B, h, s, D]`` in, ``[B, s, h, D]`` out."""
    if given.get("output_attentions"):
        raise ValueError(
            "context_parallel_size: output_attentions: each rank has the weights of its own heads; leave it off."
        )
    heads = _Heads(active, query, key, value)
    q, k, v = heads.to_all_tokens(query, key, value)
    module = _OfOwnHeads(module, q.shape[1] // k.shape[1], heads)
    args = tuple(heads.of_mine(value) for value in args)
    given = {name: heads.of_mine(_all_tokens(value)) for name, value in given.items()}
    heads.check_mask(given.get("attention_mask") if "attention_mask" in given else args[0] if args else None)
    with _inside(active):
        output = own(module, q, k, v, *args, **given)[0]
    return heads.to_own_tokens(output.transpose(1, 2)).transpose(1, 2).contiguous(), None


def _attend_by_torch(
    active: Active,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **given: Any,
) -> Tensor:
    """``F.scaled_dot_product_attention`` of ``[B, h, s, D]``."""
    heads = _Heads(active, query, key, value)
    heads.check_mask(attn_mask)
    q, k, v = heads.to_all_tokens(query, key, value)
    mask = heads.of_mine(attn_mask)
    with _inside(active):
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **given)
    return heads.to_own_tokens(output)


@contextmanager
def _inside(active: Active) -> Iterator[None]:
    active.check_checkpoint()
    active.inside = True
    active.attended()
    try:
        yield
    finally:
        active.inside = False


class _Heads:
    """Which heads of one call of attention this rank computes, and how its tensors go there and back.

    Raises:
        ValueError: if the call is of other tokens than the rank's own, or its heads do not divide.
    """

    def __init__(self, active: Active, query: Tensor, key: Tensor, value: Tensor) -> None:
        assert active.split is not None
        self.block, self.split, self.mesh = active.block, active.split, active.split.mesh
        own = self.split.mine[1]
        if not all(x.ndim == 4 and x.shape[2] == own for x in (query, key, value)):
            shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
            raise ValueError(
                f"context_parallel_size: attention in {self.block} is given queries, keys and values {shapes}, which"
                f" are not [batch, heads, this rank's {own} tokens, size]: a cache, other sequences, or tokens in"
                " another dim; leave it at 1 for this model."
            )
        self.count, size = query.shape[1], self.mesh.cp_size
        if self.count % size:
            raise ValueError(uneven(f"attention in {self.block} has {self.count} query heads", [self.count], size))
        self.each = self.count // size

    def to_all_tokens(self, *tensors: Tensor) -> list[Tensor]:
        """All tokens of this rank's heads, of queries, keys and values; heads of keys go to all that need them."""
        if len({x.dtype for x in tensors}) > 1:
            return [self.to_all_tokens(x)[0] for x in tensors]
        chosen = [self._heads_of(x.shape[1]) for x in tensors]
        parts = []
        for rank in range(self.mesh.cp_size):
            own = [_of_heads(x, heads[rank]).reshape(-1) for x, heads in zip(tensors, chosen)]
            parts.append(torch.cat(own))
        mine = [len(heads[self.mesh.cp_rank]) for heads in chosen]
        widths = [x.shape[0] * count * x.shape[3] for x, count in zip(tensors, mine)]
        received = _exchange(self.mesh, parts, [sum(widths) * tokens for _, tokens in self.split.parts])
        found: list[list[Tensor]] = [[] for _ in tensors]
        for (_, tokens), flat in zip(self.split.parts, received):
            for at, piece in enumerate(flat.split([width * tokens for width in widths])):
                found[at].append(piece.view(tensors[at].shape[0], mine[at], tokens, tensors[at].shape[3]))
        return [torch.cat(pieces, 2) for pieces in found]

    def to_own_tokens(self, output: Tensor) -> Tensor:
        """``[B, h, s, D]`` of this rank's tokens, from ``[B, h / cp, S, D]``."""
        rows, _, _, size = output.shape
        parts = [output.narrow(2, start, tokens).reshape(-1) for start, tokens in self.split.parts]
        own = self.split.mine[1]
        received = _exchange(self.mesh, parts, [rows * self.each * own * size] * self.mesh.cp_size)
        return torch.cat([flat.view(rows, self.each, own, size) for flat in received], 1)

    def of_mine(self, value: Any) -> Any:
        """This rank's heads of what has an entry for each head: masks and biases ``[B, h, S, S]``, sinks ``[h]``."""
        if not isinstance(value, Tensor) or self.count == 1:
            return value
        dim = {4: 1, 1: 0}.get(value.ndim)
        if dim is None or value.shape[dim] != self.count or dim == 0 and not value.is_floating_point():
            return value
        return value.narrow(dim, self.mesh.cp_rank * self.each, self.each)

    def check_mask(self, mask: Any) -> None:
        """Refuse a mask that is not of all tokens."""
        length = self.split.length
        if isinstance(mask, Tensor) and (
            mask.shape[-1] != length or mask.ndim > 2 and mask.shape[-2] not in (1, length)
        ):
            raise ValueError(
                f"context_parallel_size: attention in {self.block} is given a mask {list(mask.shape)}, and there are"
                f" {length} tokens: it was made in the block, of a rank's own tokens. Make it before the first block."
            )

    def _heads_of(self, count: int) -> list[list[int]]:
        """By rank, which of ``count`` heads of keys its query heads attend to, or of queries, which it has."""
        group, found = self.count // count, []
        for rank in range(self.mesh.cp_size):
            needed = [head // group for head in range(rank * self.each, (rank + 1) * self.each)]
            once = list(dict.fromkeys(needed))
            # as many query heads for each, in order; or else one for each query head
            even = all(needed.count(head) == self.each // len(once) for head in once)
            found.append(once if even else needed)
        if len({len(heads) for heads in found}) > 1:
            return [
                [head // group for head in range(rank * self.each, (rank + 1) * self.each)]
                for rank in range(self.mesh.cp_size)
            ]
        return found


def _of_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    first = heads[0]
    if list(heads) == list(range(first, first + len(heads))):
        return x.narrow(1, first, len(heads))
    return x[:, list(heads)]


def _all_tokens(value: Any) -> Any:
    """All of an argument that was split for the block."""
    return getattr(value, FULL, value) if isinstance(value, Tensor) else value


class _OfOwnHeads:
    """An attention module as a function sees it that computes a rank's own heads: groups and sinks are theirs."""

    def __init__(self, module: Any, groups: int, heads: _Heads) -> None:
        self._module, self._heads = module, heads
        if hasattr(module, "num_key_value_groups"):
            self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        return self._heads.of_mine(getattr(self._module, name))


class _Exchange(torch.autograd.Function):
    """Forward: sends part r to rank r, and gives what the ranks have sent. Backward: the same, of gradients."""

    @staticmethod
    def forward(ctx: Any, mesh: Mesh, lengths: list[int], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.mesh, ctx.lengths = mesh, [part.numel() for part in parts]
        return tuple(mesh.collectives.exchange(parts, lengths, "cp"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_Exchange.apply(ctx.mesh, ctx.lengths, *grads)


def _exchange(mesh: Mesh, parts: list[Tensor], lengths: list[int]) -> tuple[Tensor, ...]:
    received: tuple[Tensor, ...] = _Exchange.apply(mesh, lengths, *parts)
    return received
