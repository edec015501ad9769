"""Who sees which data, and whose metrics add up: ranks that share a model count once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchmetrics import SumMetric

from lightning_autotp.training.consistency import DisagreementError, digests, require_agreement
from tests.helpers.models import quiet_trainer
from tests.helpers.small_nets import WIDTH, Regressor, Rows, everyones, plugin_of, strategy


class Watching(Regressor):
    """Writes down the batches that it is given."""

    def __init__(self, train: Any, val: Any = None) -> None:
        super().__init__()
        self.loaders = {"train": train, "val": val}
        self.seen: dict[str, list[Tensor]] = {"train": [], "val": []}

    def train_dataloader(self) -> Any:
        return self.loaders["train"]

    def val_dataloader(self) -> Any:
        return self.loaders["val"] or []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.seen["val"].append(batch)


def watched(train: Any, val: Any = None, **options: Any) -> Watching:
    model = Watching(train, val)
    quiet_trainer(strategy=strategy(2), **options).fit(model)
    return model


def all_equal(values: list[Tensor]) -> bool:
    return all(torch.equal(value, values[0]) for value in values)


# ---- the sampler


@pytest.mark.ranks(4)
def test_the_sampler_deals_data_out_to_data_parallel_ranks_only() -> None:
    model = watched(DataLoader(Rows(16), batch_size=4, shuffle=True), DataLoader(Rows(8, seed=2), batch_size=2))
    loader: Any = model.trainer.train_dataloader
    assert isinstance(loader.sampler, DistributedSampler)
    for stage, rows in (("train", Rows(16).rows), ("val", Rows(8, seed=2).rows)):
        seen = everyones(torch.cat(model.seen[stage]))
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
        together = torch.cat([seen[0], seen[2]])
        assert sorted(together.tolist()) == sorted(rows.tolist()), stage


@pytest.mark.ranks(2)
def test_ranks_that_share_a_model_shuffle_alike_without_a_seed() -> None:
    torch.manual_seed(dist.get_rank())
    loader = DataLoader(Rows(16), batch_size=4, shuffle=True)
    model = watched(loader, use_distributed_sampler=False)
    assert all_equal(everyones(torch.cat(model.seen["train"])))


# ---- randomness in workers


class Augmented(Rows):
    """Noise, drawn anew each time, in place of the rows."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(WIDTH)


def noise_loader(**options: Any) -> DataLoader[Tensor]:
    # a worker that frees the groups of an earlier test crashes, for fork does not copy the threads that belong to them
    gc.collect()
    # fork: ranks are themselves children of a fork server, and one more of it would import everything anew
    return DataLoader(Augmented(8), batch_size=2, num_workers=1, multiprocessing_context="fork", **options)


@pytest.mark.ranks(4)
def test_workers_of_ranks_that_share_a_model_augment_alike_when_lightning_seeds_them() -> None:
    seed_everything(3, workers=True, verbose=False)  # as LightningCLI does
    model = watched(noise_loader(), noise_loader())
    for stage in ("train", "val"):
        seen = everyones(torch.cat(model.seen[stage]))
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
        assert not torch.equal(seen[0], seen[2]), f"data parallel ranks draw the same augmentations in {stage}"


