"""A call of a function that draws random numbers, of which this rank has a part: what the unsharded model draws there.

The full tensor's numbers are drawn, as the unsharded run draws them, and the rank's own are taken. So the shared stream
goes on by as much on every rank, though their parts are of different sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_autotp.compat import tree_leaves, tree_map
from lightning_autotp.randomness.cut import OtherShapeError, Part, full_like
from lightning_autotp.randomness.functions import ATTENTION, FACTORIES

Order = Sequence[int]
FindPart = Callable[[Sequence[int]], Part]
"""The part of a full tensor that a rank has, by the shape of what it holds."""

LARGEST = 2**31
"""Numbers that are drawn at once at most; kernels count them in 32 bits."""


class NotDrawnError(Exception):
    """The unsharded model's numbers cannot be drawn here; says why."""


def draw(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], find: FindPart, order: Order) -> Any:
    """What ``func`` returns, with this rank's part of the numbers that the unsharded model draws.

    Args:
        func: a function of torch's, by its ``name``.
        name: its name.
        args: what it is called with.
        kwargs: the same, by name.
        find: the part of the drawn tensor.
        order: how its dims lie in memory in the unsharded model, the outermost first.

    Raises:
        NotDrawnError: if that is not possible.
    """
    try:
        if name == ATTENTION:
            return _attention(args, kwargs, find)
        if name in ("dropout", "dropout_"):
            return _dropout(name, args, kwargs, find, order)
        if name in FACTORIES and not any(isinstance(leaf, Tensor) for leaf in args):
            return _made(func, name, args, kwargs, find)
        return _embedded(func, name, args, kwargs, find, order)
    except OtherShapeError as error:
        raise NotDrawnError(str(error)) from None


def _part(find: FindPart, shape: Sequence[int]) -> Part:
    part = find(shape)
    if prod(part.full) >= LARGEST:
        raise NotDrawnError(f"{list(part.full)} are more numbers than are drawn at once")
    return part


def _dropout(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], find: FindPart, order: Order) -> Tensor:
    x: Tensor = args[0] if args else kwargs["input"]
    p: float = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    inplace = name == "dropout_" or kwargs.get("inplace", args[3] if len(args) > 3 else False)
    dropped = dropped_out(x, p, _part(find, x.shape), order)
    return x.copy_(dropped) if inplace else dropped


def dropped_out(x: Tensor, p: float, part: Part, order: Order) -> Tensor:
    """Dropout of this rank's part ``x`` of a tensor, with the full one's mask."""
    on_gpu = x.device.type == "cuda" and p < 1
    with torch.no_grad():
        ones = full_like(part, x, order, 1.0)
        drawn = torch.native_dropout(ones, p, True)[1] if on_gpu else F.dropout(ones, p)
        mask = part.take(drawn, x.shape).clone()  # no view, which would keep the full one
    if on_gpu:  # the kernel that scales in fp32, as fused dropout does
        scaled: Tensor = torch.ops.aten.native_dropout_backward(x.contiguous(), mask, 1 / (1 - p))
        return scaled
    return x * mask


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], find: FindPart) -> Tensor:
    """Attention by its definition, as torch computes it on the CPU where something is dropped."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args)), **kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    if query.device.type != "cpu":
        raise NotDrawnError("kernels of attention draw numbers of their own for the heads that they are given")
    dtype = query.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        query, key, value = (one.to(dtype).to(wide) for one in (query, key, value))
        if given.get("enable_gqa"):
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        scale = given.get("scale")
        root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
        weights = (query * root) @ (key * root).transpose(-2, -1)
        allowed = given.get("attn_mask")
        if given.get("is_causal"):
            allowed = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
        if allowed is not None:
            if allowed.dtype == torch.bool:
                weights = weights.masked_fill(~allowed, float("-inf"))
            else:
                weights = weights + allowed.to(wide)
        # rows in which nothing is allowed are zero
        weights = torch.where(weights.amax(-1, keepdim=True) == float("-inf"), 0.0, weights.softmax(-1))
        part = _part(find, weights.shape)
        dropped = dropped_out(weights, given["dropout_p"], part, range(weights.ndim))
        return (dropped @ value).to(dtype)


def _made(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], find: FindPart) -> Tensor:
    """What ``torch.rand`` and others draw of a size that is this rank's own."""
    given = [(at, value) for at, value in enumerate(args) if isinstance(value, (list, tuple))]
    first = 2 if name in ("randint", "normal") else 0
    if "size" in kwargs:
        part = _part(find, kwargs["size"])
        return part.take(func(*args, **{**kwargs, "size": part.full}), kwargs["size"])
    if given:
        at, shape = given[-1]
        part = _part(find, shape)
        return part.take(func(*args[:at], part.full, *args[at + 1 :], **kwargs), shape)
    if first or not args:
        raise NotDrawnError(f"{name}: its size is not found among its arguments")
    part = _part(find, args)
    return part.take(func(part.full, **kwargs), args)


def _embedded(
    func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], find: FindPart, order: Order
) -> Any:
    """The function of a full tensor that has this rank's part in its place; each entry is drawn by itself."""
    written: Optional[Tensor] = args[0] if name.endswith("_") or kwargs.get("inplace") else kwargs.get("out")
    parts: dict[tuple[int, ...], Part] = {}

    def whole(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        try:
            part = parts.setdefault(tuple(value.shape), _part(find, value.shape))
        except OtherShapeError:
            return value  # what every rank has alike
        return part.put(value, full_like(part, value, order, 0.0))

    full_args, full_kwargs = tree_map(whole, (list(args), dict(kwargs)))
    if not parts:
        raise NotDrawnError(f"{name}: no tensor among its arguments is a rank's part")
    out = func(*full_args, **full_kwargs)

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for shape, part in parts.items():
            if tuple(value.shape) == part.full:
                return part.take(value, shape).clone()
        raise NotDrawnError(f"{name}: what it returns is shaped otherwise than what it is given")

    made = tree_map(own, out)
    if written is None:
        return made
    if written.requires_grad and written.is_leaf:
        raise NotDrawnError(f"{name}: it writes into a parameter")
    return written.copy_(made)


def tensors_of(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a function is called with."""
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
