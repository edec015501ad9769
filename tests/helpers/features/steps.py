"""Features of training steps: clipping, manual optimization, higher gradients, several optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.features.frame import Feature, Recorded
from tests.helpers.small_nets import Net


class OwnClipping(Recorded):
    """Clips late, and only some parameters by value."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        torch.nn.utils.clip_grad_value_(self.net.down.parameters(), 0.01)


class Manual(Recorded):
    def __init__(self, make: Any = Net) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.keep(self.loss(batch)))
        optimizer.step()


class Accumulating(Manual):
    """Steps after every second batch, with ``toggle_model(sync_grad=...)``."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        last = batch_idx % 2 == 1
        with optimizer.toggle_model(sync_grad=last):
            self.manual_backward(self.keep(self.loss(batch)) / 2)
        if last:
            optimizer.step()
            optimizer.zero_grad()


class Pair(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = Net(), Net()


class Adversarial(Manual):
    """A GAN with two optimizers, toggled."""

    def __init__(self) -> None:
        super().__init__(Pair)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        of_generator, of_critic = optimizers
        self.toggle_optimizer(of_generator)
        fake = self.net.generator(batch)
        loss = self.keep(-self.net.critic(fake).square().mean())
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.toggle_optimizer(of_critic)
        fake = self.net.generator(batch).detach()
        loss = self.keep(self.net.critic(fake).square().mean() - self.net.critic(batch.flip(-1)).tanh().mean())
        of_critic.zero_grad()
        self.manual_backward(loss)
        of_critic.step()
        self.untoggle_optimizer(of_critic)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", functional.mse_loss(self.net.generator(batch), batch.flip(-1)), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(part.parameters(), lr=0.01, eps=1e-5) for part in (self.net.generator, self.net.critic)
        ]


class Penalized(Recorded):
    """A gradient penalty: the gradient of a gradient."""

    def penalized(self, batch: Tensor) -> Tensor:
        """The loss and a penalty of each row's slope."""
        batch = batch.clone().requires_grad_()
        rows = (self.net(batch) - batch.flip(-1)).square().mean(-1)
        (slope,) = torch.autograd.grad(rows.sum(), batch, create_graph=True)
        return self.keep(rows.mean() + slope.square().sum(-1).mean())

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.penalized(batch)


class PenalizedByHand(Penalized):
    """The same in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.penalized(batch))
        optimizer.step()


class Functional(Recorded):
    """``functional_call`` with the module's own parameters."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        parameters: dict[str, Tensor] = dict(self.net.named_parameters())
        out = torch.func.functional_call(self.net, parameters, (batch,))
        return self.keep(functional.mse_loss(out, batch.flip(-1)))


class FunctionalGrad(Manual):
    """``torch.func.grad`` of ``functional_call``, put into ``.grad`` by hand."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()

        def loss_of(parameters: dict[str, Tensor]) -> Tensor:
            out = torch.func.functional_call(self.net, parameters, (batch,))
            return functional.mse_loss(out, batch.flip(-1))

        parameters = {name: p.detach() for name, p in self.net.named_parameters()}
        gradients, loss = torch.func.grad_and_value(loss_of)(parameters)
        self.keep(loss)
        for name, parameter in self.net.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()


class Vectorized(Recorded):
    """``vmap`` over rows."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        out = torch.func.vmap(self.net)(batch)
        return self.keep(functional.mse_loss(out, batch.flip(-1)))


class Sharpness(Manual):
    """SAM: a step uphill of a length that all weights share, then the gradient there."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        norm = self.norm()
        moved = []
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.grad is not None:
                    step = 0.05 * parameter.grad / (norm + 1e-12)
                    parameter.add_(step)
                    moved.append((parameter, step))
        optimizer.zero_grad()
        self.manual_backward(self.keep(self.loss(batch)))
        with torch.no_grad():
            for parameter, step in moved:
                parameter.sub_(step)
        optimizer.step()

    def norm(self) -> Tensor:
        """The norm of all gradients."""
        strategy: Any = self.trainer.strategy
        if hasattr(strategy, "grad_norm"):
            return strategy.grad_norm()
        return torch.nn.utils.get_total_norm(p.grad for p in self.parameters() if p.grad is not None)


class NaiveSharpness(Sharpness):
    """SAM as it is found everywhere: of the norms of what a rank holds."""

    def norm(self) -> Tensor:
        return torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm()


class Branches(nn.Module):
    """Two blocks, of which a step may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Net(), Net()

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        out: Tensor = self.first(x)
        return self.second(out) if both else out


class Sometimes(Recorded):
    """Leaves half of the model out in every second step."""

    def __init__(self) -> None:
        super().__init__(Branches)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.keep(functional.mse_loss(self.net(batch, both=batch_idx % 2 == 0), batch.flip(-1)))


class LoggedNorm(Recorded):
    """Logs the norm of the gradient by Lightning's own function."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        from lightning.pytorch.utilities import grad_norm

        self.log_dict(grad_norm(self, norm_type=2))


class TrueNorm(Recorded):
    """Logs norms of gradients by the strategy's call, or by torch where there is none."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        strategy: Any = self.trainer.strategy
        ours = hasattr(strategy, "grad_norm")
        for kind in (1.0, 2.0, 3.0, float("inf")):
            for name, module in (("net", self.net), ("up", self.net.up)):
                if ours:
                    norm = strategy.grad_norm(module, norm_type=kind)
                else:
                    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()], kind)
                self.log(f"{name}-{kind}", norm)
        parameters = list(self.parameters())
        weights = strategy.parameter_norm() if ours else torch.nn.utils.get_total_norm(parameters)
        self.log("weights", weights)


class ByHand(Manual):
    """Clips with torch's own function."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.keep(self.loss(batch)))
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)
        optimizer.step()


class ByHandInHook(Recorded):
    """Clips with torch's own function in a hook."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class LocalLog(Recorded):
    """Logs what differs on the ranks that share a model."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("weight", self.net.up.weight.norm())
        return super().training_step(batch, batch_idx)


STEPS: dict[str, Feature] = {
    "clip-norm": Feature(options=lambda d: {"gradient_clip_val": 0.05}),
    "clip-value": Feature(options=lambda d: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "own-clipping": Feature(OwnClipping),
    "manual": Feature(Manual),
    "manual-accumulation": Feature(Accumulating),
    "gan": Feature(Adversarial, strategy={"find_unused_parameters": True}),
    "gradient-penalty": Feature(Penalized),
    "gradient-penalty-by-hand": Feature(PenalizedByHand),
    "functional-call": Feature(Functional),
    "func-grad": Feature(FunctionalGrad, refused_by_replicas="were not averaged over the replicas"),
    "vmap": Feature(Vectorized, refused="tensor paralleli"),
    "sam": Feature(Sharpness),
    "sam-of-local-norms": Feature(NaiveSharpness, refused="grad_norm"),
    "unused-in-some-steps": Feature(Sometimes, strategy={"find_unused_parameters": True}),
    "lightning-grad-norm": Feature(LoggedNorm, refused="grad_norm"),
    "true-norms": Feature(TrueNorm),
    "clip-by-hand": Feature(ByHand, refused="clip_gradients"),
    "clip-by-hand-in-hook": Feature(ByHandInHook, refused="clip_gradients"),
    "local-log": Feature(LocalLog, refused="weight"),
}
