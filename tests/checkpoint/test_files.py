"""What a checkpoint is on disk, and the paths that are written, kept, linked and replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils.data import DataLoader

from lightning_autotp.checkpoint import is_directory_checkpoint
from lightning_autotp.randomness.saved import RANDOM
from tests.helpers.checkpoints import Scheduled, trained
from tests.helpers.closeness import assert_close
from tests.helpers.rank_pool import run_ranks
from tests.helpers.small_nets import (
    Rows,
    full_weights,
    strategy,
    trainer,
    weights,
)


@pytest.mark.ranks(4)
def test_a_directory_has_the_names_and_shapes_of_the_unsharded_model(tmp_path: Path) -> None:
    trained(2, 1, save=tmp_path / "checkpoint")
    assert is_directory_checkpoint(tmp_path / "checkpoint")
    stored = FileSystemReader(tmp_path / "checkpoint").read_metadata().state_dict_metadata
    sizes = {name: tuple(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    reference = Scheduled()
    want: dict[str, tuple[int, ...]] = {f"model.{n}": tuple(t.shape) for n, t in reference.state_dict().items()}
    for name, parameter in reference.named_parameters():
        want |= {f"optimizer_0.state.{name}.{entry}": tuple(parameter.shape) for entry in ("exp_avg", "exp_avg_sq")}
        want[f"optimizer_0.state.{name}.step"] = ()
    assert sizes == want


@pytest.mark.ranks(4)
def test_each_rank_of_a_model_writes_its_part_and_data_parallel_copies_are_written_once(tmp_path: Path) -> None:
    trained(2, 1, save=tmp_path / "checkpoint")
    stored = FileSystemReader(tmp_path / "checkpoint").read_metadata()
    chunks = stored.state_dict_metadata["model.net.up.weight"].chunks  # type: ignore[union-attr]
    assert sorted((tuple(c.offsets), tuple(c.sizes)) for c in chunks) == [((0, 0), (5, 8)), ((5, 0), (5, 8))]
    numbers = sum(p.numel() for p in Scheduled().parameters())
    assert stored.storage_data is not None
    written = sum(info.length for index, info in stored.storage_data.items() if index.fqn.startswith("model."))
    # 4 bytes a number, and up to 2 KiB a piece around them: nothing is there twice
    pieces = sum(index.fqn.startswith("model.") for index in stored.storage_data)
    assert pieces == 9 and written < 4 * numbers + 2048 * pieces


@pytest.mark.ranks(2)
def test_a_file_is_the_one_that_a_plain_trainer_writes(tmp_path: Path) -> None:
    trained(2, 1, save=tmp_path / "ours.ckpt", directory=False)
    trained(None, 1, save=tmp_path / f"plain{dist.get_rank()}.ckpt")
    ours = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    plain = torch.load(tmp_path / f"plain{dist.get_rank()}.ckpt", weights_only=True)
    assert ours.keys() == plain.keys() | {RANDOM}
    assert ours["lr_schedulers"] == plain["lr_schedulers"]
    assert ours["optimizer_states"][0]["param_groups"] == plain["optimizer_states"][0]["param_groups"]
    assert_close(ours["state_dict"], plain["state_dict"], 1e-5, "weight")
    for number, state in plain["optimizer_states"][0]["state"].items():
        assert_close(ours["optimizer_states"][0]["state"][number], state, 1e-3, f"optimizer state {number}")


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
    made = [".metadata", "__0_0.distcp", "__1_0.distcp", "autotp.json", "meta.pt"]
    assert sorted(file.name for file in path.iterdir()) == made
    others = {"elsewhere"} if before == "link" else set()
    assert {entry.name for entry in tmp_path.iterdir()} == {"last.ckpt"} | others
    if before == "link":
        assert (tmp_path / "elsewhere" / "precious").read_text() == "stays"
    got = run_ranks(1, trained, 0, 1, path)[0]
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
