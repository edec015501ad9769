"""Private interfaces of torch, transformers and Lightning, each with the versions it was seen in.

What is here may change without notice: look here first when a new release breaks something. Imports nothing of ours,
and transformers, which is optional, only when it is asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Optional, Union
from unittest import mock

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed import _symmetric_memory as symmetric_memory  # registers torch.ops.symm_mem
from torch.distributed.checkpoint.filesystem import _StorageInfo as stored_piece
from torch.nn.modules.dropout import _DropoutNd as AnyDropout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

__all__ = [
    "CPU_FLASH_ATTENTION",
    "CPU_FLASH_ATTENTION_BACKWARD",
    "AnyDropout",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "GroupedExpertsFunctions",
    "TorchDispatchMode",
    "all_gather_single",
    "apply_gate",
    "assert_async",
    "autocast_dtype",
    "can_set_experts_implementation",
    "collect_random_state",
    "convert_checkpoint",
    "experts_implementation",
    "flop_registry",
    "foreach_copy_",
    "foreach_norm",
    "forget_loss_function",
    "functional_collectives",
    "given_loss_function",
    "grouped_experts_functions",
    "grouped_experts_in_fp64",
    "has_gate",
    "has_hooks",
    "hide_values_from_transformers",
    "in_backward",
    "initialize_inside",
    "initializes_others",
    "is_compiled_in_place",
    "is_compiled_module",
    "keep_initialized",
    "loading_checkpoints_by",
    "layout_by_name",
    "make_wrapper_subclass",
    "nccl_options",
    "no_init_weights",
    "optimizers_to_device",
    "quantization_of",
    "reduce_scatter_single",
    "reverse_conversion",
    "reversed_conversion_groups",
    "scaler_settings",
    "set_random_state",
    "stored_piece",
    "symmetric_memory",
    "tp_plan_of",
    "tree_iter",
    "tree_leaves",
    "tree_map",
    "unsafe_view",
]

# -- torch (2.11 to 2.13) ----------------------------------------------------------------------------------------------

all_gather_single: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Called ``all_gather_into_tensor`` until torch 2.12."""

reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""Called ``reduce_scatter_tensor`` until torch 2.12."""

assert_async: Callable[[Tensor, str], None] = torch._assert_async
"""An assertion on the value of a tensor that does not wait for the GPU."""

foreach_copy_: Any = torch._foreach_copy_
foreach_norm: Any = torch._foreach_norm

layout_by_name: Callable[[str], torch.layout] = torch.serialization._get_layout
"""How a pickle names a ``torch.layout``."""

make_wrapper_subclass: Any = torch.Tensor._make_wrapper_subclass

CPU_FLASH_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_FLASH_ATTENTION_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unsafe_view(x: Tensor, shape: list[int]) -> Tensor:
    """View ``x`` as ``shape`` without autograd's knowledge that the result is a view."""
    return torch.ops.aten._unsafe_view(x, shape)


def autocast_dtype(device_type: str) -> Optional[torch.dtype]:
    """The dtype of autocast on a kind of device, None where it is off; torch raises for those that have none (meta)."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def in_backward() -> bool:
    """Whether this thread is in a backward pass."""
    return torch._C._current_graph_task_id() != -1


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def is_compiled_module(module: nn.Module) -> bool:
    """Whether ``module`` or its forward is compiled, in any way of torch's or Lightning's."""
    if getattr(module, "_compiler_ctx", None) is not None:  # a LightningModule, by Lightning
        return True
    wraps = "_orig_mod" in module._modules or hasattr(module.forward, "get_compiler_config")
    return wraps or is_compiled_in_place(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` itself has forward or backward hooks of any kind."""
    forward, backward = (
        (module._forward_hooks, module._forward_pre_hooks),
        (module._backward_hooks, module._backward_pre_hooks),
    )
    return any(forward + backward)


def nccl_options(timeout: Optional[timedelta]) -> Any:
    """Make options of an NCCL group whose kernels go before others that wait for the GPU."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if timeout is not None:
        options._timeout = timeout
    return options


def scaler_settings(scaler: Any) -> dict[str, Any]:
    """Read what makes a ``torch.amp.GradScaler`` like ``scaler``, and ``started``: whether it is in use."""
    return {
        "device": scaler._device,
        "init_scale": scaler._init_scale,
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
        "enabled": scaler.is_enabled(),
        "started": scaler._scale is not None,
    }


# -- Lightning (2.6) ---------------------------------------------------------------------------------------------------

optimizers_to_device = _optimizers_to_device


def collect_random_state(*, include_cuda: bool) -> dict[str, Any]:
    """Collect the states of Python's, NumPy's and torch's random number generators, and of those of all GPUs."""
    state: dict[str, Any] = _collect_rng_states(include_cuda)
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`collect_random_state` collected."""
    _set_rng_states(state)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, entering ``torch.autocast`` changes nothing, in all threads."""
    # torch asks whether the dtype suits the device; a cast that does not happen need not be asked about
    with (
        mock.patch.object(torch.autocast, "__enter__", lambda self: self),
        mock.patch.object(torch.autocast, "__exit__", lambda self, *_: None),
    ):
        yield


# -- transformers (5.17 to 5.24) ---------------------------------------------------------------------------------------


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
