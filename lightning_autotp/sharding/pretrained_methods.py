"""What Hugging Face and PEFT models say of themselves, where a rank holds its part of them."""

from functools import partial
from typing import Any, NoReturn

from torch import nn

from lightning_autotp.sharding.state import INSIDE, Inside, Sharded, inside


def speak_for_the_full_model(model: nn.Module, found: Sharded) -> None:
    """Have the Hugging Face and PEFT models in a sharded model count full parameters, and refuse to save a shard."""
    if found.mesh.tp_size == 1:
        return
    layouts = found.plan.layouts
    for path, module in model.named_modules():
        if not callable(getattr(type(module), "save_pretrained", None)):
            continue
        prefix = f"{path}." if path else ""
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        vars(module)[INSIDE] = Inside({n: layouts[prefix + n] for n in names if prefix + n in layouts}, found.mesh)
        # on the object: its class is shared with models that are not sharded
        vars(module)["save_pretrained"] = partial(_refuse, type(module).__name__)
        if callable(getattr(type(module), "num_parameters", None)):
            vars(module)["num_parameters"] = partial(_count, module)
        if callable(getattr(type(module), "get_nb_trainable_parameters", None)):
            vars(module)["get_nb_trainable_parameters"] = partial(_count_both, module)


def _refuse(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"{name}.save_pretrained would write this rank's shard of the model. Call"
        " `lightning_autotp.save_pretrained(model, directory)` on all ranks, or write a checkpoint and run"
        " `lightning-autotp export CHECKPOINT DIRECTORY`."
    )


def _count(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    found = inside(model)
    assert found is not None
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
    count = 0
    for name, parameter in model.named_parameters():
        if id(parameter) not in embeddings and (parameter.requires_grad or not only_trainable):
            layout = found.layouts.get(name)
            size = 1
            for length in parameter.shape if layout is None else layout.shape:
                size *= length
            count += size
    return count


def _count_both(model: nn.Module) -> tuple[int, int]:
    return _count(model, only_trainable=True), _count(model)
