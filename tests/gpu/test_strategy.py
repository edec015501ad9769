"""What only GPUs show: memory while a model is sharded, inference mode, loss scaling, a model that stays on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_autotp.checkpoint import is_directory_checkpoint
from tests.helpers.closeness import assert_close
from tests.helpers.rank_pool import rank_device
from tests.helpers.small_nets import (
    WIDTH,
    Net,
    Regressor,
    Rows,
    everyones,
    parts_of,
    strategy,
    trainer,
    unsharded,
    weights,
)


def reference(**options: Any) -> dict[str, Tensor]:
    """The weights of the same training on the CPU."""
    return unsharded(Regressor(), accelerator="cpu", **options)


# ---- memory


class Large(nn.Module):
    """Sixteen blocks, 512 MiB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(16):
            block = nn.Module()
            block.up, block.down = nn.Linear(1024, 4096, bias=False), nn.Linear(4096, 1024, bias=False)
            self.blocks.append(block)

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, 1024 // WIDTH)
        for block in self.blocks:
            x = x + block.down(block.up(x))  # type: ignore[operator]
        return x[:, :WIDTH]


class Building(Regressor):
    """Builds the large network in ``configure_model``, where the strategy chooses or on the meta device."""

    def __init__(self, meta: bool) -> None:
        super().__init__(nn.Identity)
        del self.net
        self.meta = meta

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            if self.meta:
                with torch.device("meta"):
                    self.net = Large()
            else:
                self.net = Large()


@pytest.mark.parametrize("where", ["in-init", "in-configure_model", "on-meta"])
@pytest.mark.gpu
@pytest.mark.ranks(2)
def test_a_gpu_never_holds_more_than_its_part_and_a_few_whole_weights(where: str) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = Regressor(Large) if where == "in-init" else Building(meta=where == "on-meta")
    trainer(strategy(2)).validate(model, DataLoader(Rows(), batch_size=4), verbose=False)
    peak = torch.cuda.max_memory_allocated() - before
    whole, largest = 16 * 2 * 4 * 1024 * 4096, 4 * 1024 * 4096
    assert {p.device for p in model.parameters()} == {rank_device()}
    assert whole / 2 < peak < whole / 2 + 4 * largest


# ---- inference mode, which Lightning enters over NCCL and not over gloo


@pytest.mark.gpu
@pytest.mark.ranks(2)
def test_a_model_trains_after_being_evaluated_in_inference_mode() -> None:
    modes: list[bool] = []

    class Watched(Regressor):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            modes.append(torch.is_inference_mode_enabled())
            super().validation_step(batch, batch_idx)

    model, loader = Watched(), DataLoader(Rows(4), batch_size=2)
    run = trainer(strategy(2))
    run.validate(model, loader, verbose=False)
    assert modes[-2:] == [True, True]  # or the test shows nothing; the proof called it, too
    run.test(model, loader, verbose=False)
    predicted = run.predict(model, loader)
    run.fit(model)
    assert predicted is not None and len(predicted) == 2
    assert_close(weights(model), parts_of(model, reference()), 1e-4, "weight")


@pytest.mark.gpu
@pytest.mark.ranks(2)
def test_evaluating_after_fit_gives_the_numbers_of_the_whole_model_and_training_goes_on() -> None:
    model, loader = Regressor(), DataLoader(Rows(6, seed=3), batch_size=3)
    run = trainer(strategy(2))
    run.fit(model)
    predicted = run.predict(model, loader)
    whole = Net()
    whole.load_state_dict({name.removeprefix("net."): tensor for name, tensor in reference().items()})
    assert predicted is not None
    got = {"outputs": torch.cat(predicted)}  # type: ignore[arg-type]
    assert_close(got, {"outputs": whole(Rows(6, seed=3).rows)}, 1e-4, "output")
    run.fit_loop.max_epochs = 2
    run.fit(model)
    assert run.global_step == 8


# ---- after fit


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.gpu
@pytest.mark.ranks(2)
def test_after_fit_the_model_stays_on_the_gpu_is_saved_and_fitted_again(directory: bool, tmp_path: Path) -> None:
    model = Regressor()
    run = trainer(strategy(2, save_distributed_checkpoint=directory))
    run.fit(model)
    assert {p.device for p in model.parameters()} == {rank_device()}
    run.save_checkpoint(tmp_path / "checkpoint")
    assert is_directory_checkpoint(tmp_path / "checkpoint") == directory
    run.fit_loop.max_epochs = 2
    run.fit(model)
    resumed = Regressor()
    trainer(strategy(2), max_epochs=2).fit(resumed, ckpt_path=tmp_path / "checkpoint")
    assert {p.device for p in resumed.parameters()} == {rank_device()}
    want = parts_of(model, reference(max_epochs=2))
    assert_close(weights(resumed), want, 1e-4, "weight")


# ---- loss scaling


class Overflowing(Regressor):
    """On rank 1 alone, the second step's gradient of a cut weight overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.after: list[tuple[dict[str, Tensor], float]] = []

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.batch_idx == 1 and dist.get_rank() == 1:
            gradient = self.net.get_parameter("up.weight").grad
            assert gradient is not None
            gradient[0, 0] = float("inf")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        plugin = self.trainer.precision_plugin
        assert isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        self.after.append((weights(self), float(plugin.scaler.get_scale())))


@pytest.mark.gpu
@pytest.mark.ranks(2)
def test_an_overflow_on_one_gpu_skips_the_step_and_halves_the_scale_on_all() -> None:
    plugin = MixedPrecision("16-mixed", "cuda", scaler=torch.amp.GradScaler("cuda", init_scale=1024.0))
    model = Overflowing()
    trainer(strategy(2), plugins=[plugin], gradient_clip_val=1.0).fit(model)
    scales = [scale for _, scale in model.after]
    assert everyones(scales) == [[1024.0, 512.0, 512.0, 512.0]] * 2
    stepped = [
        any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
        for (before, _), (after, _) in zip(model.after, model.after[1:])
    ]
    assert everyones(stepped) == [[False, True, True]] * 2
