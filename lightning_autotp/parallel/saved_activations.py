"""What activation checkpointing keeps of a forward pass, kept once: each tensor parallel rank its part.

A checkpointed block keeps its input ``[B, S, H]``, which all tensor parallel ranks share. Here a rank keeps
``ceil(B * S * H / tp)`` elements of it, and the parts are all-gathered when the backward pass computes the block again.

Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198), and
Megatron-LM's ``--distribute-saved-activations``.
"""

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Union

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_autotp.distributed.mesh import Mesh

_MARK = "_autotp_shared"
"""The attribute of what enters or leaves a block: where that was, and the version of the tensor then."""


@dataclass(frozen=True)
class _Part:
    """This rank's part ``[ceil(N / tp)]`` of a tensor of N elements, padded at the end."""

    part: Tensor
    shape: torch.Size


@dataclass(frozen=True)
class _Whole:
    """A tensor as it is. Autograd leaves it to hooks to see that nobody changed it in place."""

    tensor: Tensor
    version: int


class SavedActivations:
    """Shards the inputs that checkpointed blocks keep for the backward pass; gradients are the same bit for bit.

    A tensor is cut only if ``torch.utils.checkpoint`` saves it (reentrant or not), if it is the very object that
    entered or left one of ``blocks`` (whole on every rank: all cuts are opened and closed inside a block) and if nobody
    changed it since. Before the first one of each place is cut, ``compare`` sees it. Everything else stays as it is:
    what is between a column and a row cut is never touched. Where checkpointing is outside a block's call, the input
    of the first block in a list is known too late, and stays whole.

    The all-gathers are in the same order on all ranks: they all record the same graph, autograd runs it in one thread
    of each device in an order that the graph alone decides, and a checkpointed region unpacks its input once a backward
    pass. A second backward pass over a retained graph gathers again, on every rank.

    Args:
        blocks: the blocks, by path.
        mesh: this process's place.
        compare: is given the name of a place and what is there, and raises on all ranks unless it is the same on all.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], mesh: Mesh, compare: Callable[[str, Tensor], None]) -> None:
        self.mesh, self.compare = mesh, compare
        self._first, self._used = True, False
        self._handles = []
        for path, block in blocks.items():
            self._handles.append(block.register_forward_pre_hook(_entering(path)))
            self._handles.append(block.register_forward_hook(_leaving(path)))

    def remove(self) -> None:
        """Take the hooks off the blocks."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def step(self) -> Generator[None, None, None]:
        """Around the forward pass of a training step; warns after the first one if it had nothing to shard."""
        with saved_tensors_hooks(self._pack, self._unpack):
            yield
        first, self._first = self._first, False
        if first and not self._used:
            rank_zero_warn(
                "shard_saved_activations did nothing in the first training step, because no block was checkpointed in"
                " it. Turn checkpointing on (`model.gradient_checkpointing_enable()`, with the model in train mode, or"
                " torch.utils.checkpoint around each block), or leave `shard_saved_activations` off. In a model that"
                " torch.compile compiles with its checkpoints inside it does nothing, either."
            )

    def _pack(self, x: Tensor) -> Union[_Part, _Whole]:
        place, version = getattr(x, _MARK, ("", -1))
        known = version == x._version and x.is_floating_point() and x.is_contiguous()
        if not known or not _checkpointing():
            # not x itself: an op that saves its own output would then be part of a cycle that nothing frees
            return _Whole(x.detach(), x._version)
        self._used = True
        self.compare(place, x)
        flat = x.detach().view(-1)
        length = -(-flat.numel() // self.mesh.tp_size)
        part = flat[self.mesh.tp_rank * length : (self.mesh.tp_rank + 1) * length]
        padding = part.new_zeros(length - part.numel())
        return _Part(torch.cat([part, padding]), x.shape)  # never a view, which would keep all of x

    def _unpack(self, kept: Union[_Part, _Whole]) -> Tensor:
        if isinstance(kept, _Part):
            return self.mesh.collectives.all_gather(kept.part)[: kept.shape.numel()].view(kept.shape)
        if kept.tensor._version != kept.version:
            raise RuntimeError(
                f"a tensor {list(kept.tensor.shape)} that the backward pass needs was changed in place after the"
                f" forward pass saved it (it is at version {kept.tensor._version}, and was at {kept.version}); change"
                " a copy of it."
            )
        return kept.tensor


def _entering(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        _mark(args[0] if args else None, f"the input of {path}")

    return hook


def _leaving(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        _mark(output[0] if isinstance(output, tuple) else output, f"the output of {path}")

    return hook


def _mark(x: Any, place: str) -> None:
    # what torch.compile traces has no state of its own, and what inference mode makes has no version
    if isinstance(x, Tensor) and not torch.compiler.is_compiling() and not x.is_inference():
        setattr(x, _MARK, (place, x._version))


def _checkpointing() -> bool:
    """Whether it is ``torch.utils.checkpoint`` that saves a tensor now.

    It saves what it is given from its own code or through an autograd function that it calls; what layers save inside
    its regions never gets here. Other saves of a block's input are left alone: several of them would share one tensor,
    and each would be gathered for itself.
    """
    caller = sys._getframe(2)
    frames = (caller, caller.f_back)
    return any(frame and frame.f_globals.get("__name__") == "torch.utils.checkpoint" for frame in frames)
