"""What stands in a Trainer's place while a step is looked at: reads go through, what has effects does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_autotp.proof.watched import Decisions, watch
from lightning_autotp.training.norms import Norms

COUNTERS = ("global_step", "current_epoch", "fit_loop", "is_last_batch")
"""What of a Trainer changes while it runs."""


class Quiet:
    """Takes every call and answers nothing, as loggers and progress bars do here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


class StandInOptimizer(LightningOptimizer):
    """What ``self.optimizers()`` gives: it has the copy's parameters, changes none, and tells who steps.

    Args:
        real: the run's own optimizer, if there is one.
        groups: its parameter groups, with the copy's parameters.
        stepped: is called with the parameters at every step, which may then lose their gradients.
    """

    def __init__(self, real: Any, groups: list[dict[str, Any]], stepped: Callable[[list[nn.Parameter]], None]) -> None:
        self._real, self.param_groups, self._tell = real, groups, stepped

    @property
    def optimizer(self) -> Any:
        return self

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that it holds."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_real" or self._real is None:
            raise AttributeError(name)
        return getattr(self._real, name)

    def step(self, closure: Optional[Callable[[], Any]] = None, **kwargs: Any) -> Any:
        result = closure() if closure is not None else None
        self._tell(self.parameters)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def toggle_model(self, sync_grad: bool = True) -> Any:
        return nullcontext()


class StandInTrainer:
    """A Trainer to read from.

    Args:
        module: the copy that is run.
        real: the Trainer of the run; None where there is none yet.
        names: the run's own parameters by their names, with which its optimizers are found in the copy.
        decisions: notes what is decided by the run's counters.
        stepped: is called with an optimizer's parameters when it steps.
        norms: of a sharded copy.
        backward: whether to run the backward passes of manual optimization.
    """

    def __init__(
        self,
        module: LightningModule,
        real: Any,
        names: Mapping[int, str],
        decisions: Decisions,
        stepped: Callable[[list[nn.Parameter]], None],
        norms: Optional[Norms] = None,
        backward: bool = True,
    ) -> None:
        norms = norms or Norms(module)
        own = dict(module.named_parameters())
        optimizers = [
            StandInOptimizer(optimizer, _groups(optimizer.param_groups, names, own), stepped)
            for optimizer in (getattr(real, "optimizers", None) or ())
        ] or [StandInOptimizer(optimizer, optimizer.param_groups, stepped) for optimizer in _configured(module)]
        self._real, self._decisions, self._runs_backward = real, decisions, backward
        ours = getattr(real, "strategy", None)
        sizes = {name: getattr(ours, name, 1) for name in ("world_size", "dp_size", "cp_size", "tp_size")}
        ranks = {name: getattr(ours, name, 0) for name in ("global_rank", "dp_rank", "cp_rank", "tp_rank")}
        self.losses: list[Tensor] = []
        self.optimizers = optimizers
        self.lr_scheduler_configs = [SimpleNamespace(scheduler=Quiet()) for _ in optimizers]
        self.strategy = SimpleNamespace(
            _lightning_optimizers=optimizers,
            backward=self._backward,
            all_gather=lambda tensor, **_: tensor,
            reduce=lambda tensor, **_: tensor,
            barrier=lambda *_: None,
            broadcast=lambda value, *_: value,
            root_device=torch.device("cpu"),
            grad_norm=norms.grad_norm,
            grad_norms=norms.grad_norms,
            parameter_norm=norms.parameter_norm,
            **sizes,
            **ranks,
        )
        self.precision_plugin = SimpleNamespace(clip_gradients=lambda *_, **__: None)
        self.logger = Quiet()
        self.loggers = [self.logger]
        self.progress_bar_callback = None
        self.gradient_clip_val = self.gradient_clip_algorithm = None
        self.should_stop = False

    def _backward(self, loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.losses.append(loss.detach() if self._runs_backward else loss)
        if self._runs_backward:
            loss.backward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_real", "_decisions", "_runs_backward"):
            raise AttributeError(name)
        value = _BEFORE_A_RUN[name] if self._real is None and name in _BEFORE_A_RUN else getattr(self._real, name)
        return watch(value, f"trainer.{name}", self._decisions) if name in COUNTERS else value


def _configured(module: LightningModule) -> list[Optimizer]:
    """The optimizers of a copy, before a Trainer has made any; one of all parameters if it has none to give."""
    try:
        found: Any = module.configure_optimizers()
    except Exception:  # it may ask the Trainer for what is not known yet
        found = None
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], (list, tuple)):
        found = found[0]
    each = list(found) if isinstance(found, (list, tuple)) else [found]
    optimizers = [one["optimizer"] if isinstance(one, Mapping) else one for one in each]
    optimizers = [one.optimizer if isinstance(one, LightningOptimizer) else one for one in optimizers]
    if optimizers and all(isinstance(one, Optimizer) for one in optimizers):
        return optimizers
    return [torch.optim.SGD(list(module.parameters()), lr=1e-3)]


_BEFORE_A_RUN: dict[str, Any] = {
    **dict.fromkeys(("global_step", "current_epoch", "global_rank", "local_rank"), 0),
    **dict.fromkeys(("estimated_stepping_batches", "max_steps", "num_training_batches"), 1000),
    **dict.fromkeys(("accumulate_grad_batches", "world_size", "num_devices", "num_nodes"), 1),
    **dict.fromkeys(("is_global_zero", "training"), True),
    **dict.fromkeys(("sanity_checking", "validating", "testing", "predicting", "is_last_batch"), False),
    "max_epochs": 10,
    "log_every_n_steps": 50,
    "callback_metrics": {},
    "logged_metrics": {},
}
"""What a step may read of a Trainer where there is none yet."""


def _groups(
    groups: Iterable[Mapping[str, Any]], names: Mapping[int, str], own: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """An optimizer's groups with the parameters of the copy; those that it lacks (shortened lists) are left out."""

    def found(group: Mapping[str, Any]) -> list[nn.Parameter]:
        return [own[name] for name in (names.get(id(parameter), "") for parameter in group["params"]) if name in own]

    return [{**group, "params": found(group)} for group in groups]
