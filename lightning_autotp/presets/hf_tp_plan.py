"""The tensor parallel plan that a Hugging Face model brings itself, as rules of ours.

Source: ``transformers/distributed/tensor_parallel.py``; keys are paths of modules, or of parameters that are no
layer's, with ``*`` for a layer's number.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_autotp.compat import tp_plan_of
from lightning_autotp.specs.layer_spec import AutoTPConfig, PartitionType, TPLayerSpec

_COLUMN, _ROW, _SKIP = PartitionType.COLUMN, PartitionType.ROW, PartitionType.SKIP

_STYLES: dict[str, dict[str, Any]] = {
    "colwise": {"partition_type": _COLUMN},
    "colwise_gather_output": {"partition_type": _COLUMN, "gather_output": True},
    "colwise_rep": {"partition_type": _COLUMN, "gather_output": True},
    "rowwise": {"partition_type": _ROW},
    "rowwise_split_input": {"partition_type": _ROW, "split_input": True},
    "rowwise_rep": {"partition_type": _ROW, "split_input": True},
    "embedding_rowwise": {"partition_type": _ROW},
    "embedding_colwise": {"partition_type": _COLUMN, "gather_output": True},
    "replicated_with_grad_allreduce": {"partition_type": _SKIP, "grad_allreduce": True},
    "replicate": {"partition_type": _SKIP},
    "mla_kv_a_proj": {"partition_type": _SKIP, "partial_outputs": "qk_rope_head_dim"},
}

_PACKED = {"packed_colwise": _COLUMN, "packed_rowwise": _ROW}
"""Two equal parts along the dim that the plain style would cut."""


def model_plan(model: nn.Module) -> AutoTPConfig:
    """The rules of the plans of all Hugging Face models inside ``model``; empty if there are none.

    A module that is none of theirs may have a ``config`` with a ``base_model_tp_plan``, which is taken alike; its paths
    start at that module or at a child of it.

    Raises:
        ValueError: if a plan uses a style that has no rule here; the message names it and the module it is for.
    """
    specs: list[TPLayerSpec] = []
    inside: list[str] = []
    for path, module in model.named_modules():
        is_theirs = hasattr(module, "base_model_prefix")
        plan = tp_plan_of(module) if is_theirs else getattr(getattr(module, "config", None), "base_model_tp_plan", None)
        if not plan or not isinstance(plan, dict) or any(path.startswith(outer) for outer in inside):
            continue
        start = re.escape(f"{path}." if path else "") + ("" if is_theirs else _CHILD)
        if not is_theirs and not _names_any(model, start, plan):  # a block of theirs knows the plan of its model
            continue
        inside.append(f"{path}." if path else "")
        for key, style in plan.items():
            specs += _rules(module, start, key, style)
    return AutoTPConfig(specs)


_CHILD = r"(?:[^.]+\.)?"


def _names_any(model: nn.Module, start: str, plan: dict[str, str]) -> bool:
    """Whether a plan names any module of ``model``."""
    paths = [path for path, _ in model.named_modules()]
    return any(re.fullmatch(start + _expression(key), path) for key in plan for path in paths)


def _rules(model: nn.Module, start: str, key: str, style: str) -> Iterator[TPLayerSpec]:
    """The rules of one entry; ``start`` is an expression for what comes before it."""
    path = start + _expression(key)
    patterns = [rf"{path}\.weight$", rf"{path}$"]
    if style in _STYLES:
        yield TPLayerSpec(patterns, **_STYLES[style])
    elif style in _PACKED:
        yield _packed(model, key, patterns, _PACKED[style])
    elif style in ("moe_tp_experts", "all_reduce"):
        yield TPLayerSpec([rf"{path}$"], _SKIP, boundary=True)
    elif style == "moe_identity_expert":
        yield TPLayerSpec([rf"{path}$"], _ROW)
    elif style == "local_params":
        for name in _own_parameters(model, key):
            yield TPLayerSpec([rf"{path}\.{re.escape(name)}$"], _COLUMN)
    else:
        raise ValueError(
            f"the model's own plan cuts {key!r} in style {style!r}, which has no rule here yet;"
            " give `partition_config` rules for this model."
        )


def _packed(model: nn.Module, key: str, patterns: list[str], kind: PartitionType) -> TPLayerSpec:
    named = (p for name, p in model.named_parameters() if re.fullmatch(rf"{_expression(key)}(\.weight)?", name))
    dims = next((p.ndim for p in named), 3)
    cut = dims - 1 if kind is _ROW else dims - 2
    shape = tuple(2 if dim == cut else -1 for dim in range(dims))
    return TPLayerSpec(patterns, kind, shape, cut)


def _own_parameters(model: nn.Module, key: str) -> list[str]:
    """The names of parameters that modules at ``key`` keep themselves."""
    modules = (module for path, module in model.named_modules() if re.fullmatch(_expression(key), path))
    return list(dict.fromkeys(name for module in modules for name in module._parameters))


def _expression(key: str) -> str:
    return re.escape(key).replace(r"\*", r"[^.]+")
