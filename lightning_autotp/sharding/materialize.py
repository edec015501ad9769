"""Give every parameter what this rank holds of it: from rank 0's weights, from files, or initialized from meta."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.compat import FakeTensor, initialize_inside, initializes_others, keep_initialized
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Box, Layout
from lightning_autotp.sharding.adapters import create_adapters
from lightning_autotp.sharding.agreement import agreed_tensors, from_rank_zero
from lightning_autotp.sharding.full_models import warn_of_full_models
from lightning_autotp.sharding.sources import Source, forget_sources, sources_of


def load_parts(model: nn.Module, layouts: dict[str, Layout], mesh: Mesh, device: torch.device) -> None:
    """Give every parameter this rank's part and every buffer its place, in the order in which models initialize.

    What the ranks hold alike, each of them takes its part of: from memory, which may be a file's, or from the source
    that reads the file. What differs comes from rank 0.
    """
    create_adapters(model)
    sources = sources_of(model)
    by_id = {id(p): layouts[name] for name, p in model.named_parameters(remove_duplicate=False)}
    warn_of_full_models(model, by_id, mesh)
    parts = _Parts(mesh, device, sources, agreed_tensors(model, sources, mesh), by_id)
    parts.load(model)
    forget_sources(model)


@torch.no_grad()
def load_full(model: nn.Module, device: torch.device, only: Optional[Container[int]] = None) -> None:
    """Give parameters and buffers of ``model`` that lie in files their full values, without any sharding.

    Args:
        model: the model.
        device: where to put them.
        only: their ids; None reads all.
    """
    create_adapters(model)
    read: dict[int, Tensor] = {}
    sources = sources_of(model)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) not in sources or (only is not None and id(tensor) not in only):
                    continue
                if id(tensor) not in read:
                    layout = Layout.replicated(tensor.shape, 1)
                    read[id(tensor)] = _like(tensor, _read(tensor, sources[id(tensor)], layout, 0, device))
                tensors[name] = read[id(tensor)]  # type: ignore[assignment]


@dataclass
class _Parts:
    """What :func:`load_parts` knows; tensors go by their ids before it."""

    mesh: Mesh
    device: torch.device
    sources: Mapping[int, Source]
    agreed: set[int]
    layouts: Mapping[int, Layout]
    made: dict[int, nn.Parameter] = field(default_factory=dict)
    """Parameters in place of those on the meta device; one that is shared is made once."""

    def load(self, model: nn.Module) -> None:
        waiting: dict[int, int] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                waiting[id(parameter)] = waiting.get(id(parameter), 0) + 1
        for module, initialize in _with_initializers(model, None):
            old = {name: p for name, p in module._parameters.items() if p is not None}
            buffers = {name: b for name, b in module._buffers.items() if b is not None}
            if self.device.type != "meta" and any(
                t.is_meta and id(t) not in self.sources for t in [*old.values(), *buffers.values()]
            ):
                self._create(module)
                initialize()
            for name, original in old.items():
                waiting[id(original)] -= 1
                if original.is_meta and id(original) in self.sources:
                    module._parameters[name] = self._from_source(original)
                elif not waiting[id(original)]:  # a tied parameter is initialized by each of its modules, then cut once
                    self._cut(module._parameters[name], original)  # type: ignore[arg-type]
            for name, buffer in buffers.items():
                module._buffers[name] = self._buffer(module._buffers[name], buffer)  # type: ignore[arg-type]

    def _create(self, module: nn.Module) -> None:
        """Empty full tensors for what ``module`` itself has on the meta device and in no file."""
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) in self.sources:
                keep_initialized(parameter)
                continue
            if id(parameter) not in self.made:
                self.made[id(parameter)] = _like(parameter, torch.empty_like(parameter, device=self.device))  # type: ignore[assignment]
            module._parameters[name] = self.made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                if id(buffer) in self.sources:
                    keep_initialized(buffer)
                else:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)

    def _from_source(self, original: nn.Parameter) -> nn.Parameter:
        if id(original) not in self.made:
            layout = self.layouts[id(original)]
            self.made[id(original)] = _like(original, self._part(original, original, layout))  # type: ignore[assignment]
        return self.made[id(original)]

    def _cut(self, parameter: nn.Parameter, original: nn.Parameter) -> None:
        parameter.grad = None
        parameter.data = self._part(parameter.data, original, self.layouts[id(original)])

    def _buffer(self, buffer: Tensor, original: Tensor) -> Tensor:
        return self._part(buffer, original, Layout.replicated(buffer.shape, self.mesh.tp_size))

    def _part(self, full: Tensor, original: Tensor, layout: Layout) -> Tensor:
        """This rank's part of ``full``, which the ids of ``original`` speak of."""
        rank, source = self.mesh.tp_rank, self.sources.get(id(original))
        if id(original) in self.agreed:
            if source is not None:
                return _read(full, source, layout, rank, self.device)
            return layout.shard(full, rank).to(self.device).contiguous()

        def read(box: Box, out: Tensor) -> None:
            if source is not None:
                source.read([box], [out])
            else:
                out.copy_(box.view(full))

        return from_rank_zero(read, full.dtype, layout, self.mesh, self.device)


def _read(tensor: Tensor, source: Source, layout: Layout, rank: int, device: torch.device) -> Tensor:
    local = torch.empty(layout.local_shape(rank), dtype=tensor.dtype, device=device)
    if not isinstance(local, FakeTensor):  # an estimate needs no values
        source.read(layout.boxes(rank), layout.split(local, rank))
    return local


def _like(original: Tensor, values: Tensor) -> Tensor:
    """``values`` as a parameter, if that is what ``original`` is."""
    is_parameter = isinstance(original, nn.Parameter)
    return nn.Parameter(values, requires_grad=original.requires_grad) if is_parameter else values


def _with_initializers(model: nn.Module, hf_model: Any, path: str = "") -> Iterator[tuple[nn.Module, Any]]:
    """Every module once, children first, with the call that initializes its own tensors.

    That is ``_init_weights`` of the Hugging Face model around it, or its own ``reset_parameters``.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, hf_model: Any, path: str) -> Iterator[tuple[nn.Module, Any]]:
        hf_model = module if initializes_others(module) else hf_model
        for name, child in module.named_children():
            yield from walk(child, hf_model, f"{path}.{name}" if path else name)
        if id(module) not in seen:
            seen.add(id(module))
            yield module, lambda: _initialize(module, hf_model, path)

    yield from walk(model, hf_model, path)


@torch.no_grad()
def _initialize(module: nn.Module, hf_model: Any, path: str) -> None:
    if hf_model is not None:
        initialize_inside(hf_model, module)
        return
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(module, name):
            getattr(module, name)()
            return
    raise ValueError(
        f"{path or type(module).__name__} was built on the meta device, and {type(module).__name__} has no"
        " `reset_parameters()` that could give its parameters and buffers their values; define it, or build the model"
        " on the CPU."
    )
