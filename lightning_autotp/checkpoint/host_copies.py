"""Copies of a checkpoint that nobody changes while it is written."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_Key = tuple[Any, ...]


class HostCopies:
    """Copies tensors to the host, into memory that is kept for the next time: to have it anew takes longer.

    Only one copy is good at a time: the next one overwrites it.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def of(self, value: Any, live: Any = None) -> Any:
        """``value`` with copies in place of what may change: tensors in dicts, lists and tuples, and all else.

        Tensors that are one stay one.

        Args:
            value: what to copy.
            live: what the run goes on with; tensors on the host that share no memory with it are not copied. By default
                ``value``.
        """
        changing = {t.untyped_storage().data_ptr() for t in _tensors(value if live is None else live)}
        before, self._kept = self._kept, []
        made: dict[_Key, Tensor] = {}

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return of_tensor(value.detach())
            if type(value) is dict:
                return {key: copied(of_key) for key, of_key in value.items()}
            if type(value) in (list, tuple):
                return type(value)(copied(entry) for entry in value)
            return copy.deepcopy(value)

        def of_tensor(tensor: Tensor) -> Tensor:
            if type(tensor) is not Tensor or tensor.layout is not torch.strided:
                return tensor.clone().cpu()
            storage = tensor.untyped_storage().data_ptr()
            if tensor.device.type == "cpu" and storage not in changing:
                return tensor
            key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key not in made:
                own = before.pop(0) if before else None
                if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
                    own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._kept.append(own)
                made[key] = own.copy_(tensor, non_blocking=True)
            return made[key]

        result = copied(value)
        for device in {key[0] for key in made if key[0].type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
            yield value
    elif isinstance(value, dict):
        for of_key in value.values():
            yield from _tensors(of_key)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
