"""Column and row parallel linears: an ``nn.Linear`` whose class was changed in place and whose weight is a part."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp.compat import autocast_dtype
from lightning_autotp.distributed.functions import copy_input, gather_output, reduce_output, split_input
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout
from lightning_autotp.parallel.column_group import ColumnGroup
from lightning_autotp.parallel.convert import become
from lightning_autotp.parallel.deferred_logits import leave_out_logits
from lightning_autotp.parallel.linear_functions import RowScatter
from lightning_autotp.parallel.overlap import Overlap, form_of


class ColumnParallel(nn.Module):
    """A linear cut along its output features: ``[..., K]`` whole -> ``[..., N_r]``, or ``[..., N]`` gathered.

    With ``keeps_part`` one that gathers does so only where no gradients are recorded: the loss needs no more. With
    ``defers`` it computes nothing where they are: the loss does, of the input that an empty output carries to it.
    Made by :meth:`convert`, never constructed.
    """

    mesh: Mesh
    layout: Layout
    overlap: bool
    gathers: bool
    reduces: bool
    keeps_part: bool = False
    defers: bool = False
    group: ColumnGroup
    place: int
    weight: Any
    bias: Any

    @classmethod
    def convert(
        cls, module: nn.Module, mesh: Mesh, layout: Layout, *, overlap: bool, gather: bool, reduce: bool = True
    ) -> "ColumnParallel":
        """Change ``module`` in place; its parameters must already be this rank's parts.

        Without ``reduce`` the gradient of its input stays partial, for what made the input to sum it.
        """
        converted: Any = become(module, cls, mesh, layout)
        converted.overlap, converted.gathers, converted.reduces = overlap, gather, reduce
        return converted

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[N_r, K]``."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        if self.defers and torch.is_grad_enabled():
            return leave_out_logits(input)
        if torch.is_grad_enabled() and input.requires_grad:
            output = self.group(self.place, input)
        else:
            output = F.linear(input, self.matrix, self.bias)
        if self.gathers and not (self.keeps_part and torch.is_grad_enabled()):
            return gather_output(output, self.layout, self.mesh)
        return output

    def extra_repr(self) -> str:
        gathered = ", gather_output" if self.gathers else ""
        return f"{super().extra_repr()}, column parallel {self.mesh.tp_rank}/{self.mesh.tp_size}{gathered}"


class ColumnParallelLinear(ColumnParallel, nn.Linear):
    """``nn.Linear`` cut along its output features; ``in_features`` and ``out_features`` stay those of the full one."""


class ColumnParallelConv1D(ColumnParallel):
    """transformers' ``Conv1D``, whose weight is ``[in, out]``, cut along its output features."""

    @property
    def matrix(self) -> Tensor:
        return self.weight.t()


class RowParallel(nn.Module):
    """A linear cut along its input features: ``[..., K_r]`` -> ``[..., N]``, summed over the ranks.

    The bias is whole on every rank and added once, after the sum. With ``splits`` the input comes whole, ``[..., K]``;
    with ``scatters`` the sum is scattered over the tokens, ``[1, T_r, N]`` (sequence parallelism). Made by
    :meth:`convert`, never constructed.
    """

    mesh: Mesh
    layout: Layout
    splits: bool
    scatters: Optional[Overlap]
    forms: tuple[str, str]
    weight: Any
    bias: Any

    @classmethod
    def convert(
        cls, module: nn.Module, mesh: Mesh, layout: Layout, *, split: bool = False, scatter: Optional[Overlap] = None
    ) -> "RowParallel":
        """Change ``module`` in place; its weight must already be this rank's part."""
        converted: Any = become(module, cls, mesh, layout)
        converted.splits, converted.scatters = split, scatter
        inputs, outputs = layout.shape[layout.dim or 0], converted.matrix.shape[0]
        converted.forms = form_of("scatter", inputs, [outputs]), form_of("gather", outputs, [inputs])
        return converted

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[N, K_r]``."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        weight = self.matrix
        if self.splits:
            input = split_input(input, self.layout, self.mesh)  # noqa: A001
        elif input.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"a row parallel linear of {self.layout.shape[self.layout.dim or 0]} input features got"
                f" {input.shape[-1]} of them on tensor parallel rank {self.mesh.tp_rank}, where its part is"
                f" {weight.shape[1]}: the layers before it must be cut by column rules that match this row rule."
            )
        if self.scatters is None:
            output = reduce_output(F.linear(input, weight), self.mesh)
        else:
            dtype = autocast_dtype(input.device.type)
            if dtype is not None:
                input, weight = input.to(dtype), weight.to(dtype)  # noqa: A001
            output = RowScatter.apply(input, weight, self.scatters, *self.forms)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        split = ", split_input" if self.splits else ""
        return f"{super().extra_repr()}, row parallel {self.mesh.tp_rank}/{self.mesh.tp_size}{split}"


class RowParallelLinear(RowParallel, nn.Linear):
    """``nn.Linear`` cut along its input features; ``in_features`` and ``out_features`` stay those of the full one."""


class RowParallelConv1D(RowParallel):
    """transformers' ``Conv1D``, whose weight is ``[in, out]``, cut along its input features."""

    @property
    def matrix(self) -> Tensor:
        return self.weight.t()


class PartialOutputLinear(nn.Linear):
    """A whole ``nn.Linear`` whose last ``count`` output features feed cut heads: their gradient is all-reduced."""

    mesh: Mesh
    layout: Layout
    count: int

    @classmethod
    def convert(cls, module: nn.Module, mesh: Mesh, layout: Layout, count: int) -> "PartialOutputLinear":
        """Change ``module`` in place."""
        converted: PartialOutputLinear = become(module, cls, mesh, layout)
        converted.count = count
        return converted

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        return copy_input(super().forward(input), self.mesh, self.count)
