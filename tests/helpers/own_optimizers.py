"""Optimizers as people write them into one file, each of which looks at more than one element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Own(Optimizer):
    def __init__(self, params: Any, lr: float = 0.02, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    def each(self) -> Iterator[tuple[Any, Tensor, Tensor, Any]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield group, p, p.grad, self.state[p]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        raise NotImplementedError


def _average(state: Any, name: str, value: Tensor, beta: float) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(value)
    average: Tensor = state[name].mul_(beta).add_(value, alpha=1 - beta)
    return average


class SingleFileMuon(_Own):
    """Momentum, orthogonalized by Newton and Schulz; groups without ``use_muon`` get Adam, as in the common file."""

    def update(self) -> None:
        for group, p, grad, state in self.each():
            moment = _average(state, "momentum", grad, 0.95)
            if not group.get("use_muon", True):
                p.sub_(moment / (_average(state, "square", grad**2, 0.95).sqrt() + 1e-8), alpha=group["lr"])
                continue
            x = moment.reshape(len(moment), -1)
            tall = x.shape[0] > x.shape[1]
            x = (x.T if tall else x) / (x.norm() + 1e-7)
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            p.sub_((x.T if tall else x).reshape(p.shape), alpha=group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


class Lamb(_Own):
    """Adam by the ratio of a tensor's norm to its update's."""

    def update(self) -> None:
        for group, p, grad, state in self.each():
            update = _average(state, "mean", grad, 0.9) / (_average(state, "square", grad**2, 0.99).sqrt() + 1e-6)
            update = update + 0.01 * p
            p.sub_(update * (p.norm() / (update.norm() + 1e-12)), alpha=group["lr"])


class Lars(_Own):
    """Momentum by the ratio of a tensor's norm to its gradient's, where it decays; elementwise where not."""

    def update(self) -> None:
        for group, p, grad, state in self.each():
            if group["weight_decay"]:
                grad = (grad + group["weight_decay"] * p) * (0.1 * p.norm() / (grad.norm() + 1e-12))
            p.sub_(_average(state, "momentum", grad, 0.9), alpha=group["lr"])


class Shampoo(_Own):
    """Preconditions every dim of a tensor by the root of its statistics, which are lists in its state."""

    def update(self) -> None:
        for group, p, grad, state in self.each():
            state.setdefault("statistics", [1e-3 * torch.eye(n, dtype=p.dtype) for n in p.shape])
            for dim, statistics in enumerate(state["statistics"]):
                rows = grad.movedim(dim, 0).reshape(p.shape[dim], -1)
                statistics += rows @ rows.T
            for dim, statistics in enumerate(state["statistics"]):
                values, vectors = torch.linalg.eigh(statistics)
                root = (vectors * values.clamp_min(1e-12) ** (-0.5 / p.ndim)) @ vectors.T
                grad = torch.tensordot(root, grad, ([1], [dim])).movedim(0, dim)
            p.sub_(grad, alpha=group["lr"])


class SM3(_Own):
    """Keeps a maximum for every row and column, which one step of a dense gradient does not tell from Adagrad."""

    def update(self) -> None:
        for group, p, grad, state in self.each():
            shape = [[n if at == dim else 1 for at in range(p.ndim)] for dim, n in enumerate(p.shape)]
            state.setdefault("most", [p.new_zeros(sizes) for sizes in shape])
            square = grad**2 + torch.stack([most.expand(p.shape) for most in state["most"]]).amin(0)
            state["most"] = [
                square.amax([d for d in range(p.ndim) if d != at], keepdim=True) if p.ndim > 1 else square
                for at in range(p.ndim)
            ]
            p.sub_(grad / (square.sqrt() + 1e-8), alpha=group["lr"])


class StableAdamW(_Own):
    """Adam whose step is clipped by the size that it has over a tensor: elementwise until a gradient jumps."""

    def update(self) -> None:
        for group, p, grad, state in self.each():
            square = _average(state, "square", grad**2, 0.99)
            size = (grad**2 / square.clamp_min(1e-16)).mean().sqrt()
            update = _average(state, "mean", grad, 0.9) / (square.sqrt() + 1e-8)
            p.sub_(update / max(1.0, size.item() / 4), alpha=group["lr"])


class Prodigy(_Own):
    """Adam whose rate grows by sums over all parameters."""

    def update(self) -> None:
        first = self.param_groups[0]
        along = size = 0.0
        rate = first.setdefault("d", 1e-3)
        for _, p, grad, state in self.each():
            state.setdefault("start", p.clone())
            along += rate * (grad * (state["start"] - p)).sum().item()
            size += _average(state, "sum", rate * grad, 0.999).abs().sum().item()
        first["gathered"] = 0.99 * first.get("gathered", 0.0) + along
        first["d"] = max(rate, first["gathered"] / (size + 1e-12))
        for group, p, grad, state in self.each():
            update = _average(state, "mean", grad, 0.9) / (_average(state, "square", grad**2, 0.99).sqrt() + 1e-8)
            p.sub_(update, alpha=group["lr"] * first["d"] * 100)


class GlobalNorm(_Own):
    """Divides by the norm over all tensors, and its momentum keeps what it was."""

    def update(self) -> None:
        norm = torch.stack([grad.norm() for _, _, grad, _ in self.each()]).norm()
        for group, p, grad, state in self.each():
            p.sub_(_average(state, "momentum", grad / norm, 0.9), alpha=group["lr"])


class UnitSteps(_Own):
    """Steps of one length a tensor: what anybody may write."""

    def update(self) -> None:
        for group, p, grad, _ in self.each():
            p.sub_(grad / (grad.norm() + 1e-12), alpha=group["lr"])


class Noisy(_Own):
    """Adds noise to every step."""

    def update(self) -> None:
        for group, p, grad, _ in self.each():
            p.sub_(grad + 0.1 * torch.randn_like(p), alpha=group["lr"])


class Sam(_Own):
    """Climbs by the norm over all tensors first; its steps are ``first_step`` and ``second_step``."""

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([grad.norm() for _, _, grad, _ in self.each()]).norm()
        for _, p, grad, state in self.each():
            state["before"] = p.clone()
            p.add_(grad / norm, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group, p, grad, state in self.each():
            p.copy_(state["before"] - group["lr"] * grad)
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        self.first_step()
        with torch.enable_grad():
            loss = closure()
        self.second_step()
        return loss
