"""Training steps under manual optimization."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.nets.features import Mlp
from tests.helpers.nets.frame import WIDTH
from tests.helpers.nets.step_frame import Module, Step, cross_entropy, right, tokens_of, wrong

Batch = dict[str, Tensor]


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Accumulating(Manual):
    """Steps every second batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch) / 2
        self.manual_backward(loss)
        if (batch_idx + 1) % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
        self.log("loss", loss)


class Clipping(Manual):
    """Lightning's own clipping, which knows of TP."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


class Scheduled(Manual):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class TwoOptimizers(Manual):
    """Body and head in turns, the other one's gradients switched off."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05), torch.optim.SGD(self.head.parameters(), lr=0.1)


class Closure(Manual):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class Gan(LightningModule):
    """A generator and a discriminator, each an MLP that is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, WIDTH), Mlp())
        self.discriminator = nn.Sequential(Mlp(), nn.LeakyReLU(), nn.Linear(WIDTH, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        of_generator, of_discriminator = optimizers
        noise = batch[:, :8]

        self.toggle_optimizer(of_generator)
        fake = self.generator(noise)
        logits = self.discriminator(fake)
        loss = functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        self.log("generator", loss)
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()
        self.untoggle_optimizer(of_generator)

        self.toggle_optimizer(of_discriminator)
        real, made = self.discriminator(batch), self.discriminator(fake.detach())
        loss = functional.softplus(-real).mean() + functional.softplus(made).mean()
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.generator, self.discriminator)]


class ClippingByHand(Manual):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)
        optimizer.step()


class NormedGradients(Manual):
    """Each gradient is scaled to a norm of one, as LARS and others do."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(parameter.grad.norm() + 1e-6)
        optimizer.step()


class AdversarialWeights(Manual):
    """Sharpness-aware: a step along the gradient by a local norm, another backward pass, and back."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        block: Any = self.net.block
        weight = block.up.weight
        moved = 0.5 * weight.grad / weight.grad.norm()
        weight.data.add_(moved)
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch["tokens"]), batch["targets"]))
        weight.data.sub_(moved)
        optimizer.step()


def images() -> list[Any]:
    """Rows [5, 32] of floats."""
    return [torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(int(t[0, 0]))) for t in tokens_of(4)]


STEPS: tuple[Step, ...] = (
    right("manual", Manual),
    right("manual, accumulating", Accumulating),
    right("manual, clipped by Lightning", Clipping),
    right("manual, scheduler", Scheduled),
    right("manual, two optimizers in turns", TwoOptimizers),
    right("manual, closure", Closure),
    right("GAN", Gan, batches=images),
    wrong("manual, clipped by a local norm", ClippingByHand, "clip_grad_norm_(self.parameters(), 0.1)"),
    wrong(
        "manual, gradients by their local norms", NormedGradients, "parameter.grad.div_(parameter.grad.norm() + 1e-6)"
    ),
    wrong("manual, moved by a local norm", AdversarialWeights, "moved = 0.5 * weight.grad / weight.grad.norm()"),
)
