"""Context parallelism: between the first block and the last each rank holds its part of every sequence's tokens.

A step sees whole batches: embeddings, masks, positions and losses are computed of all tokens on every rank. The input
of the first block ``[B, S, H]`` is split to ``[B, s, H]``, as is what blocks are given for each token, attention
exchanges tokens for heads (:mod:`.context_attention`), and the output of the last block is gathered.

In the backward pass a rank's part of the output's gradient is multiplied by ``cp``: so the gradients of parameters in
blocks, of which each rank computes a part, average to their sum, and those of parameters outside, which every rank
computes whole, to themselves. One average over all replicas is right for both, and for parameters that are read at both
places.

Where no gradients are recorded (evaluation, ``generate``), and for sequences of fewer tokens than ranks, nothing is
split: every rank computes all of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.compat import in_backward
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.parallel.context_attention import FULL, Active, enter, leave, under_way
from lightning_autotp.parallel.context_tokens import Split, beside_tokens, join_tokens, split_tokens
from lightning_autotp.randomness.forked import Forked

_SPLIT = "_autotp_split"
"""The attribute of hidden states that says how they are split; of a cache, that it holds a rank's own tokens."""

_OF_ALL_TOKENS = ("mask", "bias", "cu_seq", "seq_idx")
"""What is in the names of arguments that only attention reads, which sees all tokens."""

_COLLECTED = ("hidden_states", "attentions", "router_logits")
"""Outputs of Hugging Face models that are collected from inside of blocks, where they are of a rank's own tokens."""


class Context:
    """What is known of the forward pass under way.

    Args:
        mesh: this process's place.
        blocks: the paths of the blocks.
    """

    def __init__(self, mesh: Mesh, blocks: tuple[str, ...]) -> None:
        self.mesh, self.blocks = mesh, blocks
        self.split: Optional[Split] = None
        self.is_open = False
        """Whether tokens are split and not gathered yet."""
        self.records: Optional[bool] = None
        """Whether gradients are recorded, in the module around the blocks: checkpointing turns it off in them."""
        self.seen: set[int] = set()
        """Lengths of the sequences since the last step."""
        self.attended = 0
        self.again: Optional[Split] = None
        """How the tokens are split of the block whose backward pass is under way, and that may be computed again."""
        self.parts: list[tuple[Tensor, Tensor]] = []
        """What blocks were given in the forward pass under way, and this rank's part of it."""
        self._random: Optional[Forked] = None

    def begin(self, x: Tensor) -> Optional[Split]:
        """The first block is given ``x [B, S, H]``: how its tokens are split, None if they are not."""
        length = x.shape[1]
        again = in_backward()  # only what recorded gradients is computed again
        records = again or (torch.is_grad_enabled() if self.records is None else self.records)
        split = Split(length, self.mesh) if records and length >= self.mesh.cp_size else None
        if not again:
            self.split, self.is_open, self.attended = split, split is not None, 0
            self.parts.clear()
            self.seen.add(length)
        return split

    def of(self, x: Tensor, block: str) -> Optional[Split]:
        """How the tokens are split that a block behind the first is given.

        Raises:
            ValueError: if that is not known.
        """
        if not in_backward():
            if self.split is not None and x.shape[1] != self.split.mine[1]:
                raise ValueError(
                    f"context_parallel_size: {block} is given {list(x.shape)}, which is not this rank's"
                    f" {self.split.mine[1]} tokens: blocks must be called in the order of their list, with what the one"
                    " before puts out; leave it at 1 for this model."
                )
            setattr(x, _SPLIT, self.split)
            return self.split
        if hasattr(x, _SPLIT):
            found: Optional[Split] = getattr(x, _SPLIT)
            return found
        splits = [Split(length, self.mesh) if length >= self.mesh.cp_size else None for length in sorted(self.seen)]
        fits = [s for s, length in zip(splits, sorted(self.seen)) if x.shape[1] == (length if s is None else s.mine[1])]
        if len(fits) != 1:
            raise ValueError(
                "context_parallel_size: with activation checkpointing that is reentrant, the sequences of one optimizer"
                f" step whose parts are as long must be of one length, not of {sorted(self.seen)} tokens; checkpoint"
                " with use_reentrant=False."
            )
        return fits[0]

    def note_attention(self) -> None:
        """Attention to all tokens was called."""
        self.attended += 1

    def end(self, block: str) -> None:
        """The last block has put out its tokens.

        Raises:
            ValueError: if no block had an attention that is known.
        """
        if in_backward():
            return
        self.is_open = False
        self.parts.clear()
        if not self.attended:
            raise ValueError(
                f"context_parallel_size: no block up to {block} has called transformers' attention interface or"
                " F.scaled_dot_product_attention, so their tokens have seen a rank's own tokens alone; leave it at 1"
                " for this model."
            )

    def fork_random(self, device: torch.device) -> None:
        """Draw each rank's own random numbers from here on: its tokens, and its heads, are not those of the others."""
        self._random = Forked(self.mesh.cp_rank, device)

    def join_random(self) -> None:
        """Draw the same numbers on all ranks again."""
        if self._random is not None:
            self._random.join()
            self._random = None


