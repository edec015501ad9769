"""Which of a Trainer's arguments must be the same on all ranks."""

import inspect
import os
from datetime import timedelta
from typing import Any, Optional

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelSummary, ProgressBar

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.errors import Processes
from lightning_autotp.distributed.same import on, require_same
from lightning_autotp.recipe.facts import SAME_JOB, job_facts, text

_OWN = {
    *("default_root_dir", "logger", "profiler", "enable_progress_bar", "enable_model_summary"),
    *("callbacks", "plugins", "strategy", "accelerator"),
}
"""Arguments that ranks may have their own of, or that are looked at otherwise."""

_PLAIN = (bool, int, float, str, timedelta, type(None))
_SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


def require_one_job(config: TPTrainingConfig, module: Optional[LightningModule]) -> None:
    """Compare packages, ``config`` and the Trainer's arguments on all processes, and take rank 0's seeds on all.

    Raises:
        DisagreementError: on all of them, with what differs.
    """
    trainer = None if module is None else module._trainer
    require_same(job_facts(config) | ({} if trainer is None else trainer_facts(trainer)), SAME_JOB)
    _share_seeds()


def trainer_facts(trainer: Trainer) -> dict[str, str]:
    """What is plain data of the arguments that ``trainer`` was made with, its precision and its callbacks."""
    holders = (trainer, trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer._accelerator_connector)
    facts = {
        "Trainer(precision)": text(trainer.precision),
        "Trainer(accelerator)": type(trainer.accelerator).__qualname__,
        "the entry point": text(trainer.state.fn),
    }
    for name in inspect.signature(Trainer.__init__).parameters:
        if name in _OWN or name == "self":
            continue
        for key in (name, f"_{name}", f"_{name}_flag"):
            found = next((vars(h)[key] for h in holders if key in vars(h)), _OWN)
            found = next((getattr(h, key) for h in holders if hasattr(type(h), key)), found) if found is _OWN else found
            if isinstance(found, _PLAIN):
                facts[f"Trainer({name})"] = text(found)
                break
    callbacks = [c for c in trainer.callbacks if not isinstance(c, (ProgressBar, ModelSummary))]  # type: ignore[attr-defined]
    facts["Trainer(callbacks)"] = ", ".join(c.state_key for c in callbacks)
    for number, callback in enumerate(callbacks):
        facts |= _arguments(callback, f"callback {number}, {type(callback).__qualname__}")
    return facts


def _arguments(callback: Callback, where: str) -> dict[str, str]:
    """What a callback was given that it keeps under the same name; paths may be each rank's own."""
    names = inspect.signature(type(callback).__init__).parameters
    kept = {name: vars(callback)[name] for name in names if name in vars(callback)}
    return {f"{name} of {where}": text(v) for name, v in kept.items() if isinstance(v, (bool, int, float, type(None)))}


def _share_seeds() -> None:
    """Take the seeds of ``seed_everything`` from the first rank, for samplers and workers are seeded with them."""
    mine: dict[str, Optional[str]] = {name: os.environ.get(name) for name in _SEEDS}
    everyones: list[Any] = Processes().gather(mine)
    for name, wanted in everyones[0].items():
        ranks: dict[Optional[str], list[int]] = {}
        for rank, seeds in enumerate(everyones):
            ranks.setdefault(seeds[name], []).append(rank)
        if len(ranks) == 1:
            continue
        told = ", ".join(f"{'none' if seed is None else seed} on {on(held)}" for seed, held in ranks.items())
        rank_zero_warn(f"seed_everything: the ranks have different seeds ({name} is {told}); rank 0's is taken on all.")
        if wanted is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = wanted
