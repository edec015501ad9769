"""Replicas step by the same gradients: what goes past torch's DistributedDataParallel is found at the first steps."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.training.consistency import Digest, DisagreementError, digests

LOOKS = 2
"""Steps of each optimizer whose gradients are compared."""


class ReplicasLook:
    """Compares the gradients of data parallel replicas before an optimizer's first steps.

    Args:
        model: the model.
        mesh: this process's place.
        enabled: whether anything is compared.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, enabled: bool) -> None:
        self.mesh, self.enabled = mesh, enabled and mesh.replicas > 1
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._steps: dict[int, int] = {}

    def before(self, optimizer: Optimizer) -> None:
        """Compare the gradients that ``optimizer`` is about to step by; every process must call it.

        Raises:
            DisagreementError: on all processes, with the names of parameters.
        """
        step = self._steps[id(optimizer)] = self._steps.get(id(optimizer), 0) + 1
        if not self.enabled or step > LOOKS:
            return
        own = [p for group in optimizer.param_groups for p in group["params"] if p in self._names]
        mine = digests({self._names[p]: p.grad for p in own if p.grad is not None}, "")
        everyones = self.mesh.collectives.gather_objects((self.mesh.tp_rank, mine), "world")
        wrong = [
            name
            for tp_rank in range(self.mesh.tp_size)
            for name in _different([theirs for rank, theirs in everyones if rank == tp_rank])
        ]
        if wrong:
            names = [name.removeprefix("['").removesuffix("']") for name in dict.fromkeys(wrong)]
            raise DisagreementError(
                f"the gradients of {', '.join(names[:5])} were not averaged over the replicas (data parallel size"
                f" {self.mesh.dp_size}{self._context()}). {self._reason()}"
            )

    def _context(self) -> str:
        return f", context parallel size {self.mesh.cp_size}" if self.mesh.cp_size > 1 else ""

    def _reason(self) -> str:
        unused = [name for parameter, name in self._names.items() if parameter.requires_grad and parameter.grad is None]
        if unused:
            return (
                f"{', '.join(unused[:5])} took no part in the loss, and DistributedDataParallel waits for them: freeze"
                " them, or set AutoTPStrategy(find_unused_parameters=True)."
            )
        return (
            "What `torch.func` or `torch.autograd.grad` gives, or what is changed by numbers of its own process, goes"
            " past DistributedDataParallel: average it, as with `self.trainer.strategy.reduce(gradient)`, or get it by"
            " `backward`."
        )


def _different(everyones: Iterable[dict[str, Digest]]) -> list[str]:
    first, *others = everyones
    return [name for name in first for theirs in others if name in theirs and not _alike(first[name], theirs[name])]


def _alike(one: Digest, other: Digest) -> bool:
    if not all(map(math.isfinite, (*one.numbers, *other.numbers))):
        return True  # an overflow is seen by others
    scale = max(*map(abs, one.numbers), *map(abs, other.numbers))
    return all(abs(a - b) <= one.tolerance * scale for a, b in zip(one.numbers, other.numbers))
