"""Training without any rules: the plan is derived from a sample, the same on all ranks, and trains as unsharded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from lightning_autotp import AutoTPStrategy, parallelize
from lightning_autotp.sharding.state import sharded
from tests.helpers.closeness import assert_close
from tests.helpers.small_nets import WIDTH, Net, Regressor, Rows, parts_of, trainer, unsharded, weights

HEADS = 4


class Mixer(nn.Module):
    """Attention over four tokens made of a row under no usual name, packed in no usual order, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(4, WIDTH))
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.back = nn.Linear(WIDTH, WIDTH)
        self.gated = nn.Linear(WIDTH, 2 * 12)
        self.out = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] + self.places
        a, b, c = self.fused(x).view(len(x), 4, -1, 3, WIDTH // HEADS).permute(3, 0, 2, 1, 4)
        seen = (a @ b.transpose(-1, -2) * self.temperature).softmax(-1) @ c
        x = x + self.back(seen.transpose(1, 2).flatten(2))
        first, second = self.gated(x).chunk(2, dim=-1)
        out: Tensor = x + self.out(functional.silu(first) * second)
        return out.mean(1)


def sharded_names(model: nn.Module) -> set[str]:
    found = sharded(model)
    assert found is not None
    return {name for name, layout in found.plan.layouts.items() if not layout.is_replicated}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.ranks(4)
def test_a_model_without_rules_trains_as_unsharded(size: int) -> None:
    model = Regressor(Mixer)
    trainer(AutoTPStrategy(autotp_size=size)).fit(model)
    layers = ("fused", "back", "gated", "out")
    assert {f"net.{layer}.weight" for layer in layers} | {"net.temperature"} <= sharded_names(model)
    assert_close(weights(model), parts_of(model, unsharded(Regressor(Mixer))), 1e-4, "weight")


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(WIDTH, 12, bias=False), nn.BatchNorm1d(12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.norm(self.up(x)).relu())
        return out


@pytest.mark.ranks(3)
def test_a_batch_norm_of_sharded_features_has_the_statistics_of_all() -> None:
    model, full = Regressor(Normed), Regressor(Normed)
    trainer(AutoTPStrategy(autotp_size=3)).fit(model)
    assert "net.norm.weight" in sharded_names(model)
    assert_close(weights(model), parts_of(model, unsharded(full)), 1e-4, "weight")
    assert_close(dict(model.named_buffers()), dict(full.named_buffers()), 1e-5, "statistics")
    model.eval(), full.eval()
    assert_close({"": model.net(Rows(6).rows)}, {"": full.net(Rows(6).rows)}, 1e-4, "outputs")


class Streamed(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(Rows(16).rows)


class OfAStream(Regressor):
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Streamed(), batch_size=4)


@pytest.mark.ranks(2)
def test_without_a_sample_the_error_says_how_to_give_one_on_every_rank() -> None:
    with pytest.raises(ValueError, match=r"there is no sample to run\. Give a `sample_batch`") as raised:
        trainer(AutoTPStrategy(autotp_size=2)).fit(OfAStream(Mixer))
    said: list[Any] = [None] * 2
    dist.all_gather_object(said, str(raised.value))
    assert said[0] == said[1]


class WithASample(OfAStream):
    def sample_batch(self) -> Tensor:
        return Rows(5).rows


@pytest.mark.parametrize("by", ["argument", "method"])
@pytest.mark.ranks(2)
def test_a_sample_may_be_given(by: str) -> None:
    model, given = (OfAStream(Mixer), Rows(5).rows) if by == "argument" else (WithASample(Mixer), None)
    trainer(AutoTPStrategy(autotp_size=2, sample_batch=given)).fit(model)
    assert "net.fused.weight" in sharded_names(model)
    assert_close(weights(model), parts_of(model, unsharded(OfAStream(Mixer))), 1e-4, "weight")


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.ranks(2)
def test_a_model_that_cannot_be_sharded_is_refused_on_every_rank() -> None:
    with pytest.raises(ValueError, match="nothing of Regressor can be sharded"):
        trainer(AutoTPStrategy(autotp_size=2)).fit(Regressor(Products))


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return functional.mse_loss(model(batch), batch.flip(-1))


@pytest.mark.ranks(2)
def test_a_loop_of_ones_own_gives_the_sample_with_its_loss() -> None:
    torch.manual_seed(0)
    model = Mixer()
    full = copy.deepcopy(model)
    made = parallelize(model, autotp_size=2, device="cpu", sample_batch=Rows(6).rows, loss_fn=squares)
    assert "fused.weight" in sharded_names(model)
    for each in (model, full):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.02, eps=1e-5)
        for at in range(3):
            squares(each, Rows(6, seed=at).rows).backward()
            made.step(optimizer) if each is model else optimizer.step()
            optimizer.zero_grad()
    assert_close(weights(model), parts_of(model, weights(full)), 1e-4, "weight")


@pytest.mark.ranks(2)
def test_auto_asks_for_it_whatever_rules_could_be_found() -> None:
    model = Regressor(Net)
    trainer(AutoTPStrategy(autotp_size=2, preset_model="auto")).fit(model)
    assert {"net.up.weight", "net.up.bias", "net.down.weight"} == sharded_names(model)
    assert_close(weights(model), parts_of(model, unsharded(Regressor(Net))), 1e-4, "weight")
