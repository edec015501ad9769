"""Lightning's summary of a model that ranks share: the full model's numbers, and what this rank holds of it."""

from collections.abc import Mapping
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import LayerSummary, get_human_readable_count
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary as Summary
from torch import nn
from typing_extensions import override

from lightning_autotp.distributed.dp_shards import local_rows
from lightning_autotp.plans.plan import ShardingPlan


def summarize_the_full_model(trainer: Trainer, module: nn.Module, plan: ShardingPlan) -> None:
    """Have the trainer's summaries of ``module`` count full parameters."""
    layouts = plan.layouts
    sizes = {}
    for name, parameter in module.named_parameters():
        layout, size = layouts.get(name), 1
        for length in parameter.shape if layout is None else layout.shape:
            size *= length
        sizes[id(parameter)] = size

    def summary(callback: Any, trainer: Trainer, of: LightningModule) -> Summary:
        return FullSummary(of, callback._max_depth, sizes)

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelSummary):
            vars(callback)["_summary"] = MethodType(summary, callback)


class FullSummary(Summary):
    """A summary with one more column: what this rank holds.

    Args:
        model: the sharded module.
        max_depth: as Lightning has it.
        sizes: the numbers in each full parameter, by the identity of what this rank holds of it.
    """

    def __init__(self, model: LightningModule, max_depth: int, sizes: Mapping[int, int]) -> None:
        self._sizes = sizes
        super().__init__(model, max_depth)

    def _count(self, module: nn.Module, *, trainable: bool = False) -> int:
        held = module.parameters()
        return sum(self._sizes.get(id(p), p.numel()) for p in held if p.requires_grad or not trainable)

    @property
    @override
    def param_nums(self) -> list[int]:
        return [self._count(layer._module) for layer in self._layers]

    @property
    @override
    def total_parameters(self) -> int:
        return self._count(self._model)

    @property
    @override
    def trainable_parameters(self) -> int:
        return self._count(self._model, trainable=True)

    @property
    def _layers(self) -> list[LayerSummary]:
        return list(self._layer_summary.values())

    @override
    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        data = super()._get_summary_data()
        held = [sum(local_rows(p).numel() for p in layer._module.parameters()) for layer in self._layers]
        own = [get_human_readable_count(count) for count in held]
        rows = len(data[0][1])
        at = next(number for number, (title, _) in enumerate(data) if title == "Params")
        # the title that Lightning's rich table knows
        data.insert(at + 1, ("Params per Device", own + ["n/a"] * (rows - len(own))))
        return data
