"""ZeRO's parts of parameters and optimizer states, in flat tensors of groups, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_autotp.checkpoint.foreign.deepspeed_files import Files, load_dict
from lightning_autotp.checkpoint.safe_load import DamagedError

Rank = tuple[int, int]
"""Tensor parallel and data parallel rank."""


@dataclass(frozen=True)
class _Run:
    """A run of a flat tensor: of which group, where it begins and how long it is."""

    group: int
    start: int
    length: int


@dataclass(frozen=True)
class Fragments:
    """Where each parameter's values are.

    Args:
        runs: for each rank, by name.
        flat: for each rank and entry, the flat tensor of each group; of ``step`` a number.
        shapes: for each tensor parallel rank, by name.
    """

    runs: Mapping[Rank, Mapping[str, _Run]]
    flat: Mapping[Rank, Mapping[str, list[Any]]]
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]]

    @property
    def names(self) -> list[str]:
        """The parameters that are in an optimizer."""
        return list(self.shapes[0])

    @property
    def entries(self) -> set[str]:
        """The entries of the optimizer's state that are there for all groups, and ``fp32``."""
        return {e for e, values in self.flat[0, 0].items() if values and all(v is not None for v in values)}

    def shape(self, name: str, tp_rank: int) -> tuple[int, ...]:
        """That of the part of a tensor parallel rank."""
        return self.shapes[tp_rank][name]

    def dtype(self, name: str, entry: str) -> torch.dtype:
        """That of an entry."""
        run = next(runs[name] for runs in self.runs.values() if name in runs)
        value = self.flat[0, 0][entry][run.group]
        return value.dtype if isinstance(value, Tensor) else torch.float32

    def read(self, name: str, entry: str, tp_rank: int) -> Tensor:
        """The part of a tensor parallel rank, from those of all data parallel ranks."""
        ranks = sorted(rank for rank in self.runs if rank[0] == tp_rank and name in self.runs[rank])
        if entry == "step":
            value = self.flat[ranks[0]][entry][self.runs[ranks[0]][name].group]
            return torch.as_tensor(value, dtype=torch.float32).reshape(()).clone()  # optimizers count in place
        parts = []
        for rank in ranks:
            run = self.runs[rank][name]
            parts.append(self.flat[rank][entry][run.group].narrow(0, run.start, run.length))
        flat, shape = torch.cat(parts), self.shape(name, tp_rank)
        if flat.numel() != prod(shape):
            raise DamagedError(f"{name}: ZeRO's parts have {flat.numel()} numbers of {prod(shape)}.")
        return flat.reshape(shape)


def fragments_of(files: Files, held: Mapping[Rank, Mapping[str, Any]], unsafe: bool) -> Fragments:
    """Read which parts there are, of ZeRO 1, 2 or 3.

    Raises:
        ValueError: if a file is damaged, could run code, or does not say where parameters are in it.
    """
    groups = {tp: _groups(held[tp, 0], files) for tp in range(files.tp_size)}
    runs: dict[Rank, dict[str, _Run]] = {}
    flat: dict[Rank, dict[str, list[Any]]] = {}
    for rank, file in sorted(files.optimizers.items()):
        state = load_dict(file, unsafe, "optimizer_state_dict")["optimizer_state_dict"]
        if "fp32_flat_groups" in state:
            runs[rank] = _of_stage_3(groups[rank[0]], rank[1], files.dp_size)
            weights, inner = state["fp32_flat_groups"], state["optimizer_state_dict"]
        elif "param_slice_mappings" in state:
            runs[rank] = {
                name: _Run(at, where.start, where.numel)
                for at, group in enumerate(state["param_slice_mappings"])
                for name, where in group.items()
            }
            weights, inner = state["single_partition_of_fp32_groups"], state["base_optimizer_state"]
        else:
            raise ValueError(
                f"{file} does not say where parameters are in it: it is of an old DeepSpeed. Make it whole with the"
                " `zero_to_fp32.py` that lies beside the checkpoint."
            )
        states = inner["state"] if isinstance(inner, dict) else {}
        own = [states.get(at, {}) for at in range(len(weights))]
        entries = ("exp_avg", "exp_avg_sq", "step")
        flat[rank] = {"fp32": list(weights), **{entry: [state.get(entry) for state in own] for entry in entries}}
    shapes = {tp: {name: shape for group in found for name, shape in group.items()} for tp, found in groups.items()}
    return Fragments(runs, flat, shapes)


def _groups(model: Mapping[str, Any], files: Files) -> list[dict[str, tuple[int, ...]]]:
    if not model.get("param_shapes"):
        raise DamagedError(f"{files.folder}: the model's file does not say which parameters the optimizer has.")
    return [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]


def _of_stage_3(groups: list[dict[str, tuple[int, ...]]], rank: int, size: int) -> dict[str, _Run]:
    """Each parameter in as many equal runs as there are ranks, the last ones padded; one after the other."""
    runs = {}
    for at, group in enumerate(groups):
        start = 0
        for name, shape in group.items():
            length = -(-prod(shape) // size)
            own = max(0, min(length, prod(shape) - rank * length))
            runs[name] = _Run(at, start, own)
            start += length
    return runs
