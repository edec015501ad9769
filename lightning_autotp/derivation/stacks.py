"""Stacks of matrices ``[experts, ., .]`` on their way to a product: which of their dims lie along which of a view's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Optional

import numpy as np
from torch import Tensor

from lightning_autotp.derivation.atoms import Ids

Factors = tuple[tuple[int, int], ...]
"""Dims of a stack, each with its size, that lie along one dim of a view, the slowest first."""

_SAME = ("detach", "alias", "_to_copy", "clone")

_RESHAPES = ("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")


@dataclass(frozen=True)
class Stack:
    """A view of a parameter that is a stack of matrices.

    Args:
        path: the name of the parameter.
        dims: the factors of each dim of the view.
    """

    path: str
    dims: tuple[Factors, ...]

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> Stack:
        """All of a parameter with three dims."""
        return cls(name, tuple(((dim, size),) for dim, size in enumerate(parameter.shape)))

    def moved(self, name: str, args: Sequence[Any], out: Tensor) -> Optional[Stack]:
        """What ``out`` is, that an operator made of this; None if its dims cannot be told any more."""
        dims = list(self.dims)
        shape = tuple(out.shape)
        if name in ("t", "transpose"):
            a, b = args[1:] if name == "transpose" else (0, 1)
            dims[a], dims[b] = dims[b], dims[a]
        elif name == "permute":
            dims = [dims[d] for d in args[1]]
        elif name in _RESHAPES:
            return self._with(_regrouped([factor for one in dims for factor in one], shape))
        elif name in ("select", "unbind"):
            dim = args[1] if len(args) > 1 else 0
            if not _of_experts(dims[dim]):
                return None
            del dims[dim]
        elif name in ("slice", "index"):
            changed = [
                d for d in range(len(dims)) if len(shape) != len(dims) or prod(n for _, n in dims[d]) != shape[d]
            ]
            if name == "index":
                changed += [d for d, index in enumerate(args[1]) if index is not None]
            if len(shape) != len(dims) or any(not _of_experts(dims[d]) for d in changed):
                return None
            for d in changed:
                dims[d] = ((0, shape[d]),)
        elif name not in _SAME:
            return None
        return self._with(dims)

    def _with(self, dims: Optional[Sequence[Factors]]) -> Optional[Stack]:
        return None if dims is None else Stack(self.path, tuple(dims))

    def product(self) -> Optional[Product]:
        """What a product ``[.., k] x [.., k, n]`` with this on the right contracts; None if not by matrices."""
        inputs, outputs = ([(at, dim) for at, (dim, _) in enumerate(one) if dim] for one in self.dims[-2:])
        if len(inputs) != 1 or len(outputs) != 1:
            return None
        (k_at, k_dim), (n_at, n_dim) = inputs[0], outputs[0]
        return Product((n_dim, k_dim), _places(self.dims[-2], k_at), _places(self.dims[-1], n_at))


@dataclass(frozen=True)
class Product:
    """A product with a stack's matrices.

    Args:
        dims: the stack's dims of outputs and of inputs.
        inputs: of each entry along what is contracted, which input it is.
        outputs: of each entry along the result's last dim, which output it is.
    """

    dims: tuple[int, int]
    inputs: Ids
    outputs: Ids


def _of_experts(factors: Factors) -> bool:
    return all(dim == 0 for dim, _ in factors)


def _places(factors: Factors, at: int) -> Ids:
    found: Ids = np.indices([size for _, size in factors])[at].ravel()
    return found


def _regrouped(factors: Sequence[tuple[int, int]], shape: Sequence[int]) -> Optional[list[Factors]]:
    """Factors as they lie along the dims of another shape; None if one of them is split."""
    left = [factor for factor in factors if factor[1] > 1]
    found = []
    for size in shape:
        taken: list[tuple[int, int]] = []
        while left and prod(n for _, n in taken) < size:
            taken.append(left.pop(0))
        if prod(n for _, n in taken) != size:
            return None
        found.append(tuple(taken))
    return found
