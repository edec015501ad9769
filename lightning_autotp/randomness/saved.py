"""The states of random number generators in checkpoints, so that a resumed run draws what comes next."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_autotp.distributed.mesh import Mesh

RANDOM = "lightning_autotp_random_states"
"""Under which name a checkpoint has them: one state if all replicas are alike, else one a replica."""


def random_states(mesh: Mesh, device: torch.device) -> list[dict[str, Any]]:
    """The states of all replicas' generators, in plain types and tensors; every process must call it."""
    mine = _state(device)
    of_replicas = mesh.collectives.gather_objects(mine, "dp") if mesh.dp_size > 1 else [mine]
    digests = {_digest(state) for state in of_replicas}
    return of_replicas[:1] if len(digests) == 1 else of_replicas


def set_random_states(states: list[Mapping[str, Any]], mesh: Mesh, device: torch.device) -> None:
    """Go on from ``states``; of another number of replicas only if these were alike, else a warning says so."""
    if len(states) not in (1, mesh.dp_size):
        rank_zero_warn(
            f"the checkpoint is of {len(states)} replicas with random states of their own, and here are {mesh.dp_size}:"
            " random numbers begin anew."
        )
        return
    state = states[0] if len(states) == 1 else states[mesh.dp_rank]
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))


def _state(device: torch.device) -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state()
    name, keys, *rest = numpy_state
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(numpy.int64)), *map(_plain, rest)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _digest(state: Mapping[str, Any]) -> tuple[object, ...]:
    found: list[object] = []
    for entry in state.values():
        for value in entry if isinstance(entry, list) else [entry]:
            found.append(value.numpy().tobytes() if isinstance(value, torch.Tensor) else value)
    return tuple(found)
