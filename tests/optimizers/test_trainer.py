"""Optimizers that look at whole tensors, in the Trainer: the unsharded numbers, and state that reshards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_autotp.optimizers.whole import whole_steps
from tests.helpers.closeness import assert_close
from tests.helpers.rank_pool import run_ranks
from tests.helpers.small_nets import Net, Regressor, alone, full_weights, strategy, trainer, unsharded, weights


def _net() -> Net:
    return Net(hidden=12)


class Whole(Regressor):
    """Muon for matrices, Adafactor for the rest, one after the other, with a schedule of each."""

    def __init__(self, kind: str = "adafactor") -> None:
        super().__init__(_net, batch=8)
        self.kind = kind
        if kind == "two":
            self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if self.kind != "two":
            return loss
        optimizers: Any = self.optimizers()
        self.manual_backward(loss)
        for optimizer, scheduler in zip(optimizers, self.lr_schedulers()):  # type: ignore[arg-type]
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return None

    def configure_optimizers(self) -> Any:
        if self.kind == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3)
        if self.kind == "adafactor":
            optimizer = torch.optim.Adafactor(self.parameters(), lr=0.05)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        matrices = torch.optim.Muon([p for p in self.parameters() if p.ndim == 2], lr=0.02)
        rest = torch.optim.Adafactor([p for p in self.parameters() if p.ndim != 2], lr=0.05)
        both = [matrices, rest]
        return both, [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8) for optimizer in both]


@pytest.mark.parametrize("kind", ["adafactor", "two", "lbfgs"])
@pytest.mark.ranks(4)
def test_they_train_as_unsharded_with_replicas_schedules_and_clipping(kind: str) -> None:
    options: dict[str, Any] = {"gradient_clip_val": 0.1} if kind == "adafactor" else {}
    if kind == "adafactor":
        options["accumulate_grad_batches"] = 2
    model = Whole(kind)
    trainer(strategy(2), max_epochs=2, **options).fit(model)
    want = unsharded(Whole(kind), max_epochs=2, **options)
    assert_close(full_weights(model), want, 2e-5, what="weights")
    owned = [steps for o in model.trainer.optimizers if (steps := whole_steps(o)) is not None]
    shapes = {tuple(v.shape) for o in model.trainer.optimizers for p in o.state for v in [p]}
    assert owned and (8, 12) not in shapes, "parameters hold their parts again after a step"


def _fit(size: int | None, epochs: int, resume: Path | None, save: Path | None, directory: bool) -> Any:
    model = Whole("two")
    if size is None:
        with alone():
            return _saved(trainer("auto", devices=1, max_epochs=epochs), model, resume, save)
    run = trainer(strategy(size, save_distributed_checkpoint=directory), max_epochs=epochs)
    return _saved(run, model, resume, save)


def _saved(run: Trainer, model: Whole, resume: Path | None, save: Path | None) -> Any:
    run.fit(model, ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
    return full_weights(model) if hasattr(model, "_autotp_sharded") else weights(model)


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
def test_their_state_is_saved_whole_and_resumes_with_other_sizes(directory: bool, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_ranks(2, _fit, 2, 1, None, first, directory)
    got = run_ranks(4, _fit, 4, 2, first, second, directory)
    want = _fit(None, 3, None, None, directory)
    if not directory:
        assert_close(_fit(None, 3, second, None, directory), want, 2e-5, what="weights")
        _fit(None, 1, None, first, directory)  # and back: a plain Trainer's file
        run_ranks(4, _fit, 4, 2, first, second, directory)
    (again, *_) = run_ranks(2, _fit, 2, 3, second, None, directory)
    assert got and len(got) == 4
    assert_close(again, want, 2e-5, what="weights")
