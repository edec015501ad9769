"""Gradients over data parallel ranks: torch's DDP on the data parallel group, for every way to optimize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_autotp import AutoTPStrategy
from tests.helpers.closeness import assert_close
from tests.helpers.small_nets import (
    RULES,
    WIDTH,
    Net,
    Regressor,
    Rows,
    assert_replicas_equal,
    parts_of,
    plugin_of,
    strategy,
    trainer,
    unsharded,
    weights,
)


def assert_unsharded_run(model: LightningModule, want: dict[str, Tensor]) -> None:
    """The weights are those of a run on one process, and bit-equal on the ranks that hold them alike."""
    assert_close(weights(model), parts_of(model, want), 1e-4, "weight")
    assert_replicas_equal(model)


# ---- accumulation


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.ranks(4)
def test_training_is_that_of_one_process(size: int, accumulate: int) -> None:
    model = Regressor()
    trainer(strategy(size), accumulate_grad_batches=accumulate).fit(model)
    assert_unsharded_run(model, unsharded(Regressor(), accumulate_grad_batches=accumulate))


class CountsReductions(Regressor):
    """Notes at which batches the gradients of data parallel ranks are reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.at = -1

    def on_train_start(self) -> None:
        wrapped = self.trainer.strategy.model
        assert isinstance(wrapped, DistributedDataParallel)
        # a lambda: DDP looks at annotations, and does not understand those of this file
        wrapped.register_comm_hook(self, lambda model, bucket: _counted(model, bucket))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.at = batch_idx
        return super().training_step(batch, batch_idx)


def _counted(model: CountsReductions, bucket: Any) -> Any:
    model.batches.append(model.at)
    group = plugin_of(model).mesh.dp_group
    reduced = dist.all_reduce(bucket.buffer() / dist.get_world_size(group), group=group, async_op=True)
    assert reduced is not None
    return reduced.get_future().then(lambda future: future.value()[0])


@pytest.mark.ranks(4)
def test_gradients_are_reduced_over_data_parallel_ranks_once_a_step_not_once_a_batch() -> None:
    model = CountsReductions()
    trainer(strategy(2), accumulate_grad_batches=2).fit(model)
    assert sorted(set(model.batches)) == [1, 3]
    assert_unsharded_run(model, unsharded(Regressor(), accumulate_grad_batches=2))


@pytest.mark.ranks(4)
def test_without_accumulation_every_batch_is_reduced() -> None:
    model = CountsReductions()
    trainer(strategy(2)).fit(model)
    assert sorted(set(model.batches)) == [0, 1, 2, 3]


@pytest.mark.ranks(2)
def test_without_data_parallel_ranks_nothing_is_wrapped() -> None:
    model = Regressor()
    seen: list[Any] = []
    model.on_train_start = lambda: seen.append(model.trainer.strategy.model)  # type: ignore[method-assign]
    trainer(strategy(2)).fit(model)
    assert seen == [model]


# ---- by hand


class ByHand(Regressor):
    """Two optimizers and two schedulers over one loss, accumulated over two batches by hand."""

    def __init__(self, sum_gain: bool = False) -> None:
        super().__init__(Gained if sum_gain else Net)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        steps = batch_idx % 2 == 1
        if steps:
            self.manual_backward(self.loss(batch))
        else:
            for optimizer in optimizers:
                optimizer.zero_grad()
            with self.trainer.strategy.block_backward_sync():  # type: ignore[attr-defined]
                self.manual_backward(self.loss(batch))
        if steps:
            for optimizer, scheduler in zip(optimizers, schedulers):
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
                optimizer.step()
                scheduler.step()

    def configure_optimizers(self) -> Any:
        net: Any = self.net
        optimizers = [
            torch.optim.AdamW(net.up.parameters(), lr=0.02, eps=1e-5),
            torch.optim.SGD([p for name, p in net.named_parameters() if not name.startswith("up")], lr=0.1),
        ]
        return optimizers, [torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in optimizers]


class Gained(Net):
    """A weight of every rank's hidden units, between the cuts: its gradient is partial."""

    def __init__(self) -> None:
        super().__init__(hidden=8)
        self.gain = nn.Parameter(torch.ones(1))

    def between(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.gelu(self.up(self.norm(x))) * self.gain)
        return out


SUMMED: dict[str, Any] = {
    "layer_specs": [
        *RULES["layer_specs"],
        {"patterns": [r".*\.gain"], "partition_type": "skip", "grad_allreduce": True},
    ]
}


