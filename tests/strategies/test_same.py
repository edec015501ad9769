"""A mistake that one rank makes is an error on every rank, soon, that says what differs and where."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_autotp.recipe import facts
from tests.helpers.models import quiet_trainer
from tests.helpers.small_nets import RULES, WIDTH, Net, Regressor, Rows, alone, everyones, strategy, trainer

SOON = 30.0
"""Seconds in which a mistake is to be told."""


def mine() -> int:
    """1 on the rank that makes the mistake, 0 on the other."""
    return int(dist.get_rank() == 1)


def told(run: Callable[[], Any]) -> str:
    """What the error of ``run`` says, which every rank must raise, soon."""
    start, message = time.monotonic(), ""
    try:
        run()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    assert time.monotonic() - start < SOON
    messages = everyones(message)
    assert all(messages), f"not on every rank: {messages}"
    return message


def fit(model: Any = None, plugin: dict[str, Any] | None = None, **options: Any) -> Callable[[], Any]:
    return lambda: trainer(strategy(2, **(plugin or {})), **options).fit(Regressor() if model is None else model)


def says(run: Callable[[], Any], *words: str) -> None:
    message = told(run)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# ---- how the job was started


@pytest.mark.ranks(2, timeout=120)
def test_another_config_version_or_argument_of_the_trainer_is_told_with_values_and_ranks() -> None:
    with pytest.MonkeyPatch.context() as patch:
        real = facts._version
        patch.setattr(facts, "_version", lambda name: "9.9.9" if mine() and name == "transformers" else real(name))
        says(fit(), "version of transformers", "9.9.9 on rank 1", "on rank 0")
    says(fit(plugin={"sequence_parallel": bool(mine())}), "sequence_parallel is False on rank 0, True on rank 1")
    says(fit(plugin={"check_every_n_steps": 5 + mine()}), "check_every_n_steps is 5 on rank 0, 6 on rank 1")
    says(
        fit(plugin={"preset_model": ("llama", "qwen2")[mine()]}), "preset_model is 'llama' on rank 0, 'qwen2' on rank 1"
    )
    other = {"layer_specs": [*RULES["layer_specs"], {"patterns": ["nothing"], "partition_type": "skip"}]}
    says(fit(plugin={"partition_config": other if mine() else RULES}), "partition_config['layer_specs'] is")
    says(lambda: trainer(strategy(1 + mine())).fit(Regressor()), "autotp_size is 1 on rank 0, 2 on rank 1")
    says(fit(max_steps=(2, 3)[mine()]), "Trainer(max_steps) is 2 on rank 0, 3 on rank 1")
    says(fit(precision=("32-true", "bf16-mixed")[mine()]), "Trainer(precision) is '32-true' on rank 0, 'bf16-mixed'")
    switch = torch.use_deterministic_algorithms
    says(lambda: (switch(bool(mine())), fit()()), "deterministic algorithms is False on rank 0, True on rank 1")
    switch(False)
    stopping = [EarlyStopping("loss", patience=3)] if mine() else []
    says(fit(callbacks=stopping), "Trainer(callbacks) is", "EarlyStopping{")
    says(fit(callbacks=[EarlyStopping("loss", patience=3 + mine())]), "patience of callback 0, EarlyStopping is 3")
    trainer(strategy(2), max_steps=1).fit(Regressor())  # and the ranks still go together


@pytest.mark.long
@pytest.mark.ranks(2, timeout=240)
def test_each_argument_of_the_trainer_is_told() -> None:
    arguments: dict[str, Any] = {
        "max_steps": (2, 3),
        "max_epochs": (1, 2),
        "accumulate_grad_batches": (1, 2),
        "gradient_clip_val": (0.5, None),
        "gradient_clip_algorithm": ("norm", "value"),
        "precision": ("32-true", "bf16-mixed"),
        "limit_train_batches": (2, 3),
        "limit_val_batches": (2, 1.0),
        "val_check_interval": (1.0, 0.5),
        "num_sanity_val_steps": (2, 0),
        "detect_anomaly": (False, True),
        "log_every_n_steps": (1, 2),
        "overfit_batches": (0.0, 2),
        "check_val_every_n_epoch": (1, 2),
        "reload_dataloaders_every_n_epochs": (0, 1),
    }
    for name, values in arguments.items():
        says(fit(**{name: values[mine()]}), f"Trainer({name}) is {values[0]!r} on rank 0, {values[1]!r} on rank 1")


# ---- the model, the plan, the optimizers


class Wide(Net):
    def __init__(self, rows: int = 10, more: bool = False, rate: float = 0.0) -> None:
        super().__init__(rows)
        self.drop = nn.Dropout(rate)
        if more:
            self.more = nn.Linear(WIDTH, WIDTH)


class Optimized(Regressor):
    def __init__(self, optimizers: Callable[[Any], Any]) -> None:
        super().__init__()
        self.optimizers_of = optimizers

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


def grouped(model: nn.Module, cut: int) -> Any:
    held = list(model.parameters())
    return torch.optim.SGD([{"params": held[:cut]}, {"params": held[cut:]}], lr=0.1)


def scheduled(model: nn.Module, step: int) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step)]


def broken(model: nn.Module) -> Any:
    if mine():
        raise ValueError("no optimizer today")
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.ranks(2, timeout=120)
def test_another_model_or_optimizer_is_told_with_the_module_and_the_group() -> None:
    says(fit(Regressor(lambda: Wide(10 + 2 * mine()))), "parameter net.up.weight is [10, 8] torch.float32 on rank 0")
    says(fit(Regressor(lambda: Wide(more=bool(mine())))), "module net.more is nothing on rank 0")
    says(fit(Regressor(lambda: Wide(rate=0.5 * mine()))), "module net.drop is Dropout(p=0.0", "p=0.5")
    says(fit(Regressor().to(torch.float64 if mine() else torch.float32)), "torch.float64 on rank 1")
    frozen = Regressor()
    frozen.net.get_parameter("norm.weight").requires_grad_(not mine())
    says(fit(frozen), "parameter net.norm.weight is [8] torch.float32 on rank 0, [8] torch.float32, frozen on rank 1")
    kinds = (torch.optim.SGD, torch.optim.AdamW)
    says(
        fit(Optimized(lambda m: kinds[mine()](m.parameters(), lr=0.1))), "optimizer 0 is SGD on rank 0, AdamW on rank 1"
    )
    rate = 0.1 + 0.1 * mine()
    says(
        fit(Optimized(lambda m: torch.optim.SGD(m.parameters(), lr=rate))),
        "lr of group 0 of optimizer 0 is 0.1 on rank 0",
    )
    says(
        fit(Optimized(lambda m: grouped(m, 2 + mine()))),
        "the place of net.up.weight in optimizer 0 is group 1, place 0",
    )
    says(fit(Optimized(lambda m: scheduled(m, 2 + mine()))), "step_size of scheduler 0 is 2 on rank 0, 3 on rank 1")
    says(fit(Optimized(broken)), "no optimizer today")
    trainer(strategy(2), max_steps=1).fit(Regressor())


# ---- data


class Given(Regressor):
    """Trains on a loader, and lets one rank do something in its steps."""

    def __init__(self, loader: Any, in_step: Callable[[int, Tensor], Tensor] | None = None, val: Any = None) -> None:
        super().__init__()
        self.loader, self.in_step, self.val = loader, in_step, val
        self.seen: list[Any] = []

    def train_dataloader(self) -> Any:
        return self.loader

    def val_dataloader(self) -> Any:
        return [] if self.val is None else self.val

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        rows = batch if isinstance(batch, Tensor) else batch["x"]
        loss = self.loss(rows)
        return loss if self.in_step is None else self.in_step(batch_idx, loss)


class Stream(IterableDataset[Any]):
    """Rows, changed by ``change(number, row)``, which may raise or end the stream."""

    def __init__(self, change: Callable[[int, Tensor], Any], count: int = 16) -> None:
        self.change, self.count = change, count

    def __iter__(self) -> Iterator[Any]:
        for number, row in enumerate(Rows(self.count).rows):
            with suppress(StopIteration):
                yield self.change(number, row)
                continue
            return


def stream(change: Callable[[int, Tensor], Any], batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(Stream(change), batch_size=batch_size)


def failing(number: int, row: Tensor) -> Tensor:
    if mine() and number == 6:
        raise OSError("the disk is gone")
    return row


def ending(number: int, row: Tensor) -> Tensor:
    if mine() and number == 6:
        raise StopIteration
    return row


def nan(of: int) -> Callable[[int, Tensor], Tensor]:
    return lambda number, loss: loss * (float("nan") if mine() and number == of else 1.0)


class NotANumberBehind(torch.autograd.Function):
    """A gradient that is not a number on one rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * float("nan")


