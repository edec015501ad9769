"""Pretrained models of which every process holds all, though it needs a part: say who could read only that."""

import sys
from bisect import bisect_right
from collections.abc import Mapping
from math import prod
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_autotp.compat import FakeTensor, initializes_others
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout

NEEDLESS = 2**28
"""Bytes that a process may hold beyond its part without a word."""


def warn_of_full_models(model: nn.Module, layouts: Mapping[int, Layout], mesh: Mesh) -> None:
    """Warn where a pretrained model takes much more memory than this rank's part, before it is cut.

    transformers maps files: weights whose dtype and names are the file's take none. What it converts takes all.
    """
    if mesh.tp_size == 1 or not sys.platform.startswith("linux"):
        return
    seen: list[str] = []
    for path, module in model.named_modules():
        name = getattr(getattr(module, "config", None), "_name_or_path", "")
        is_inside = any(path.startswith(f"{outer}.") or not outer for outer in seen)
        if name and not is_inside and initializes_others(type(module)):  # PEFT's wrappers pass attributes on
            seen.append(path)
            needless = _needless(module, layouts, mesh)
            if needless > NEEDLESS:
                rank_zero_warn(
                    f"{path or type(module).__name__}: every process holds all of this model in memory while it is cut,"
                    f" {needless / 2**30:.1f} GiB more than its part, because transformers converts the weights of"
                    f" {name!r} (another dtype, or weights that it fuses). `lightning_autotp.from_pretrained"
                    f"({type(module).__name__}, {name!r}, ...)` reads only what each process holds."
                )


def _needless(model: nn.Module, layouts: Mapping[int, Layout], mesh: Mesh) -> int:
    """The bytes of ``model``'s parameters in this process's own memory that are not this rank's part."""
    mapped = _mapped()
    total = 0
    for parameter in model.parameters():
        if not parameter.is_meta and not isinstance(parameter, FakeTensor) and not _lies_in(parameter, mapped):
            local = layouts[id(parameter)].local_shape(mesh.tp_rank)
            held = parameter.numel() - prod(local)
            total += held * parameter.element_size()
    return total


def _mapped() -> list[tuple[int, int]]:
    """The address ranges that are files', in order."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            start, _, end = addresses.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return sorted(found)


def _lies_in(tensor: Tensor, ranges: list[tuple[int, int]]) -> bool:
    at = bisect_right(ranges, (tensor.data_ptr(), sys.maxsize)) - 1
    return at >= 0 and tensor.data_ptr() < ranges[at][1]
