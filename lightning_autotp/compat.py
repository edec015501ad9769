"""Private interfaces of torch, transformers and Lightning, each with the versions it was seen in.

What is here may change without notice: look here first when a new release breaks something. Imports nothing of ours,
and transformers, which is optional, only when it is asked for.
"""

from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed import _symmetric_memory as symmetric_memory  # registers torch.ops.symm_mem

__all__ = [
    "all_gather_single",
    "collect_random_state",
    "functional_collectives",
    "reduce_scatter_single",
    "set_random_state",
    "symmetric_memory",
]

all_gather_single: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Called ``all_gather_into_tensor`` until torch 2.12."""

reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""Called ``reduce_scatter_tensor`` until torch 2.12."""


def collect_random_state() -> dict[str, Any]:
    """Collect the states of Python's, NumPy's and torch's random number generators (Lightning 2.6)."""
    state: dict[str, Any] = _collect_rng_states(include_cuda=torch.cuda.is_initialized())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`collect_random_state` collected."""
    _set_rng_states(state)
