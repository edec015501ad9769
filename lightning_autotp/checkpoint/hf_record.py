"""What a checkpoint records of the Hugging Face models in a module: enough to write them out again without the run."""

import json
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn

Record = Mapping[str, Any]
"""Plain JSON: ``path`` of the model in the module, ``class`` and ``module`` of its class, its ``config`` and
``generation_config``, ``tied`` names with the name that each shares its values with, and for PEFT models ``adapters``
(a config by name) and ``inner``, the path of the Hugging Face model inside."""


def is_hf_model(module: nn.Module) -> bool:
    """Whether ``module`` is a model of transformers'; without an import of it, which nobody else may need."""
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(module, loaded.PreTrainedModel)


def is_peft_model(module: nn.Module) -> bool:
    """Whether ``module`` is a model with adapters of PEFT's around it."""
    loaded = sys.modules.get("peft.peft_model")
    return loaded is not None and isinstance(module, loaded.PeftModel)


def outermost(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The Hugging Face and PEFT models in ``module`` that are in no other one, with their paths."""

    def walk(found: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if is_hf_model(found) or is_peft_model(found):
            yield path, found
            return
        for name, child in found.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    yield from walk(module, "")


def models_in(module: nn.Module) -> list[dict[str, Any]]:
    """Describe every Hugging Face model in ``module``, sharded or not; one that cannot be described is warned of."""
    records = []
    for path, model in outermost(module):
        try:
            records.append(record_of(path, model))
        except Exception as error:  # of configs with code of their own; a checkpoint is not lost for it
            rank_zero_warn(
                f"the config of {path or type(model).__name__} cannot be recorded ({type(error).__name__}: {error}):"
                " `lightning-autotp export` will need `--config`."
            )
    return records


def record_of(path: str, model: nn.Module) -> dict[str, Any]:
    """Describe the Hugging Face or PEFT model at ``path``."""
    inner, inner_path, adapters = model, "", {}
    if is_peft_model(model):
        inner_path, inner = next((p, m) for p, m in model.named_modules() if is_hf_model(m))
        configs: Any = model.peft_config
        adapters = {name: _as_json(config.to_dict()) for name, config in configs.items()}
    known = next(cls for cls in type(inner).__mro__ if cls.__module__.startswith("transformers."))
    generation = getattr(inner, "generation_config", None)
    return {
        "path": path,
        "class": type(inner).__name__,
        "known_class": known.__name__,
        "config": _as_json(original(inner.config).to_diff_dict()),
        "model_type": original(inner.config).model_type,
        "generation_config": None if generation is None else _as_json(generation.to_diff_dict()),
        "tied": tied_names(model),
        "inner": inner_path,
        "adapters": adapters,
    }


def original(config: Any) -> Any:
    """A model's config, where sharding has put this rank's view of it in its place."""
    return vars(config).get("_original", config)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Every name in the state dict that shares its parameter with an earlier name, and that one."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return tied


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else str(value)