def apply_context(model: nn.Module, blocks: tuple[str, ...], mesh: Mesh) -> Context:
    """Split tokens before the first of ``blocks`` and gather them behind the last.

    Args:
        model: the model, its layers already sharded.
        blocks: the paths of its blocks.
        mesh: this process's place.

    Returns:
        what is known of a forward pass; its ``seen`` is to be cleared between steps.
    """
    context = Context(mesh, blocks)
    for path in blocks:
        block = model.get_submodule(path)
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        block.register_forward_pre_hook(partial(_enter, context, path, names), with_kwargs=True)
        # before a user's own hooks on it, which read hidden states
        block.register_forward_hook(partial(_leave, context, path), prepend=True, always_call=True)
        for inner in block.modules():
            if inner is not block and not _is_layer(inner):
                inner.register_forward_pre_hook(partial(_enter_again, context, path))
                inner.register_forward_hook(partial(_leave_again, path), always_call=True)
    around = model.get_submodule(blocks[0].rpartition(".")[0].rpartition(".")[0])

    around.register_forward_pre_hook(partial(_begin, context), prepend=True)
    around.register_forward_hook(partial(_end, context), always_call=True)
    return context


def _begin(context: Context, *_: Any) -> None:
    """The module around the blocks is called."""
    if not in_backward():
        context.records, context.is_open, context.split = torch.is_grad_enabled(), False, None


def _end(context: Context, around: nn.Module, args: Any, output: Any) -> None:
    context.records = None
    was_open, context.is_open = context.is_open, False
    if context.split is None or output is None:
        return
    _refuse_collected(output)
    if was_open:
        raise ValueError(
            f"context_parallel_size: {context.blocks[-1]}, the last block, was not called behind {context.blocks[0]},"
            " so tokens stayed split; leave it at 1 for this model."
        )


def _refuse_collected(output: Any) -> None:
    for name in _COLLECTED:
        found = getattr(output, name, None)
        if found is not None and any(value is not None for value in found):
            raise ValueError(
                f"context_parallel_size: {name} are collected inside of the blocks, where they are of a rank's own"
                f" tokens; turn output_{name} off in training steps, or leave context_parallel_size at 1."
            )


