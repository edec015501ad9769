"""Names of parameters and modules: without wrappers, without layer numbers, and the model types around them."""

import re
from collections.abc import Iterator

from torch import nn


def join_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def folded(name: str) -> str:
    """A name with its layer numbers as ``*``."""
    return re.sub(r"(?:(?<=\.)|^)\d+(?=\.)", "*", name)


_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|base_layer|original_module|modules_to_save\.[^.]+)\."
)


def clean_name(name: str) -> str:
    """A parameter or module name without the wrappers of compile, activation checkpointing and PEFT."""
    return _WRAPPERS.sub("", f"{name}.")[:-1]


def model_types(model: nn.Module) -> list[str]:
    """The model types of all configs in ``model``, outermost first."""
    types = (getattr(getattr(module, "config", None), "model_type", None) for module in model.modules())
    return list(dict.fromkeys(t for t in types if isinstance(t, str) and t))


def ancestors(name: str) -> Iterator[str]:
    """The paths of the modules around a name, innermost first, the root (``""``) last."""
    while name:
        name = name.rpartition(".")[0]
        yield name
