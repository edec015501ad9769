"""Checkpoints through the Trainer: the unsharded model's on disk, and a resumed run goes on as if never stopped.

``trained`` below runs on each rank and returns the full weights, so that runs of different sizes can be compared.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy
from lightning_autotp.checkpoint import is_directory_checkpoint
from tests.helpers import models
from tests.helpers.closeness import assert_close
from tests.helpers.models import LanguageModel, quiet_trainer, token_loader
from tests.helpers.rank_pool import run_ranks
from tests.helpers.small_nets import (
    Net,
    Regressor,
    Rows,
    alone,
    everyones,
    full_weights,
    plugin_of,
    strategy,
    trainer,
    weights,
)


class Scheduled(Regressor):
    """AdamW with two parameter groups, and a learning rate that falls with every step."""

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 0.01}]
        optimizer = torch.optim.AdamW(groups, lr=0.02, eps=1e-5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trained(
    size: int | None,
    epochs: int,
    resume: Path | str | None = None,
    save: Path | str | None = None,
    directory: bool = True,
) -> dict[str, Tensor]:
    """Train up to ``epochs`` epochs, from ``resume`` if given, and save at ``save``. ``size`` None: plain Lightning."""
    model = Scheduled()
    if size is None:
        with alone():
            _fit(trainer("auto", devices=1, max_epochs=epochs), model, resume, save)
    else:
        _fit(trainer(strategy(size, save_distributed_checkpoint=directory), max_epochs=epochs), model, resume, save)
    return full_weights(model)


def _fit(run: Trainer, model: LightningModule, resume: Any, save: Any) -> None:
    run.fit(model, ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)


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
    assert loaded.keys() == saved.keys()
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


# ---- what is on disk


@pytest.mark.ranks(4)
def test_a_directory_has_the_names_and_shapes_of_the_unsharded_model(tmp_path: Path) -> None:
    trained(2, 1, save=tmp_path / "checkpoint")
    assert is_directory_checkpoint(tmp_path / "checkpoint")
    stored = FileSystemReader(tmp_path / "checkpoint").read_metadata().state_dict_metadata
    sizes = {name: tuple(entry.size) for name, entry in stored.items()}  # type: ignore[union-attr]
    reference = Scheduled()
    want: dict[str, tuple[int, ...]] = {f"state_dict.{n}": tuple(t.shape) for n, t in reference.state_dict().items()}
    for name, parameter in reference.named_parameters():
        want |= {f"optimizers.0.{name}.{entry}": tuple(parameter.shape) for entry in ("exp_avg", "exp_avg_sq")}
        want[f"optimizers.0.{name}.step"] = ()
    assert sizes == want


@pytest.mark.ranks(4)
def test_each_rank_of_a_model_writes_its_part_and_data_parallel_copies_are_written_once(tmp_path: Path) -> None:
    trained(2, 1, save=tmp_path / "checkpoint")
    stored = FileSystemReader(tmp_path / "checkpoint").read_metadata()
    chunks = stored.state_dict_metadata["state_dict.net.up.weight"].chunks  # type: ignore[union-attr]
    assert sorted((tuple(c.offsets), tuple(c.sizes)) for c in chunks) == [((0, 0), (5, 8)), ((5, 0), (5, 8))]
    numbers = sum(p.numel() for p in Scheduled().parameters())
    assert stored.storage_data is not None
    written = sum(info.length for index, info in stored.storage_data.items() if index.fqn.startswith("state_dict."))
    # 4 bytes a number, and up to 2 KiB a piece around them: nothing is there twice
    pieces = sum(index.fqn.startswith("state_dict.") for index in stored.storage_data)
    assert pieces == 9 and written < 4 * numbers + 2048 * pieces


@pytest.mark.ranks(2)
def test_a_file_is_the_one_that_a_plain_trainer_writes(tmp_path: Path) -> None:
    trained(2, 1, save=tmp_path / "ours.ckpt", directory=False)
    trained(None, 1, save=tmp_path / f"plain{dist.get_rank()}.ckpt")
    ours = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    plain = torch.load(tmp_path / f"plain{dist.get_rank()}.ckpt", weights_only=True)
    assert ours.keys() == plain.keys()
    assert ours["lr_schedulers"] == plain["lr_schedulers"]
    assert ours["optimizer_states"][0]["param_groups"] == plain["optimizer_states"][0]["param_groups"]
    assert_close(ours["state_dict"], plain["state_dict"], 1e-5, "weight")
    for number, state in plain["optimizer_states"][0]["state"].items():
        assert_close(ours["optimizer_states"][0]["state"][number], state, 1e-3, f"optimizer state {number}")


# ---- paths


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(4)
def test_all_ranks_write_and_read_the_path_of_rank_zero(directory: bool, tmp_path: Path) -> None:
    mine = tmp_path / f"of-rank-{dist.get_rank()}" / f"checkpoint-{dist.get_rank()}"
    want = trained(2, 1, save=mine, directory=directory)
    dist.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["of-rank-0"]
    assert [path.name for path in (tmp_path / "of-rank-0").iterdir()] == ["checkpoint-0"]
    model = Scheduled()
    trainer(strategy(2)).test(model, DataLoader(Rows(4)), ckpt_path=mine, verbose=False)
    assert all(torch.equal(tensor, want[name]) for name, tensor in full_weights(model).items())


class Uneven(Scheduled):
    """Its validation loss falls, and differs a little from rank to rank."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", 1.0 / (1 + self.trainer.current_epoch) + 1e-4 * self.global_rank)

    def val_dataloader(self) -> Any:
        return DataLoader(Rows(4), batch_size=2)