class BadGradient(Given):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        shift: Any = self.net.get_parameter("norm.bias")
        extra = NotANumberBehind.apply(shift).sum() * 0.0 if mine() and batch_idx == 2 else shift.sum() * 0.0
        return super().training_step(batch, batch_idx) + extra


@pytest.mark.ranks(2, timeout=120)
def test_other_batches_ends_and_errors_of_one_rank_are_told_with_the_key_and_the_step() -> None:
    plugin = {"proof": "off"}

    def fed(loader: Any, in_step: Any = None, kind: type[Given] = Given, **options: Any) -> Callable[[], Any]:
        return fit(kind(loader, in_step), plugin, **options)

    says(fed(DataLoader(Rows(16 + 4 * mine()), batch_size=4)), "the length of the train dataloader is 4 on rank 0, 5")
    says(
        fed(DataLoader(Rows(16), batch_size=4, shuffle=bool(mine()))),
        "sampler of the train dataloader",
        "RandomSampler",
    )
    other = lambda at: lambda number, row: row + (mine() and number == at)  # noqa: E731
    more: dict[str, Any] = {"val": [DataLoader(Rows(4), batch_size=2)] * (1 + mine())}
    says(
        fit(Given(stream(other(-1)), **more), plugin), "where the ranks are is", "the val dataloader is made on rank 1"
    )
    says(fed(stream(other(0))), "disagree on batch (different values between ranks 0 and 1)")
    says(fed(stream(other(10))), "train batch 5 of epoch 0: batch has different values on rank 0 and on rank 1")
    named = stream(lambda number, row: {"x": row, "y": torch.tensor(number + (mine() and number == 9))})
    says(fed(named), "train batch 4 of epoch 0: batch['y'] has different values on rank 0 and on rank 1")
    says(fed(stream(other(15))), "train batch 7 of epoch 0: batch has different values")  # the last
    text = stream(lambda number, row: {"x": row, "text": "other" if mine() and number == 5 else "same"})
    says(fed(text), "batch 2 of the train dataloader", "batch['text'][1] is 'same' on rank 0, 'other' on rank 1")
    lengths = stream(lambda number, row: row.repeat(1 + (mine() and number == 3), 1), batch_size=1)
    says(fed(lengths), "batch 3 of the train dataloader", "batch is [1, 1, 8] torch.float32 on rank 0, [1, 2, 8]")
    says(fed(stream(failing)), "the disk is gone", *(() if mine() else ("batch 3 of the train dataloader: rank 1",)))
    says(fed(stream(ending)), "batch 3 of the train dataloader is there on rank 0, and on rank 1 the data has ended")
    says(
        fed(stream(other(-1)), nan(3)), "train batch 3 of epoch 0: the loss is not finite (NaN or inf) on rank 1 alone"
    )
    says(fed(stream(other(-1)), nan(7)), "train batch 7 of epoch 0: the loss is not finite")  # the last
    bad = "train batch 2 of epoch 0: the gradient of net.norm.bias is not finite (NaN or inf) on rank 1 alone"
    says(fed(stream(other(-1)), kind=BadGradient), bad)
    trainer(strategy(2), max_steps=1).fit(Regressor())


