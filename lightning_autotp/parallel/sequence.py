"""Gathers and scatters of tokens at the edges of cut modules, for sequence parallelism.

A rank's tokens are ``[1, T_r, H]``: its contiguous part of all ``T = B * S`` of them, padded at the end so that every
rank has ``T_r = ceil(T / tp)``. Padding never reaches a loss, and its gradient is zero.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import _functional_collectives as functional

from lightning_autotp.mesh import Mesh
from lightning_autotp.parallel.collectives import all_gather
from lightning_autotp.plan import Region, SequencePlan

_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # renamed as all-gather's was


class Batch:
    """How many sequences of which length the tokens of the forward pass under way are.

    Where calls bring positions, these tell the length; elsewhere what the first block saw does. A checkpointed block is
    computed again in the backward pass, maybe after the forward pass of another batch: then only one shape may have
    been seen since the last step.
    """

    def __init__(self) -> None:
        self.length = 0
        self.seen: set[int] = set()

    def begin(self, length: int) -> None:
        """A forward pass over sequences of ``length`` begins."""
        self.length = length
        self.seen.add(length)

    def of(self, kwargs: dict[str, Any]) -> int:
        """The length of the sequences that a call with these arguments works on.

        Raises:
            ValueError: if that cannot be known for certain.
        """
        embeddings, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        first = embeddings[0] if isinstance(embeddings, (tuple, list)) and embeddings else embeddings
        if isinstance(first, Tensor):
            return first.shape[-2]
        if isinstance(positions, Tensor):
            return positions.shape[-1]
        if len(self.seen) > 1 and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "sequence_parallel: blocks of this model are not told of positions, and with activation checkpointing"
                f" the batches of one optimizer step must have one length, not {sorted(self.seen)}; pad them."
            )
        return self.length


def apply_sequence(model: nn.Module, sequence: SequencePlan, mesh: Mesh, whole_routing: bool) -> Batch:
    """Attach the gathers and scatters of ``sequence`` to the modules of a sharded ``model``.

    Args:
        model: the model, its layers already converted.
        sequence: where its blocks and regions are.
        mesh: this process's place.
        whole_routing: refuse batches that need padding, which a router would count as tokens.

    Returns:
        what is remembered of a batch; its ``seen`` is to be cleared between steps.
    """
    batch = Batch()

    def split(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def part(x: Tensor) -> Tensor:
            if x.ndim != 3:
                raise ValueError(
                    f"sequence_parallel: blocks that take hidden states {list(x.shape)}, not [batch, tokens, features],"
                    " are not known; leave it off for this model."
                )
            if whole_routing and x.shape[0] * x.shape[1] % mesh.tp_size:
                raise ValueError(
                    f"sequence_parallel: a batch of {x.shape[0]} x {x.shape[1]} tokens does not divide among"
                    f" {mesh.tp_size} ranks, and the routers of experts must not see padding; pad the batch."
                )
            if -(x.shape[0] * x.shape[1]) % mesh.tp_size >= x.shape[1]:
                raise ValueError(
                    f"sequence_parallel: {x.shape[0]} sequences of {x.shape[1]} tokens are too short to be told from"
                    f" the padding for {mesh.tp_size} ranks; use longer ones."
                )
            batch.begin(x.shape[1])
            return scatter_tokens(x, mesh, reduce=False)

        return _on_hidden(args, kwargs, part)

    def join(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        length = batch.of(kwargs)
        return _on_first(output, lambda x: _as_sequences(gather_tokens(x, mesh, reduce=False), length))

    model.get_submodule(sequence.first).register_forward_pre_hook(split, with_kwargs=True)
    for region in sequence.regions:
        _attach(model.get_submodule(region.module), region, batch, mesh)
    model.get_submodule(sequence.last).register_forward_hook(join, with_kwargs=True)
    return batch


def _attach(module: nn.Module, region: Region, batch: Batch, mesh: Mesh) -> None:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def gathered(x: Tensor) -> Tensor:
            if x.ndim != 3 or x.shape[0] != 1:
                raise ValueError(
                    f"sequence_parallel: {region.module} is given {list(x.shape)}, which is not this rank's tokens of"
                    " the hidden states; leave it off for this model."
                )
            tokens = gather_tokens(x, mesh, reduce=region.reduces)
            return _as_sequences(tokens, batch.of(kwargs)) if region.mixes else tokens

        return _on_hidden(args, kwargs, gathered)

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _on_first(output, lambda x: scatter_tokens(x, mesh, reduce=False))

    module.register_forward_pre_hook(enter, with_kwargs=True)
    if not region.reduces:
        module.register_forward_hook(leave)


def _on_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the hidden states changed: the first of them, or the one of that name."""
    if args and isinstance(args[0], Tensor):
        return (change(args[0]), *args[1:]), kwargs
    for name in ("hidden_states", "x"):
        if isinstance(kwargs.get(name), Tensor):
            return args, kwargs | {name: change(kwargs[name])}
    raise ValueError("sequence_parallel: a block is called without hidden states as its first argument.")


