"""Training steps under Lightning's automatic optimization."""

from __future__ import annotations

import copy
import logging
import os
import threading
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy

from tests.helpers.nets.features import Checkpointed
from tests.helpers.nets.frame import VOCAB, WIDTH
from tests.helpers.nets.step_frame import (
    Backbone,
    Module,
    Step,
    cross_entropy,
    loader,
    right,
    token_batches,
    tokens_of,
    wrong,
)

Batch = dict[str, Tensor]


class Plain(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)


class Item(Module):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.history.append(loss.item())
        return loss


class Log(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(batch["tokens"])
        loss = cross_entropy(logits, batch["targets"])
        accuracy = (logits.argmax(-1) == batch["targets"]).float().mean()
        self.log("loss", loss, prog_bar=True, on_epoch=True)
        self.log_dict({"accuracy": accuracy, "perplexity": loss.exp().detach()})
        return loss


class NanCheck(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        if torch.isnan(loss).any() or not torch.isfinite(loss):
            return None
        return loss


class Metric(Module):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=VOCAB, average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(batch["tokens"])
        self.accuracy(logits.detach().flatten(0, 1), batch["targets"].flatten())
        self.log("accuracy", self.accuracy)
        return cross_entropy(logits, batch["targets"])


class MaskedRows(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens, targets = batch["tokens"], batch["targets"]
        kept = tokens > VOCAB // 4
        return functional.cross_entropy(self(tokens)[kept], targets[kept])


class IgnoreIndex(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        targets = batch["targets"].masked_fill(batch["tokens"] < 5, -100)
        return cross_entropy(self(batch["tokens"]), targets, ignore_index=-100)


class LabelSmoothing(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch["tokens"]), batch["targets"], label_smoothing=0.1)


class Positions(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens = batch["tokens"]
        places = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        return cross_entropy(self.head(self.net(tokens, places)), batch["targets"])


class ReadsTrainer(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        done = self.trainer.global_step / steps + self.trainer.current_epoch / (self.trainer.max_epochs or 1)
        self.log("progress", done + 0.0 * self.trainer.world_size)
        return self.loss(batch) * (1.0 + done)


class WarmUp(Module):
    """A second loss that grows."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        weight = min(1.0, (self.global_step + 1) / 10) * 0.9**self.current_epoch
        hidden = self.net(batch["tokens"])
        return cross_entropy(self.head(hidden), batch["targets"]) + weight * hidden.pow(2).mean()


class ReadsData(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        data = getattr(self.trainer, "datamodule", None)
        best = self.trainer.callback_metrics.get("best", torch.tensor(1.0))
        loss = self.loss(batch) * (1.0 if data is None else data.weight)
        self.log("best", torch.minimum(best, loss.detach()))
        return loss


class Lora(Module):
    def __init__(self) -> None:
        super().__init__()
        config = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
        self.net = get_peft_model(self.net, config)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class CheckpointedStep(Module):
    """The whole backbone is computed twice."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = self.net.embed(batch["tokens"])
        hidden = checkpoint(self.net.inner, x, use_reentrant=False)
        return cross_entropy(self.head(hidden), batch["targets"])


class Autocast(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self(batch["tokens"])
        return cross_entropy(logits.float(), batch["targets"])


class Teacher(Module):
    """Distillation from a frozen model."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(Backbone(), nn.Linear(WIDTH, VOCAB)).requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch["tokens"]).softmax(-1)
        logits = self(batch["tokens"])
        distance = functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")
        return cross_entropy(logits, batch["targets"]) + 0.1 * distance

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class MovingAverage(Module):
    """A copy whose weights follow, and whose hidden states are a target."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.average(batch["tokens"])
        hidden = self.net(batch["tokens"])
        return cross_entropy(self.head(hidden), batch["targets"]) + (hidden - target).pow(2).mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), self.net.parameters()):
                mine.lerp_(theirs, 0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.net.parameters(), *self.head.parameters()], lr=0.05)


class Contrastive(Module):
    """Each row's other view is its positive, all other rows are negatives."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        first = functional.normalize(self.net(batch["tokens"]).mean(1), dim=-1)
        second = functional.normalize(self.net(batch["targets"]).mean(1), dim=-1)
        similarity = first @ second.T / 0.1
        return functional.cross_entropy(similarity, torch.arange(len(first), device=self.device))


class LossDict(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        hidden = self.net(batch["tokens"])
        losses = {"next": cross_entropy(self.head(hidden), batch["targets"]), "size": hidden.abs().mean()}
        return {"loss": torch.stack(list(losses.values())).sum(), **{n: v.detach() for n, v in losses.items()}}


class TwoLoaders(Module):
    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        return self.loss(batch["large"]) + 0.5 * self.loss(batch["small"])


def two_loaders() -> CombinedLoader:
    small = [{"tokens": t, "targets": t.flip(1)} for t in tokens_of(2, rows=3)]
    return CombinedLoader({"large": loader(token_batches()), "small": loader(small)}, "max_size_cycle")


def two_batches() -> list[Any]:
    return [batch for batch, _, _ in iter(two_loaders())]


class Late(Module):
    """The model is made in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        del self.net, self.head

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.net, self.head = Backbone(), nn.Linear(WIDTH, VOCAB)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)


class Awkward(Module):
    """Attributes that nothing can copy."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.sink = open(os.devnull, "w")  # noqa: SIM115 - kept open on purpose
        self.numbers = (number for number in range(1000))
        self.notes = logging.getLogger(__name__)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        with self.lock:
            self.sink.write(f"{batch_idx}: {loss.item()}\n")
        self.notes.debug("number %d", next(self.numbers))
        return loss

    def teardown(self, stage: str) -> None:
        self.sink.close()


class WritesLog(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.logger is not None and self.trainer.is_global_zero:
            self.logger.log_metrics({"raw": float(loss.detach())}, step=self.global_step)
        return loss


class Noise(Module):
    """Hidden states with noise of a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = self.net.embed(batch["tokens"])
        x = x + 0.1 * torch.randn(x.shape, generator=self.generator).to(x)
        return cross_entropy(self.head(self.net.inner(x)), batch["targets"])


class Mixup(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        share = float(torch.distributions.Beta(0.4, 0.4).sample())
        order = torch.randperm(len(batch["tokens"]), device=self.device)
        x = self.net.embed(batch["tokens"])
        logits = self.head(self.net.inner(share * x + (1 - share) * x[order]))
        own, other = cross_entropy(logits, batch["targets"]), cross_entropy(logits, batch["targets"][order])
        return share * own + (1 - share) * other


class PairsOfThings(Module):
    """A batch that is a tuple, with names in it."""

    def training_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        tokens, names = batch
        return cross_entropy(self(tokens), tokens.roll(-1, 1)) * len(names[0])


class GatheredPenalty(Module):
    """Only what every rank holds is penalized."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch) + 0.01 * sum(p.pow(2).sum() for p in self.head.parameters())


class Penalty(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        penalty = torch.stack([p.norm() for p in self.net.parameters()]).sum()
        return self.loss(batch) + 0.1 * penalty


class WidthScale(Module):
    """muP's, from the shape that a rank has."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        up: Any = self.net.block
        return self.loss(batch) * (16 / up.up.weight.shape[0])


class ReadsWeight(Module):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        up: Any = self.net.block
        size = up.up.weight.detach().abs().max()
        return self.loss(batch) / size.clamp(min=1e-3)


class ReadsItem(Module):
    """Stops the auxiliary loss once weights are large."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        up: Any = self.net.block
        large = up.up.weight.norm().item()
        return self.loss(batch) * (1 + large)


def named_batches() -> list[Any]:
    return [(tokens, ["a", "b"]) for tokens in tokens_of(4)]


STEPS: tuple[Step, ...] = (
    right("plain", Plain),
    right(".item() in a list", Item),
    right("self.log and log_dict", Log),
    right("isnan and isfinite", NanCheck),
    right("torchmetrics", Metric),
    right("boolean mask of tokens", MaskedRows),
    right("ignore_index", IgnoreIndex),
    right("label smoothing", LabelSmoothing),
    right("position ids of its own", Positions),
    right("reads of the trainer", ReadsTrainer),
    right("weight by global_step", WarmUp),
    right("reads of datamodule and callback_metrics", ReadsData),
    right("LoRA", Lora),
    right("checkpointed block", lambda: Plain(Checkpointed(False))),
    right("checkpointed block, reentrant", lambda: Plain(Checkpointed(True))),
    right("checkpointed in the step", CheckpointedStep),
    right("autocast inside", Autocast),
    right("teacher and student", Teacher),
    right("moving average", MovingAverage),
    right("contrastive", Contrastive),
    right("dict of losses", LossDict),
    right("two loaders", TwoLoaders, batches=two_batches, loaders=two_loaders),
    right("configure_model", Late),
    right("what cannot be copied", Awkward),
    right("writes to its logger", WritesLog),
    right("generator of its own", Noise),
    right("mixup", Mixup),
    right("tuple with names", PairsOfThings, batches=named_batches),
    right("penalty of the head", GatheredPenalty),
    wrong("penalty of all weights", Penalty, "torch.stack([p.norm() for p in self.net.parameters()])"),
    wrong("scale by a local width", WidthScale, "16 / up.up.weight.shape[0]"),
    wrong("largest entry of a sharded weight", ReadsWeight, "up.up.weight.detach().abs().max()"),
    wrong("norm of a sharded weight as a number", ReadsItem, "up.up.weight.norm().item()"),
)
