"""What happens around the steps of a sharded model, whichever strategy or loop takes them."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, Optional

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_autotp.checkpoint.state_dict import optimizer_names
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.errors import raised_together
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.same import require_same
from lightning_autotp.optimizers.accept import accept_optimizers
from lightning_autotp.optimizers.whole import whole_steps
from lightning_autotp.planning.blocks import called_around
from lightning_autotp.proof.prover import Look, Prover
from lightning_autotp.proof.step import loss_of_call
from lightning_autotp.randomness.mode import RandomNumbers
from lightning_autotp.recipe.deriving import derive_together, is_derived
from lightning_autotp.recipe.facts import (
    SAME_MODEL,
    SAME_OPTIMIZERS,
    SAME_PLAN,
    model_facts,
    optimizer_facts,
    plan_facts,
)
from lightning_autotp.recipe.found import Planned, Sample
from lightning_autotp.recipe.improving import improve_together, may_improve
from lightning_autotp.recipe.make_plan import make_plan
from lightning_autotp.recipe.proving import prove_together
from lightning_autotp.sharding.state import Sharded, sharded, with_plan
from lightning_autotp.sharding.zero import zero_of
from lightning_autotp.training.compile import is_compiled
from lightning_autotp.training.consistency import FirstLook
from lightning_autotp.training.gradients import TPGradients, shared_scaler
from lightning_autotp.training.norms import Norms
from lightning_autotp.training.random_state import (
    share_random_state,
    undisturbed,
    warn_of_draw,
    warn_of_dropout,
    warn_of_dropout_in_blocks,
)
from lightning_autotp.training.replicas import ReplicasLook


def plan_once(model: nn.Module, config: TPTrainingConfig, mesh: Mesh, sample: Sample) -> Planned:
    """The plan that ``model`` was sharded by, or one for it; every process must call it.

    Args:
        model: the model.
        config: the config.
        mesh: this process's place.
        sample: a step to derive a plan from where there are no rules, and to look at where not all are the user's.

    Raises:
        ValueError: if it cannot be planned; on all processes, as a RuntimeError where only others failed.
    """
    found = sharded(model)
    if found is not None:
        return Planned(found.plan)
    _refuse_sharded_parts(model)
    require_same(model_facts(model), SAME_MODEL)
    with undisturbed():
        planned = _planned(model, config, mesh, sample)
    require_same(plan_facts(planned.plan), SAME_PLAN)
    return planned


def _planned(model: nn.Module, config: TPTrainingConfig, mesh: Mesh, sample: Sample) -> Planned:
    if mesh.tp_size > 1 and is_derived(model, config):
        return derive_together(model, config, mesh, sample)
    planned = Planned(raised_together(lambda: make_plan(model, config, mesh.tp_size, warn=False)))
    if may_improve(model, planned.plan, config):
        planned = improve_together(model, planned.plan, config, mesh, sample)
    for warning in planned.plan.warnings:
        rank_zero_warn(warning)
    return planned


def _refuse_sharded_parts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        found = sharded(module)
        if found is not None and found.mesh.batch_ranks > 1:
            raise ValueError(
                f"{path} was sharded for a tensor parallel size of {found.mesh.tp_size} by a run of its own, and cannot"
                " be a part of another model's plan. To call it only (a teacher), keep it out of the modules, as in"
                " `self.teacher = [teacher]`; to train it, build it anew and load its checkpoint."
            )


class Engine:
    """What happens around the steps of one run; every process must make the same calls in the same order.

    Between a step's backward pass and its optimizer, :meth:`complete` (or :meth:`clip_norm`, :meth:`clip_value`, which
    call it); after the optimizer, :meth:`stepped`.

    Args:
        model: a sharded model.
        found: how it was sharded.
        look: the comparisons of this run.
        prover: proves the steps of this run; None proves nothing.
    """

    def __init__(self, model: nn.Module, found: Sharded, look: FirstLook, prover: Optional[Prover] = None) -> None:
        self.model, self.sharded, self.mesh = model, found, found.mesh
        self.look, self.prover, self.zero = look, prover, zero_of(model)
        self.random = RandomNumbers(model, self.mesh, found.batch.tokens, warn_of_draw)
        if prover is not None:
            prover.sharded(model)
            self._learn_of_draws(prover)
        # under ZeRO there is one gradient, of which replicas hold rows
        self.replicas = ReplicasLook(model, found.mesh, look.enabled and self.zero is None)
        self._gradients: Optional[TPGradients] = None
        self._scaler: Any = None

    @property
    def gradients(self) -> TPGradients:
        """The gradients, between :meth:`begin_training` and :meth:`end_training`."""
        assert self._gradients is not None, "the engine does not train"
        return self._gradients

    @property
    def norms(self) -> Norms:
        """Norms of the unsharded model's gradients and weights, between :meth:`begin_training` and its end."""
        return Norms(self.model, self.gradients)

    # -- a run --------------------------------------------------------------------------------------------------------

    def begin_training(self, device: torch.device, autocast: Optional[torch.dtype] = None) -> None:
        """Prepare gradients, overlapped matmuls and random numbers, once the model is compiled (if it is to be).

        Args:
            device: where the model is.
            autocast: the dtype of autocast in training steps, None without it.
        """
        self._gradients = TPGradients(self.model, self.sharded, compiled=is_compiled(self.model))
        if self.zero is not None:
            self.zero.discard()
        with nullcontext() if self.zero is None else self.zero.gathered():
            self.sharded.overlap.measure(autocast)
        share_random_state(self.mesh, device)
        if self.sharded.context is not None:
            if is_compiled(self.model):
                raise ValueError("context_parallel_size: modules that exchange tokens are not compiled; compile none.")
            warn_of_dropout_in_blocks(self.model, self.sharded.context.blocks)
        elif self.mesh.tp_size > 1 and self.prover is None:
            warn_of_dropout(self.model, self.sharded.plan)

    def _learn_of_draws(self, prover: Prover) -> None:
        """Let the ranks draw their parts of the unsharded model's random numbers, where it was seen what these are."""
        if self.sharded.context is not None:  # in blocks each draws for its own tokens, and heads of all of them
            return
        if is_compiled(self.model):
            if prover.sites:
                warn_of_dropout(self.model, self.sharded.plan, compiled=True)
            return
        self.random.learn(prover.sites)

    def watch_calls(self) -> None:
        """Do around the model's own calls what a strategy does around its steps, for a loop that has no such hooks.

        That is :meth:`batch` before the first calls in training and in evaluation, with gradients and without, and what
        :meth:`training_step` does about saved activations; and where tokens are split, a proof of the first call.
        """
        before, after = self.model.register_forward_pre_hook, self.model.register_forward_hook
        contexts = ExitStack()

        def first(model: nn.Module, args: Any, kwargs: Any) -> None:
            if self.zero is not None:  # what is gathered may be older than the weights
                self.zero.reshard()
            self.batch((args, kwargs), (model.training, torch.is_grad_enabled()))
            trains = model.training and torch.is_grad_enabled()
            if trains and self.sharded.context is not None and self.prover is not None and not self.prover.trained:
                self.prove(Look("training", ((args, kwargs),), call=loss_of_call))

        def enter(model: nn.Module, *_: Any) -> None:
            assert self.sharded.saved is not None
            if model.training and torch.is_grad_enabled():
                contexts.enter_context(self.sharded.saved.step())

        def leave(*_: Any) -> None:
            contexts.close()

        before(first, prepend=True, with_kwargs=True)
        if self.sharded.saved is not None:
            before(enter)
            after(leave, always_call=True)

    def accept(self, optimizers: Iterable[Optimizer], schedulers: Iterable[Any] = (), *, closures: bool = True) -> None:
        """Let optimizers step as unsharded ones do: what looks at whole tensors gets them, on the ranks that own them.

        Args:
            optimizers: the optimizers, which stay the same objects.
            schedulers: their schedulers, which are compared.
            closures: whether their steps get a closure.

        Raises:
            DisagreementError: on all ranks, if they have different optimizers.
            ValueError: if one cannot be exact here, or holds what is not the model's.
        """
        optimizers = list(optimizers)
        require_same(optimizer_facts(self.model, optimizers, schedulers), SAME_OPTIMIZERS)
        for optimizer in optimizers:
            optimizer_names(self.model, optimizer)
        accept_optimizers(optimizers, self.gradients.layouts, self.mesh, self._complete_gradients, closures=closures)
        for optimizer in optimizers if self.zero is not None else ():
            optimizer.register_step_post_hook(self._reshard)  # what is gathered is older than the step
            self._discard_with(optimizer)

    def _discard_with(self, optimizer: Optimizer) -> None:
        """Let ``optimizer.zero_grad`` forget gradients that are not reduced, too."""
        own = optimizer.zero_grad

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            assert self.zero is not None
            self.zero.discard(p for group in optimizer.param_groups for p in group["params"])
            own(*args, **kwargs)

        vars(optimizer)["zero_grad"] = zero_grad

    def _reshard(self, *_: Any) -> None:
        assert self.zero is not None
        self.zero.reshard()

    def _complete_gradients(self) -> None:
        if self._gradients is not None:
            self._gradients.complete()

    def loss_scaler(self, scaler: Any) -> Any:
        """A loss scaler like ``scaler`` that skips a step on all ranks if one of them overflows."""
        if self.mesh.tp_size > 1 or self.zero is not None:
            scaler = shared_scaler(scaler, self.mesh, zero=self.zero is not None)
        self._scaler = scaler
        return self._scaler

    def end_training(self) -> None:
        """Take all hooks off the model, which stays sharded; steps from here on are the user's own."""
        if self._gradients is not None:
            self._gradients.remove()
            self._gradients = None
        if self.sharded.saved is not None:
            self.sharded.saved.remove()

    # -- a step -------------------------------------------------------------------------------------------------------

    def prove(self, look: Look) -> None:
        """Prove a step if it is the first of its kind; what is found of partial gradients is put right.

        Raises:
            PlanRefutedError: on all ranks, if it would not compute what the unsharded model does.
        """
        if self.prover is None or not self.prover.is_new(self.model, look):
            return
        repairs = prove_together(self.prover, self.model, look, self.mesh)
        self._learn_of_draws(self.prover)
        if repairs:
            self.prover.plan = repairs.plan(self.sharded.plan)
            self.sharded = with_plan(self.model, self.prover.plan)
            repairs.carry_out(self.model, self.mesh.tp_rank)
            self.prover.sharded(self.model)
            if self._gradients is not None:
                self._gradients.remove()
                self._gradients = TPGradients(self.model, self.sharded, compiled=is_compiled(self.model))

    def batch(self, batch: Any, loader: object) -> None:
        """See a batch before it goes to the model; the first of each ``loader`` is compared."""
        self.look.batch(batch, loader)

    def training_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``step``, a forward pass that ends in a loss, returns."""
        saved = self.sharded.saved
        with nullcontext() if saved is None else saved.step(), self.random.active():
            output = step(*args, **kwargs) if self.zero is None else self.zero.call(step, *args, **kwargs)
        self.look.loss(output)
        return output

    def evaluation_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``step``, a forward pass without gradients, returns; the first one's outputs are compared."""
        look = partial(self.look.step, called_around(self.model, self.sharded.plan), step)
        with self.random.active():
            if self.zero is None:
                return look(*args, **kwargs)
            with torch.inference_mode(False), torch.no_grad():  # what is gathered is used in training, too
                output = self.zero.call(look, *args, **kwargs)
            self.zero.reshard()
            return output

    def complete(self, optimizer: Optional[Optimizer] = None) -> None:
        """Make the gradients those of the unsharded model, if they are not yet; the first ones are compared."""
        steps = None if optimizer is None else whole_steps(optimizer)
        if steps is not None and steps.is_held:  # called by a hook of the step, for which all has been done
            return
        if self._gradients is not None:  # None when users step on after a run
            self.look.gradients(self._gradients, optimizer)
            self._gradients.complete()
            if optimizer is not None:
                self.replicas.before(optimizer)
            if self._scaler is None:  # a scaler lets gradients overflow, and skips the step on all ranks
                self.look.each.gradients(self._gradients.whole())

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The 2-norm of the unsharded model's gradient with respect to ``parameters``; the same on every rank."""
        self.complete()
        return self.gradients.total_norm(parameters)

    def clip_norm(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients so that their true norm is at most ``max_norm``; returns the norm before."""
        self.complete(optimizer)
        return self.gradients.clip_norm(parameters, max_norm)

    def clip_value(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter], value: float) -> None:
        """Clip every element of the gradients to ``[-value, value]``."""
        self.complete(optimizer)
        self.gradients.clip_value(parameters, value)

    def stepped(self, optimizer: Optimizer) -> None:
        """Learn from the step that ``optimizer`` has taken which layers share an input; compare the first weights."""
        self.sharded.settle()
        self.look.weights(self.gradients.whole_parameters, optimizer)