def _on_first(output: Any, change: Any) -> Any:
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


def _as_sequences(tokens: Tensor, length: int) -> Tensor:
    """``[1, T, H]`` as ``[B, S, H]``, padding dropped."""
    rows = tokens.shape[1] // length
    return tokens[0, : rows * length].view(rows, length, tokens.shape[-1])


class _GatherTokens(torch.autograd.Function):
    """Forward: all-gather ``[1, T_r, H]`` -> ``[1, T, H]``. Backward: reduce-scatter of partial gradients, or part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, reduce: bool) -> Tensor:
        ctx.mesh, ctx.reduce = mesh, reduce
        return _gathered(x, mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return _part(grads[0][0], ctx.mesh, ctx.reduce), None, None


class _ScatterTokens(torch.autograd.Function):
    """Forward: reduce-scatter of partial sums ``[T, H]`` -> ``[1, T_r, H]``, or a part. Backward: all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, reduce: bool) -> Tensor:
        ctx.mesh, ctx.tokens = mesh, x.shape[0]
        padding = -x.shape[0] % mesh.tp_size
        if padding:
            x = torch.cat([x, x.new_zeros(padding, x.shape[1])])
        return _part(x, mesh, reduce)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return _gathered(grads[0], ctx.mesh)[0, : ctx.tokens], None, None


def _gathered(x: Tensor, mesh: Mesh) -> Tensor:
    """``[1, T_r, H]`` of every rank as ``[1, T, H]``; no view, so that what follows may change it in place."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return functional.wait_tensor(functional.all_gather_tensor(x[0], 0, mesh.tp_group))[None]
    gathered = x.new_empty(1, mesh.tp_size * x.shape[1], x.shape[2])
    all_gather(gathered[0], x[0], group=mesh.tp_group)
    return gathered


def _part(x: Tensor, mesh: Mesh, reduce: bool) -> Tensor:
    """This rank's rows ``[1, T_r, H]`` of ``[T, H]``, summed over the ranks if they are partial; no view."""
    rows = x.shape[0] // mesh.tp_size
    if not reduce:
        return x[None, mesh.tp_rank * rows : (mesh.tp_rank + 1) * rows].clone()
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return functional.wait_tensor(functional.reduce_scatter_tensor(x, "sum", 0, mesh.tp_group))[None]
    part = x.new_empty(1, rows, *x.shape[1:])
    _reduce_scatter(part[0], x, group=mesh.tp_group)
    return part


def gather_tokens(x: Tensor, mesh: Mesh, *, reduce: bool) -> Tensor:
    """All tokens ``[1, T, H]`` (padding included) from every rank's own ``[1, T_r, H]``.

    With ``reduce`` what reads them sees one rank's features, and its gradients are summed as they are scattered;
    without, it does the same on every rank.
    """
    gathered: Tensor = _GatherTokens.apply(x, mesh, reduce)
    return gathered


def scatter_tokens(x: Tensor, mesh: Mesh, *, reduce: bool) -> Tensor:
    """This rank's own tokens ``[1, T_r, H]`` of all, ``[..., H]``; with ``reduce`` of the sum over the ranks."""
    part: Tensor = _ScatterTokens.apply(x.reshape(-1, x.shape[-1]), mesh, reduce)
    return part
