"""Averages of weights in checkpoints are full tensors: they resume at any sizes, from both forms, in plain Trainers."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_autotp import AutoTPStrategy, from_pretrained
from lightning_autotp.checkpoint.other_states import STATES
from lightning_autotp.cli.export import main as export
from tests.helpers.closeness import assert_close
from tests.helpers.corners import corners_of
from tests.helpers.features.averages import KINDS, averages
from tests.helpers.features.frame import Recorded
from tests.helpers.models import LanguageModel, quiet_trainer, tiny_llama, token_loader
from tests.helpers.small_nets import alone, full_weights, strategy, trainer


def run(kind: str, plugin: Any, *, save: Path | None = None, resume: Path | None = None) -> dict[str, Tensor]:
    """Train for four epochs; the averages and the weights after that."""
    callbacks = [KINDS[kind]()]
    if save:
        callbacks.append(ModelCheckpoint(save.parent, save.stem, every_n_epochs=3, save_on_train_epoch_end=True))
    model = Recorded()
    options = {} if plugin else {"devices": 1}
    with contextlib.nullcontext() if plugin else alone():
        fitting = trainer(
            plugin or "auto", max_epochs=4, callbacks=callbacks, enable_checkpointing=bool(save), **options
        )
        fitting.fit(model, ckpt_path=resume, weights_only=None if plugin else False)
        found = {f"average {n}": t for n, t in averages(fitting, model).items()}
    return found | full_weights(model)


FORMS = ("directory", "file", "async")
CASES = corners_of(((kind, form) for kind in KINDS for form in FORMS), [("ema", "directory"), ("swa", "file")])


@pytest.mark.parametrize("kind,form", CASES)
@pytest.mark.ranks(4, timeout=120)
def test_averages_resume_at_any_size_and_in_a_plain_trainer(kind: str, form: str, tmp_path: Path) -> None:
    def plugin(size: int) -> Any:
        return strategy(size, save_distributed_checkpoint=form != "file", async_checkpoint=form == "async")

    ours, plain = tmp_path / "ours.ckpt", tmp_path / f"plain-{dist.get_rank()}.ckpt"
    want = run(kind, None, save=plain)
    assert_close(run(kind, None, resume=plain), want, 1e-6, "weights of the plain run that goes on")
    assert_close(run(kind, plugin(2), save=ours), want, 1e-4, "weights")
    assert_close(run(kind, plugin(4), resume=ours), want, 1e-4, "weights of the resumed run")
    dist.barrier()
    everyones = tmp_path / "plain-0.ckpt"
    assert_close(run(kind, plugin(4), resume=everyones), want, 1e-4, "weights of the plain run that goes on sharded")
    if form == "file":
        held = torch.load(ours, weights_only=False)
        assert held.pop(STATES)
        assert_close(run(kind, None, resume=ours), want, 1e-4, "weights of the run that goes on alone")


class Saving(Callback):
    """Saves after the third batch, and keeps what the weights and their averages are then."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            trainer.save_checkpoint(self.path)
            self.now, self.averages = full_weights(module), averages(trainer, module)


@pytest.mark.parametrize("form", ["directory", "file"])
@pytest.mark.ranks(2)
def test_both_the_averages_and_the_weights_are_exported(form: str, tmp_path: Path) -> None:
    saving = Saving(tmp_path / "run.ckpt")
    plugin = AutoTPStrategy(autotp_size=2, save_distributed_checkpoint=form == "directory")
    fitting = quiet_trainer(strategy=plugin, callbacks=[EMAWeightAveraging(decay=0.5), saving])
    fitting.fit(LanguageModel(tiny_llama, layers=1), token_loader(n=3))
    if dist.get_rank():
        return
    for state, want in (("state_dict", saving.averages), ("current_model_state", saving.now)):
        assert export([str(saving.path), str(tmp_path / state), "--state", state]) == 0
        found = load_file(tmp_path / state / "model.safetensors")
        assert all(torch.equal(found[name.removeprefix("model.")], tensor) for name, tensor in want.items())
    assert not torch.equal(*(one["model.lm_head.weight"] for one in (saving.averages, saving.now)))
    assert export([str(saving.path), str(tmp_path / "none"), "--state", "other"]) == 1


class Pretrained(LanguageModel):
    """Is on the meta device until it is sharded; with a plain Trainer it is read at once."""

    def __init__(self, path: Path, read: Any) -> None:
        super().__init__(torch.nn.Identity)
        self.path, self.read = path, read

    def configure_model(self) -> None:
        if isinstance(self.model, torch.nn.Identity):
            self.model = self.read(self.path).train()


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.ranks(2)
def test_averages_of_a_model_that_is_read_in_parts(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if dist.get_rank() == 0:
        tiny_llama(layers=1).save_pretrained(path)
    dist.barrier()

    def fit(model: LanguageModel, plugin: Any, **options: Any) -> dict[str, Tensor]:
        callbacks = [KINDS[kind]()]
        fitting = quiet_trainer(
            strategy=plugin, callbacks=callbacks, max_epochs=2, use_distributed_sampler=False, **options
        )
        fitting.fit(model, token_loader(n=3))
        return full_weights(model) | {f"average {n}": t for n, t in averages(fitting, model).items()}

    got = fit(Pretrained(path, partial(from_pretrained, LlamaForCausalLM)), AutoTPStrategy(autotp_size=2))
    with alone():
        want = fit(Pretrained(path, LlamaForCausalLM.from_pretrained), "auto", devices=1)
    assert_close(got, want, 1e-4, "weights and averages")
