"""Checkpoints that cannot be written or loaded are errors, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy
from tests.helpers.checkpoints import Scheduled, fit, trained
from tests.helpers.closeness import assert_close
from tests.helpers.rank_pool import run_ranks
from tests.helpers.small_nets import (
    Net,
    Regressor,
    Rows,
    everyones,
    full_weights,
    strategy,
    trainer,
    weights,
)


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
def test_state_that_is_not_shaped_like_the_parameters_is_saved_whole_and_resumes(
    directory: bool, tmp_path: Path
) -> None:
    run = trainer(strategy(2, save_distributed_checkpoint=directory))
    run.fit(Factored())
    run.save_checkpoint(tmp_path / "checkpoint")
    resumed, straight = Factored(), Factored()
    trainer(strategy(2), max_epochs=2).fit(resumed, ckpt_path=tmp_path / "checkpoint")
    trainer(strategy(2), max_epochs=2).fit(straight)
    assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in weights(resumed).items())
    shapes = {tuple(s["row_mean"].shape) for s in resumed.trainer.optimizers[0].state.values()}
    assert {shape for rank in everyones(shapes) for shape in rank} == {(10, 1), (8, 1)}


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
    fit(trainer(strategy(size, save_distributed_checkpoint=directory), max_epochs=epochs), model, resume, save)
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
    [("nowhere://bucket/checkpoint", {}, "Protocol not known: nowhere"), ("here", {"a": 1}, "CheckpointIO")],
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