def kept(**options: Any) -> dict[str, Any]:
    """Options for a Trainer that keeps the best checkpoint of every epoch."""
    callback = ModelCheckpoint(monitor="val", filename="{epoch}-{val:.6f}", save_top_k=1, **options)
    return {"enable_checkpointing": True, "callbacks": [callback], "max_epochs": 3, "num_sanity_val_steps": 0}


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(4)
def test_only_the_best_and_the_last_checkpoint_are_kept_though_ranks_log_other_values(
    directory: bool, tmp_path: Path
) -> None:
    plugin = strategy(2, save_distributed_checkpoint=directory)
    run = trainer(plugin, **kept(dirpath=tmp_path, save_last=True))
    fitted = Uneven()
    run.fit(fitted)
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=2-val=0.333333.ckpt", "last.ckpt"]
    want = weights(fitted)
    for which in ("best", "last"):
        model = Uneven()
        run.test(model, DataLoader(Rows(4)), ckpt_path=which, verbose=False)
        assert all(torch.equal(tensor, want[name]) for name, tensor in weights(model).items())


@pytest.mark.ranks(2)
def test_a_link_to_the_last_checkpoint_is_followed_and_replaced(tmp_path: Path) -> None:
    run = trainer(strategy(2), **kept(dirpath=tmp_path, save_last="link"))
    run.fit(Uneven())
    dist.barrier()
    assert (tmp_path / "last.ckpt").is_symlink() and is_directory_checkpoint(tmp_path / "last.ckpt")
    options = kept(dirpath=tmp_path, save_last="link") | {"max_epochs": 4}
    resumed = trainer(strategy(2), **options)
    model = Uneven()
    resumed.fit(model, ckpt_path="last")
    assert resumed.current_epoch == 4
    got, want = full_weights(model), trained(2, 4)
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


@pytest.mark.ranks(2)
def test_last_without_a_checkpoint_trains_from_the_start(tmp_path: Path) -> None:
    options = kept(dirpath=tmp_path, save_last=True) | {"max_epochs": 1}
    model = Uneven()
    trainer(strategy(2), **options).fit(model, ckpt_path="last")
    got, want = full_weights(model), trained(2, 1)
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


