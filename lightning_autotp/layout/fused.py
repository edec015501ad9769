"""Parameters that hold several: how a ``shape`` divides the dim of them that is cut. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class Fused:
    """How a fused parameter is divided along the dim that is cut.

    Args:
        sizes: the sub-parameters, one behind the other; each is cut separately.
        repeat: how often their sequence repeats.
        unit: the length of the runs that must stay together.
    """

    sizes: tuple[int, ...]
    repeat: int = 1
    unit: int = 1


def sub_parameters(shape: Any, cut_dim: int, weight: Sequence[int], weight_dim: int) -> Fused:
    """The sub-parameters of the fused weight of a linear.

    A view of as many dims as the weight names them one for one. A longer one divides the output features further, as
    ``(experts, 2, -1)`` with partition_dim 1 does: what lies before the cut dim repeats, what lies behind it must not
    be cut across.

    Args:
        shape: the view: sizes, one -1, and at ``cut_dim`` a count or a tuple of sizes.
        cut_dim: the dim of the view that is cut.
        weight: [out, in] of the weight.
        weight_dim: the dim of the weight that the cut dim of the view lies in.

    Raises:
        ValueError: if the weight cannot be viewed so.
    """
    if len(shape) < 2:
        raise ValueError(f"shape: {shape} has fewer dims than the weight {list(weight)}.")
    known = [sum(e) if isinstance(e, tuple) else e for e in shape]
    if shape[-1] not in (-1, weight[1]) and cut_dim != len(shape) - 1:
        raise ValueError(f"shape: the last entry of {shape} is not the weight's {weight[1]} input features.")
    if weight_dim == 1:
        if len(shape) != 2 or cut_dim != 1:
            raise ValueError(f"shape: a row rule cuts the input features, the last of two entries, not {shape}.")
        if known[0] not in (-1, weight[0]):
            raise ValueError(f"shape: the first entry of {shape} is not the weight's {weight[0]} output features.")
        return Fused(_parts_of(shape[1], weight[1]))
    if cut_dim == len(shape) - 1:
        raise ValueError(f"shape: a column rule cuts the output features, which the last entry of {shape} is not.")
    leading = list(known[:-1])
    leading[cut_dim] = 1
    if -1 in leading:
        if not isinstance(shape[cut_dim], tuple):
            raise ValueError(f"shape: {shape} leaves two sizes open; only one entry before the last may be -1.")
        leading[leading.index(-1)] = weight[0] // known[cut_dim]
    total, rest = divmod(weight[0], prod(leading))
    if rest:
        raise ValueError(f"shape: {shape} does not divide the weight's {weight[0]} output features.")
    before, after = prod(leading[:cut_dim]), prod(leading[cut_dim + 1 :])
    return Fused(tuple(size * after for size in _parts_of(shape[cut_dim], total)), before, after)


def fused_parameter(shape: Any, cut_dim: int, parameter: Sequence[int]) -> Fused:
    """The sub-parameters of any fused parameter, along its dim ``cut_dim``.

    Entries of ``shape`` are the parameter's dims one for one; further ones directly behind the cut entry divide that
    dim into runs that stay together.

    Raises:
        ValueError: if the parameter cannot be viewed so.
    """
    behind = len(shape) - len(parameter)
    if behind < 0 or cut_dim >= len(parameter):
        raise ValueError(f"shape: {shape} cut along its dim {cut_dim} is no view of a parameter {list(parameter)}.")
    runs = shape[cut_dim + 1 : cut_dim + 1 + behind]
    outer = (*shape[:cut_dim], -1, *shape[cut_dim + 1 + behind :])
    if any(e not in (-1, size) for e, size in zip(outer, parameter)) or any(e == -1 for e in runs):
        raise ValueError(f"shape: {shape} is no view of a parameter {list(parameter)}.")
    unit = prod(runs)
    if parameter[cut_dim] % unit:
        raise ValueError(f"shape: {parameter[cut_dim]} features do not divide into runs of {unit}.")
    parts = _parts_of(shape[cut_dim], parameter[cut_dim] // unit)
    return Fused(tuple(size * unit for size in parts), 1, unit)


def _parts_of(entry: Any, total: int) -> tuple[int, ...]:
    """The sub-parameter sizes that a ``shape`` entry gives for a dim of ``total``."""
    if isinstance(entry, tuple):
        if sum(entry) != total:
            raise ValueError(f"shape: the sub-parameters {entry} add up to {sum(entry)}, but the weight has {total}.")
        return entry
    if entry == -1:
        return (total,)
    if total % entry:
        raise ValueError(f"shape: {total} features do not divide into {entry} equal sub-parameters.")
    return (total // entry,) * entry
