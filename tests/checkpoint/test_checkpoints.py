"""Checkpoints through the Trainer: the unsharded model's on disk, and a resumed run goes on as if never stopped.

``trained`` below runs on each rank and returns the full weights, so that runs of different sizes can be compared.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy
from lightning_autotp.randomness.saved import RANDOM
from tests.helpers import models
from tests.helpers.checkpoints import Scheduled, trained
from tests.helpers.closeness import assert_close
from tests.helpers.models import LanguageModel, quiet_trainer, token_loader
from tests.helpers.rank_pool import run_ranks
from tests.helpers.small_nets import (
    Regressor,
    Rows,
    alone,
    plugin_of,
    strategy,
    trainer,
    weights,
)

# ---- resuming


@cache
def uninterrupted(ranks: int, size: int | None, epochs: int) -> dict[str, Tensor]:
    full: dict[str, Tensor] = run_ranks(ranks, trained, size, epochs)[0]
    return full


# four data parallel ranks would not do: DDP orders their sums anew after its first step, also when it starts again
@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.parametrize(("ranks", "size"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    ranks: int, size: int, directory: bool, tmp_path: Path
) -> None:
    path = tmp_path / "first.ckpt"
    run_ranks(ranks, trained, size, 1, None, path, directory)
    resumed = run_ranks(ranks, trained, size, 3, path)[0]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted(ranks, size, 3).items())


# (ranks, tensor parallel size) where the checkpoint is written, and where it is read; None is plain Lightning
RESIZED: list[tuple[tuple[int, int | None], tuple[int, int | None]]] = [
    ((2, 2), (4, 4)),
    ((2, 2), (1, 0)),
    ((4, 2), (4, 4)),
    ((4, 2), (2, 1)),
    ((4, 4), (4, 2)),
    ((4, 4), (3, 3)),
    ((3, 3), (2, 2)),
    ((1, 0), (4, 2)),
]
PLAIN: list[tuple[tuple[int, int | None], tuple[int, int | None]]] = [
    ((2, 2), (1, None)),
    ((4, 2), (1, None)),
    ((1, None), (2, 2)),
    ((1, None), (4, 2)),
    ((1, None), (3, 3)),
]


@pytest.mark.parametrize(
    ("written", "read", "directory"),
    [(w, r, True) for w, r in RESIZED] + [(w, r, False) for w, r in [*RESIZED[:3], *PLAIN]],
)
def test_a_run_resumed_with_other_sizes_ends_where_the_uninterrupted_one_does(
    written: tuple[int, int | None], read: tuple[int, int | None], directory: bool, tmp_path: Path
) -> None:
    path = tmp_path / "first.ckpt"
    run_ranks(written[0], trained, written[1], 1, None, path, directory)
    assert path.is_dir() == directory
    got = run_ranks(read[0], trained, read[1], 2, path)[0]
    assert_close(got, uninterrupted(1, None, 2), 1e-5, "weight")
    assert (got["net.up.weight"] - uninterrupted(1, None, 1)["net.up.weight"]).abs().max() > 1e-3


@pytest.mark.ranks(2)
def test_a_file_with_full_weights_is_read_by_load_from_checkpoint(tmp_path: Path) -> None:
    want = trained(2, 1, save=tmp_path / "full.ckpt", directory=False)
    model = Scheduled.load_from_checkpoint(tmp_path / "full.ckpt", map_location="cpu")
    assert all(torch.equal(tensor, want[name]) for name, tensor in weights(model).items())


@pytest.mark.ranks(4)
def test_the_schedule_the_step_and_the_epoch_are_restored(tmp_path: Path) -> None:
    trained(2, 1, save=tmp_path / "first.ckpt")
    seen: list[tuple[int, int, list[float]]] = []

    class Notes(Callback):
        def on_train_start(self, run: Trainer, module: LightningModule) -> None:
            rates = [group["lr"] for group in run.optimizers[0].param_groups]
            seen.append((run.current_epoch, run.global_step, rates))

    trainer(strategy(2), max_epochs=2, callbacks=[Notes()]).fit(Scheduled(), ckpt_path=tmp_path / "first.ckpt")
    ((epoch, step, rates),) = seen
    assert (epoch, step) == (1, 4)
    assert rates == pytest.approx([0.02 * 0.8**4, 0.01 * 0.8**4])


@pytest.mark.parametrize("factory", [models.transformer, models.tiny_llama])
@pytest.mark.ranks(2)
def test_tied_weights_are_one_parameter_after_resuming(factory: Any, tmp_path: Path) -> None:
    rules = {
        "layer_specs": [
            {"patterns": [r".*\.(q|k|v|gate|up)_proj\.weight"]},
            {"patterns": [r".*\.(o|down)_proj\.weight", r".*embed_tokens\.weight"], "partition_type": "row"},
            {"patterns": [r".*lm_head\.weight"], "gather_output": True},
        ]
    }

    def fit(epochs: int, path: Path | None = None) -> tuple[Trainer, Any]:
        model = LanguageModel(factory, tied=True, layers=1, hidden=32, heads=4, kv_heads=4)
        run = quiet_trainer(strategy=AutoTPStrategy(autotp_size=2, partition_config=rules), max_epochs=epochs)
        run.fit(model, token_loader(), ckpt_path=path)
        return run, model

    fit(1)[0].save_checkpoint(tmp_path / "tied")
    _, resumed = fit(2, tmp_path / "tied")
    inner = getattr(resumed.model, "model", resumed.model)
    assert inner.embed_tokens.weight is resumed.model.lm_head.weight
    want = weights(fit(2)[1])
    assert all(torch.equal(tensor, want[name]) for name, tensor in weights(resumed).items())


# ---- what a load gives back to Lightning


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(2)
def test_a_load_returns_everything_that_lightning_saved_with_this_ranks_parts(directory: bool, tmp_path: Path) -> None:
    with alone():
        plain = trainer("auto", devices=1)
        plain.fit(Scheduled())
        saved = plain._checkpoint_connector.dump_checkpoint()
    model = Scheduled()
    run = trainer(strategy(2, save_distributed_checkpoint=directory))
    run.fit(model)
    run.save_checkpoint(tmp_path / "checkpoint")
    loaded = plugin_of(model).load_checkpoint(tmp_path / "checkpoint")
    assert loaded.keys() == saved.keys() | {RANDOM}
    own = model.state_dict()
    assert {name: tensor.shape for name, tensor in loaded["state_dict"].items()} == {
        name: tensor.shape for name, tensor in own.items()
    }
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded["state_dict"].items())
    optimizer = run.optimizers[0].state_dict()
    assert loaded["optimizer_states"][0]["param_groups"] == optimizer["param_groups"]
    for number, state in optimizer["state"].items():
        for entry, value in state.items():
            assert torch.equal(loaded["optimizer_states"][0]["state"][number][entry], value), (number, entry)
    assert len(loaded["lr_schedulers"]) == 1


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(2)
def test_weights_alone_are_enough_to_validate_and_lightning_says_so_when_fit_wants_more(
    directory: bool, tmp_path: Path
) -> None:
    model, loader = Scheduled(), DataLoader(Rows(4), batch_size=2)
    run = trainer(strategy(2, save_distributed_checkpoint=directory))
    run.fit(model)
    run.save_checkpoint(tmp_path / "weights", weights_only=True)
    other = Scheduled()
    fresh = trainer(strategy(2))
    fresh.validate(other, loader, ckpt_path=tmp_path / "weights", verbose=False)
    trained_weights = weights(model)
    assert all(torch.equal(tensor, trained_weights[name]) for name, tensor in weights(other).items())
    with pytest.raises(KeyError, match="contains only the model"):
        trainer(strategy(2), max_epochs=2).fit(Scheduled(), ckpt_path=tmp_path / "weights")


class Without(Regressor):
    """Trains without an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)  # type: ignore[arg-type]
                parameter.grad = None

    def configure_optimizers(self) -> Any:
        return None


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(2)
def test_a_model_without_an_optimizer_is_saved_and_resumed(directory: bool, tmp_path: Path) -> None:
    def fit(epochs: int, path: Path | None = None) -> tuple[Trainer, Without]:
        model, run = Without(), trainer(strategy(2, save_distributed_checkpoint=directory), max_epochs=epochs)
        run.fit(model, ckpt_path=path)
        return run, model

    fit(1)[0].save_checkpoint(tmp_path / "checkpoint")
    resumed, want = fit(2, tmp_path / "checkpoint")[1], weights(fit(2)[1])
    assert all(torch.equal(tensor, want[name]) for name, tensor in weights(resumed).items())


