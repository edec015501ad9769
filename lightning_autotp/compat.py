"""Private interfaces of torch, transformers and Lightning, each with the versions it was seen in.

What is here may change without notice: look here first when a new release breaks something. Imports nothing of ours,
and transformers, which is optional, only when it is asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Optional
from unittest import mock

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed import _symmetric_memory as symmetric_memory  # registers torch.ops.symm_mem
from torch.nn.modules.dropout import _DropoutNd as AnyDropout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry

__all__ = [
    "CPU_FLASH_ATTENTION",
    "CPU_FLASH_ATTENTION_BACKWARD",
    "AnyDropout",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensorMode",
    "GroupedExpertsFunctions",
    "TorchDispatchMode",
    "all_gather_single",
    "assert_async",
    "autocast_dtype",
    "collect_random_state",
    "flop_registry",
    "foreach_copy_",
    "foreach_norm",
    "functional_collectives",
    "grouped_experts_functions",
    "has_hooks",
    "hide_values_from_transformers",
    "in_backward",
    "is_compiled_in_place",
    "make_wrapper_subclass",
    "nccl_options",
    "no_init_weights",
    "optimizers_to_device",
    "reduce_scatter_single",
    "scaler_settings",
    "set_random_state",
    "symmetric_memory",
    "tree_iter",
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
