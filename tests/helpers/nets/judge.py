"""What is true of a net: its loss and gradients on all ranks, in lockstep and fp64, against the unsharded ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.recipe.make_plan import make_plan
from lightning_autotp.sharding.shard import shard
from lightning_autotp.training.gradients import TPGradients
from tests.helpers.nets.frame import Net

Gradients = dict[str, Tensor]


class RefusedError(Exception):
    """The plan was refused before anything ran."""


@contextmanager
def in_fp64() -> Iterator[None]:
    """Inside, what names no dtype is fp64, and warnings of plans are not shown."""
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Unsharded:
    """The loss and gradients that are right, and the norm of all gradients."""

    loss: Tensor
    gradients: Gradients
    norm: float


def unsharded(net: Net) -> Unsharded:
    """What the net gives on one rank."""
    with in_fp64():
        loss, gradients = _step(_noisy(net), net)
    return Unsharded(loss, gradients, sum(float(gradient.norm()) ** 2 for gradient in gradients.values()) ** 0.5)


def error_of(net: Net, size: int, want: Unsharded) -> float:
    """The largest relative error of the loss or a gradient on any rank.

    Raises:
        RefusedError: if planning or sharding refuses the net.
        Exception: what the model raises on a rank.
    """
    with in_fp64():
        models = [_noisy(net) for _ in range(size)]

        return max(Lockstep[float](size).run(lambda mesh: _rank_error(net, models[mesh.tp_rank], mesh, want)))


def _rank_error(net: Net, model: nn.Module, mesh: Mesh, want: Unsharded) -> float:
    try:
        config = TPTrainingConfig.model_validate({"autotp_size": mesh.tp_size, **net.config})
        plan = make_plan(model, config)
        found = shard(model, plan, mesh, config, device=torch.device("cpu"))
    except ValueError as error:
        raise RefusedError(str(error)) from error
    partial = TPGradients(model, found)
    local_loss, local = _step(model, net, partial)
    errors = [_relative(local_loss, want.loss, 0.0)]
    for name, parameter in model.named_parameters():
        full = want.gradients.get(name)
        part = torch.zeros_like(parameter) if full is None else plan.layouts[name].shard(full, mesh.tp_rank)
        errors.append(_relative(local.get(name, torch.zeros_like(part)), part, want.norm))
    return max(errors)


def _noisy(net: Net) -> nn.Module:
    """A new model in which no parameter is all zeros or ones, which would hide what it does."""
    model = net.build().double()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.1)
    return model


def _step(model: nn.Module, net: Net, partial: TPGradients | None = None) -> tuple[Tensor, Gradients]:
    torch.manual_seed(3)
    loss: Tensor = model(**{name: t.double() if t.is_floating_point() else t for name, t in net.batch().items()})
    loss.backward()
    if partial is not None:
        partial.complete()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _relative(got: Tensor, want: Tensor, scale: float) -> float:
    """The error relative to what is right; of a gradient that is truly zero, to a small part of all gradients."""
    error = float((got - want).norm() / max(float(want.norm()), 1e-6 * scale, 1e-12))
    return error if error == error else float("inf")
