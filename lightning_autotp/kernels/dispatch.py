"""Where Triton kernels serve, and where what they compute is left to torch."""

import importlib
from functools import cache
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read and write; they compute in fp32."""


def kernels_of(name: str, x: Tensor) -> Any:
    """The module of ``name``'s kernels, if they serve for ``x``.

    None elsewhere than on CUDA, for fp64, without Triton, and in a graph, whose compiler fuses by itself.
    """
    if torch.compiler.is_compiling() or not x.is_cuda or x.dtype not in DTYPES:
        return None
    return load_kernels(name)


@cache
def load_kernels(name: str) -> Any:
    """The module of ``name``'s kernels; None without Triton, or where it cannot launch anything."""
    try:
        module = importlib.import_module(f"lightning_autotp.kernels.{name}")
    except ImportError:
        return None
    try:
        _ = module.triton.runtime.driver.active  # it builds its launchers with a C compiler
    except Exception as error:  # of many kinds: no C compiler, no headers of Python's, a cache that cannot be written
        rank_zero_warn(f"Some of a sharded model takes longer than it need ({name}), because Triton fails: {error}")
        return None
    return module
