"""What must be the same on all ranks before they go on: versions, config, model, plan, optimizers; as text by name."""

import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.plans.plan import ShardingPlan

SAME_JOB = "All ranks must run the same program, with the same packages and the same arguments"
SAME_MODEL = "Ranks that share a model must build the same one: the same modules, shapes, dtypes and frozen parameters"
SAME_PLAN = "All ranks must come to the same plan: give all of them the same rules and the same first batch"
SAME_OPTIMIZERS = "`configure_optimizers` must return the same on all ranks"

_PACKAGES = ("torch", "lightning", "transformers", "peft", "numpy")


def job_facts(config: TPTrainingConfig) -> dict[str, str]:
    """The versions of Python and of what computes, torch's global switches, and every field of ``config``."""
    facts = {
        "version of Python": platform.python_version(),
        "version of lightning_autotp": _version("lightning-autotp"),
    }
    facts |= {f"version of {name}": _version(name) for name in _PACKAGES}
    facts["deterministic algorithms"] = str(torch.are_deterministic_algorithms_enabled())
    facts["torch.backends.cudnn.benchmark"] = str(torch.backends.cudnn.benchmark)
    facts["matmul precision"] = torch.get_float32_matmul_precision()
    facts["default dtype"] = str(torch.get_default_dtype())
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name == "tensor_parallel":  # groups are each rank's own objects
            value = {"tp_size": value.tp_size, "mpu": type(value.mpu), "tp_group": value.tp_group is not None}
        facts |= dict(flat(value, name))
    return facts


def model_facts(model: nn.Module) -> dict[str, str]:
    """The class of every module, and of every parameter and buffer its shape, dtype and whether it trains."""
    facts = {f"module {path or 'itself'}": _described(module) for path, module in model.named_modules()}
    for kind, found in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in found:
            frozen = ", frozen" if kind == "parameter" and not tensor.requires_grad else ""
            facts[f"{kind} {name}"] = f"{list(tensor.shape)} {tensor.dtype}{frozen}"
    return facts


def plan_facts(plan: ShardingPlan) -> dict[str, str]:
    """Everything of ``plan``, by parameter."""
    facts = {f"the plan of {name}": text(entry) for name, entry in plan.parameters.items()}
    for name in ("tp_size", "siblings", "attributes", "boundaries", "head_inputs", "sequence"):
        facts[f"the plan's {name}"] = text(getattr(plan, name))
    return facts


def optimizer_facts(
    model: nn.Module, optimizers: Iterable[Optimizer], schedulers: Iterable[Any] = ()
) -> dict[str, str]:
    """Classes, hyperparameters of all groups, the parameters in them, and schedulers with their settings."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    facts = {}
    for number, optimizer in enumerate(optimizers):
        where = f"optimizer {number}"
        facts[where] = type(optimizer).__qualname__
        for at, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key != "params":
                    facts |= dict(flat(value, f"{key} of group {at} of {where}"))
            for place, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), "a parameter that is not the model's")
                facts[f"the place of {name} in {where}"] = f"group {at}, place {place}"
    for number, found in enumerate(schedulers):
        scheduler = getattr(found, "scheduler", found)
        where = f"scheduler {number}"
        facts[where] = type(scheduler).__qualname__
        settings = {k: v for k, v in vars(found).items() if k != "scheduler"} if scheduler is not found else {}
        for key, value in {**settings, **scheduler.state_dict()}.items():
            facts |= dict(flat(value, f"{key} of {where}"))
    return facts


def flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """The leaves of mappings and sequences in ``value``, as text by a name that says where they are."""
    if isinstance(value, Mapping):
        yield name, f"a mapping of {len(value)}"
        for key, inner in value.items():
            yield from flat(inner, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, (Mapping, list, tuple)) for inner in value):
        yield name, f"a sequence of {len(value)}"
        for at, inner in enumerate(value):
            yield from flat(inner, f"{name}[{at}]")
    else:
        yield name, text(value)


def text(value: Any) -> str:
    """``repr`` without addresses, which are each process's own; of tensors their values."""
    if isinstance(value, Enum):
        return repr(value.value)
    if isinstance(value, Tensor) and not value.is_meta:
        return f"{value.detach().cpu().tolist()} {value.dtype}"
    if callable(value) and not isinstance(value, type) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _described(module: nn.Module) -> str:
    try:
        more = text(module.extra_repr())[1:-1]
    except Exception:  # it may ask for what is not there yet
        more = ""
    return f"{type(module).__qualname__}({more})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
