"""Gathers and scatters of tokens at the edges of blocks and of their regions, for sequence parallelism.

A rank's tokens are ``[1, T_r, H]``: its contiguous part of all ``T = B * S`` of them, padded at the end so that every
rank has ``T_r = ceil(T / tp)``. A region is given ``[B, S, H]`` without padding, which never reaches a loss either.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.compat import in_backward
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.once_differentiable import once_differentiable
from lightning_autotp.parallel.overlap import Overlap, as_sequences
from lightning_autotp.plans.plan import Region, SequencePlan

_SHAPE, _SIDE, _FULL = "_autotp_sequences", "_autotp_side", "_autotp_full"
"""Attributes of tensors: what sequences its tokens are; a rank's own part of a side input; all tokens, gathered."""

_OF_SEQUENCES = ("attention_mask", "position_ids", "position_embeddings")
"""Arguments of blocks that only attention reads, which is given whole sequences."""

Shape = tuple[int, int]
"""How many sequences of which length."""


class Batch:
    """How many sequences of which length the tokens of the forward pass under way are.

    A checkpointed block is computed again in the backward pass, maybe after the forward pass of another batch. Then it
    is the one batch since the last step that had as many tokens; of several, the one that the same tensor was of, or
    that positions among the arguments tell, of the call itself or of one in its block before.
    """

    def __init__(self) -> None:
        self.count = self.length = 0
        self.seen: set[Shape] = set()
        self.again = ""
        """The block that was last computed again."""

    def tokens(self) -> int:
        """How many tokens the forward pass under way has."""
        return self.count * self.length

    def begin(self, rows: int, length: int, path: str) -> None:
        """The first block, at ``path``, is called with ``rows`` sequences of ``length``."""
        self.count, self.length = rows, length
        self.seen.add((rows, length))
        if not torch.compiler.is_compiling():
            self.again = path if in_backward() else ""

    def block(self, x: Tensor, kwargs: Mapping[str, Any], ranks: int, path: str) -> None:
        """The block at ``path`` is called with a rank's own tokens ``x``."""
        if torch.compiler.is_compiling():
            self.length = _told(kwargs) or self.length
            return
        self.of(x, kwargs, ranks, path)

    def of(self, x: Tensor, kwargs: Mapping[str, Any], ranks: int, block: str) -> Shape:
        """What sequences the tokens of a call are.

        Args:
            x: a rank's own tokens.
            kwargs: the other arguments.
            ranks: how many have some.
            block: the path of the block that the call is in.

        Raises:
            ValueError: if that cannot be known for certain.
        """
        told = _told(kwargs)
        if torch.compiler.is_compiling():
            # maybe again, after another batch: then rows are all that tokens fill
            length = told or self.length
            known = part_of(self.count, length, ranks) == x.shape[1]
            return self.count if known else ranks * x.shape[1] // length, length
        if not in_backward():
            setattr(x, _SHAPE, (self.count, self.length))
            return self.count, self.length
        marked: Optional[Shape] = getattr(x, _SHAPE, None)
        fits = [shape for shape in self.seen if part_of(*shape, ranks) == x.shape[1]]
        fits = [shape for shape in fits if shape[1] == told] or fits
        if marked is not None or len(fits) == 1:
            self.count, self.length = marked or fits[0]
            self.again = block
        elif fits and self.again != block:
            raise ValueError(
                "sequence_parallel: blocks of this model are not told of positions, and with activation checkpointing"
                " the batches of one optimizer step that have as many tokens must be of one shape, not"
                f" {' and '.join(f'{rows} x {length}' for rows, length in sorted(fits))}; pad them, or checkpoint with"
                " use_reentrant=False."
            )
        return self.count, self.length


def _told(kwargs: Mapping[str, Any]) -> Optional[int]:
    """The length of sequences that positions among arguments tell."""
    embeddings, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    first = embeddings[0] if isinstance(embeddings, (tuple, list)) and embeddings else embeddings
    if isinstance(first, Tensor):
        return first.shape[-2]
    return positions.shape[-1] if isinstance(positions, Tensor) else None


