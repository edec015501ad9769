"""Labels of tensors: arrays of atoms with as many dims as their tensor, of size 1 where it does not depend on a dim."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_autotp.dataflow.view_dims import groups
from lightning_autotp.derivation.atoms import Ids

FILLED = "_autotp_filled"
"""Attribute of a tensor that an operator filled: any part of it is like any other."""


def alike(t: Tensor, dim: int) -> bool:
    """Whether a tensor is the same along ``dim`` by how it was made."""
    if t.shape[dim] == 1 or t.stride(dim) == 0:
        return True
    return (
        getattr(t, FILLED, False) and not t.is_meta and bool((t == t.flatten()[0]).all())
    )  # it may have been written to


def narrowed(ids: Ids) -> Ids:
    """Labels with dims along which they do not differ as dims of size 1."""
    for d in range(ids.ndim):
        if ids.shape[d] > 1:
            first = np.take(ids, [0], d)
            if (ids == first).all():
                ids = first
    return ids


def viewed(ids: Ids, old: tuple[int, ...], new: tuple[int, ...]) -> Ids:
    """The labels of a tensor of shape ``old`` that is viewed as ``new``."""
    runs = [(ins, outs, any(ids.shape[d] > 1 for d in ins)) for ins, outs in groups(old, new)]
    differs = {d for ins, _, yes in runs if yes for d in ins}
    wanted = {d for _, outs, yes in runs if yes for d in outs}
    full = np.broadcast_to(ids, [old[d] if d in differs else 1 for d in range(len(old))])
    return full.reshape([new[d] if d in wanted else 1 for d in range(len(new))])
