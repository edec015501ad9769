"""Tensors that are written part by part, through views of them: their labels are put together on a canvas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from lightning_autotp.derivation.atoms import Atoms, Ids
from lightning_autotp.derivation.labels import narrowed
from lightning_autotp.derivation.operators import VIEWS

LABELS = "_autotp_labels"
"""Attribute of a tensor: its atoms."""

_OF, _CANVAS = "_autotp_view_of", "_autotp_canvas"

_NOBODY = -1
"""What stands on a canvas where the tensor is the same on all ranks."""

MOST = 1 << 22
"""Entries of a tensor up to which its labels are put together."""

Replay = Callable[[Tensor], Tensor]


class Canvas:
    """The labels of tensors that got them by writes into their views."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms

    def view(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Note that ``out`` is a view of the first argument, if it is one into which labels may be written."""
        if name not in VIEWS or not isinstance(out, Tensor) or not isinstance(args[0], Tensor):
            return
        base = args[0]
        if getattr(base, LABELS, None) is not None and not hasattr(getattr(base, _OF, (base,))[0], _CANVAS):
            return
        root, steps = getattr(base, _OF, (base, ()))
        setattr(out, _OF, (root, (*steps, lambda t: func(t, *args[1:], **kwargs))))

    def write(self, tensor: Tensor, ids: Optional[Ids]) -> None:
        """Put the labels of ``tensor`` on the canvas of what it is a view of."""
        if not hasattr(tensor, _OF):
            return
        root, steps = getattr(tensor, _OF)
        canvas = getattr(root, _CANVAS, None)
        if canvas is None and ids is None:
            return
        if root.numel() > MOST:
            if ids is not None:
                self.atoms.everywhere(ids)
            return
        if canvas is None:
            canvas = torch.full(tuple(root.shape), _NOBODY, dtype=torch.int64)
            setattr(root, _CANVAS, canvas)
        part = canvas
        for step in steps:
            part = step(part)
        part[...] = _NOBODY if ids is None else torch.from_numpy(np.array(ids))
        setattr(root, LABELS, self._read(canvas.numpy()))

    def _read(self, canvas: Ids) -> Optional[Ids]:
        """The labels on a canvas; where some of it is nobody's, what lies along that dim is on one rank."""
        nobody = canvas == _NOBODY
        if not nobody.any():
            return narrowed(np.array(canvas))
        if nobody.all():
            return None
        for dim in range(canvas.ndim):
            line = np.moveaxis(nobody, dim, 0).reshape(canvas.shape[dim], -1)
            if (line == line[:, :1]).all():
                return self.atoms.along(narrowed(np.take(canvas, np.flatnonzero(~line[:, 0]), dim)), dim)
        self.atoms.everywhere(canvas[~nobody])
        return None
