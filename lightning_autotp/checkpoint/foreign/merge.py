"""How a tensor that DeepSpeed's tensor parallel ranks hold in parts becomes whole: by what it recorded, or by a plan.

What it records (``universal_checkpoint_info``): an affine map of each parameter in the newest versions, patterns for
the ways to cut in older ones, nothing before. Source: ``merge_tp_slices`` in its ``checkpoint/ds_to_universal.py``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor

from lightning_autotp.layout.layout import Layout

_POWER = {"exp_avg": -1, "exp_avg_sq": -2}
"""How a moment scales where a rank holds a parameter times a constant: as gradients do, against it."""


class MergeError(ValueError):
    """Nobody can say for sure what the whole tensor is."""


@dataclass(frozen=True)
class Merge:
    """What parts become.

    Args:
        shape: that of the whole tensor.
        join: the whole tensor from the parts of all ranks, given the entry of the optimizer's state that they are of.
    """

    shape: tuple[int, ...]
    join: Callable[[Sequence[Tensor], str], Tensor]


@dataclass(frozen=True)
class Merger:
    """Decides for each parameter.

    Args:
        info: what DeepSpeed recorded; empty if nothing.
        layouts: how the target model's plan cuts for as many ranks, by DeepSpeed's names.
        first_replica: whether to take the first rank's where ranks should hold alike and do not.
    """

    info: Mapping[str, Any]
    layouts: Mapping[str, Layout]
    first_replica: bool = False

    def merge(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Merge:
        """That of the parameter ``name``, of which the ranks hold tensors of ``shapes``.

        Raises:
            MergeError: if it cannot be told.
        """
        if len(shapes) == 1:
            return Merge(shapes[0], lambda parts, entry: parts[0])
        for pattern, recorded in self._maps().items():
            if _matches(pattern, name):
                return _by_map(recorded, shapes, self._alike)
        layout = self._recorded(name, shapes) or self._planned(name, shapes)
        if [layout.local_shape(rank) for rank in range(len(shapes))] != list(shapes):
            raise MergeError(f"its ranks hold {_shown(shapes)}, which is not what {layout.shape} would be cut into")
        if layout.is_replicated:
            return Merge(layout.shape, lambda parts, entry: self._alike(parts))
        return Merge(layout.shape, lambda parts, entry: layout.unshard(parts))

    def buffer(self, shapes: Sequence[tuple[int, ...]]) -> Merge:
        """That of a buffer, which all ranks hold alike."""
        if len(set(shapes)) > 1:
            raise MergeError(f"it is a buffer, of which ranks hold {_shown(shapes)}")
        return Merge(shapes[0], lambda parts, entry: self._alike(parts))

    def _maps(self) -> Mapping[str, Any]:
        recorded = self.info.get("affine_map", {})
        return recorded.get("params", {}) if recorded.get("version") == 1 else {}

    def _recorded(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Optional[Layout]:
        """None for what is in no list: versions without maps have there what is cut along dim 0 and what is not cut."""
        info = self.info

        def among(kind: str) -> bool:
            return any(_matches(pattern, name) for pattern in info.get(kind, []))

        for pattern, reason in info.get("autotp_unsupported_parameter_patterns", {}).items():
            if _matches(pattern, name):
                raise MergeError(f"DeepSpeed recorded that it has no rule for it ({reason})")
        if among("tp_replicated_parameter_patterns"):
            return Layout.replicated(shapes[0], len(shapes))
        if among("parameter_with_row_parallelism_patterns"):
            return _along(1, shapes)
        for parts in info.get("parameter_with_sub_params", []):
            found = [pattern for pattern in parts["patterns"] if _matches(pattern, name)]
            if found:
                return self._packed(parts, found[0], shapes)
        for kind in ("parameter_to_average_patterns", "parameter_with_2_sub_params_cat_dim_0"):
            if among(kind):
                raise MergeError(f"it is one of `{kind}`, which are not known here")
        return None

    def _packed(self, parts: Mapping[str, Any], pattern: str, shapes: Sequence[tuple[int, ...]]) -> Layout:
        dim, ranks = parts["partition_dim"], len(shapes)
        widths = self.info.get("sub_param_shard_widths", {}).get(pattern)
        if widths is None:  # older: only even cuts were possible
            total, said = sum(shape[dim] for shape in shapes), parts["shape"][dim]
            sizes = [total // said] * said if isinstance(said, int) else list(said)
            if sum(sizes) != total or any(size % ranks for size in sizes):
                raise MergeError(f"DeepSpeed did not record how its parts, {sizes} of {total}, were cut")
            widths = [[size // ranks] * ranks for size in sizes]
        runs = [list(zip([0, *accumulate(of_part)], of_part)) for of_part in widths]
        return Layout.cut(_whole(dim, shapes), dim, ranks, runs)

    def _planned(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Layout:
        if name not in self.layouts:
            raise MergeError(f"DeepSpeed did not record how it was cut; its ranks hold {_shown(shapes)}")
        layout = self.layouts[name]
        if all(shape == layout.shape for shape in shapes):  # DeepSpeed keeps whole what our plan may cut
            return Layout.replicated(layout.shape, len(shapes))
        return layout

    def _alike(self, parts: Sequence[Tensor]) -> Tensor:
        if not self.first_replica and any(not torch.equal(parts[0], part) for part in parts[1:]):
            most = max(float((parts[0].double() - part.double()).abs().max()) for part in parts[1:])
            raise MergeError(
                f"all ranks should hold it alike, and they differ by up to {most:.3g}; `lightning-autotp import"
                " --take-first-replica` takes the first rank's"
            )
        return parts[0]


def _by_map(recorded: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], alike: Callable[..., Tensor]) -> Merge:
    """By a map of version 1: blocks by size, offset and strides in the whole tensor (source) and in a part (dest)."""
    shape = tuple(recorded["logical_shape"])
    ranks = [recorded["ranks"].get(rank, recorded["ranks"].get(str(rank))) for rank in range(len(shapes))]
    held = [None if rank is None else tuple(rank["shard_shape"]) for rank in ranks]
    if held != list(shapes):
        raise MergeError(f"its ranks hold {_shown(shapes)}, and DeepSpeed recorded that they hold {held}")
    blocks: dict[tuple[Any, ...], list[tuple[int, Mapping[str, Any]]]] = {}
    for number, rank in enumerate(ranks):
        for piece in rank["pieces"]:
            where = (piece["source"][0], tuple(piece["source"][1]), tuple(piece["shape"]))
            blocks.setdefault(where, []).append((number, piece))
    if sum(prod(size) for _, _, size in blocks) != prod(shape):
        raise MergeError("what DeepSpeed recorded does not cover all of it once")

    def join(parts: Sequence[Tensor], entry: str) -> Tensor:
        own = [part.contiguous().clone() for part in parts]  # a block outside of it is then an error
        full = own[0].new_empty(shape)
        for (start, strides, size), pieces in blocks.items():
            found = []
            for number, piece in pieces:
                block = own[number].as_strided(size, piece["dest"][1], piece["dest"][0])
                scale = float(piece.get("scale", 1.0))
                found.append(block if scale == 1 else block / scale ** _POWER.get(entry, 1))
            full.as_strided(size, strides, start).copy_(alike(found))
        return full

    return Merge(shape, join)


def _along(dim: int, shapes: Sequence[tuple[int, ...]]) -> Layout:
    widths = [shape[dim] for shape in shapes]
    return Layout.cut(_whole(dim, shapes), dim, len(shapes), [list(zip([0, *accumulate(widths)], widths))])


def _whole(dim: int, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if dim >= len(shapes[0]):
        raise MergeError(f"its ranks hold {_shown(shapes)}, which have no dim {dim}")
    return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])


def _matches(pattern: str, name: str) -> bool:
    """Whether one of DeepSpeed's patterns, most of them a whole name, means ``name``."""
    return pattern == f"^{re.escape(name)}$" or re.match(pattern, name) is not None


def _shown(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)
