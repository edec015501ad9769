"""Models in full size and their batches, built where tensors have no memory."""

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import nn

from lightning_autotp.compat import no_init_weights
from lightning_autotp.model_sources.factory import from_factory
from lightning_autotp.model_sources.hf import FEATURES, auto_class, task

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_LONGEST = 4096
"""Tokens a sequence, where neither the job nor the model says fewer."""


def build(
    source: str,
    *,
    dtype: torch.dtype,
    batch: Optional[int] = None,
    seq: Optional[int] = None,
    checkpointing: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model in full size, ready to train, and one batch: keyword arguments of its forward.

    Args:
        source: a Hugging Face model type, the path of a ``config.json`` or of a directory with one, a hub name
            (``owner/name``), or ``"module:factory"``.
        dtype: that of its parameters.
        batch: sequences or images in the batch; 1 unless a factory brings its own.
        seq: tokens a sequence; the model's longest, at most 4096, unless a factory brings its own.
        checkpointing: whether Hugging Face's gradient checkpointing is on.

    Raises:
        ValueError: if the model cannot be read, or cannot be checkpointed; the message names the fix.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as Lightning does around the model
    try:
        model, made = _from_factory(source) if ":" in source else _from_config(_config(source), source, batch, seq)
    finally:
        torch.set_default_dtype(before)
    if dtype != torch.float32:
        _convert(model, dtype)
    if checkpointing:
        checkpoint(model)
    return model.train(), made


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """``model.to(dtype)``, which torch refuses for fake tensors."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def checkpoint(model: nn.Module) -> None:
    """Turn Hugging Face's gradient checkpointing on.

    Raises:
        ValueError: if the model has none.
    """
    old, new = (getattr(model, f"{kind}_checkpointing_enable", None) for kind in ("gradient", "activation"))
    enable = new or old  # renamed in transformers 5.23
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise ValueError(f"checkpointing: {type(model).__name__} has no gradient checkpointing; leave it off.")
    # random states cannot be kept of tensors without memory, and say nothing about what a step costs
    enable({"use_reentrant": False, "preserve_rng_state": False})


def _from_factory(source: str) -> tuple[nn.Module, dict[str, Any]]:
    try:
        model, batches = from_factory(source)
    except ImportError as error:
        raise ValueError(f"model: {source!r} cannot be imported ({error}); give module:factory.") from None
    except Exception as error:  # whatever the user's code raises
        raise ValueError(
            f"model: {source!r} gives no model and batches ({type(error).__name__}: {_first_line(error)}); it must be"
            " module:factory, a function that returns (model, [batch, ...])."
        ) from error
    if not batches:
        raise ValueError(f"model: {source!r} returns no batch; return (model, [batch, ...]).")
    return model, batches[0]


def _from_config(
    config: "PretrainedConfig", source: str, batch: Optional[int], seq: Optional[int]
) -> tuple[nn.Module, dict[str, Any]]:
    with no_init_weights():  # some of it looks at what it drew
        try:
            model = auto_class(config).from_config(config, dtype=torch.get_default_dtype())
        except Exception as error:  # of many kinds: what each architecture asks of its config
            raise ValueError(
                f"model: {source} cannot be built ({type(error).__name__}: {_first_line(error)}); give a config that"
                " transformers builds a model from."
            ) from None
    model.tie_weights()
    rows = batch or 1
    if task(config) == "image":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
        if not isinstance(size, int) or not isinstance(channels, int):
            raise ValueError(
                f"model: {source} says no image_size and num_channels, so its batch is not known; give a"
                " module:factory that brings one."
            )
        if seq is not None:
            raise ValueError(f"seq: {source} reads images; leave it out.")
        pixels = torch.zeros(rows, channels, size, size)
        return model, {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or _LONGEST
    if (seq or 0) > longest and any(_learns_positions(name, module) for name, module in model.named_modules()):
        raise ValueError(f"seq: {source} learns its positions, of which it has {longest}; give {longest} or less.")
    ids = torch.zeros(rows, seq or min(longest, _LONGEST), dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def _learns_positions(name: str, module: nn.Module) -> bool:
    name = name.rpartition(".")[2]
    return isinstance(module, nn.Embedding) and (name == "wpe" or "position" in name)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _config(source: str) -> "PretrainedConfig":
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            given = json.loads(path.read_text())
            return CONFIG_MAPPING[given["model_type"]].from_dict(given)
        except Exception as error:  # no JSON, no model type, or values that its class refuses
            raise ValueError(
                f"model: {str(path)!r} cannot be read ({type(error).__name__}: {_first_line(error)}); it must be JSON"
                " with a `model_type` that transformers knows and sizes that go together."
            ) from None
    if source in CONFIG_MAPPING:
        return CONFIG_MAPPING[source].from_dict(deepcopy(FEATURES.get(source, {})))
    if source.count("/") == 1 and not source.startswith((".", "/")):
        try:
            return AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"model: {source!r} cannot be read from the hub ({first}); give a config.json.") from None
    raise ValueError(
        f"model: {source!r} is neither a model type of transformers, nor the path of a config.json, nor a hub name"
        " (owner/name), nor module:factory."
    )
