"""What optimizers are tried on: small parameters, how they are cut, and gradients that show what looks at a whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_Shapes = dict[int, tuple[tuple[tuple[int, ...], int, int], ...]]

# No tail of a vectorized loop, which may round in another way: all parts have multiples of 64 elements.
_SMALL: _Shapes = {
    0: (((), 0, 0), ((), 0, 0)),
    1: (((192,), 0, 64), ((128,), 0, 64)),
    2: (((48, 64), 0, 32), ((32, 96), 1, 32)),
    3: (((4, 16, 48), 1, 4), ((4, 32, 24), 2, 8), ((6, 16, 16), 0, 2)),
    4: (((32, 8, 2, 4), 0, 8), ((16, 24, 2, 2), 1, 8)),
}
# Some take blocks of 128 to 2048 elements, from 4096 on: the parts do not fit them. Only for what is elementwise while
# small, as others keep matrices of the size of a dim.
_LARGE: _Shapes = {
    1: (((8192,), 0, 4160), ((192,), 0, 64)),
    2: (((128, 160), 0, 80), ((128, 160), 1, 64)),
    3: (((4, 64, 48), 1, 16), ((4, 64, 48), 2, 32)),
    4: (((64, 16, 2, 4), 0, 24), ((32, 64, 2, 2), 1, 16)),
}


@dataclass(frozen=True)
class Kind:
    """What parameters of a param group have in common, as far as an optimizer may ask.

    Args:
        place: the place of the first of them in its group.
        ndim: how many dims they have.
        dtype: their dtype.
        device: where they are.
        sharded: whether one of them is sharded.
        attributes: what users have put on them.
    """

    place: int
    ndim: int
    dtype: torch.dtype
    device: torch.device
    sharded: bool
    attributes: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Sample:
    """A parameter to try with: its value, where two ranks cut it, and what it stands for."""

    value: Tensor
    dim: int
    at: int
    kind: Kind

    def cut(self, full: Tensor) -> tuple[Tensor, Tensor]:
        """What the two ranks hold of a tensor of this shape; both hold what is not sharded."""
        if not self.kind.sharded or not full.ndim:
            return full.clone(), full.clone()
        first, second = full.tensor_split([self.at], self.dim)
        return first.contiguous().clone(), second.contiguous().clone()

    def parameter(self, value: Tensor) -> nn.Parameter:
        """A parameter of its own with ``value``."""
        made = nn.Parameter(value.detach().clone())
        for name, attribute in self.kind.attributes:
            setattr(made, name, attribute)
        return made


def samples_of(kinds: Sequence[Kind], generator: torch.Generator, *, large: bool) -> list[Sample]:
    """Parameters of several shapes for each kind of a param group; at least two, so that one may hang on another."""
    found = []
    for kind in kinds:
        shapes = (_LARGE if large else {}).get(kind.ndim) or _SMALL.get(kind.ndim)
        shapes = shapes or (((64, 8, *(2 for _ in range(kind.ndim - 2))), 0, 32),) * 2
        for number, (shape, dim, at) in enumerate(shapes):
            value = torch.randn(shape, generator=generator) * (1.0, 0.05, 0.3)[number % 3]
            found.append(Sample(value.to(kind.device, kind.dtype), dim, at, kind))
    return found


def gradient(step: int, sample: Sample, weight: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of step ``step``: of all scales, mostly zero, zero on one rank, along the weight, in turns."""
    shape = sample.value.shape
    grad = torch.randn(shape, generator=generator)
    if shape:  # rows differ by far
        grad = grad * torch.randn((shape[0], *(1 for _ in shape[1:])), generator=generator).exp()
    scale = (0.1, 10.0, 1e-3, 30.0, 1.0, 1e-5)[(step + step // 6) % 6]
    kind = step % 5
    if kind == 1:
        grad = grad * (torch.rand(shape, generator=generator) < 0.03)
    elif kind == 2:
        along = weight.detach().to("cpu", torch.float32)
        grad = along / along.abs().amax().clamp_min(1) * (1 if step % 2 else -1)
    elif kind == 3 and shape:
        grad.narrow(sample.dim, 0, sample.at).zero_()
    return (grad * scale).to(sample.value.device, sample.value.dtype)