def part_of(rows: int, length: int, ranks: int) -> int:
    """How many tokens each rank has of ``rows`` sequences of ``length``, padding included."""
    return -(-rows * length // ranks)


def apply_sequence(model: nn.Module, sequence: SequencePlan, columns: Mapping[str, str], overlap: Overlap) -> Batch:
    """Attach the gathers and scatters of ``sequence`` to the modules of a sharded ``model``.

    Args:
        model: the model, its layers already converted.
        sequence: where its blocks and regions are.
        columns: by region, the name of one of the columns in it, where they are one group that can gather its input.
        overlap: how gathers and scatters run beside matmuls.

    Returns:
        what is remembered of a batch; its ``seen`` is to be cleared between steps.
    """
    batch = Batch()
    for path in sequence.blocks:
        _attach_block(model.get_submodule(path), path, path == sequence.blocks[0], batch, overlap.mesh)
    for region in {id(model.get_submodule(region.module)): region for region in sequence.regions}.values():
        _attach(model.get_submodule(region.module), region, columns.get(region.module), batch, overlap)

    def join(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = next((value for value in _listed(output) if _is_hidden(value)), None)
        if x is None or x.shape[0] != 1:
            raise ValueError(
                f"sequence_parallel: {sequence.blocks[-1]}, the last block, puts out no hidden states [1, tokens,"
                " features] of this rank; leave it off for this model."
            )
        rows, length = batch.of(x, kwargs, overlap.mesh.tp_size, sequence.blocks[-1])

        def gathered(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.shape != x.shape:
                return value
            return gather_tokens(value, overlap, reduce=False, length=length, rows=rows)

        return _on_each(output, gathered)

    # before a user's own hooks on it, which read hidden states
    model.get_submodule(sequence.blocks[-1]).register_forward_hook(join, with_kwargs=True, prepend=True)
    return batch


def _attach_block(module: nn.Module, path: str, is_first: bool, batch: Batch, mesh: Mesh) -> None:
    names = list(inspect.signature(type(module).forward).parameters)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _Arguments(args, kwargs, names)
        x = next((value for _, value in given.tensors if value.is_floating_point()), None)
        if x is None or not _is_hidden(x):
            shape = "none" if x is None else list(x.shape)
            raise ValueError(
                f"sequence_parallel: blocks that take hidden states {shape}, not [batch, tokens, features], are not"
                " known; leave it off for this model."
            )
        if is_first:
            batch.begin(x.shape[0], x.shape[1], path)
        elif x.shape[0] != 1 or _is_other(x, batch, mesh):
            raise ValueError(
                f"sequence_parallel: {path} is given {list(x.shape)}, which is not this rank's tokens of the hidden"
                " states: blocks must be called in the order of their list; leave it off for this model."
            )
        else:
            batch.block(x, kwargs, mesh.tp_size, path)

        def part(name: str, value: Tensor) -> Tensor:
            if value is x:
                return scatter_tokens(x, mesh) if is_first else x
            beside = value.ndim == 3 and value.shape[:2] == (batch.count, batch.length)
            if not beside or not value.is_floating_point() or name in _OF_SEQUENCES or isinstance(value, nn.Parameter):
                return value
            own = scatter_tokens(value, mesh)
            setattr(own, _SIDE, True)
            return own

        return given.changed(part)

    module.register_forward_pre_hook(enter, with_kwargs=True)


def _is_other(x: Tensor, batch: Batch, mesh: Mesh) -> bool:
    """Whether ``x`` has another number of tokens than a rank has in the forward pass under way."""
    if torch.compiler.is_compiling() or in_backward():
        return False
    return x.shape[1] != part_of(batch.count, batch.length, mesh.tp_size)


def _second_of(first: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Optional[Tensor]:
    return next((second for own, second in pairs if own is first), None)


def _attach(module: nn.Module, region: Region, columns: Optional[str], batch: Batch, overlap: Overlap) -> None:
    names = list(inspect.signature(type(module).forward).parameters)

    def enter(entered: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _Arguments(args, kwargs, names)
        hidden = [value for _, value in given.tensors if _is_hidden(value)]
        x = next((value for value in hidden if value.shape[0] == 1 and not _is_other(value, batch, overlap.mesh)), None)
        if x is None and not region.sharded:
            return None  # it is called with something else
        if x is None:
            shapes = ", ".join(str(list(value.shape)) for _, value in given.tensors) or "no tensor"
            raise ValueError(
                f"sequence_parallel: {region.module} is given {shapes}, which is not this rank's tokens of the hidden"
                " states; leave it off for this model."
            )
        rows, length = batch.of(x, kwargs, overlap.mesh.tp_size, region.block)
        done: list[tuple[Tensor, Tensor]] = []  # not by id(), which Dynamo does not follow

        def gathered(name: str, value: Tensor) -> Tensor:
            if not hasattr(value, _SIDE):
                if region.reduces and _second_of(x, done) is not None:  # what is added to its output is this rank's own
                    return value
                alike = value.shape == x.shape and not region.reduces and name not in _OF_SEQUENCES
                if value is not x and (not alike or isinstance(value, nn.Parameter)):
                    return value
            full = _second_of(value, done)
            if full is not None:
                return full
            if value is x and columns is not None:  # through the module, which may be a copy of the sharded one
                group: Any = entered.get_submodule(columns).group
                full = group.gather(x, overlap, length, rows)
            if full is None:
                full = gather_tokens(value, overlap, reduce=region.reduces, length=length, rows=rows)
            done.append((value, full))
            return full

        changed = given.changed(gathered)
        if not region.reduces:
            setattr(_second_of(x, done), _FULL, True)
        return changed

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entered = [value for _, value in _Arguments(args, kwargs, names).tensors if hasattr(value, _FULL)]
        if not entered:
            return output
        shape, first = entered[0].shape, next(iter(_listed(output)), None)

        def part(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            tokens = shape[:2].numel() if value is first else None
            of_tokens = value.shape == shape or value.shape[:-1].numel() == tokens
            return scatter_tokens(value, overlap.mesh) if of_tokens else value

        return _on_each(output, part)

    module.register_forward_pre_hook(enter, with_kwargs=True)
    if not region.reduces:
        module.register_forward_hook(leave, with_kwargs=True)


class _Arguments:
    """The tensors that a module is called with, in the order of its forward's arguments.

    A tuple in the first place holds arguments, too: modules in an ``nn.Sequential`` pass them on like this.

    Args:
        args: by position.
        kwargs: by name.
        names: of its forward's arguments.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> None:
        self.args, self.kwargs = args, kwargs
        self.packed = len(args) > 0 and isinstance(args[0], (tuple, list))
        positional = [*args[0], *args[1:]] if self.packed else list(args)
        named = [name for name in names if name in kwargs] + [name for name in kwargs if name not in names]
        every = [("", value) for value in positional] + [(name, kwargs[name]) for name in named]
        self.tensors: list[tuple[str, Tensor]] = [pair for pair in every if isinstance(pair[1], Tensor)]

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, of which each tensor and its name, if it is called by name, went through ``change``."""

        def new(name: str, value: Any) -> Any:
            return change(name, value) if isinstance(value, Tensor) else value

        args = [
            _on_each(value, lambda one: new("", one)) if self.packed and at == 0 else new("", value)
            for at, value in enumerate(self.args)
        ]
        return tuple(args), {name: new(name, value) for name, value in self.kwargs.items()}


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _listed(output: Any) -> list[Any]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _on_each(output: Any, change: Callable[[Any], Any]) -> Any:
    """``output`` changed, or each entry of a tuple or list."""
    if isinstance(output, (tuple, list)):
        changed = [change(value) for value in output]
        return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)
    return change(output)


class _GatherTokens(torch.autograd.Function):
    """Forward: all-gather ``[1, T_r, H]`` -> ``[B, S, H]``. Backward: reduce-scatter of partial gradients, or part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, overlap: Overlap, reduce: bool, length: int, rows: int) -> Tensor:
        full = overlap.mesh.collectives.all_gather(x[0].contiguous())
        ctx.overlap, ctx.reduce = overlap, reduce
        sequences = as_sequences(full, length, rows)
        ctx.padding = full.shape[0] - sequences.shape[:2].numel()
        return sequences

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


def gather_tokens(x: Tensor, overlap: Overlap, *, reduce: bool, length: int, rows: int) -> Tensor:
    """All tokens ``[B, S, H]``, B being ``rows`` and S ``length``, from every rank's own ``[1, T_r, H]``.

    Padding is dropped.

    With ``reduce`` what reads them sees one rank's features, and its gradients are summed as they are scattered;
    without, it does the same on every rank.
    """
    gathered: Tensor = _GatherTokens.apply(x, overlap, reduce, length, rows)
    return gathered


def scatter_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's own tokens ``[1, T_r, H]`` of all, ``[..., H]``, which every rank has alike."""
    part: Tensor = _ScatterTokens.apply(x, mesh)
    return part