@pytest.mark.ranks(2)
def test_seeds_that_differ_are_made_the_same_with_a_warning() -> None:
    seed_everything(3 + mine(), verbose=False)
    model = Given(DataLoader(Rows(16), batch_size=4, shuffle=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(strategy=strategy(2), max_epochs=2).fit(model)
    found = [str(one.message) for one in caught if "different seeds" in str(one.message)]
    assert bool(found) == (not mine())
    assert mine() or "PL_GLOBAL_SEED is 3 on rank 0, 4 on rank 1" in found[0]
    seen = everyones(torch.cat(model.seen))
    assert torch.equal(seen[0], seen[1])


# ---- the order of data


class Drawing(Given):
    """One rank draws random numbers of its own before each epoch."""

    def on_train_epoch_end(self) -> None:
        if mine():
            torch.rand(7)


class OwnSampler:
    """Batches of indices in an order of its own, by NumPy."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.generator.permutation(16).reshape(4, 4).tolist())

    def __len__(self) -> int:
        return 4


def shuffled(kind: str) -> DataLoader[Any]:
    if kind == "generator":
        return DataLoader(Rows(16), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5 + mine()))
    if kind == "by NumPy":
        import numpy

        class Sampler(OwnSampler, torch.utils.data.Sampler[Any]):
            pass

        sampler: Any = Sampler(numpy.random.default_rng(5 + mine()))
        return DataLoader(Rows(16), batch_sampler=sampler)
    return DataLoader(Rows(16), batch_size=4, shuffle=kind == "shuffle")


@pytest.mark.parametrize("kind", ["shuffle", "in order", "generator", "by NumPy"])
@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.ranks(2)
def test_the_order_of_one_replica_is_that_of_the_plain_trainer(kind: str, broadcast: bool) -> None:
    def trained(alone_too: bool) -> Any:
        torch.manual_seed(7 if alone_too else 7 + mine())
        model = (Given if alone_too else Drawing)(shuffled(kind), val=DataLoader(Rows(4), batch_size=2))
        plugin: Any = "auto" if alone_too else strategy(2, broadcast_batch=broadcast)
        quiet_trainer(strategy=plugin, max_epochs=3, **({"devices": 1} if alone_too else {})).fit(model)
        return model

    model = trained(False)
    seen = torch.cat(model.seen)
    if mine():
        assert type(model.trainer.train_dataloader.sampler).__name__ != "DistributedSampler"
    else:
        with alone():
            assert torch.equal(torch.cat(trained(True).seen), seen)
    both = everyones(seen)
    assert torch.equal(both[0], both[1]) and len(seen) == 48


# ---- batches that one rank loads


@dataclass
class Item:
    x: Tensor
    name: str
    nothing: None = None


def nested(rows: list[Tensor]) -> dict[str, Any]:
    x = torch.stack(rows)
    return {
        "x": x,
        "inner": [(x[0], "text"), Item(x * 2, "name")],
        "sparse": torch.eye(3).to_sparse(),
        "none": None,
        "large": torch.arange(40_000),
    }


class Unreadable(Rows):
    """Data that only the first rank has."""

    def __getitem__(self, index: int) -> Tensor:
        if mine():
            raise OSError("no data here")
        return super().__getitem__(index) + 0 * torch.rand(1)


class Everything(Given):
    """Goes through all stages, and notes what it draws after each batch."""

    def __init__(self, loader: Any, val: Any) -> None:
        super().__init__(loader, val=val)
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn.append(float(torch.rand(1)))
        if isinstance(batch, dict) and "a" in batch:
            return super().training_step(batch["a"], batch_idx) + self.loss(batch["b"])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append(batch)


@pytest.mark.ranks(2, timeout=120)
def test_one_rank_loads_whatever_a_batch_is_made_of_and_the_others_draw_the_same_numbers() -> None:
    loader = DataLoader(Unreadable(16), batch_size=4, shuffle=True, collate_fn=nested)
    model = Everything(loader, [DataLoader(Unreadable(4), batch_size=2), DataLoader(Unreadable(6), batch_size=2)])
    plugin = {"broadcast_batch": True}
    run = quiet_trainer(strategy=strategy(2, **plugin), max_epochs=2)
    run.fit(model)
    seen, drawn = everyones(model.seen), everyones(model.drawn)
    assert drawn[0] == drawn[1] and len(drawn[0]) == 8
    assert len(seen[0]) == len(seen[1]) == 8 + 3 * 5 - 1
    for one, two in zip(*seen):
        if isinstance(one, Tensor):
            assert torch.equal(one, two)
            continue
        assert one.keys() == two.keys() and one["none"] is two["none"] is None
        assert all(torch.equal(one[key], two[key]) for key in ("x", "large"))
        assert torch.equal(one["sparse"].to_dense(), two["sparse"].to_dense())
        (first, text), item = two["inner"]
        assert torch.equal(first, one["x"][0]) and text == "text" and item.name == "name" and item.nothing is None
        assert torch.equal(item.x, one["x"] * 2)
    predicted = everyones(run.predict(model, DataLoader(Unreadable(8), batch_size=2)))
    assert len(predicted[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*predicted))
    run.test(model, DataLoader(Unreadable(8), batch_size=2), verbose=False)
    combined = {"a": DataLoader(Unreadable(8), batch_size=2), "b": DataLoader(Unreadable(12), batch_size=2)}
    pair = Everything(CombinedLoader(combined, "max_size_cycle"), None)
    quiet_trainer(strategy=strategy(2, **plugin)).fit(pair)
    assert len(pair.drawn) == 6 and everyones(pair.drawn)[0] == pair.drawn
    over = Everything(DataLoader(Unreadable(16), batch_size=2), None)
    quiet_trainer(strategy=strategy(2, **plugin), overfit_batches=2, max_epochs=2).fit(over)
    assert len(over.seen) == 4


@pytest.mark.ranks(2)
def test_the_end_and_an_error_of_the_rank_that_loads_reach_all() -> None:
    def on_source(number: int, row: Tensor) -> Tensor:
        if number == 6:
            raise OSError("the disk is gone" if not mine() else "not iterated")
        return row

    run = fit(Given(stream(on_source)), {"broadcast_batch": True})
    says(run, "the disk is gone", *(("batch 3 of the train dataloader: rank 0, which loads",) if mine() else ()))
    short = Given(stream(lambda number, row: ending(number, row) if not mine() else row))
    fit(short, {"broadcast_batch": True})()
    assert everyones(len(short.seen)) == [8, 8]
    odd = stream(lambda number, row: {"x": row, "f": lambda: 0})
    odd.collate_fn = lambda items: {"x": torch.stack([i["x"] for i in items]), "f": items[0]["f"]}
    says(fit(Given(odd), {"broadcast_batch": True}), "ickle")
