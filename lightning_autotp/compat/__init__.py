"""Private interfaces of torch, transformers and Lightning, each with the versions it was seen in.

What is here may change without notice: look here first when a new release breaks something. Imports nothing of ours,
and transformers, which is optional, only when it is asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Optional
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
from torch.utils.serialization import config as serialization_config

from lightning_autotp.compat.transformers import (
    GroupedExpertsFunctions,
    apply_gate,
    around_attention_of_transformers,
    can_set_experts_implementation,
    convert_checkpoint,
    experts_implementation,
    forget_loss_function,
    given_loss_function,
    grouped_experts_functions,
    grouped_experts_in_fp64,
    has_gate,
    hide_values_from_transformers,
    initialize_inside,
    initializes_others,
    keep_initialized,
    loading_checkpoints_by,
    no_init_weights,
    quantization_of,
    reverse_conversion,
    reversed_conversion_groups,
    tp_plan_of,
)

__all__ = [
    "around_attention_of_transformers",
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
    "begin_data_of_next_epoch",
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


@contextmanager
def without_record_checksums() -> Iterator[None]:
    """Inside, in this thread, ``torch.save`` computes no checksums, which ``torch.load`` does not look at."""
    config: Any = serialization_config
    with config.patch("save.compute_crc32", False):
        yield


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


def transforms_are_active() -> bool:
    """Whether transforms of ``torch.func`` are under way."""
    return torch._C._are_functorch_transforms_active()


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


def begin_data_of_next_epoch(trainer: Any) -> None:
    """Make the training data's iterators anew where a run is resumed between two epochs.

    Lightning makes them before it restores anything, and not again for that epoch, as it does in a run that goes on.
    """
    loop = trainer.fit_loop
    if loop.epoch_loop.batch_progress.is_last_batch and loop._data_fetcher is not None:
        iter(loop._data_fetcher)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, entering ``torch.autocast`` changes nothing, in all threads."""
    # torch asks whether the dtype suits the device; a cast that does not happen need not be asked about
    with (
        mock.patch.object(torch.autocast, "__enter__", lambda self: self),
        mock.patch.object(torch.autocast, "__exit__", lambda self, *_: None),
    ):
        yield
