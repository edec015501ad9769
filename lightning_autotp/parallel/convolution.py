"""Column and row parallel convolutions, and batch norms between: channels are cut as a linear's features are."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_autotp.distributed.functions import copy_input, gather_output, gather_parts, reduce_output
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout
from lightning_autotp.parallel.convert import become


class ColumnParallelConvolution(nn.Module):
    """A convolution cut along its output channels: ``[B, K, ...]`` whole -> ``[B, N_r, ...]``, or all N gathered.

    Made by :meth:`convert`, never constructed.
    """

    mesh: Mesh
    layout: Layout
    gathers: bool
    kernel_size: tuple[int, ...]

    @classmethod
    def convert(cls, module: nn.Module, mesh: Mesh, layout: Layout, *, gather: bool) -> "ColumnParallelConvolution":
        """Change ``module`` in place; its parameters must already be this rank's parts."""
        converted: ColumnParallelConvolution = become(module, cls, mesh, layout)
        converted.gathers = gather
        return converted

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name for it
        output: Tensor = super().forward(copy_input(input, self.mesh))
        if not self.gathers:
            return output
        channels = -len(self.kernel_size) - 1
        full = gather_output(output.movedim(channels, -1), self.layout, self.mesh)
        return full.movedim(-1, channels).contiguous()

    def extra_repr(self) -> str:
        gathered = ", gather_output" if self.gathers else ""
        return f"{super().extra_repr()}, column parallel {self.mesh.tp_rank}/{self.mesh.tp_size}{gathered}"


class RowParallelConvolution(nn.Module):
    """A convolution cut along its input channels: ``[B, K_r, ...]`` -> ``[B, N, ...]``, summed over the ranks.

    The bias is whole on every rank and added once, after the sum. Made by :meth:`convert`, never constructed.
    """

    mesh: Mesh
    layout: Layout
    kernel_size: tuple[int, ...]
    weight: Any
    bias: Any
    _conv_forward: Any

    @classmethod
    def convert(cls, module: nn.Module, mesh: Mesh, layout: Layout) -> "RowParallelConvolution":
        """Change ``module`` in place; its weight must already be this rank's part."""
        converted: RowParallelConvolution = become(module, cls, mesh, layout)
        return converted

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name for it
        output = reduce_output(self._conv_forward(input, self.weight, None), self.mesh)
        return output if self.bias is None else output + self.bias.view(-1, *(1 for _ in self.kernel_size))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, row parallel {self.mesh.tp_rank}/{self.mesh.tp_size}"


class ColumnParallelBatchNorm(nn.Module):
    """A batch norm of this rank's channels: ``[B, C_r, ...]`` -> ``[B, C_r, ...]``.

    Its running statistics stay those of all channels, on every rank; one all-gather each in a training step keeps them
    so. Made by :meth:`convert`, never constructed.
    """

    mesh: Mesh
    layout: Layout

    @classmethod
    def convert(cls, module: nn.Module, mesh: Mesh, layout: Layout) -> "ColumnParallelBatchNorm":
        """Change ``module`` in place; its parameters must already be this rank's parts."""
        converted: ColumnParallelBatchNorm = become(module, cls, mesh, layout)
        return converted

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.BatchNorm2d's name for it
        held = {name: self._buffers.get(name) for name in ("running_mean", "running_var")}
        full = {name: buffer for name, buffer in held.items() if buffer is not None}
        own = {name: self.layout.shard(buffer, self.mesh.tp_rank).clone() for name, buffer in full.items()}
        try:
            self._buffers.update(own)
            output: Tensor = super().forward(input)
        finally:
            self._buffers.update(full)
        if self.training:
            with torch.no_grad():
                for name, part in own.items():
                    full[name].copy_(gather_parts(part, self.layout, self.mesh))
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, column parallel {self.mesh.tp_rank}/{self.mesh.tp_size}"
