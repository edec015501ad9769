"""Features of the loops: hooks, schedulers, callbacks that watch and stop, and runs one after another."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    Timer,
)
from lightning.pytorch.core.hooks import ModelHooks
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError, SumMetric

from lightning_autotp import AutoTPStrategy
from tests.helpers.features.frame import Feature, Recorded
from tests.helpers.models import next_token_loss, tiny_llama
from tests.helpers.small_nets import strategy, trainer

# ---- hooks

_QUIET = {"state_dict", "load_state_dict", "state_key", "configure_sharded_model"}


def _noting(name: str, base: type) -> Any:
    own = getattr(base, name)

    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.noted.append(name)
        return own(self, *args, **kwargs)

    return hook


def _hooks_of(base: type, beside: tuple[str, ...] = ()) -> dict[str, Any]:
    names = [n for n in vars(base) if not n.startswith("_") and callable(getattr(base, n)) and n not in _QUIET]
    return {name: _noting(name, base) for name in (*names, *beside)}


class Noting(type("Noting", (Callback,), _hooks_of(Callback))):  # type: ignore[misc]
    """Notes the order of a callback's hooks."""

    def __init__(self) -> None:
        self.noted: list[str] = []


_OF_MODULES = ("configure_optimizers", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "backward")


class Hooked(Recorded):
    """Notes the order of its own hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []


for _name in [n for n in vars(ModelHooks) if n.startswith(("on_", "configure_m"))]:
    setattr(Hooked, _name, _noting(_name, LightningModule))
for _name in _OF_MODULES:
    setattr(Hooked, _name, _noting(_name, Recorded))


def _all_stages(run: Trainer, model: Any, directory: Path) -> Any:
    run.validate(model, verbose=False)
    run.fit(model)
    run.test(model, verbose=False)
    run.predict(model)
    (noting,) = (one for one in run.callbacks if isinstance(one, Noting))  # type: ignore[attr-defined]
    return {"callback": ", ".join(noting.noted), "module": ", ".join(model.noted)}


def _resumed(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    path = directory / "saved.ckpt"
    run.save_checkpoint(path)
    (noting,) = (one for one in run.callbacks if isinstance(one, Noting))  # type: ignore[attr-defined]
    noting.noted, model.noted = [], []
    run.fit_loop.max_epochs = 2
    run.fit(model, ckpt_path=path, weights_only=False)
    return {"callback": ", ".join(noting.noted), "module": ", ".join(model.noted)}


# ---- schedulers


class Scheduled(Recorded):
    """With a schedule of its learning rate.

    Args:
        kind: ``step``, ``epoch`` or ``plateau``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        made: dict[str, Any] = {
            "step": lambda: {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"},
            "epoch": lambda: {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)},
            "plateau": lambda: {
                "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
                "monitor": "val_loss",
            },
        }
        return {"optimizer": optimizer, "lr_scheduler": made[self.kind]()}


