"""What is logged is alike on the ranks that share a model, of which only the first one's values are written."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Trainer

from lightning_autotp.distributed.mesh import Mesh

_TOLERANCE = 1e-4


class LoggedLook:
    """Warns of logged values that differ on ranks that share a model, at the first of each name.

    Args:
        mesh: this process's place.
        enabled: whether anything is compared.
    """

    def __init__(self, mesh: Mesh, enabled: bool) -> None:
        self.mesh, self.enabled = mesh, enabled and mesh.tp_size > 1
        self._steps = 0
        self._warned: set[str] = set()
        self._ends: dict[str, int] = {}

    def before_step(self, trainer: Trainer) -> None:
        """Compare what was logged in steps 1, 2, 4, 8 and so on; every rank must call it before every step."""
        if self._steps and not self._steps & (self._steps - 1):
            self._compare(trainer)
        self._steps += 1

    def at_end(self, trainer: Trainer, stage: str) -> None:
        """Compare what was logged, at the first two ends of each stage; the first may be a sanity check."""
        self._ends[stage] = self._ends.get(stage, 0) + 1
        if self._ends[stage] <= 2:
            self._compare(trainer)

    def _compare(self, trainer: Trainer) -> None:
        if not self.enabled:
            return
        everyones = self.mesh.collectives.gather_objects(_numbers(trainer.callback_metrics))
        first = everyones[0]
        for name in [name for name in first if name not in self._warned]:
            values = [theirs[name] for theirs in everyones if name in theirs]
            if not all(_alike(first[name], value) for value in values):
                self._warned.add(name)
                shown = ", ".join(f"{value:.6g}" for value in values[:4])
                rank_zero_warn(
                    f"the ranks that share a model logged different values of {name!r} ({shown}), of which only the"
                    " first is written. Of weights and gradients each rank holds a part: for norms of the whole model"
                    " call `trainer.strategy.grad_norm()`, `grad_norms()` and `parameter_norm()`; a time or the memory"
                    " of a process may differ, and is the first one's."
                )


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) or isinstance(value, torch.Tensor) and value.numel() == 1
    }


def _alike(one: float, other: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return one == other or math.isnan(one) and math.isnan(other)
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other))
