"""What a step allocates and computes, seen op by op.

Works on real and on fake tensors alike: it looks at the storages that ops make and at when these are freed.
"""

import weakref
from collections.abc import Iterable
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.compat import (
    CPU_FLASH_ATTENTION,
    CPU_FLASH_ATTENTION_BACKWARD,
    TorchDispatchMode,
    flop_registry,
    tree_iter,
)
from lightning_autotp.estimation.trace import Attention, Event, Trace, Work

_ROUNDED_TO = 512
"""Bytes: what torch's CUDA allocator rounds every tensor up to."""

_aten = torch.ops.aten

_MATMULS = {
    **dict.fromkeys(("aten.mm", "aten.bmm", "aten._grouped_mm", "transformers.grouped_mm_fallback"), 0),
    **dict.fromkeys(("aten.addmm", "aten.addmm_", "aten.baddbmm"), 1),
}
"""Matrix products by name (transformers' own is registered as it is first used): which argument is the first matrix."""

_ATTENTION = {
    CPU_FLASH_ATTENTION: (0, 4, 1.0),
    CPU_FLASH_ATTENTION_BACKWARD: (1, 7, 2.5),
}
"""Attention kernels: which arguments are the query (key and value follow) and ``is_causal``, and how many times the
forward pass's operations they do (backward: five products instead of two)."""

_UNWRITTEN = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}

_LOOKUPS = {_aten.embedding, _aten.index, _aten.gather}
"""Ops that read no more of their first input than they write."""


class StepTracker(TorchDispatchMode):
    """Inside, notes what ops allocate besides ``known``, and what they compute.

    Args:
        model: its gradients are told from other memory as they arrive.
        known: tensors that are there before the step, and are not counted: parameters, buffers, the batch.

    Attributes:
        forward: what happened in the forward pass.
        backward: what happened in the backward pass.
        attention: the attention kernels of the forward pass.
    """

    def __init__(self, model: nn.Module, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.forward: list[Event] = []
        self.backward: list[Event] = []
        self.attention: list[Attention] = []
        self._model = model
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._others: dict[int, int] = {}
        self._gradients: dict[int, int] = {}
        self._alive = self._alive_gradients = 0
        self._in_backward = False
        self._hooks: list[Any] = []

    def __enter__(self) -> "StepTracker":
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._has_gradient))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    @property
    def trace(self) -> Trace:
        """All that was noted."""
        return Trace(tuple(self.forward), tuple(self.backward), tuple(self.attention))

    def begin_backward(self) -> None:
        """The forward pass is done."""
        self._in_backward = True
        self._note("backward")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_iter(output) if isinstance(leaf, Tensor)]
        if outputs:
            new = [self._allocated(tensor) for tensor in outputs]
            made = any(new)
            packet = func.overloadpacket
            works = (made or func._schema.is_mutable) and packet not in _UNWRITTEN
            if made or works:
                self._note(str(packet), _work(packet, args, kwargs, output, outputs) if works else None)
            if packet is CPU_FLASH_ATTENTION and not self._in_backward:
                query, key, value = args[:3]
                sizes = (tensor.numel() * tensor.element_size() for tensor in (query, key, value, outputs[0]))
                self.attention.append(Attention(query.shape[1], key.shape[1], *sizes))
        return output

    def _allocated(self, tensor: Tensor) -> bool:
        """Whether the storage of ``tensor`` is new; then it is counted until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._others or key in self._gradients:
            return False
        self._others[key] = size = -(-storage.nbytes() // _ROUNDED_TO) * _ROUNDED_TO
        self._alive += size
        weakref.finalize(storage, self._freed, key)
        return True

    def _freed(self, key: int) -> None:
        self._alive -= self._others.pop(key, 0)
        self._alive_gradients -= self._gradients.pop(key, 0)

    def _has_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key in self._others:
            self._gradients[key] = size = self._others.pop(key)
            self._alive -= size
            self._alive_gradients += size
            self._note("gradient")

    def _note(self, name: str, work: Optional[Work] = None) -> None:
        events = self.backward if self._in_backward else self.forward
        events.append(Event(name, work, self._alive, self._alive_gradients))


def _work(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, outputs: list[Tensor]) -> Work:
    read = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    written = sum(map(_bytes, outputs))
    if packet in _LOOKUPS:
        return Work(0, 2 * written + sum(map(_bytes, read[1:])), False)
    flops = _flops(packet, args, kwargs, output)
    return Work(flops, written + sum(map(_bytes, read)), flops > 0 and read[0].dtype == torch.float32)


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    name = str(packet)
    if name in _MATMULS:
        return 2 * args[_MATMULS[name]].numel() * output.shape[-1]
    if name == "transformers.grouped_mm_fallback_backward":
        return 4 * args[0].numel() * args[3].shape[-1]
    if packet in _ATTENTION:
        first, causal, times = _ATTENTION[packet]
        query, key, value = args[first : first + 3]
        full = 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return int(full * times) // (2 if len(args) > causal and args[causal] else 1)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=output))
    return 0


def _bytes(tensor: Tensor) -> int:
    """Of the elements that lie in memory: an expanded dim is there once."""
    there = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride or not size]
    return prod(there) * tensor.element_size()
