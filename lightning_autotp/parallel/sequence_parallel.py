"""Gathers and scatters of tokens at the edges of cut modules, for sequence parallelism.

A rank's tokens are ``[1, T_r, H]``: its contiguous part of all ``T = B * S`` of them, padded at the end so that every
rank has ``T_r = ceil(T / tp)``. Padding never reaches a loss, and its gradient is zero.
"""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.compat import in_backward
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.once_differentiable import once_differentiable
from lightning_autotp.parallel.overlap import Overlap, as_sequences
from lightning_autotp.plans.plan import Region, SequencePlan


class Batch:
    """How many sequences of which length the tokens of the forward pass under way are.

    Where calls bring positions, these tell the length; elsewhere what the first block saw does. A checkpointed block is
    computed again in the backward pass, maybe after the forward pass of another batch: then only one shape may have
    been seen since the last step.
    """

    def __init__(self) -> None:
        self.count = self.length = 0
        self.seen: set[int] = set()

    def begin(self, rows: int, length: int) -> None:
        """A forward pass over ``rows`` sequences of ``length`` begins."""
        self.count, self.length = rows, length
        self.seen.add(length)

    @property
    def rows(self) -> Optional[int]:
        """How many sequences there are, where no block is computed again: while gradients are recorded, None."""
        return None if torch.is_grad_enabled() else self.count

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
        if len(self.seen) > 1 and in_backward():
            raise ValueError(
                "sequence_parallel: blocks of this model are not told of positions, and with activation checkpointing"
                f" the batches of one optimizer step must have one length, not {sorted(self.seen)}; pad them."
            )
        return self.length


_OF_SEQUENCES = ("attention_mask", "position_ids", "position_embeddings")
"""Arguments of blocks that only attention reads, which is given whole sequences."""