class Averaged(Callback):
    """Puts tensors of its own into a checkpoint, and wants to see the model's when one is loaded."""

    seen: list[str]

    def on_save_checkpoint(self, run: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["of_a_callback"] = torch.arange(3)

    def on_load_checkpoint(self, run: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.seen = [*checkpoint["state_dict"], *map(str, checkpoint["of_a_callback"].tolist())]


@pytest.mark.ranks(2)
def test_a_callback_finds_its_own_entries_and_the_state_dict_in_a_loaded_checkpoint(tmp_path: Path) -> None:
    run = trainer(strategy(2), callbacks=[Averaged()])
    run.fit(Scheduled())
    run.save_checkpoint(tmp_path / "checkpoint")
    callback = Averaged()
    trainer(strategy(2), max_epochs=2, callbacks=[callback]).fit(Scheduled(), ckpt_path=tmp_path / "checkpoint")
    assert sorted(callback.seen) == sorted([*Scheduled().state_dict(), "0", "1", "2"])


@pytest.mark.ranks(2)
def test_weight_averaging_resumes_with_data_parallelism(tmp_path: Path) -> None:
    def fit(path: Path | None = None) -> dict[str, Tensor]:
        saving = ModelCheckpoint(tmp_path / ("second" if path else "first"), filename="{epoch}", save_top_k=-1)
        model = Scheduled()
        callbacks = [saving, EMAWeightAveraging(decay=0.5)]
        run = trainer(AutoTPStrategy(), max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
        run.fit(model, ckpt_path=path)
        return weights(model)

    want = fit()
    resumed = fit(tmp_path / "first" / "epoch=0.ckpt")
    assert all(torch.equal(tensor, want[name]) for name, tensor in resumed.items())


class WithPath(Scheduled):
    def __init__(self, where: Path = Path("nowhere"), sizes: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.parametrize("weights_only", [None, False])
@pytest.mark.ranks(2)
def test_hyperparameters_that_are_no_tensors_survive(
    directory: bool, weights_only: bool | None, tmp_path: Path
) -> None:
    run = trainer(strategy(2, save_distributed_checkpoint=directory))
    run.fit(WithPath(Path("data") / "here", (3, 4)))
    run.save_checkpoint(tmp_path / "checkpoint")
    model = WithPath()
    again = trainer(strategy(2), max_epochs=2)
    again.fit(model, ckpt_path=tmp_path / "checkpoint", weights_only=weights_only)
    loaded = plugin_of(model).load_checkpoint(tmp_path / "checkpoint", weights_only=weights_only)
    assert loaded["hyper_parameters"] == {"where": Path("data") / "here", "sizes": (3, 4)}
