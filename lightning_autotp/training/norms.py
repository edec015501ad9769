"""Norms of the unsharded model's gradients and weights, of which every rank holds its part."""

from collections.abc import Callable, Iterable, Iterator
from typing import Optional, Union

import torch
from torch import Tensor, nn

from lightning_autotp.distributed.dp_shards import all_rows
from lightning_autotp.training.gradients import TPGradients

Of = Union[nn.Module, Tensor, Iterable[Tensor], None]
"""Parameters: those of a module, one, some, or (None) all of the model."""


class Norms:
    """Norms that are the same on every rank that shares the model; all of them must ask for the same ones.

    Args:
        model: the model.
        gradients: its gradients; None for a model that is not sharded.
    """

    def __init__(self, model: nn.Module, gradients: Optional[TPGradients] = None) -> None:
        self.model, self.gradients = model, gradients

    def grad_norm(self, of: Of = None, norm_type: float = 2.0) -> Tensor:
        """The norm of the gradient of the unsharded model.

        Args:
            of: a module, a parameter or some; None takes all of the model. Those without a gradient are left out.
            norm_type: of the p-norm; ``inf`` is the largest element.
        """
        if self.gradients is not None:
            self.gradients.complete()
        return self._norm([p for p in self._parameters(of) if p.grad is not None], norm_type, lambda p: p.grad)  # type: ignore[arg-type,return-value]

    def parameter_norm(self, of: Of = None, norm_type: float = 2.0) -> Tensor:
        """The norm of the unsharded model's weights; see :meth:`grad_norm`."""
        return self._norm(self._parameters(of), norm_type, lambda p: p.detach())

    def grad_norms(
        self, of: Optional[nn.Module] = None, norm_type: float = 2.0, separator: str = "/"
    ) -> dict[str, Tensor]:
        """What ``lightning.pytorch.utilities.grad_norm`` gives of the unsharded model, to be logged as it is."""
        norm_type = float(norm_type)
        module = self.model if of is None else of
        named = [(name, p) for name, p in module.named_parameters() if p.grad is not None]
        found = {f"grad_{norm_type}_norm{separator}{name}": self.grad_norm(p, norm_type) for name, p in named}
        if found:
            found[f"grad_{norm_type}_norm_total"] = torch.stack(list(found.values())).norm(norm_type)
        return found

    def _parameters(self, of: Of) -> list[Tensor]:
        if of is None:
            of = self.model
        if isinstance(of, nn.Module):
            return list(of.parameters())
        return [of] if isinstance(of, Tensor) else list(of)

    @torch.no_grad()
    def _norm(self, parameters: list[Tensor], norm_type: float, values: Callable[[Tensor], Tensor]) -> Tensor:
        norm_type = float(norm_type)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        cut, whole = torch.zeros((), device=device), torch.zeros((), device=device)
        for parameter in parameters:
            if self._is_cut(parameter):
                for piece, owners in self._pieces(parameter, all_rows(values(parameter))):
                    cut = _joined(cut, piece, norm_type, owners)
            else:
                whole = _joined(whole, all_rows(values(parameter)), norm_type, 1)
        if self.gradients is not None:
            # in one dtype on all ranks, some of which may hold nothing of a parameter
            cut = cut.double() if any(p.dtype == torch.float64 for p in parameters) else cut
            largest = norm_type == float("inf")
            cut = self.gradients.mesh.collectives.all_reduce(cut, op="max" if largest else "sum")
        if norm_type == float("inf"):
            return torch.maximum(cut, whole)
        return (cut + whole) ** (1.0 / norm_type)

    def _is_cut(self, parameter: Tensor) -> bool:
        layout = None if self.gradients is None else self.gradients.layouts.get(parameter)  # type: ignore[call-overload]
        return layout is not None and not layout.is_replicated

    def _pieces(self, parameter: Tensor, tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
        """A cut tensor in runs, each with the number of ranks that hold it."""
        assert self.gradients is not None
        end, dim = 0, self.gradients.layouts[parameter].dim or 0  # type: ignore[index]
        for run in self.gradients.partial.get(parameter, []):  # type: ignore[call-overload]
            yield tensor.narrow(dim, end, run.start - end), 1
            yield run.of(tensor), len(run.owners)
            end = run.start + run.length
        yield tensor.narrow(dim, end, tensor.shape[dim] - end), 1


def _joined(total: Tensor, tensor: Tensor, norm_type: float, owners: int) -> Tensor:
    """``total``, of powers or the largest, and that of ``tensor``, which ``owners`` ranks hold; in fp32 at least."""
    if not tensor.numel():
        return total
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm = torch.linalg.vector_norm(tensor, norm_type, dtype=dtype)
    if norm_type == float("inf"):
        return torch.maximum(total, norm.to(torch.promote_types(total.dtype, dtype)))
    return total + norm**norm_type / owners