@pytest.mark.parametrize("partial", [False, True], ids=["complete", "with-a-partial-gradient"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.ranks(4)
def test_manual_optimization_with_two_optimizers_is_that_of_one_process(size: int, partial: bool) -> None:
    model = ByHand(partial)
    trainer(strategy(size, partition_config=SUMMED if partial else RULES)).fit(model)
    assert_unsharded_run(model, _alone_by_hand(partial))


def _alone_by_hand(partial: bool) -> dict[str, Tensor]:
    """The loop of ``ByHand``, written out: one process has no reduction to block."""
    model = ByHand(partial)
    optimizers, schedulers = model.configure_optimizers()
    for at, batch in enumerate(Rows(model.count).rows.split(model.batch)):
        if at % 2 == 0:
            model.zero_grad()
        model.loss(batch).backward()
        if at % 2 == 1:
            for optimizer, scheduler in zip(optimizers, schedulers):
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
                scheduler.step()
    return weights(model)


class Adversaries(Regressor):
    """Two networks, an optimizer each, that take turns on every batch, as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.judge = Net()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        losses: list[Callable[[], Tensor]] = [
            lambda: self.loss(batch) + self.judge(self.net(batch)).square().mean(),
            lambda: functional.mse_loss(self.judge(self.net(batch).detach()), batch),
        ]
        for optimizer, loss in zip(optimizers, losses):
            with optimizer.toggle_model():
                self.manual_backward(loss())
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(each.parameters(), lr=0.05) for each in (self.net, self.judge)]


@pytest.mark.ranks(4)
def test_two_networks_that_take_turns_train_as_on_one_process() -> None:
    model = Adversaries()
    trainer(strategy(2, find_unused_parameters=True)).fit(model)
    assert_unsharded_run(model, unsharded(Adversaries()))


class WithoutWrapper(Regressor):
    """Steps the bare optimizer, of which Lightning and the strategy hear nothing."""

    def __init__(self) -> None:
        super().__init__(Gained)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.ranks(2)
def test_a_step_of_the_bare_optimizer_sees_complete_gradients() -> None:
    model = WithoutWrapper()
    trainer(strategy(2, partition_config=SUMMED)).fit(model)
    assert_unsharded_run(model, unsharded(WithoutWrapper()))


# ---- plain data parallelism


@pytest.mark.parametrize("options", [{}, {"autotp_size": 0}, {"autotp_size": 1}], ids=["bare", "0", "1"])
@pytest.mark.ranks(2)
def test_without_a_size_it_is_plain_data_parallelism_bit_for_bit(options: dict[str, Any]) -> None:
    model, reference = Regressor(), Plain()
    trainer(AutoTPStrategy(**options), accumulate_grad_batches=2, gradient_clip_val=0.1).fit(model)
    assert (plugin_of(model).tp_size, plugin_of(model).dp_size) == (1, 2)
    trainer(DDPStrategy(), accumulate_grad_batches=2, gradient_clip_val=0.1).fit(reference)
    want = weights(reference)
    assert all(torch.equal(tensor, want[name]) for name, tensor in weights(model).items())
    assert {type(module) for module in model.net.modules()} == {Net, nn.LayerNorm, nn.Linear}


class Plain(Regressor):
    """Dealt out by global rank."""

    def train_dataloader(self) -> Any:
        rank, size = dist.get_rank(), dist.get_world_size()
        own = [row for batch in Rows(self.count).rows.split(self.batch) for row in batch.chunk(size)[rank]]
        return torch.utils.data.DataLoader(own, batch_size=self.batch // size)  # type: ignore[arg-type]


# ---- what DDP cannot do


class Idle(Net):
    """Has a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(WIDTH, WIDTH)


@pytest.mark.ranks(4)
def test_parameters_that_are_never_used_are_an_error_that_names_them_and_the_fix() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"net\.idle\.weight.*find_unused_parameters=True"):
        trainer(strategy(2)).fit(Regressor(Idle))


@pytest.mark.ranks(4)
def test_parameters_that_are_never_used_train_with_find_unused_parameters() -> None:
    model = Regressor(Idle)
    trainer(strategy(2, find_unused_parameters=True), accumulate_grad_batches=2).fit(model)
    assert_unsharded_run(model, unsharded(Regressor(Idle), accumulate_grad_batches=2))


@pytest.mark.ranks(2)
def test_parameters_that_are_never_used_are_no_matter_without_data_parallel_ranks() -> None:
    model = Regressor(Idle)
    trainer(strategy(2)).fit(model)
    assert_unsharded_run(model, unsharded(Regressor(Idle)))


class Frozen(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch).requires_grad_()


@pytest.mark.ranks(4)
def test_a_model_without_a_trainable_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient, so there is nothing to train"):
        trainer(strategy(2)).fit(Frozen())


@pytest.mark.ranks(4)
def test_static_graph_with_accumulation_is_an_error() -> None:
    with pytest.raises(ValueError, match="static_graph: it does not go with gradient accumulation"):
        trainer(strategy(2, static_graph=True), accumulate_grad_batches=2).fit(Regressor())


@pytest.mark.ranks(4)
def test_static_graph_without_accumulation_trains() -> None:
    model = Regressor()
    trainer(strategy(2, static_graph=True)).fit(model)
    assert_unsharded_run(model, unsharded(Regressor()))


class Recomputed(Net):
    """Its block is checkpointed, reentrantly or not."""

    def __init__(self, reentrant: bool = True) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.before = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, self.before(x), use_reentrant=self.reentrant)
        return out


class RecomputedLater(Recomputed):
    def __init__(self) -> None:
        super().__init__(reentrant=False)


@pytest.mark.ranks(4)
def test_find_unused_parameters_with_reentrant_checkpointing_is_an_error_that_says_so() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"find_unused_parameters.*use_reentrant=False"):
        trainer(strategy(2, find_unused_parameters=True)).fit(Regressor(Recomputed))


@pytest.mark.parametrize(("make", "find"), [(Recomputed, False), (RecomputedLater, False), (RecomputedLater, True)])
@pytest.mark.ranks(4)
def test_other_checkpointing_trains_as_on_one_process(make: Callable[[], nn.Module], find: bool) -> None:
    model = Regressor(make)
    trainer(strategy(2, find_unused_parameters=find), accumulate_grad_batches=2).fit(model)
    assert_unsharded_run(model, unsharded(Regressor(make), accumulate_grad_batches=2))
