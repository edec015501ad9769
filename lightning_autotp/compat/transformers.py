"""Private interfaces of transformers (5.17 to 5.24)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Optional, Union
from unittest import mock

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GroupedExpertsFunctions:
    """What transformers computes grouped experts with (``integrations/moe.py``).

    Args:
        interface: its registry of implementations.
        forward: its own grouped implementation.
        linear: ``(rows, weight, offs=, bias=, is_transposed=) -> rows``, a matmul for each group of rows.
        one_by_one: ``(rows, weight, ends) -> rows``, which takes what torch's grouped matmul does not.
        gate: its own gate, with which the first half of the features goes through the activation.
        decorator: what describes experts.
    """

    interface: Any
    forward: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    one_by_one: Callable[..., Tensor]
    gate: Callable[..., Tensor]
    decorator: Callable[..., Any]


def grouped_experts_functions() -> Optional[GroupedExpertsFunctions]:
    """Find transformers' functions for grouped experts; None without transformers, or in a release without them."""
    try:
        from transformers.integrations import moe

        return GroupedExpertsFunctions(
            moe.ALL_EXPERTS_FUNCTIONS,
            moe.grouped_mm_experts_forward,
            moe._grouped_linear,
            torch.ops.transformers.grouped_mm_fallback,
            moe._default_apply_gate,
            moe.use_experts_implementation,
        )
    except (ImportError, AttributeError):
        return None


def experts_implementation(experts: Any) -> Optional[str]:
    """The name of what computes ``experts`` now; None where transformers itself spreads them over ranks.

    It then marks the tokens of others by ids beyond the last. It reads its config in every call.
    """
    if getattr(experts, "_is_expert_parallel", False):
        return None
    name: str = experts.config._experts_implementation
    return name


def has_gate(experts: Any, gate: Callable[..., Tensor]) -> bool:
    """Whether ``gate`` is what ``experts`` apply, by their class and not by something put on the object."""
    return type(experts)._apply_gate is gate and "_apply_gate" not in vars(experts)


def apply_gate(experts: Any, rows: Tensor) -> Tensor:
    """Apply the experts' own gate: ``[S, 2 I] -> [S, I]``."""
    gated: Tensor = experts._apply_gate(rows)
    return gated


def can_set_experts_implementation(hf_model: Any) -> bool:
    """Whether a Hugging Face model has experts whose implementation can be chosen."""
    able: bool = hf_model._can_set_experts_implementation()
    return able