@pytest.mark.parametrize("before", ["larger", "file", "link"])
def test_overwriting_leaves_nothing_of_what_was_there(before: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    if before == "larger":
        run_ranks(4, trained, 4, 1, None, path)
        assert (path / "__3_0.distcp").exists()
    elif before == "file":
        path.write_text("not a checkpoint")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "precious").write_text("stays")
        path.symlink_to(tmp_path / "elsewhere")
    want = run_ranks(2, trained, 2, 1, None, path)[0]
    assert sorted(file.name for file in path.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    others = {"elsewhere"} if before == "link" else set()
    assert {entry.name for entry in tmp_path.iterdir()} == {"last.ckpt"} | others
    if before == "link":
        assert (tmp_path / "elsewhere" / "precious").read_text() == "stays"
    got = run_ranks(1, trained, 0, 1, path)[0]
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


# ---- errors, on every rank


@pytest.mark.parametrize("missing", ["meta.pt", ".metadata"])
@pytest.mark.ranks(2)
def test_an_incomplete_directory_is_an_error(missing: str, tmp_path: Path) -> None:
    trained(2, 1, save=tmp_path / "checkpoint")
    dist.barrier()
    if dist.get_rank() == 0:
        (tmp_path / "checkpoint" / missing).unlink()
    dist.barrier()
    with pytest.raises(FileNotFoundError, match="is not a complete checkpoint"):
        trained(2, 2, resume=tmp_path / "checkpoint")


@pytest.mark.ranks(2)
def test_a_path_where_nothing_is_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere|nowhere.*not found|nowhere"):
        trained(2, 2, resume=tmp_path / "nowhere")


class RowMeans(torch.optim.Adafactor):
    """An optimizer with factored state, by a name that nobody knows it by."""


class RowScaled(torch.optim.SGD):
    """Keeps a running mean for every row of a matrix."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["row_mean"] = parameter.detach().reshape(len(parameter), -1).mean(1, keepdim=True)
        return result


class Factored(Regressor):
    def configure_optimizers(self) -> Any:
        return RowScaled(self.parameters(), lr=0.1)


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(2)
def test_state_that_is_not_shaped_like_the_parameters_is_an_error_when_it_is_saved(
    directory: bool, tmp_path: Path
) -> None:
    run = trainer(strategy(2, save_distributed_checkpoint=directory))
    run.fit(Factored())
    with pytest.raises(ValueError, match=r"the state of net\.up\.weight has shape \[5, 1\], which is neither"):
        run.save_checkpoint(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks(2)
def test_state_of_any_shape_is_saved_and_resumed_without_tensor_parallelism(tmp_path: Path) -> None:
    class OfAdafactor(Regressor):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adafactor(self.parameters())

    def fit(epochs: int, path: Path | None = None) -> tuple[Trainer, Regressor]:
        model, run = OfAdafactor(), trainer(AutoTPStrategy(), max_epochs=epochs)
        run.fit(model, ckpt_path=path)
        return run, model

    fit(1)[0].save_checkpoint(tmp_path / "checkpoint")
    resumed, want = fit(2, tmp_path / "checkpoint")[1], weights(fit(2)[1])
    assert all(torch.equal(tensor, want[name]) for name, tensor in weights(resumed).items())


class TwoOptimizers(Regressor):
    """Optimizers of the matrices and of the rest; ``swapped`` gives them in the other order."""

    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.swapped = swapped

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        groups = [[p for p in self.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
        return [torch.optim.AdamW(group, lr=0.02) for group in (groups[::-1] if self.swapped else groups)]


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
def test_several_optimizers_resume_with_other_sizes(directory: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    run_ranks(4, _two, 2, 1, None, path, directory)
    got = run_ranks(3, _two, 3, 2, path)[0]
    assert_close(got, run_ranks(1, _two, 0, 2)[0], 1e-4, "weight")


def _two(
    size: int, epochs: int, resume: Path | None = None, save: Path | None = None, directory: bool = True
) -> dict[str, Tensor]:
    model = TwoOptimizers()
    _fit(trainer(strategy(size, save_distributed_checkpoint=directory), max_epochs=epochs), model, resume, save)
    return full_weights(model)


@pytest.mark.ranks(2)
def test_optimizers_of_other_parameters_than_those_saved_are_an_error(tmp_path: Path) -> None:
    run = trainer(strategy(2))
    run.fit(TwoOptimizers())
    run.save_checkpoint(tmp_path / "checkpoint")
    for model, message in (
        (TwoOptimizers(swapped=True), r"different parameters: net\.down\.bias"),
        (Scheduled(), "the checkpoint has 2 optimizers, this run has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(strategy(2), max_epochs=2).fit(model, ckpt_path=tmp_path / "checkpoint")


@pytest.mark.ranks(2, timeout=20)
def test_a_file_never_replaces_a_directory_and_every_rank_hears_of_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir(exist_ok=True)
    with pytest.raises(IsADirectoryError, match="an ordinary checkpoint file cannot replace it"):
        trained(2, 1, save=tmp_path / "checkpoint", directory=False)


@pytest.mark.parametrize(
    ("path", "options", "error"),
    [("s3://bucket/checkpoint", {}, "file systems that this machine has mounted"), ("here", {"a": 1}, "CheckpointIO")],
)
@pytest.mark.ranks(2)
def test_storage_that_is_no_directory_is_an_error(path: str, options: Any, error: str, tmp_path: Path) -> None:
    run = trainer(strategy(2))
    run.fit(Scheduled())
    with pytest.raises((TypeError, ValueError), match=error):
        run.save_checkpoint(path if "://" in path else tmp_path / path, storage_options=options or None)


@pytest.mark.ranks(2)
def test_another_model_than_the_fitted_one_is_tested_from_a_checkpoint_by_the_same_trainer(tmp_path: Path) -> None:
    run = trainer(strategy(2))
    first, second = Scheduled(), Scheduled()
    run.fit(first)
    run.save_checkpoint(tmp_path / "checkpoint")
    run.test(second, DataLoader(Rows(4)), ckpt_path=tmp_path / "checkpoint", verbose=False)
    assert everyones(all(torch.equal(t, weights(first)[n]) for n, t in weights(second).items())) == [True, True]


@pytest.mark.ranks(2)
def test_a_checkpoint_of_another_network_is_an_error_that_names_what_is_missing(tmp_path: Path) -> None:
    trained(2, 1, save=tmp_path / "checkpoint")

    class Wider(Net):
        def __init__(self) -> None:
            super().__init__(hidden=12)

    with pytest.raises(RuntimeError, match=r"size mismatch for net\.up\.weight"):
        trainer(strategy(2)).test(
            Regressor(Wider), DataLoader(Rows(4)), ckpt_path=tmp_path / "checkpoint", verbose=False
        )
