"""A module whose inside is cut: what enters is whole, what leaves is summed over the ranks."""

from functools import cache, partial
from typing import Any, Optional

from torch import Tensor, nn

from lightning_autotp.compat import in_backward, tree_map
from lightning_autotp.distributed.functions import added_once, copy_input, reduce_output
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.parallel.experts import GroupedExperts


class Boundary(nn.Module):
    """Experts, say, of which every rank holds a part: each token's output is a sum over the ranks.

    Forward: tensors enter as they are; the output ``[..., H]``, a partial sum, is all-reduced. Backward: the gradients
    of floating-point inputs (hidden states, routing weights), of which each rank has its part, are all-reduced.
    """

    mesh: Mesh
    _grouped: Optional[GroupedExperts]
    _inside: bool = False

    @staticmethod
    def convert(module: nn.Module, mesh: Mesh, once: tuple[str, ...] = (), passing: tuple[str, ...] = ()) -> "Boundary":
        """Change ``module`` in place.

        Args:
            module: the module; its parameters must already be this rank's parts.
            mesh: this process's place.
            once: its own whole parameters that add to the output, once and not per rank.
            passing: its children that pass their input on to the output, once and not per rank.
        """
        own: Any = type(module)
        grouped = GroupedExperts.of(module)
        module.__class__ = _bounded(own, once)
        module.mesh = mesh  # type: ignore[assignment]
        module._grouped = grouped  # type: ignore[assignment]
        for name in passing:
            setattr(module, name, OnFirstRank(mesh))
        return module  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(self._entering, (args, kwargs))
        forward = super().forward
        if self._grouped is not None and self._grouped.serves(self):
            forward = partial(self._grouped, self)
        self._inside = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self._inside = False
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{type(self).__name__} returned {type(output).__name__}; a module with a boundary rule must return one"
                " tensor, whose parts the ranks sum."
            )
        return reduce_output(output, self.mesh)

    def _entering(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            return copy_input(value, self.mesh)
        return value


@cache
def _bounded(own: Any, once: tuple[str, ...]) -> Any:
    # its own forward, and nobody else, reads such a parameter as what this rank adds of it
    def property_of(name: str) -> property:
        def read(module: Boundary) -> Any:
            parameter = module._parameters[name]
            # the backward pass reads it where a part of the forward pass was checkpointed
            computing = module._inside or in_backward()
            return added_once(parameter, module.mesh) if computing and parameter is not None else parameter

        return property(read)

    body = {"__doc__": own.__doc__} | {name: property_of(name) for name in once}
    return type(f"Boundary{own.__name__}", (Boundary, own), body)


class OnFirstRank(nn.Identity):
    """Passes its input on where the tensor parallel rank is 0, zeros elsewhere: a sum over the ranks has it once."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Identity's name for it
        return input if self.mesh.tp_rank == 0 else input * 0
