"""A model that was parallelized for a training loop of one's own, and what such a loop needs of it."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Optional, Union
from weakref import WeakSet

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_autotp.checkpoint.run_state import load_state, read_state, unsharded_state
from lightning_autotp.checkpoint.state_dict import Placement
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof.prover import Look
from lightning_autotp.recipe.engine import Engine


@dataclass(frozen=True, eq=False)
class Parallelized:
    """What :func:`~lightning_autotp.parallelize` returns; every process must make the same calls in the same order.

    Args:
        model: what the loop calls: the sharded module, in torch's ``DistributedDataParallel`` where it has replicas.
        module: the sharded module itself; its parameters are what the optimizer takes.
        mesh: the process groups, and this process's place in them.
        plan: what was sharded; ``print_plan`` and ``plan.explain()`` show it.
        engine: what happens around a step.
    """

    model: nn.Module
    module: nn.Module
    mesh: Mesh
    plan: ShardingPlan
    engine: Engine = field(repr=False)
    _accepted: "WeakSet[Optimizer]" = field(default_factory=WeakSet, init=False, repr=False)

    @property
    def sampler_kwargs(self) -> dict[str, Any]:
        """The arguments of a ``DistributedSampler``: ranks that share a model see the same data."""
        return {"num_replicas": self.mesh.dp_size, "rank": self.mesh.dp_rank}

    def no_sync(self) -> AbstractContextManager[None]:
        """A context for the forward and backward passes of all but the last batch that gradients are summed over."""
        if self.engine.zero is not None:
            return self.engine.zero.without_reduction()
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def prove(self, step: Callable[[nn.Module, Any], Tensor], batch: Any) -> None:
        """Prove a step of the loop before it is taken: its loss and gradients against the unsharded model's.

        Partial gradients of replicated parameters that are found are summed from now on.

        Args:
            step: ``(model, batch) -> loss``; it is called with copies of the model, and must use no other.
            batch: what the step will be called with.

        Raises:
            PlanRefutedError: a ``ValueError``, on all ranks, if it would not compute what the unsharded model does.
        """
        self.engine.prove(Look("training", (batch,), call=step))

    def step(
        self, optimizer: Optimizer, max_norm: Optional[float] = None, loss: Optional[Tensor] = None
    ) -> Optional[Tensor]:
        """Complete the gradients, clip them if asked to, and step; gradients are the loop's to zero, as in torch.

        At the first step of each optimizer, ``loss`` and the gradients of replicated parameters are compared over the
        tensor parallel ranks, unless ``check_agreement`` is off.

        Args:
            optimizer: an optimizer of :attr:`module`'s parameters.
            max_norm: the largest norm that the unsharded model's gradient may have; longer ones are scaled.
            loss: the last loss, to be compared.

        Returns:
            The norm before clipping, the same on every rank; None without ``max_norm``.

        Raises:
            ValueError: if ``optimizer`` cannot be exact here.
            DisagreementError: if the ranks have come to different numbers.
        """
        self._accept(optimizer)
        self.engine.look.loss(loss)
        norm = None
        if max_norm is None:
            self.engine.complete(optimizer)
        else:
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            norm = self.engine.clip_norm(optimizer, held, max_norm)
        optimizer.step()
        self.engine.stepped(optimizer)
        return norm

    def grad_norm(self) -> Tensor:
        """The 2-norm of the unsharded model's gradient, the same on every rank; between backward pass and step."""
        return self.engine.grad_norm(self.module.parameters())

    def state_dict(self, optimizer: Optional[Optimizer] = None) -> dict[str, Any]:
        """The state to give to ``torch.distributed.checkpoint.save``, under the unsharded model's names and shapes.

        It is ``{"model": ..., "optimizer": ...}`` as torch's ``get_state_dict`` has it, so that an unsharded run reads
        it, too. Tensors are views of this rank's part and are not copied.

        Raises:
            ValueError: if the optimizer's state is not shaped like the parameters.
        """
        return unsharded_state(self.module, optimizer, self._placement)

    def load_state_dict(
        self, state: Union[Mapping[str, Any], str, os.PathLike[str]], optimizer: Optional[Optimizer] = None
    ) -> None:
        """Take over a state, that of a run of any other sizes, or of an unsharded one.

        Args:
            state: the folder that ``torch.distributed.checkpoint.save`` wrote; or the state itself, with full tensors,
                or that of :meth:`state_dict` after ``torch.distributed.checkpoint.load``.
            optimizer: the optimizer to load, which need not have stepped yet.

        Raises:
            ValueError: if there is no optimizer in it, or one of other parameters.
            RuntimeError: if it is the state of another model.
        """
        if optimizer is not None:
            self._accept(optimizer)  # before its state comes: some is for the ranks that own parameters
        placement = self._placement
        if not isinstance(state, Mapping):
            state = read_state(state, self.module, optimizer, placement)
        load_state(state, self.module, optimizer, placement)

    @property
    def _placement(self) -> Placement:
        return Placement.of(self.module, self.plan.layouts, self.mesh)

    def _accept(self, optimizer: Optimizer) -> None:
        if optimizer not in self._accepted:
            self.engine.accept([optimizer], closures=False)
            self._accepted.add(optimizer)
