"""The net under every plan: tensor parallel ranks must see the same data and come to the same numbers.

Looked at once for each run, at its first batch and before its first optimizer step, when a mistake costs least.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from lightning_autotp.mesh import Mesh

Digest = tuple[float, float, float]
"""Sum, 1-norm and 2-norm."""

_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Relative differences that rounding explains; a partial gradient differs by far more. 1e-3 for other dtypes."""


class DisagreementError(RuntimeError):
    """Tensor parallel ranks hold different values where they must hold the same."""


def digests(values: Any, name: str) -> dict[str, tuple[Digest, float]]:
    """For every tensor in a nested structure, by a name that says where: its digest and its tolerance."""
    leaves, _ = tree_flatten_with_path(values)
    found = {}
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            found[name + "".join(map(str, path))] = (_digest(leaf.detach()), _TOLERANCE.get(leaf.dtype, 1e-3))
    return found


def require_agreement(values: Mapping[str, tuple[Digest, float]], mesh: Mesh, fix: str) -> None:
    """Compare ``values`` inside every tensor parallel group; every process must call it.

    Raises:
        DisagreementError: on all processes alike, with the names of what differs and ``fix``.
    """
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (mesh.tp_source, mesh.tp_rank, dict(values)))
    reference = {source: theirs for source, tp_rank, theirs in everyones if tp_rank == 0}
    wrong: dict[str, str] = {}
    for rank, (source, _, theirs) in enumerate(everyones):
        for name in [*reference[source], *(n for n in theirs if n not in reference[source])]:
            difference = _difference(reference[source].get(name), theirs.get(name))
            if difference:
                wrong.setdefault(name, f"{name} ({difference} between ranks {source} and {rank})")
    if wrong:
        shown = list(wrong.values())
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        raise DisagreementError(f"tensor parallel ranks disagree on {', '.join(shown[:5])}{more}. {fix}")


def _digest(tensor: Tensor) -> Digest:
    if tensor.is_sparse or tensor.is_quantized or tensor.is_complex():
        tensor = torch.view_as_real(tensor.to_dense()) if tensor.is_complex() else tensor.to_dense()
    if not tensor.is_floating_point():
        tensor = tensor.double()
    one = torch.linalg.vector_norm(tensor, 1, dtype=torch.float64)
    two = torch.linalg.vector_norm(tensor, 2, dtype=torch.float64)
    total = torch.stack((tensor.sum(dtype=torch.float64), one, two)).tolist()
    return (total[0], total[1], total[2])


def _difference(want: Any, got: Any) -> str:
    if want is None or got is None:
        return "missing on one"
    (want_sum, want_one, want_two), tolerance = want
    (got_sum, got_one, got_two), _ = got
    scale_one, scale_two = max(want_one, got_one), max(want_two, got_two)
    if scale_one != scale_one or scale_two == float("inf") or scale_two != scale_two:
        both = [value != value or value == float("inf") for value in (want_two, got_two)]
        return "" if all(both) else "not finite on one"
    apart = max(
        _relative(want_sum, got_sum, scale_one),
        _relative(want_one, got_one, scale_one),
        _relative(want_two, got_two, scale_two),
    )
    return f"{apart:.1%} apart" if apart > tolerance else ""


def _relative(a: float, b: float, scale: float) -> float:
    return abs(a - b) / scale if scale else 0.0
