"""A step of a copy: what it computes, gradients as they are when its optimizers step among it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_autotp.compat import tree_leaves, tree_map
from lightning_autotp.model_sources.factory import loss_of
from lightning_autotp.proof.live import attributes
from lightning_autotp.proof.stand_in import StandInTrainer
from lightning_autotp.proof.watched import Decisions, watch
from lightning_autotp.training.norms import Norms

Gradients = dict[str, Tensor]


@dataclass
class Seen:
    """What one run of a step gave.

    Args:
        model: the model that is run.
        complete: makes partial gradients complete, as it is done before an optimizer steps.
        cast: what is done to the batch.
    """

    model: nn.Module
    complete: Callable[[], None] = lambda: None
    cast: Callable[[Any], Any] = lambda batch: batch
    losses: list[Tensor] = field(default_factory=list)
    gradients: list[Gradients] = field(default_factory=list)
    incomplete: list[Gradients] = field(default_factory=list)
    """The gradients before they were completed."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """What was returned and logged."""
    norms: Optional[Norms] = None
    """Norms of a sharded model's gradients and weights."""
    backward: bool = True
    """Whether backward passes are run; without, ``losses`` can be differentiated."""

    def backward_ended(self) -> None:
        """Complete the gradients."""
        self.incomplete.append(self._held(None))
        self.complete()

    def optimizer_steps(self, parameters: Optional[Sequence[nn.Parameter]] = None) -> None:
        """Take the gradients of ``parameters``, or of all, off the model."""
        chosen = None if parameters is None else {id(parameter) for parameter in parameters}
        self.gradients.append(self._held(chosen))
        for parameter in self.model.parameters():
            if chosen is None or id(parameter) in chosen:
                parameter.grad = None

    def _held(self, chosen: Optional[set[int]]) -> Gradients:
        return {
            name: parameter.grad.detach().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and (chosen is None or id(parameter) in chosen)
        }


Step = Callable[[Seen], None]
"""Runs a step of ``seen.model`` and puts what it gives into ``seen``."""


def loss_step(call: Callable[[nn.Module, Any], Tensor], batch: Any) -> Step:
    """The step of a loop of one's own: a loss, and its gradients."""

    def run(seen: Seen) -> None:
        seen.model.train()
        loss = call(seen.model, seen.cast(batch))
        seen.losses.append(loss.detach() if seen.backward else loss)
        if not seen.backward:
            return
        loss.backward()
        seen.backward_ended()
        seen.optimizer_steps()

    return run


