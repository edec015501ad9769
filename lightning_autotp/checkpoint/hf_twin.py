"""A Hugging Face model without weights, made from what a checkpoint recorded of it; it knows names and conversions."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional
from unittest import mock

import torch
from torch import Tensor, nn

from lightning_autotp.checkpoint.hf_record import Record
from lightning_autotp.checkpoint.tensors import Tensors
from lightning_autotp.compat import no_init_weights, reverse_conversion, reversed_conversion_groups


@dataclass(frozen=True)
class Piece:
    """Tensors that become others together: a fused weight and those it is made of on the disk.

    Args:
        names: those that are read.
        make: what is written, by name, from what was read.
    """

    names: tuple[str, ...]
    make: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def twin_of(record: Record) -> Optional[nn.Module]:
    """The model that ``record`` describes, on the meta device; None for classes that transformers does not have."""
    import transformers

    cls: Any = getattr(transformers, record["known_class"], None)
    model_type = record["model_type"]
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not known or cls is transformers.PreTrainedModel or model_type not in transformers.CONFIG_MAPPING:
        return None
    settings = {name: value for name, value in _harmless(record["config"]).items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(model_type, **settings, attn_implementation="eager")
    with torch.device("meta"), no_init_weights():
        made: nn.Module = cls(config)
    return made


def _harmless(config: Any) -> Any:
    """A config without what makes transformers fetch code (kernels by name) or change weights (quantizers)."""
    if isinstance(config, Mapping):
        kept = {n: _harmless(v) for n, v in config.items() if not n.endswith("_implementation")}
        return {n: v for n, v in kept.items() if n not in ("auto_map", "quantization_config")}
    return config


def pieces_of(twin: Optional[nn.Module], names: list[str]) -> Iterator[Piece]:
    """What has to be converted together on the way to the names that transformers' ``save_pretrained`` writes."""
    if twin is None:
        yield from (Piece((name,), dict) for name in names)
        return
    for group in reversed_conversion_groups(twin, names):
        yield Piece(tuple(group), lambda tensors: reverse_conversion(twin, tensors))


def adapted_twin(record: Record, base: nn.Module) -> Any:
    """The PEFT model that ``record`` describes around ``base``, on the meta device."""
    from peft import PeftConfig, get_peft_model

    made: Any = None
    for name, settings in record["adapters"].items():
        drawn = {"init_lora_weights": False} if "init_lora_weights" in settings else {}  # not made of the base's values
        config = PeftConfig.from_peft_type(**{**settings, **drawn})
        if made is None:
            options: dict[str, Any] = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
            made = get_peft_model(base, config, adapter_name=name, **options)
        else:
            made.add_adapter(name, config, low_cpu_mem_usage=True)
    return made


def adapter_names(twin: Any, adapter: str, names: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name that PEFT's ``save_pretrained`` writes of an adapter, the name in the state dict."""
    from peft import get_peft_model_state_dict

    by_id = {id(shape): name for name, shape in names.items()}
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):  # it asks the hub whether the vocabulary has grown
        written = get_peft_model_state_dict(twin, state_dict=dict(names), adapter_name=adapter)
    return {name: by_id[id(shape)] for name, shape in written.items()}


def merged(twin: Any, inner: str, tensors: Tensors) -> Tensors:
    """The tensors of the Hugging Face model inside a PEFT model, with its adapters merged, by PEFT's own arithmetic.

    Args:
        twin: the PEFT model, on the meta device.
        inner: the path of the Hugging Face model in it.
        tensors: those of the PEFT model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = {p: m for p, m in twin.named_modules() if isinstance(m, BaseTunerLayer)}
    wrappers = {p: m for p, m in twin.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    prefix = f"{inner}." if inner else ""
    sources: dict[str, tuple[Optional[str], str]] = {}  # merged name -> the adapted layer, if any, and the name here
    for name in tensors.shapes:
        layer = next((p for p in layers if name.startswith(f"{p}.")), None)
        wrapper = next((p for p in wrappers if name.startswith(f"{p}.")), None)
        plain: Optional[str] = name
        if layer is not None:
            own = name.removeprefix(f"{layer}.")
            plain = f"{layer}.{own.removeprefix('base_layer.')}" if own.startswith("base_layer.") else None
        elif wrapper is not None:
            saved = f"{wrapper}.modules_to_save.{wrappers[wrapper].active_adapters[0]}."
            plain = f"{wrapper}.{name.removeprefix(saved)}" if name.startswith(saved) else None
        if plain is not None and plain.startswith(prefix):
            sources[plain.removeprefix(prefix)] = (layer, name)
    last: dict[str, dict[str, Tensor]] = {}

    def read(name: str) -> Tensor:
        layer, source = sources[name]
        if layer is None:
            return tensors.read(source)
        if layer not in last:
            last.clear()
            last[layer] = _merge(layers[layer], f"{layer}.", tensors)
        return last[layer][source.removeprefix(f"{layer}.base_layer.")]

    return Tensors({name: tensors.shapes[source] for name, (_, source) in sources.items()}, read)


def _merge(layer: Any, prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one adapted layer's base, its adapters merged in."""
    named = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    before = {}
    for name in named:
        if prefix + name in tensors.shapes:
            path, _, leaf = name.rpartition(".")
            holder = layer.get_submodule(path)
            before[name] = (holder, leaf, getattr(holder, leaf))
            read = tensors.read(prefix + name).clone()
            setattr(holder, leaf, nn.Parameter(read, requires_grad=False) if leaf in holder._parameters else read)
    layer.merge()
    made = {name: tensor.detach() for name, tensor in layer.get_base_layer().state_dict().items()}
    layer.merged_adapters.clear()
    for holder, leaf, old in before.values():
        setattr(holder, leaf, old)
    return made