def _enter(
    context: Context, path: str, names: list[str], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if len(args) == 1 and isinstance(args[0], (tuple, list)):  # modules in an nn.Sequential pass them on like this
        given, packed = tuple(args[0]), type(args[0])
    else:
        given, packed = args, None
    named = [*((name, value) for name, value in zip((*names, *[""] * len(given)), given)), *kwargs.items()]
    x = next((value for _, value in named if _is_hidden(value)), None)
    if x is None:
        raise ValueError(
            f"context_parallel_size: {path} is given no hidden states [batch, tokens, features]; leave it at 1 for this"
            " model."
        )
    first = path == context.blocks[0]
    split = context.begin(x) if first else context.of(x, path)
    for _, value in named:
        if split is None and getattr(value, _SPLIT, None) is True:
            raise ValueError(
                "context_parallel_size: this cache was filled in a training step, where each rank has its own tokens"
                " alone; evaluate and generate with a new one."
            )
        if split is not None and hasattr(value, "get_seq_length"):
            setattr(value, _SPLIT, True)
    if split is None:
        enter(Active(path, None, owner=block))
        return None
    if first:
        context.fork_random(x.device)
    enter(Active(path, split, context.note_attention, owner=block))
    change = partial(_part, context, split, x, first)
    done = [_nested(value, partial(change, name)) for (name, _), value in zip(named, given)]
    changed = {name: _nested(value, partial(change, name)) for name, value in kwargs.items()}
    return ((packed(done),) if packed is not None else tuple(done)), changed


def _leave(context: Context, path: str, block: nn.Module, args: Any, output: Any) -> Any:
    active = leave(block)
    if active is None:
        return output
    if output is not None and (active.split is None or path != context.blocks[-1]):
        output = _nested(output, lambda x: _again(x, context, active.split))
    if active.split is None:
        return output
    if path == (context.blocks[0] if in_backward() else context.blocks[-1]):
        context.join_random()
    if path != context.blocks[-1]:
        return output
    if output is None:  # it raised, as a recompute does that has all it needs
        return None
    split = active.split
    context.end(path)
    listed = list(output) if isinstance(output, (tuple, list)) else [output]
    x = next((value for value in listed if _is_hidden(value)), None)
    if x is None or x.shape[1] != split.mine[1]:
        raise ValueError(
            f"context_parallel_size: {path}, the last block, puts out no hidden states [batch, tokens, features] of"
            " this rank; leave it at 1 for this model."
        )

    def joined(value: Tensor) -> Tensor:
        return _again(join_tokens(value, split), context, split) if value.shape == x.shape else value

    return _nested(output, joined)


def _enter_again(context: Context, path: str, inner: nn.Module, *_: Any) -> None:
    """A module inside of a block is called: maybe again, by a checkpoint inside of the block's forward."""
    active = under_way(path)
    if active is None and in_backward():
        active = Active(path, context.again, owner=inner)
        enter(active)
    if active is not None:
        active.depth += 1


def _leave_again(path: str, inner: nn.Module, *_: Any) -> None:
    active = under_way(path)
    if active is not None:
        active.depth -= 1
    leave(inner)


def _is_layer(module: nn.Module) -> bool:
    """Whether it is one of torch's without modules inside, which calls no attention."""
    return type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _nested(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        made = [_nested(one, change) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if type(value) is dict:
        return {name: _nested(one, change) for name, one in value.items()}
    return value


def _part(context: Context, split: Split, x: Tensor, first: bool, name: str, value: Tensor) -> Tensor:
    """What a block is given of an argument: this rank's tokens of it, or all."""
    if value is x and not first or isinstance(value, nn.Parameter):
        return value
    dim = _dim_of_tokens(split.length, x, name, value)
    if dim is None:
        return beside_tokens(value, split) if value.requires_grad else value
    known = next((part for full, part in context.parts if full is value), None)
    if known is not None and not in_backward():
        return known
    part = split_tokens(value, split, dim)
    setattr(part, FULL, value)
    if value is not x and not value.requires_grad and not in_backward():  # positions are the same for all blocks
        context.parts.append((value, part))
    return part


def _dim_of_tokens(length: int, x: Tensor, name: str, value: Tensor) -> Optional[int]:
    """The dim of an argument that counts all tokens, and of which a block is to have a rank's own."""
    if value is x:
        return 1
    if any(word in name for word in _OF_ALL_TOKENS):
        return None
    if "position" in name and value.ndim:
        dim = value.ndim - (1 if value.ndim == 1 or not (value.is_floating_point() or value.is_complex()) else 2)
        if value.shape[dim] == length:
            return dim
    if value.ndim == 3 and value.shape[1] == length and value.shape[0] == x.shape[0] and value.shape[2] == x.shape[2]:
        return 1
    dims = [dim for dim, size in enumerate(value.shape) if size == length]
    return dims[0] if len(dims) == 1 and value.ndim > 1 else None


class _Again(torch.autograd.Function):
    """Forward: what a block puts out, as it is. Backward: what is computed again from here on is this block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Context, split: Optional[Split]) -> Tensor:
        ctx.context, ctx.split = context, split
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        ctx.context.again = ctx.split
        return grads[0], None, None


def _again(x: Tensor, context: Context, split: Optional[Split]) -> Tensor:
    same: Tensor = _Again.apply(x, context, split) if x.requires_grad else x
    return same
