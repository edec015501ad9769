"""Pretrained Hugging Face models of which every rank reads only its part."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from types import MethodType
from typing import Any, Union

import torch
from torch import Tensor, nn

from lightning_autotp.checkpoint.pretrained_files import Files
from lightning_autotp.checkpoint.pretrained_tensors import InFile, InMemory, Stored, StoredTensor
from lightning_autotp.compat import convert_checkpoint, loading_checkpoints_by, quantization_of
from lightning_autotp.layout.layout import Box
from lightning_autotp.sharding.adapters import create_adapters
from lightning_autotp.sharding.materialize import load_full
from lightning_autotp.sharding.sources import set_source, sources_of

_REFUSED = {
    "device_map": "setup decides where parameters are; leave it out.",
    "tp_plan": "setup shards the model by its own plan; leave it out.",
    "tp_size": "setup shards the model; give the strategy its autotp_size instead.",
    "distributed_config": "setup shards the model by its own plan; leave it out.",
    "gguf_file": "GGUF files cannot be read in parts; convert the model to safetensors first.",
    "state_dict": "there is nothing to read in parts; build the model with `from_config` and load it after setup.",
}


def from_pretrained(model_class: Any, path_or_hub_id: Union[str, os.PathLike[str]], *args: Any, **kwargs: Any) -> Any:
    """Load a pretrained model as ``model_class.from_pretrained`` does, but read its weights only when it is sharded.

    What comes back is on the meta device. ``AutoTPStrategy`` or :func:`~lightning_autotp.parallelize` then read, on
    each rank, this rank's part from the files, converted as transformers converts it, and no full model is ever in
    memory. Weights that are not in the files have the values that transformers gives them, and its report says so.
    Adapters of PEFT may be put on top. Without a strategy of this package, the first move to a device
    (``model.to("cpu")``, as any Trainer makes it) reads the full model.

    Args:
        model_class: a class with a ``from_pretrained`` of transformers, such as ``AutoModelForCausalLM``.
        path_or_hub_id: a folder, or the id of a model on the Hugging Face Hub.
        *args: as ``model_class.from_pretrained`` takes them.
        **kwargs: as it takes them: ``dtype``, ``attn_implementation``, ``config``, ``revision`` and so on.

    Raises:
        ValueError: if an argument cannot be kept in this way, such as ``device_map``, or the weights would stay
            quantized; the message names it.
    """
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"from_pretrained: {name}: {reason}")
    origins: list[str] = []

    def load(model: Any, state_dict: Any, paths: Any, settings: Any) -> Any:
        quantization = quantization_of(settings)
        if quantization is not None:
            raise ValueError(
                f"{path_or_hub_id}: its weights would stay quantized ({quantization}), and cannot be sharded; where"
                " transformers can dequantize them, ask for it, as `quantization_config=FineGrainedFP8Config("
                "dequantize=True)` does for fp8."
            )
        if not paths:
            raise ValueError(f"{path_or_hub_id}: there are no files of weights to read.")
        tensors, origin = _stored(paths)
        origins.append(origin)
        return convert_checkpoint(model, tensors, settings)

    # what is not in files is made here and now, though a Trainer's `init_module(empty_init=True)` is around it
    with loading_checkpoints_by(load), torch.device("cpu"):
        loaded = model_class.from_pretrained(path_or_hub_id, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    _to_meta(model, " ".join(origins))
    _read_when_needed(model)
    return loaded


def _stored(paths: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint by their names in it, none of them read, and the mark of its files."""
    files = Files(paths)
    if not paths[0].endswith(".safetensors"):
        found: dict[str, Stored] = {}
        for path in paths:
            mapped = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found |= {key: InMemory(tuple(value.shape), value.dtype, value) for key, value in mapped.items()}
    else:
        found = {key: InFile(shape, dtype, files, path, key) for path, key, shape, dtype in files.tensors()}
        files.close()
    return {key: StoredTensor(stored) for key, stored in found.items()}, files.origin


@dataclass(frozen=True, eq=False)
class PretrainedTensor:
    """The source of a parameter: what is in files named by ``origin``."""

    stored: Stored
    origin: str

    def __deepcopy__(self, memo: dict[int, Any]) -> "PretrainedTensor":
        return self

    def read(self, boxes: Sequence[Box], out: Sequence[Tensor]) -> None:
        """Copy each of ``boxes`` into the tensor of its size in ``out``."""
        self.stored.read(boxes, out)


def _to_meta(model: nn.Module, origin: str) -> None:
    """Put ordinary parameters and buffers on the meta device in place of stored ones, and note where to read them."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                stored = getattr(tensor, "stored", None)
                if tensor is None or stored is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]
                set_source(module, name, made[id(tensor)], PretrainedTensor(stored, origin))


def _read_when_needed(model: Any) -> None:
    """Have ``model`` read weights in full when somebody moves it off the meta device, or loads others over them."""
    model._apply = MethodType(_apply, model)
    model.register_load_state_dict_pre_hook(_read_what_is_loaded)
    model.resize_token_embeddings = _refuse_to_resize


def _apply(model: Any, function: Any, recurse: bool = True) -> nn.Module:
    if sources_of(model):
        try:
            function(torch.empty(0, device="meta"))
        except NotImplementedError:  # torch moves no meta tensors
            load_full(model, torch.device("cpu"))
    if not sources_of(model):  # read in full, or sharded
        for name in ("_apply", "resize_token_embeddings"):
            vars(model).pop(name, None)
    applied: nn.Module = type(model)._apply(model, function, recurse)
    return applied


def _read_what_is_loaded(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # torch copies nothing into a tensor on the meta device
    create_adapters(model)
    sources = sources_of(model)
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    load_full(
        model, torch.device("cpu"), {id(x) for name, x in tensors if id(x) in sources and prefix + name in state_dict}
    )


def _refuse_to_resize(*_: Any, **__: Any) -> None:
    raise ValueError(
        "resize_token_embeddings: the embeddings of this model are not read yet, so that new rows cannot be put beside"
        " them. Resize it once, with transformers' own `from_pretrained`, `save_pretrained` it, and load that."
    )
