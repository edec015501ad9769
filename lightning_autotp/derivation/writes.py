"""What writes at places that indices say ask of atoms: the dim that is indexed is mixed, others stay."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from lightning_autotp.derivation.atoms import Ids


def scatter(call: Any) -> Optional[list[Optional[Ids]]]:
    """Write what stands at each place of an index."""
    index, source = call.given["index"], call.given.get("src")
    if call.labels(index) is not None:
        return None
    source = source if isinstance(source, Tensor) else None
    return _written(call, [index, *([] if source is None else [source])])


def index_add(call: Any) -> Optional[list[Optional[Ids]]]:
    """Write slices along a dim."""
    index, source = call.given["index"], call.given.get("source")
    if call.labels(index) is not None:
        return None
    return _written(call, [source] if isinstance(source, Tensor) and source.ndim else [])


def _written(call: Any, sources: list[Tensor]) -> Optional[list[Optional[Ids]]]:
    d, operands = call.dim(), []
    for t in (call.x, *sources):
        ids = call.labels(t)
        ids = None if ids is None else call.atoms.along(ids, d)
        operands.append((ids, t))
    for d_other in range(call.x.ndim):
        differs = any(ids is not None and ids.shape[d_other] > 1 for ids, _ in operands)
        if differs and len({t.shape[d_other] for _, t in operands}) > 1:
            return None
    shape = (*call.x.shape[:d], 1, *call.x.shape[d + 1 :])
    return [call.met(operands, shape)]


def index_put(call: Any) -> Optional[list[Optional[Ids]]]:
    """Write values at places of the first dims or of dims beside each other."""
    indices, values = call.given["indices"], call.given["values"]
    at = [d for d, index in enumerate(indices) if index is not None]
    together = bool(at) and at == list(range(at[0], at[-1] + 1))
    if not together or any(call.labels(indices[d]) is not None for d in at):
        return None
    masks = [indices[d] for d in at if indices[d].dtype == torch.bool]
    if masks and (len(at) > 1 or at[0]):
        return None
    wide = masks[0].ndim if masks else len(at)
    named = 1 if masks else max(indices[d].ndim for d in at)
    ids, held = call.labels(call.x), call.labels(values)
    for d in range(at[0], at[0] + wide):
        ids = None if ids is None else call.atoms.along(ids, d)
    more = call.x.ndim - wide + named - values.ndim
    if more < 0:
        return None
    if held is not None:
        held = held.reshape((1,) * more + held.shape)
        for d in range(at[0], at[0] + named):
            held = call.atoms.along(held, d)
        held = held.reshape((*held.shape[: at[0]], *(1,) * wide, *held.shape[at[0] + named :]))
    if at[0] and named != wide and values.ndim:  # the dims before lie elsewhere than in the result
        values = values.reshape((1,) * more + tuple(values.shape))
        values = values.flatten(at[0], at[0] + named - 1).unflatten(at[0], (*(1,) * (wide - 1), -1))
    shape = tuple(1 if at[0] <= d < at[0] + wide else size for d, size in enumerate(call.x.shape))
    return [call.met([(ids, call.x), (held, values)], shape)]


WRITES = {
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    **dict.fromkeys(("index_add", "index_copy", "index_fill", "index_reduce"), index_add),
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), index_put),
}
