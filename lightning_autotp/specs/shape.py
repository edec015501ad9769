"""A rule's ``shape``: how a fused weight is viewed before it is cut."""

from collections.abc import Iterable
from typing import Any, Optional, Union

from lightning_autotp.layout.heads import Heads

HEAD_SIZES = ("q", "kv")
"""Names that stand in a nested ``shape`` for sizes that only the model knows: the rows of all query heads, and of all
key (or value) heads."""

SubSizes = tuple[Union[int, str], ...]

Shape = tuple[Union[int, SubSizes], ...]


def parse_shape(shape: Any, partition_dim: Optional[int], default_dim: int) -> Shape:
    """A rule's ``shape`` with lists as tuples, every entry checked.

    Raises:
        ValueError: on entries that are no sizes, a nested entry away from the cut dim, or a cut dim out of range.
    """
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Iterable):
        raise ValueError(f"shape: {shape!r} is not a list of sizes such as [2, -1] or [[4096, 1024, 1024], -1].")
    entries = tuple(tuple(e) if isinstance(e, (list, tuple)) else e for e in shape)
    dim = default_dim if partition_dim is None else partition_dim
    if not 0 <= dim < len(entries):
        raise ValueError(f"partition_dim: {dim} is out of range for shape {entries} with {len(entries)} dims.")
    for at, entry in enumerate(entries):
        if isinstance(entry, tuple):
            if at != dim:
                raise ValueError(f"shape: only the entry at partition_dim {dim} may list sub-parameters: {entries}.")
            if not entry or not all(is_size(size) or size in HEAD_SIZES for size in entry):
                raise ValueError(
                    f"shape: the sub-parameters {entry} must be sizes of at least 1, or"
                    f" {' and '.join(repr(name) for name in HEAD_SIZES)} for the sizes of the model's heads."
                )
        elif entry != -1 and not is_size(entry) or isinstance(entry, bool):
            raise ValueError(f"shape: {entry!r} in {entries} is neither a size of at least 1 nor -1.")
    return entries


def resolve_shape(shape: Shape, heads: Optional[Heads]) -> Shape:
    """``shape`` with ``"q"`` and ``"kv"`` as numbers.

    Raises:
        ValueError: if it has such names and the heads are not known.
    """
    if not any(isinstance(size, str) for entry in shape if isinstance(entry, tuple) for size in entry):
        return shape
    if heads is None:
        raise ValueError(f"shape: {shape} needs head counts, and neither the module nor its config has them.")
    known = heads
    return tuple(
        tuple(known.size(size) if isinstance(size, str) else size for size in entry)
        if isinstance(entry, tuple)
        else entry
        for entry in shape
    )


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