@pytest.mark.ranks(4)
def test_workers_of_ranks_that_share_a_model_augment_alike_without_a_seed() -> None:
    torch.manual_seed(dist.get_rank())
    seen = everyones(torch.cat(watched(noise_loader()).seen["train"]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


def own_seed(worker: int) -> None:
    torch.manual_seed(worker)


@pytest.mark.ranks(2)
def test_a_worker_init_fn_of_the_users_stays() -> None:
    seed_everything(3, workers=True, verbose=False)
    first = watched(noise_loader(worker_init_fn=own_seed)).seen["train"][0]
    torch.manual_seed(0)
    assert torch.equal(first, torch.stack([torch.randn(WIDTH), torch.randn(WIDTH)]))


# ---- data that is not the same


class Stream(IterableDataset[Tensor]):
    """Rows dealt out by ``rank`` of ``size``, as users write it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(Rows(16).rows[self.rank :: self.size])


def stream(rank: int, size: int) -> DataLoader[Tensor]:
    return DataLoader(Stream(rank, size), batch_size=2)


@pytest.mark.ranks(4)
def test_a_stream_split_by_global_rank_is_an_error_on_every_rank() -> None:
    with pytest.raises(DisagreementError, match=r"disagree on batch.*split your data by `trainer.strategy.dp_rank`"):
        watched(stream(dist.get_rank(), 4))


@pytest.mark.ranks(4)
def test_a_stream_split_by_global_rank_is_found_though_validation_data_is_in_order() -> None:
    with pytest.raises(DisagreementError, match=r"disagree on batch.*split your data by `trainer.strategy.dp_rank`"):
        watched(stream(dist.get_rank(), 4), DataLoader(Rows(8), batch_size=2))


@pytest.mark.ranks(4)
def test_a_stream_split_by_data_parallel_rank_is_right() -> None:
    seen = everyones(torch.cat(watched(stream(dist.get_rank() // 2, 2)).seen["train"]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[0], seen[2])


@pytest.mark.ranks(2)
def test_validation_data_that_differs_is_an_error_of_validate() -> None:
    model = Watching(None)
    run = quiet_trainer(strategy=strategy(2))
    with pytest.raises(DisagreementError, match="disagree on batch"):
        run.validate(model, stream(dist.get_rank(), 2), verbose=False)


def differing(batches: list[Any]) -> str:
    """What the comparison says of a batch that is ``batches[r]`` on rank r."""
    model = watched(DataLoader(Rows(4), batch_size=4))
    with pytest.raises(DisagreementError) as raised:
        require_agreement(digests(batches[dist.get_rank()], "batch"), plugin_of(model).mesh, "Fix it.")
    return str(raised.value)


@pytest.mark.ranks(2)
def test_one_token_of_a_large_batch_that_differs_is_found() -> None:
    tokens = torch.randint(50_000, (8, 1024), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[3, 7] += 1
    assert "batch['input_ids']" in differing([{"input_ids": tokens}, {"input_ids": other}])


@pytest.mark.ranks(2)
def test_rows_in_another_order_are_found() -> None:
    tokens = torch.arange(32).view(4, 8)
    assert "batch" in differing([tokens, tokens.flip(0)])


@pytest.mark.ranks(2)
def test_tensors_inside_a_batch_class_of_a_library_are_compared() -> None:
    transformers = pytest.importorskip("transformers")
    batches = [transformers.BatchEncoding({"input_ids": torch.full((2, 3), value)}) for value in (1, 2)]
    assert "input_ids" in differing(batches)


@pytest.mark.ranks(2)
def test_batches_of_other_shapes_or_names_are_found() -> None:
    assert "batch" in differing([torch.ones(2, 3), torch.ones(3, 2)])
    assert "batch['y'] (missing on one" in differing([{"x": torch.ones(1)}, {"x": torch.ones(1), "y": torch.ones(1)}])


# ---- metrics


class Logging(Regressor):
    """Logs what only this rank knows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = SumMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        mine = float(plugin_of(self).dp_rank + 1)
        self.log("sum", mine, sync_dist=True, reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("mean", mine, sync_dist=True, on_step=False, on_epoch=True)
        self.rows.update(len(batch))
        self.log("rows", self.rows, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.ranks(4)
def test_metrics_add_up_over_data_parallel_ranks_only() -> None:
    model = Logging()
    quiet_trainer(strategy=strategy(2), use_distributed_sampler=False).fit(model)
    logged = {name: float(value) for name, value in model.trainer.callback_metrics.items()}
    # 4 batches a rank: ranks 1 and 2 add 4 x (1 + 2); the 16 rows are counted once, whatever the tensor parallel size
    assert everyones(logged) == [{"sum": 12.0, "mean": 1.5, "rows": 16.0}] * 4


@pytest.mark.ranks(4)
def test_a_metric_counts_over_data_parallel_ranks_in_validate_too_and_keeps_a_group_of_its_own() -> None:
    model = Logging()
    model.own = SumMetric(process_group=dist.group.WORLD)
    run = quiet_trainer(strategy=strategy(2))
    run.validate(model, DataLoader(Rows(8), batch_size=2), verbose=False)
    for metric in (model.rows, model.own):
        metric.update(1)
    assert (float(model.rows.compute()), float(model.own.compute())) == (2.0, 4.0)


@pytest.mark.ranks(2)
def test_a_metric_can_still_be_cloned() -> None:
    model = Logging()
    quiet_trainer(strategy=strategy(2), use_distributed_sampler=False).fit(model)
    copy = model.rows.clone()
    copy.update(1)
    assert float(copy.compute()) == 1.0
