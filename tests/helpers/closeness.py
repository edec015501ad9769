"""How close is close: the one comparison that all parity tests use.

The error of a tensor is that of :mod:`lightning_autotp.proof.error_metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_autotp.proof.error_metrics import comparable, model_norm, tensor_error


def relative_errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of every tensor by name, computed in float64; infinite or NaN where a value is.

    Raises:
        AssertionError: if names or shapes differ.

    """
    _check_same_tensors(got, want)
    exact = {name: tensor.detach().to(torch.float64) for name, tensor in want.items()}
    norm = model_norm(exact)
    return {name: tensor_error(got[name].detach().to(tensor), tensor, norm)[0] for name, tensor in exact.items()}


def assert_close(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], tol: float = 1e-4, what: str = "gradient"
) -> None:
    """Assert that no tensor's error exceeds ``tol``; the message lists those that do, the worst first.

    Raises:
        AssertionError: if one does, or if names or shapes differ.

    """
    errors = relative_errors(got, want)
    # Not "error > tol", which NaN would pass.
    wrong = sorted((name for name in errors if not errors[name] <= tol), key=lambda name: -comparable(errors[name]))
    if wrong:
        lines = [f"  {errors[name]:.3g}  {name} {list(want[name].shape)}" for name in wrong]
        summary = f"{len(wrong)} of {len(errors)} tensors differ in {what} by more than {tol:g}, the worst first:"
        raise AssertionError("\n".join([summary, *lines]))


def _check_same_tensors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(want.keys() - got.keys()), sorted(got.keys() - want.keys())
    if missing or extra:
        raise AssertionError(f"The tensors' names differ: missing {missing}, unexpected {extra}.")
    shapes = {name: (tuple(got[name].shape), tuple(want[name].shape)) for name in want}
    wrong = [f"{name} {ours} instead of {theirs}" for name, (ours, theirs) in shapes.items() if ours != theirs]
    if wrong:
        raise AssertionError(f"The tensors' shapes differ: {', '.join(wrong)}.")
