"""LoRA adapters on the meta device: PEFT moves them there with their base layers, and forgets their values."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_autotp.sharding.sources import sources_of

_AS_PEFT_DOES = (True, False, "gaussian")


@torch.no_grad()
def create_adapters(model: nn.Module) -> None:
    """Give the LoRA adapters that are on the meta device the values with which PEFT would begin, on the CPU.

    Raises:
        ValueError: if they are to begin from the values of their base layers.
    """
    configs: dict[str, Any] = {}
    sources = sources_of(model)  # of adapters that were loaded with their model
    for module in model.modules():
        found = getattr(module, "peft_config", None)
        configs.update(found if isinstance(found, dict) else {})
    for path, layer in model.named_modules():
        if hasattr(layer, "reset_lora_parameters"):
            for adapter, config in configs.items():
                holders = list(_holders(layer, adapter))
                tensors = (holder._parameters.get(name) for holder, name in holders)
                if any(tensor is not None and tensor.is_meta and id(tensor) not in sources for tensor in tensors):
                    _create(layer, adapter, holders, config.init_lora_weights, path)


def _holders(layer: Any, adapter: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules that hold the tensors of an adapter of a layer, with their names there."""
    for half in ("lora_A", "lora_B"):
        if adapter in getattr(layer, half, ()):
            yield from ((getattr(layer, half)[adapter], name) for name in ("weight", "bias"))
    for half in ("lora_embedding_A", "lora_embedding_B"):
        if adapter in getattr(layer, half, ()):
            yield getattr(layer, half), adapter


def _create(layer: Any, adapter: str, holders: list[tuple[nn.Module, str]], init: Any, path: str) -> None:
    if init not in _AS_PEFT_DOES:
        raise ValueError(
            f"{path}: init_lora_weights={init!r} computes adapters from the values of their base layer, which are not"
            " read yet; load the model with transformers' own `from_pretrained`, or use init_lora_weights=True."
        )
    for holder, name in holders:
        tensor = holder._parameters.get(name)
        if tensor is not None:
            empty = torch.empty_like(tensor, device="cpu")
            holder._parameters[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            if isinstance(holder, (nn.Linear, nn.Embedding)):
                holder.reset_parameters()
            elif isinstance(holder, nn.ParameterDict):
                nn.init.normal_(holder._parameters[name])  # type: ignore[arg-type]
    layer.reset_lora_parameters(adapter, init)
