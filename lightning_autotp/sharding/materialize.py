"""Give every parameter what this rank holds of it: from the weights of rank 0, or initialized from the meta device."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autotp.compat import initialize_inside, initializes_others
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout


def load_parts(model: nn.Module, layouts: dict[str, Layout], mesh: Mesh, device: torch.device) -> None:
    """Give every parameter this rank's part and every buffer its place, in the order in which models initialize."""
    waiting = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    by_id = {id(p): layouts[name] for name, p in model.named_parameters(remove_duplicate=False)}
    created: dict[int, nn.Parameter] = {}
    for module, initialize in _with_initializers(model, None):
        old = {name: p for name, p in module._parameters.items() if p is not None}
        if any(t.is_meta for t in [*old.values(), *_buffers(module).values()]):
            _create(module, device, created)
            initialize()
        for name, original in old.items():
            waiting[id(original)] -= 1
            if not waiting[id(original)]:  # a tied parameter is initialized by each of its modules, then cut once
                _cut(module._parameters[name], by_id[id(original)], mesh, device)  # type: ignore[arg-type]
        for name, buffer in _buffers(module).items():
            module._buffers[name] = _from_rank_zero(buffer, mesh, device)


def _cut(parameter: nn.Parameter, layout: Layout, mesh: Mesh, device: torch.device) -> None:
    parameter.grad = None
    parameter.data = layout.shard(_from_rank_zero(parameter.data, mesh, device), mesh.tp_rank)


def _from_rank_zero(tensor: Tensor, mesh: Mesh, device: torch.device) -> Tensor:
    tensor = tensor.to(device).contiguous()
    if mesh.tp_size * mesh.dp_size > 1 and tensor.numel():
        mesh.collectives.broadcast(tensor.view(-1).view(torch.uint8))  # bytes: backends know few dtypes
    return tensor


def _create(module: nn.Module, device: torch.device, created: dict[int, nn.Parameter]) -> None:
    """Empty full tensors for what ``module`` itself has on the meta device; a shared parameter is created once."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            if id(parameter) not in created:
                empty = torch.empty_like(parameter, device=device)
                created[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = created[id(parameter)]
    for name, buffer in _buffers(module).items():
        if buffer.is_meta:
            module._buffers[name] = torch.empty_like(buffer, device=device)


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


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
