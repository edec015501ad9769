"""One training run as Lightning does it with AutoTPStrategy, and the same run unsharded in a plain loop."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy
from lightning_autotp.distributed.dp_shards import all_rows
from lightning_autotp.proof.error_metrics import MODEL_SCALE
from lightning_autotp.sharding.state import sharded
from tests.helpers.closeness import assert_close, relative_errors
from tests.helpers.models import LanguageModel, TokenDataset, next_token_loss, quiet_trainer, token_batches
from tests.helpers.rank_pool import default_device, rank_device

ACCUMULATE, STEPS, CLIP = 2, 5, 0.5
_REMEMBERED = 16


@dataclass
class Record:
    """What a run did: the loss of every micro-batch, gradients before clipping a step, weights at the end."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class RecordedModel(LanguageModel):
    """A language model that writes its run down; its rows are dealt out by data parallel rank, in order."""

    def __init__(self, batches: list[Tensor], factory: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__(factory, **options)
        self.batches = batches
        self.record = Record()

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        strategy = self.trainer.strategy
        assert isinstance(strategy, AutoTPStrategy)
        mine = [batch.chunk(strategy.dp_size)[strategy.dp_rank] for batch in self.batches]
        return DataLoader(TokenDataset(mine), batch_size=len(mine[0]))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.record.losses.append(loss.detach().clone())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.record.gradients.append(
            {n: all_rows(p.grad.detach()).clone() for n, p in self.named_parameters() if p.grad is not None}
        )

    def on_train_end(self) -> None:
        self.record.weights = {name: all_rows(p.detach()).clone() for name, p in self.named_parameters()}


def batches_for(vocab: int, steps: int = STEPS) -> list[Tensor]:
    """``ACCUMULATE`` micro-batches a step, of 4 rows each."""
    return token_batches(seed=1, n=steps * ACCUMULATE, batch=4, seq=12, vocab=vocab)


_remembered: OrderedDict[bytes, Record] = OrderedDict()


def reference_run(
    factory: Callable[..., nn.Module],
    batches: list[Tensor],
    dtype: torch.dtype = torch.float32,
    mixed: bool = False,
    **options: Any,
) -> Record:
    """The run without Lightning and without tensor parallelism; ``mixed`` is under bf16 autocast.

    The last few are remembered by what they were asked for, as tests of several sizes compare with the same run, and
    must not be written to.
    """
    tokens = [(batch.shape, batch.numpy().tobytes()) for batch in batches]
    key = pickle.dumps((factory, tokens, dtype, mixed, options, default_device()))
    if key not in _remembered:
        _remembered[key] = _reference_run(factory, batches, dtype, mixed, **options)
    _remembered.move_to_end(key)
    if len(_remembered) > _REMEMBERED:
        _remembered.popitem(last=False)
    return _remembered[key]


def _reference_run(
    factory: Callable[..., nn.Module], batches: list[Tensor], dtype: torch.dtype, mixed: bool, **options: Any
) -> Record:
    model = LanguageModel(factory, **options).to(rank_device(), dtype)
    optimizer = model.configure_optimizers()
    record = Record()
    for number, batch in enumerate(batches):
        tokens = batch.to(rank_device())
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=mixed):
            loss = next_token_loss(model(tokens), tokens)
        record.losses.append(loss.detach().clone())
        (loss / ACCUMULATE).backward()
        if number % ACCUMULATE == ACCUMULATE - 1:
            record.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    record.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return record


def sharded_run(
    strategy: AutoTPStrategy, factory: Callable[..., nn.Module], batches: list[Tensor], **options: Any
) -> RecordedModel:
    """The run through ``Trainer.fit``."""
    trainer_options = options.pop("trainer", {})
    model = RecordedModel(batches, factory, **options)
    defaults = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP, "use_distributed_sampler": False}
    quiet_trainer(strategy=strategy, **(defaults | trainer_options)).fit(model)
    return model


def part_of(model: nn.Module, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts of full tensors, as the sharded model holds them."""
    found = sharded(model)
    assert found is not None
    layouts = found.plan.layouts
    return {name: layouts[name].shard(tensor, found.mesh.tp_rank) for name, tensor in full.items()}


def global_loss(record: Record, model: nn.Module) -> Tensor:
    """The losses [micro-batches] as means over the data parallel ranks."""
    found = sharded(model)
    assert found is not None
    losses = torch.stack(record.losses).float()
    dist.all_reduce(losses, group=found.mesh.dp_group)
    return losses / found.mesh.dp_size


def assert_parity(model: RecordedModel, reference: Callable[..., Record]) -> None:
    """Every loss, every gradient of every step and every weight on this rank is the unsharded run's, in fp32.

    ``reference`` makes the unsharded run, in the dtype it is given. A gradient that is truly zero (that of a key bias
    without rotary positions) holds rounding noise, and the bound of 1e-4 is one that the unsharded fp32 run misses
    against the fp64 run, too (by 4e-4 to 1e-3). Such a tensor, and no other, is held to 1e-8 of the model's gradient
    norm, which is a twelfth of fp32's machine epsilon.
    """
    got, want = model.record, reference()
    assert_close({"loss": global_loss(got, model)}, {"loss": torch.stack(want.losses).float()}, 1e-5, "loss")
    assert len(got.gradients) == len(want.gradients) == STEPS
    noisy = noise(want, reference(dtype=torch.float64))
    for step, (ours, theirs) in enumerate(zip(got.gradients, want.gradients)):
        full = part_of(model, theirs)
        assert_close(without(ours, noisy[step]), without(full, noisy[step]), 1e-4, f"gradient of step {step}")
        for name, error in relative_errors(ours, full).items():
            assert name not in noisy[step] or error * MODEL_SCALE <= 1e-8, f"{name}: {error}"
    assert_close(got.weights, part_of(model, want.weights), 1e-4, "weight")
    assert_replicas_equal(model)


def noise(single: Record, double: Record) -> list[dict[str, float]]:
    """For each step the gradients that fp32 itself misses by more than 1e-4, with their errors."""
    return [
        {name: error for name, error in relative_errors(ours, theirs).items() if error > 1e-4}
        for ours, theirs in zip(single.gradients, double.gradients)
    ]


def without(tensors: dict[str, Tensor], names: dict[str, float]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def assert_replicas_equal(model: RecordedModel) -> None:
    """What is whole on every rank is bit-equal on all of them, weights and last gradients."""
    found = sharded(model)
    assert found is not None
    for kind, tensors in (("weight", model.record.weights), ("gradient", model.record.gradients[-1])):
        for name, tensor in tensors.items():
            if found.plan.layouts[name].is_replicated:
                first = tensor.clone()
                dist.broadcast(first, src=0)
                assert torch.equal(tensor, first), f"{kind} of {name} is not bit-equal to rank 0's"


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest error of any tensor, in the terms of ``closeness``."""
    return max(relative_errors(got, want).values())
