"""The tensor parallel plan that a Hugging Face model brings itself, as rules of ours.

Source: ``transformers/distributed/tensor_parallel.py``; keys are module paths with ``*`` for a layer's number.
"""

import re
from typing import Any

from torch import nn

from lightning_autotp.specs import AutoTPConfig, PartitionType, TPLayerSpec

_STYLES: dict[str, dict[str, Any]] = {
    "colwise": {"partition_type": PartitionType.COLUMN},
    "colwise_gather_output": {"partition_type": PartitionType.COLUMN, "gather_output": True},
    "colwise_rep": {"partition_type": PartitionType.COLUMN, "gather_output": True},
    "rowwise": {"partition_type": PartitionType.ROW},
    "embedding_rowwise": {"partition_type": PartitionType.ROW},
    "replicated_with_grad_allreduce": {"partition_type": PartitionType.SKIP, "grad_allreduce": True},
    "replicate": {"partition_type": PartitionType.SKIP},
}


def model_plan(model: nn.Module) -> AutoTPConfig:
    """The rules of the plans of all Hugging Face models inside ``model``; empty if there are none.

    Raises:
        ValueError: if a plan uses a style that has no rule here; the message names it and the module it is for.
    """
    specs: list[TPLayerSpec] = []
    inside: list[str] = []
    for path, module in model.named_modules():
        plan = getattr(module, "_tp_plan", None)
        if not plan or not hasattr(module, "base_model_prefix") or any(path.startswith(outer) for outer in inside):
            continue
        inside.append(f"{path}." if path else "")
        specs += [_rule(inside[-1], key, style) for key, style in plan.items()]
    return AutoTPConfig(specs)


def _rule(prefix: str, key: str, style: str) -> TPLayerSpec:
    if style not in _STYLES:
        raise ValueError(
            f"the model's own plan cuts {key!r} in style {style!r}, which has no rule here yet;"
            " give `partition_config` rules for this model."
        )
    path = re.escape(prefix + key).replace(r"\*", r"[^.]+")
    return TPLayerSpec([rf"{path}\.weight$", rf"{path}$"], **_STYLES[style])