def _with_rates(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    return [float(group["lr"]) for group in run.optimizers[0].param_groups]


# ---- callbacks that watch


def _stopped_at(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    return run.current_epoch, run.global_step


def _best(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    saver: Any = run.checkpoint_callback
    names = sorted(Path(path).name for path in saver.best_k_models)
    run.test(model, ckpt_path="best", verbose=False)
    return {"names": ", ".join(names), "best": Path(saver.best_model_path).name, "score": saver.best_model_score}


class LastRates(Callback):
    """Keeps what was logged of rates."""

    rates: list[float]

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self.rates = [float(v) for n, v in sorted(trainer.callback_metrics.items()) if n.startswith("lr-")]


def _monitored(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    return [one.rates for one in run.callbacks if isinstance(one, LastRates)][0]  # type: ignore[attr-defined]


def _found_rate(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    (finder,) = (one for one in run.callbacks if isinstance(one, LearningRateFinder))  # type: ignore[attr-defined]
    assert finder.optimal_lr is not None
    return {"losses": [float(x) for x in finder.optimal_lr.results["loss"][-4:]], "lr": float(model.lr)}


class WithRate(Recorded):
    lr = 1e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Writer(BasePredictionWriter):
    """Writes each prediction into a file of its own; where two would write the same one it is an error."""

    def __init__(self, directory: Path) -> None:
        super().__init__("batch_and_epoch")
        self.directory = directory

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *rest: Any) -> None:
        plugin, number = trainer.strategy, rest[1]
        with (self.directory / f"batch-{number}-{getattr(plugin, 'dp_rank', 0)}").open("x") as file:
            file.write(str(len(prediction)))

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
        with (self.directory / f"epoch-{getattr(trainer.strategy, 'dp_rank', 0)}").open("x") as file:
            file.write(str(len(predictions)))


def _written(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    run.predict(model, return_predictions=False)
    run.strategy.barrier()
    files = {path.name: int(path.read_text()) for path in directory.iterdir() if path.name.startswith(("b", "e"))}
    rows = sum(count for name, count in files.items() if name.startswith("batch"))
    return rows, len({name.rpartition("-")[0] for name in files})


def _predictions(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    found: Any = run.predict(model)
    return {"number": len(found), "mean": float(run.strategy.reduce(torch.cat(found).square().mean()))}


# ---- metrics


class Measured(Recorded):
    """Logs torchmetrics, of steps and epochs, with and without ``sync_dist``."""

    def __init__(self) -> None:
        super().__init__()
        self.average, self.squared, self.total = MeanMetric(), MeanSquaredError(), SumMetric()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        out = self.net(batch)
        self.average.update(out.mean())
        self.squared(out, batch.flip(-1))
        self.total.update(out.sum())
        self.log("mean", self.average)
        self.log("squared", self.squared, on_step=False, on_epoch=True)
        self.log("rows", float(len(batch)), reduce_fx="sum", sync_dist=True)
        self.log("sum", self.total)
        self.log("val_loss", self.loss(batch), sync_dist=True)


# ---- callbacks that change what trains


class Backbone(Recorded):
    """A backbone that is frozen first, and what trains from the start."""

    @property
    def backbone(self) -> Any:
        """What is frozen."""
        return self.net.down

    def configure_optimizers(self) -> Any:
        rest = [*self.net.up.parameters(), *self.net.norm.parameters()]
        return torch.optim.AdamW(rest, lr=0.01, eps=1e-5)


def _by_another_trainer(run: Trainer, model: Any, directory: Path) -> Any:
    """A second fit by a Trainer and a strategy of their own, and a third after a test."""
    run.fit(model)
    for _ in range(2):
        plugin = run.strategy
        other = strategy(plugin.tp_size) if isinstance(plugin, AutoTPStrategy) else "auto"
        again = trainer(other, **({} if isinstance(plugin, AutoTPStrategy) else {"devices": 1}))
        again.fit(model)
        again.test(model, verbose=False)


class Students(Recorded):
    """Learns from a model that a run of another size has trained."""

    teacher: Any

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        with torch.no_grad():
            wanted = self.teacher[0].net(batch)
        return self.keep(torch.nn.functional.mse_loss(self.net(batch), wanted))


def _teaches(run: Trainer, model: Any, directory: Path) -> Any:
    teacher = Recorded()
    size = run.world_size if run.strategy.__class__ is AutoTPStrategy else 1
    first = strategy(2 if run.strategy.config.size == 4 else 1) if size > 1 else "auto"  # type: ignore[attr-defined]
    trainer(first, **({} if size > 1 else {"devices": 1})).fit(teacher)
    model.teacher = [teacher.eval()]
    run.fit(model)


class Asking(Recorded):
    """Asks all processes for something in its step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if dist.is_initialized() and self.trainer.world_size > 1:
            everyones = [torch.zeros_like(loss) for _ in range(dist.get_world_size())]
            dist.all_gather(everyones, loss.detach())
            loss = loss + 0 * torch.stack(everyones).mean()
        return self.keep(loss)


# ---- generation


class Generating(Recorded):
    """Generates in its validation and predict steps."""

    def __init__(self) -> None:
        super().__init__(partial(tiny_llama, layers=1, hidden=32, heads=4, kv_heads=4, vocab=64))

    def loss(self, batch: Tensor) -> Tensor:
        return next_token_loss(self.net(self.tokens(batch)).logits, self.tokens(batch))

    def tokens(self, batch: Tensor) -> Tensor:
        """Some tokens ``[B, 8]`` for rows."""
        return (batch.abs() * 20).long() % 64

    def generated(self, batch: Tensor, **options: Any) -> Tensor:
        """The tokens that follow, as floats to be averaged."""
        options = {"do_sample": False, "use_cache": True, "max_new_tokens": 4, "pad_token_id": 0} | options
        found: Tensor = self.net.generate(self.tokens(batch), **options)
        return found[:, 8:].float()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.log("generated", self.generated(batch).mean(), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.generated(batch, num_beams=2)


def _generates(run: Trainer, model: Any, directory: Path) -> Any:
    result = _predictions(run, model, directory)
    torch.manual_seed(5)
    return result | {"after": model.generated(torch.ones(3, 8), do_sample=True)}


# ---- runs one after another


def _before_and_after(run: Trainer, model: Any, directory: Path) -> Any:
    before = run.validate(model, verbose=False)
    run.fit(model)
    return before, run.test(model, verbose=False)


def _then_test(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    return run.test(model, verbose=False)


def _again(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    run.fit_loop.max_epochs = 2
    run.fit(model)


def _overfit(run: Trainer, model: Any, directory: Path) -> Any:
    run.fit(model)
    return run.num_training_batches


EPOCHS = {"max_epochs": 3}

LOOPS: dict[str, Feature] = {
    "hooks": Feature(Hooked, lambda d: {"callbacks": [Noting()]}, run=_all_stages),
    "hooks-of-a-resumed-run": Feature(Hooked, lambda d: {"callbacks": [Noting()]}, run=_resumed),
    "lr-step": Feature(partial(Scheduled, "step"), run=_with_rates),
    "lr-epoch": Feature(partial(Scheduled, "epoch"), lambda d: EPOCHS, run=_with_rates),
    "lr-plateau": Feature(partial(Scheduled, "plateau"), lambda d: EPOCHS, run=_with_rates),
    "early-stopping": Feature(
        options=lambda d: {"max_epochs": 6, "callbacks": [EarlyStopping("val_loss", min_delta=0.3, patience=1)]},
        run=_stopped_at,
    ),
    "model-checkpoint": Feature(
        options=lambda d: {
            **EPOCHS,
            "enable_checkpointing": True,
            "callbacks": [ModelCheckpoint(d, "{epoch}", monitor="val_loss", save_top_k=2)],
        },
        run=_best,
    ),
    "lr-monitor": Feature(
        partial(Scheduled, "step"),
        lambda d: {"logger": CSVLogger(d), "callbacks": [LearningRateMonitor("step"), LastRates()]},
        run=_monitored,
    ),
    "accumulation": Feature(options=lambda d: {"accumulate_grad_batches": 2, "max_epochs": 2}),
    "accumulation-scheduler": Feature(
        options=lambda d: {**EPOCHS, "callbacks": [GradientAccumulationScheduler({0: 2, 1: 3, 2: 1})]}
    ),
    "lr-finder": Feature(
        WithRate,
        lambda d: {"callbacks": [LearningRateFinder(num_training_steps=5, early_stop_threshold=None)]},
        run=_found_rate,
        replicas=False,  # each looks at its own losses, as in Lightning's DDP
    ),
    "timer": Feature(options=lambda d: {"callbacks": [Timer("00:01:00:00")]}),
    "prediction-writer": Feature(options=lambda d: {"callbacks": [Writer(d)]}, run=_written),
    "predictions": Feature(run=_predictions),
    "overfit-batches": Feature(options=lambda d: {"overfit_batches": 2, "max_epochs": 3}, run=_overfit),
    "torchmetrics": Feature(Measured, run=_then_test),
    "validate-fit-test": Feature(run=_before_and_after),
    "backbone-finetuning": Feature(
        Backbone, lambda d: {**EPOCHS, "callbacks": [BackboneFinetuning(1, lambda epoch: 1.5, verbose=False)]}
    ),
    "batch-size-finder": Feature(
        options=lambda d: {"callbacks": [BatchSizeFinder()]}, refused="not supported with distributed strategies"
    ),
    "pruning": Feature(
        options=lambda d: {"callbacks": [ModelPruning("l1_unstructured", amount=0.3)]}, refused="tensor parallelism"
    ),
    "other-trainers": Feature(run=_by_another_trainer),
    "teacher-of-another-size": Feature(Students, run=_teaches),
    "collectives-of-ones-own": Feature(Asking),
    "generate": Feature(Generating, strategy={"partition_config": None}, run=_generates),
    "fit-again": Feature(run=_again),
}
