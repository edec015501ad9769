"""Training that becomes wrong at the second step or later: what one look at the first step does not see."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.nets.features import Mlp
from tests.helpers.nets.frame import VOCAB
from tests.helpers.nets.step_frame import Module, Step, token_batches, wrong

Batch = dict[str, Tensor]


class Switched(Mlp):
    """An MLP with a norm over its features, sharded ones, that is off at first."""

    normed = False

    def between(self, h: Tensor) -> Tensor:
        h = functional.gelu(h)
        return functional.layer_norm(h, h.shape[-1:]) if self.normed else h


class WithSwitch(Module):
    """Trains a net with a switch."""

    def __init__(self) -> None:
        super().__init__(Switched())

    @property
    def mlp(self) -> Switched:
        block = self.net.block
        assert isinstance(block, Switched)
        return block


class ByGlobalStep(WithSwitch):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.global_step >= 2:
            loss = loss + 0.1 * self.mlp.up.weight.norm()
        return loss


class ByBatchIndex(WithSwitch):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if batch_idx % 2 == 1:
            loss = loss + 10 * self.mlp.up.weight.square().mean()
        return loss


class ByEpoch(WithSwitch):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden = self.mlp.up(self.net.embed(batch["tokens"]))
        loss = self.loss(batch)
        return loss if self.current_epoch == 0 else loss + hidden.relu().mean(-1).square().mean()


class ByTrainer(WithSwitch):
    """The share of the epoch that is done says what is asked of a weight."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        done = self.trainer.global_step / self.trainer.num_training_batches
        weight = self.mlp.down.weight
        return self.loss(batch) + (0.0 if done < 0.5 else 0.1 * weight.std())


class ByCounter(WithSwitch):
    """Its own count of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen += 1
        loss = self.loss(batch)
        return loss + 10 * self.mlp.up.weight.var() if self.seen > 1 else loss


class ByKey(WithSwitch):
    """Batches with ``regularize`` ask for more."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if "regularize" in batch:
            loss = loss + batch["regularize"] * self.mlp.down.weight.norm()
        return loss


class ByDtype(WithSwitch):
    """Targets are classes, or probabilities, which are made sharper by the size of a weight."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, targets = self(batch["tokens"]).flatten(0, 1), batch["targets"].flatten(0, 1)
        if targets.is_floating_point():
            targets = (targets * self.mlp.up.weight.detach().norm()).softmax(-1)
        return functional.cross_entropy(logits, targets)


class ByNdim(WithSwitch):
    """Tokens [B, S], or [B, 2, S] of two views, whose activations should agree."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens = batch["tokens"]
        if tokens.ndim == 2:
            return self.loss(batch)
        first, second = (self.mlp.up(self.net.embed(view)) for view in tokens.unbind(1))
        return functional.cosine_similarity(first, second, dim=-1).neg().mean()


class Gained(Mlp):
    """An MLP with one gain for all features, whose gradient is partial."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()), requires_grad=False)

    def between(self, h: Tensor) -> Tensor:
        return functional.gelu(h) * self.gain


class Frozen(Module):
    """Its gain does not train, until a callback lets it."""

    def __init__(self) -> None:
        super().__init__(Gained())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)


class Thaw(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            pl_module.requires_grad_(True)


class TurnOn(Callback):
    """Turns the norm on in the second epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, WithSwitch)
        pl_module.mlp.normed = trainer.current_epoch > 0


class Turned(WithSwitch):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)


class TurnedByHook(WithSwitch):
    """The module turns the norm on itself, once it has seen a batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mlp.normed = True


def with_key() -> list[Any]:
    first, second, *others = token_batches()
    return [first, {**second, "regularize": torch.tensor(0.5)}, *others]


def with_probabilities() -> list[Any]:
    first, second, *others = token_batches()
    soft = functional.one_hot(second["targets"], VOCAB).float()
    return [first, {**second, "targets": soft}, *others]


def with_views() -> list[Any]:
    first, second, *others = token_batches()
    return [first, {**second, "tokens": torch.stack([second["tokens"], second["tokens"].flip(1)], 1)}, *others]


NORM = "functional.layer_norm(h, h.shape[-1:])"

LATE: tuple[Step, ...] = (
    wrong("late: global_step", ByGlobalStep, "0.1 * self.mlp.up.weight.norm()", first_wrong=3),
    wrong("late: batch_idx", ByBatchIndex, "10 * self.mlp.up.weight.square().mean()", first_wrong=2),
    wrong("late: current_epoch", ByEpoch, "hidden.relu().mean(-1)", first_wrong=5, epochs=2),
    wrong("late: share of the epoch", ByTrainer, "0.1 * weight.std()", first_wrong=3),
    wrong("late: a count of its own", ByCounter, "10 * self.mlp.up.weight.var()", first_wrong=2),
    wrong("late: another key", ByKey, "self.mlp.down.weight.norm()", first_wrong=2, batches=with_key),
    wrong(
        "late: another dtype", ByDtype, "self.mlp.up.weight.detach().norm()", first_wrong=2, batches=with_probabilities
    ),
    wrong(
        "late: another ndim", ByNdim, "functional.cosine_similarity(first, second", first_wrong=2, batches=with_views
    ),
    wrong(
        "late: thawed by a callback",
        Frozen,
        "functional.gelu(h) * self.gain",
        first_wrong=3,
        callbacks=lambda: [Thaw()],
    ),
    wrong("late: turned on by a callback", Turned, NORM, first_wrong=5, epochs=2, callbacks=lambda: [TurnOn()]),
    wrong("late: turned on by a hook", TurnedByHook, NORM, first_wrong=2),
)