def apply_sequence(
    model: nn.Module, sequence: SequencePlan, columns: Mapping[str, str], overlap: Overlap, whole_routing: bool
) -> Batch:
    """Attach the gathers and scatters of ``sequence`` to the modules of a sharded ``model``.

    Args:
        model: the model, its layers already converted.
        sequence: where its blocks and regions are.
        columns: by region, the name of one of the columns in it, where they are one group that can gather its input.
        overlap: how gathers and scatters run beside matmuls.
        whole_routing: refuse batches that need padding, which a router would count as tokens.

    Returns:
        what is remembered of a batch; its ``seen`` is to be cleared between steps.
    """
    batch, mesh = Batch(), overlap.mesh

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
            if torch.is_grad_enabled() and -(x.shape[0] * x.shape[1]) % mesh.tp_size >= x.shape[1]:
                raise ValueError(
                    f"sequence_parallel: {x.shape[0]} sequences of {x.shape[1]} tokens are too short to be told from"
                    f" the padding for {mesh.tp_size} ranks; use longer ones."
                )
            _refuse_other_tokens(x, args, kwargs)
            batch.begin(x.shape[0], x.shape[1])
            return scatter_tokens(x, mesh)

        return on_hidden(args, kwargs, part)

    def join(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        length = batch.of(kwargs)
        return on_first(output, lambda x: gather_tokens(x, overlap, reduce=False, length=length, rows=batch.rows))

    model.get_submodule(sequence.first).register_forward_pre_hook(split, with_kwargs=True)
    for region in {id(model.get_submodule(region.module)): region for region in sequence.regions}.values():
        _attach(model.get_submodule(region.module), region, columns.get(region.module), batch, overlap)
    model.get_submodule(sequence.last).register_forward_hook(join, with_kwargs=True)
    return batch


def _refuse_other_tokens(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A block must be given no other features of all tokens than ``x [B, S, H]``: it has a rank's own only."""
    named = {f"argument {place}": value for place, value in enumerate(args)}
    named |= {f"`{name}`": value for name, value in kwargs.items() if name not in _OF_SEQUENCES}
    for name, value in named.items():
        if isinstance(value, Tensor) and value is not x and value.ndim > 2 and value.shape[:2] == x.shape[:2]:
            raise ValueError(
                f"sequence_parallel: blocks of this model are given {name} {list(value.shape)}, features of all tokens"
                " beside the hidden states, which is not known; leave it off for this model."
            )


def _attach(module: nn.Module, region: Region, columns: Optional[str], batch: Batch, overlap: Overlap) -> None:
    def enter(entered: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def gathered(x: Tensor) -> Tensor:
            if x.ndim != 3 or x.shape[0] != 1:
                raise ValueError(
                    f"sequence_parallel: {region.module} is given {list(x.shape)}, which is not this rank's tokens of"
                    " the hidden states; leave it off for this model."
                )
            length = batch.of(kwargs) if region.mixes else overlap.mesh.tp_size * x.shape[1]
            rows = batch.rows if region.mixes else 1  # all tokens as one sequence
            full = None
            if columns is not None:  # through the module, which may be a copy of the one that was sharded
                group: Any = entered.get_submodule(columns).group
                full = group.gather(x, overlap, length)
            return gather_tokens(x, overlap, reduce=region.reduces, length=length, rows=rows) if full is None else full

        return on_hidden(args, kwargs, gathered)

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return on_first(output, lambda x: scatter_tokens(x, overlap.mesh))

    module.register_forward_pre_hook(enter, with_kwargs=True)
    if not region.reduces:
        module.register_forward_hook(leave)


def on_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the hidden states changed: the first of them, or the one of that name."""
    if args and isinstance(args[0], Tensor):
        return (change(args[0]), *args[1:]), kwargs
    for name in ("hidden_states", "x"):
        if isinstance(kwargs.get(name), Tensor):
            return args, kwargs | {name: change(kwargs[name])}
    raise ValueError("sequence_parallel: a block is called without hidden states as its first argument.")


def on_first(output: Any, change: Any) -> Any:
    """An output with its first tensor changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


class _GatherTokens(torch.autograd.Function):
    """Forward: all-gather ``[1, T_r, H]`` -> ``[B, S, H]``. Backward: reduce-scatter of partial gradients, or part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, overlap: Overlap, reduce: bool, length: int, rows: Optional[int]) -> Tensor:
        full = overlap.mesh.collectives.all_gather(x[0].contiguous())
        ctx.overlap, ctx.reduce, ctx.padding = overlap, reduce, full.shape[0] % length
        return as_sequences(full, length, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        grad = _padded(grads[0].flatten(0, 1), ctx.padding)
        part = ctx.overlap.scatter(grad)() if ctx.reduce else _part(grad, ctx.overlap.mesh)
        return part[None], None, None, None, None


class _ScatterTokens(torch.autograd.Function):
    """Forward: a part ``[1, T_r, H]`` of ``[..., H]``, which all ranks share. Backward: all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh, ctx.shape = mesh, x.shape
        x = x.flatten(0, -2)
        part = _part(_padded(x, -x.shape[0] % mesh.tp_size), mesh)
        return as_sequences(part, part.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        full = ctx.mesh.collectives.all_gather(grads[0][0].contiguous())
        return full[: ctx.shape[:-1].numel()].view(ctx.shape), None


def _padded(x: Tensor, padding: int) -> Tensor:
    return torch.cat([x, x.new_zeros(padding, x.shape[1])]) if padding else x


def _part(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's rows ``[T_r, H]`` of ``[T, H]``; no view, so that what follows may change it in place."""
    rows = x.shape[0] // mesh.tp_size
    return x[mesh.tp_rank * rows : (mesh.tp_rank + 1) * rows].clone()


def gather_tokens(x: Tensor, overlap: Overlap, *, reduce: bool, length: int, rows: Optional[int]) -> Tensor:
    """All tokens ``[B, S, H]``, B being ``rows`` and S ``length``, from every rank's own ``[1, T_r, H]``.

    Padding is dropped; without ``rows`` it is what fills no sequence.

    With ``reduce`` what reads them sees one rank's features, and its gradients are summed as they are scattered;
    without, it does the same on every rank.
    """
    gathered: Tensor = _GatherTokens.apply(x, overlap, reduce, length, rows)
    return gathered


def scatter_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's own tokens ``[1, T_r, H]`` of all, ``[..., H]``, which every rank has alike."""
    part: Tensor = _ScatterTokens.apply(x, mesh)
    return part