def around_attention_of_transformers(around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Have Hugging Face models call ``around(function)`` for the attention function that their config names.

    It is asked for in every call of attention, and must give back the function where there is nothing to do. Without
    transformers, and if it was done before, nothing happens.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    interface: Any = getattr(modeling, "AttentionInterface", None)
    own = getattr(interface, "get_interface", None)
    if own is None or hasattr(own, "_autotp_around"):
        return

    @wraps(own)
    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(own(self, *args, **kwargs))

    get_interface._autotp_around = around  # type: ignore[attr-defined]
    interface.get_interface = get_interface


def tp_plan_of(module: nn.Module) -> Any:
    """The tensor parallel plan that a Hugging Face model brings, None for other modules."""
    return getattr(module, "_tp_plan", None)


def initializes_others(module: Union[nn.Module, type[nn.Module]]) -> bool:
    """Whether ``module`` is a Hugging Face model (or a class of them), which initializes the modules inside it."""
    return hasattr(module, "_init_weights")


def initialize_inside(hf_model: Any, module: nn.Module) -> None:
    """Initialize ``module``'s own tensors as the Hugging Face model around it does."""
    hf_model._init_weights(module)


def keep_initialized(tensor: Tensor) -> None:
    """Have transformers leave ``tensor`` as it is when it initializes the module that holds it."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


@contextmanager
def loading_checkpoints_by(load: Callable[[Any, Any, Any, Any], Any]) -> Iterator[None]:
    """Have ``from_pretrained`` call ``load(model, state dict or None, files or None, settings)`` to load a checkpoint.

    What it returns is transformers' report of missing, unexpected and mismatched keys. Everything before and after that
    stays transformers' own: the model on the meta device, missing keys, tied weights, the report that users see.
    """
    from transformers import PreTrainedModel

    def load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> tuple[Any, None]:
        return load(model, state_dict, checkpoint_files, load_config), None

    with mock.patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(load_pretrained_model)):
        yield


def convert_checkpoint(hf_model: Any, tensors: dict[str, Tensor], settings: Any) -> Any:
    """Rename, convert and set the tensors of a checkpoint in a Hugging Face model; returns transformers' report."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    report, _ = convert_and_load_state_dict_in_model(model=hf_model, state_dict=tensors, load_config=settings)
    return report


def quantization_of(settings: Any) -> Optional[str]:
    """The name of the quantization that a checkpoint's weights keep when it is loaded by ``settings``, if they do."""
    if settings.hf_quantizer is None or getattr(settings.hf_quantizer.quantization_config, "dequantize", False):
        return None
    method = settings.hf_quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def given_loss_function(hf_model: nn.Module) -> Any:
    """The ``loss_function`` that was set on a Hugging Face model itself; None if its own serves."""
    return vars(hf_model).get("_loss_function")


def forget_loss_function(hf_model: Any) -> None:
    """Have a Hugging Face model use its own loss function again."""
    del hf_model._loss_function


def no_init_weights() -> AbstractContextManager[Any]:
    """Keep transformers from initializing the weights of models that are built inside."""
    from transformers.initialization import no_init_weights as hf_no_init_weights

    context: AbstractContextManager[Any] = hf_no_init_weights()
    return context


@contextmanager
def hide_values_from_transformers() -> Iterator[None]:
    """Keep transformers from looking at values, or for what only a GPU's or a CPU's real tensors can do.

    It looks in the positions for packed sequences, and takes an attention mask where it cannot see them; the fake form
    of the grouped product of experts knows bf16 only, for other dtypes there is transformers' own.
    """
    try:
        from transformers import masking_utils
        from transformers.integrations import moe
    except ImportError:
        yield
        return
    with (
        mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        mock.patch.object(moe, "_can_use_grouped_mm", lambda x, weight, offs: weight.dtype == torch.bfloat16),
    ):
        yield


@contextmanager
def grouped_experts_in_fp64() -> Iterator[None]:
    """Let transformers multiply groups of fp64 rows by its own fallback: torch's grouped matmul does not know fp64."""
    try:
        from transformers.integrations import moe

        able = moe._can_use_grouped_mm
    except (ImportError, AttributeError):
        yield
        return

    def can_use_grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> bool:
        return weight.dtype != torch.float64 and bool(able(x, weight, offs))

    with mock.patch.object(moe, "_can_use_grouped_mm", can_use_grouped_mm):
        yield


def reversed_conversion_groups(hf_model: Any, names: list[str]) -> list[list[str]]:
    """Group names of a state dict by what :func:`reverse_conversion` must be given together, in their order.

    Most are alone; a weight that is fused in the model may have its parts in several.
    """
    from transformers.core_model_loading import WeightConverter, apply_converters

    conversions = [each.reverse_transform() for each in _conversions(hf_model)[::-1]]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in names:
        target, pattern = apply_converters(name, converters)
        groups.setdefault(name if pattern is None else f" {target}", []).append(name)
    return list(groups.values())


def reverse_conversion(hf_model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors of a Hugging Face model's state dict to those that its ``save_pretrained`` writes."""
    from transformers.core_model_loading import revert_weight_conversion

    made: dict[str, Tensor] = revert_weight_conversion(hf_model, dict(tensors))
    return made


def _conversions(hf_model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    found = getattr(hf_model, "_weight_conversions", None)
    if found is None:
        found = get_model_conversion_mapping(hf_model, add_legacy=False)
        found = [each for each in found if not isinstance(each, PrefixChange)]
    return list(found)
