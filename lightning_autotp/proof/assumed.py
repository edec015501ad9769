"""Values that tensors on the meta device do not have: what is assumed where a program asks for them.

A branch on a value that is replicated goes the same way on every rank, whatever the value is: what is proved of the
branch that is traced holds where it is taken. That the tensor is replicated is for whoever follows placements to check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_MASKS = (torch.bool, torch.uint8)


def assumed_result(func: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
    """Call an operator, or make up what it would say of values; and whether it tells Python a tensor's value."""
    first = args[0] if args and isinstance(args[0], Tensor) else None
    if func is aten._local_scalar_dense.default and first is not None:
        return (_scalar(first) if first.is_meta else func(*args, **kwargs)), True
    if first is None or not first.is_meta:
        return func(*args, **kwargs), False
    if func is aten.equal.default:
        return True, True
    if func is aten.nonzero.default:  # as if all were true
        return first.new_empty((first.numel(), first.ndim), dtype=torch.long), True
    if func is aten.index.Tensor and any(index is not None and index.dtype in _MASKS for index in args[1]):
        return func(first, _all_true(args[1])), True
    if func is aten._to_copy.default and kwargs.get("device") is not None:
        return func(*args, **{**kwargs, "device": torch.device("meta")}), False
    return func(*args, **kwargs), False


def _scalar(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _all_true(indices: Any) -> list[Any]:
    found: list[Any] = []
    for index in indices:
        if index is not None and index.dtype in _MASKS:
            found += [index.new_empty((index.numel(),), dtype=torch.long) for _ in range(index.ndim)]
        else:
            found.append(index)
    return found