def loss_of_batch(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model that is called with a batch: what it returns, or its ``loss``."""
    if isinstance(batch, Mapping):
        return loss_of(model(**batch))
    return loss_of(model(*batch) if isinstance(batch, (list, tuple)) else model(batch))


def loss_of_call(model: nn.Module, batch: Any) -> Tensor:
    """The loss that stands for an unknown one: of a model's call with ``(args, kwargs)``, what it puts out is weighted.

    Raises:
        ValueError: if it puts out nothing that has gradients.
    """
    args, kwargs = batch
    output: Any = model(*args, **kwargs)
    loss: Optional[Tensor] = output.get("loss") if isinstance(output, Mapping) else None
    if loss is not None:
        return loss
    draw = torch.Generator().manual_seed(0)
    found = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    if not found:
        raise ValueError("the model's call puts out nothing that has gradients; call `prove` with a step of the loop.")
    parts = [(x * torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)).sum() for x in found]
    return torch.stack(parts).sum()


@dataclass(frozen=True)
class LightningStep:
    """The steps of a LightningModule as a Trainer calls them; training flags are left as they are.

    Args:
        stage: ``training``, ``validation``, ``test`` or ``predict``.
        args: what the step is called with, the batch first.
        trainer: the run's Trainer, None before there is one.
        names: the run's own parameters by their names.
        decisions: notes what is decided by numbers that change from step to step.
        counters: numbers of the module's own that do, by module path and name.
    """

    stage: str
    args: tuple[Any, ...]
    trainer: Any = None
    names: Mapping[int, str] = field(default_factory=dict)
    decisions: Decisions = field(default_factory=Decisions)
    counters: tuple[tuple[str, str], ...] = ()

    def __call__(self, seen: Seen) -> None:
        """Run the step.

        Raises:
            ValueError: if a training step gives no loss.
        """
        module: Any = seen.model
        decisions = Decisions(self.decisions.flipped)  # ranks run in turns, each decides for itself
        before = attributes(module)
        with _trained_by(self, module, seen, decisions) as trainer:
            batch, *rest = self.args
            counted = [watch(value, name, decisions) for value, name in zip(rest, ("batch_idx", "dataloader_idx"))]
            with torch.set_grad_enabled(self.stage == "training"):
                output = getattr(module, f"{self.stage}_step")(seen.cast(batch), *counted)
            if self.stage != "training":
                _take(output, "the returned value", seen.outputs)
            elif module.automatic_optimization:
                self._optimize(module, output, trainer, seen)
            else:
                seen.losses.extend(trainer.losses)
                seen.backward_ended()
                seen.optimizer_steps()
                if not seen.losses:
                    raise ValueError("training_step called no manual_backward; there is no loss to look at.")
        self.decisions.made[:] = decisions.made
        self.decisions.changed[:] = [
            place
            for place, value in attributes(module).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value != before.get(place, value)
        ]

    def _optimize(self, module: Any, output: Any, trainer: StandInTrainer, seen: Seen) -> None:
        """What a Trainer does with the loss of a training step, hooks of the module included."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError("training_step returned no loss; there is nothing to look at.")
        seen.losses.append(loss.detach() if seen.backward else loss)
        if not seen.backward:
            return
        optimizer = trainer.optimizers[0]
        module.on_before_backward(loss)
        module.backward(loss)
        module.on_after_backward()
        seen.backward_ended()
        module.on_before_optimizer_step(optimizer)
        if type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping:
            real = self.trainer
            value, algorithm = (getattr(real, f"gradient_clip_{name}", None) for name in ("val", "algorithm"))
            module.configure_gradient_clipping(optimizer, value, algorithm)
        seen.optimizer_steps()


@contextmanager
def _trained_by(step: LightningStep, module: Any, seen: Seen, decisions: Decisions) -> Iterator[StandInTrainer]:
    """Inside, every LightningModule in ``module`` has the stand-in for a Trainer, and what it logs is kept."""

    def stepped(parameters: list[nn.Parameter]) -> None:
        seen.backward_ended()
        seen.optimizer_steps(parameters)

    trainer = StandInTrainer(module, step.trainer, step.names, decisions, stepped, seen.norms, backward=seen.backward)

    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        _take(value, f"the logged {name!r}", seen.outputs)

    def log_dict(values: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for name, value in values.items():
            log(name, value)

    for path, name in step.counters:
        counting = module.get_submodule(path)
        setattr(counting, name, watch(getattr(counting, name), f"{path}.{name}".lstrip("."), decisions))
    inside = [one for one in module.modules() if isinstance(one, LightningModule)]
    for one in inside:
        one._trainer = trainer  # type: ignore[assignment]
        one.log, one.log_dict = log, log_dict  # type: ignore[assignment,method-assign]
    try:
        yield trainer
    finally:
        for one in inside:
            one._trainer = None
            del one.log, one.log_dict


def _take(value: Any, name: str, into: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        into[name] = value.detach()
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            _take(entry, f"{name}[{key!r}]", into)
    elif isinstance(value, (list, tuple)):
        for at, entry in enumerate(value):
            _take(entry, f"{name}[{at}]", into)


def first_rows(batch: Any, rows: int) -> Any:
    """The first ``rows`` of all tensors of a batch that have as many rows as most of them; the batch if none have."""
    sizes: list[int] = []
    tree_map(lambda value: sizes.append(len(value)) if isinstance(value, Tensor) and value.ndim else None, batch)
    size = max(sizes, key=sizes.count, default=0)

    def shortened(value: Any) -> Any:
        return value[:rows] if isinstance(value, Tensor) and value.ndim and len(value) == size > rows else value

    return tree_map(shortened, batch)
