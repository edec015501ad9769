"""How exact is exact: what the error of a tensor is, and how large one may be.

The error is ``max |got - want| / max(max |want|, 1e-6 * norm)``, computed in float64, with ``norm`` the 2-norm over the
whole model: a tensor whose true value is zero (the gradient of a key bias, say) holds rounding noise in any run, and is
held to the scale of the model and not to its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Optional

from torch import Tensor

Precision = Literal["fp64", "fp32"]
"""What was computed in: ``fp64`` or, where a model does not run in it, ``fp32``: the dtypes that the model has."""


@dataclass(frozen=True)
class Bounds:
    """How large an error may be.

    Args:
        loss: of the loss, relative.
        tensors: of gradients and weights.
    """

    loss: float
    tensors: float


BOUNDS: dict[Precision, Bounds] = {"fp64": Bounds(1e-6, 1e-4), "fp32": Bounds(1e-4, 1e-3)}
"""In fp64 models that compute all in it are right to 1e-11. Many of transformers compute some things in fp32 (norms,
routers, recurrent states, the loss): their losses were seen to be right to 2e-7, gradients to 1e-6, and to 8e-5 where a
gradient is a small sum of large terms. What a mistake makes is rarely below 1e-3.
"""

MODEL_SCALE = 1e-6

ROUNDING = 1e-8
"""What a tensor that fp32 cannot compute may differ by, of the model's norm: a twelfth of fp32's machine epsilon."""

NOISE = 0.1
"""fp32 cannot compute a tensor that the unsharded run misses by this part of the bound: another run may miss it by all.
"""

Errors = dict[str, tuple[float, float]]
"""By name: the error, and ``max |got - want|`` as a part of the whole model's norm."""


def comparable(error: float) -> float:
    """Infinity for NaN, which is neither larger nor smaller than anything."""
    return math.inf if math.isnan(error) else error


def ratio(difference: float, scale: float) -> float:
    """``difference / scale``; of zero, only zero is a part."""
    return difference / scale if scale else 0.0 if difference == 0.0 else math.inf


def model_norm(tensors: Mapping[str, Tensor]) -> float:
    """The 2-norm over all of ``tensors``."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def tensor_error(got: Optional[Tensor], want: Optional[Tensor], norm: float) -> tuple[float, float]:
    """The error, and the difference as a part of ``norm``; None is right only for zeros.

    Raises:
        RuntimeError: if the shapes differ.
    """
    if got is None or want is None:
        there = got if got is not None else want
        return (math.inf, math.inf) if there is not None and bool(there.any()) else (0.0, 0.0)
    if got.shape != want.shape:
        raise RuntimeError(f"a rank holds {list(got.shape)} where its part is {list(want.shape)}")
    if not want.numel():
        return 0.0, 0.0
    difference = float((got.double() - want.double()).abs().max())
    scale = max(float(want.abs().max()), MODEL_SCALE * norm)
    return ratio(difference, scale), ratio(difference, norm)


def tensor_errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor], norm: float) -> Errors:
    """The errors of all tensors that either side has; one that a side lacks must be zero on the other."""
    return {name: tensor_error(got.get(name), want.get(name), norm) for name in {**want, **got}}


def largest_errors(of_ranks: Sequence[Errors]) -> Errors:
    """Of every tensor's errors the largest, each of the two for itself."""
    names = {name: None for errors in of_ranks for name in errors}
    found = {name: [errors.get(name, (0.0, 0.0)) for errors in of_ranks] for name in names}
    return {
        name: (max(comparable(error) for error, _ in pairs), max(comparable(of_norm) for _, of_norm in pairs))
        for name, pairs in found.items()
    }
