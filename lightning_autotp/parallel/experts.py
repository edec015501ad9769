"""Hugging Face's grouped experts, with functions for what they do around their matmuls.

transformers' ``grouped_mm`` sorts the copies of tokens by expert. Autograd differentiates an index by adding up where
it may point to, in fp32 copies if routing weights are fp32. Here it is known that a copy has one place and a token k
copies: gradients of moved rows are moved rows, and their sums are taken in one pass and in one order.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp.compat import apply_gate, experts_implementation, grouped_experts_functions, has_gate, has_hooks
from lightning_autotp.distributed.once_differentiable import once_differentiable
from lightning_autotp.kernels.dispatch import kernels_of

_TRAITS = {"experts_class", "experts_interface"}

_TRAITS |= {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}
"""How ``use_experts_implementation`` describes experts; a release that has more to say computes them by itself."""


@dataclass(frozen=True)
class GroupedExperts:
    """How some of transformers' experts compute.

    Args:
        linear: transformers' ``(rows, weight, offs=, bias=, is_transposed=) -> rows``, a matmul for each group of rows.
        one_by_one: its ``(rows, weight, ends) -> rows``, which takes what torch's grouped matmul does not.
        gates_first: whether it is transformers' own gate: the first half of the features goes through the activation.
    """

    linear: Callable[..., Tensor]
    one_by_one: Callable[..., Tensor]
    gates_first: bool

    @staticmethod
    def of(experts: nn.Module) -> "Optional[GroupedExperts]":
        """None if ``experts`` are not computed by transformers' own functions, or by a release that describes more."""
        kind: Any = type(experts)
        if not inspect.isfunction(kind.forward):
            return None
        # a subclass, or whoever patched the class, may compute something else; only the decorator's forward says what
        interface = inspect.getclosurevars(kind.forward).nonlocals.get("experts_interface")
        if interface is None:
            return None
        functions = grouped_experts_functions()
        if functions is None:
            return None
        own = interface is functions.interface and interface.get("grouped_mm") is functions.forward
        traits = set(inspect.signature(functions.decorator).parameters)
        if not own or not traits <= _TRAITS or getattr(experts, "has_post_expert_norm", False):
            return None
        return GroupedExperts(functions.linear, functions.one_by_one, has_gate(experts, functions.gate))

    def serves(self, experts: Any) -> bool:
        """Whether experts that :meth:`of` knows are computed so now."""
        return experts_implementation(experts) == "grouped_mm"

    def __call__(self, experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What ``grouped_mm_experts_forward`` of transformers computes, step by step.

        Source: transformers, ``integrations/moe.py``.

        Args:
            experts: the module, with parameters ``[E, ...]``.
            hidden_states: ``[T, H]``.
            top_k_index: ``[T, k]``, the experts that a token goes to.
            top_k_weights: ``[T, k]``, what their outputs are multiplied by.

        Returns:
            ``[T, H]``.
        """
        expert, copy = torch.sort(top_k_index.reshape(-1))
        place = torch.empty_like(copy)
        place[copy] = torch.arange(copy.numel(), device=copy.device)
        place = place.view(top_k_index.shape)
        # not bincount, which waits for the GPU; histc takes no integers on a CPU
        counted = expert.float() if expert.device.type == "cpu" else expert.int()
        count = experts.num_experts
        ends = torch.histc(counted, count, 0, count - 1).cumsum(0, dtype=torch.int32)

        def linear(rows: Tensor, name: str) -> Tensor:
            weight = getattr(experts, name)
            bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
            if _is_aligned(weight):
                return self.linear(rows, weight, offs=ends, bias=bias, is_transposed=experts.is_transposed)
            matrices = weight if experts.is_transposed else weight.transpose(-2, -1)
            rows = self.one_by_one(rows.to(weight.dtype), matrices, ends)
            return rows if bias is None else rows + bias

        rows: Tensor = _Spread.apply(hidden_states, place)
        if experts.has_gate:
            rows = linear(rows, "gate_up_proj")
            swiglu = self.gates_first and _is_silu(experts.act_fn)
            rows = _SwiGLU.apply(rows) if swiglu else apply_gate(experts, rows)
        else:
            rows = experts.act_fn(linear(rows, "up_proj"))
        joined: Tensor = _Join.apply(linear(rows, "down_proj"), top_k_weights, place, hidden_states.dtype)
        return joined


def _is_silu(activation: Any) -> bool:
    """Whether it is torch's or transformers' own, and nobody watches or changes what it does."""
    kind = type(activation)
    known = kind is nn.SiLU or (kind.__module__, kind.__name__) == ("transformers.activations", "SiLUActivation")
    return known and "forward" not in vars(activation) and not has_hooks(activation)


def _is_aligned(weight: Tensor) -> bool:
    """Whether torch's grouped matmul takes ``[E, M, N]``: no fp64, and rows of 16 bytes, forward and backward."""
    size = weight.element_size()
    return size < 8 and not any(length * size % 16 for length in weight.shape[1:])


class _Spread(torch.autograd.Function):
    """Forward: ``y[place[t, j]] = x[t]``, ``[T, H]`` -> ``[T k, H]``. Backward: the sum of a token's k gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        kernels = kernels_of("experts", x)
        return (kernels.spread if kernels else _spread)(x, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        grad = grads[0]
        kernels = kernels_of("experts", grad)
        return (kernels.join if kernels else _join)(grad, None, place, grad.dtype), None


class _Join(torch.autograd.Function):
    """Forward: ``sum_j weights[t, j] rows[place[t, j]]``, ``[T k, H]`` and ``[T, k]`` -> ``[T, H]`` of ``dtype``.

    Backward: ``weights[t, j] grad[t]`` for the rows, ``grad[t] . rows[place[t, j]]`` for the weights.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(rows, weights, place)
        kernels = kernels_of("experts", rows)
        return (kernels.join if kernels else _join)(rows, weights, place, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, place = ctx.saved_tensors
        kernels = kernels_of("experts", rows)
        return *(kernels.join_gradient if kernels else _join_gradient)(grads[0], rows, weights, place), None, None


class _SwiGLU(torch.autograd.Function):
    """Forward: ``silu(gate) * up``, ``[S, 2 I]`` with gates first -> ``[S, I]``. Backward: from these alone.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        kernels = kernels_of("experts", rows)
        return (kernels.swiglu if kernels else _swiglu)(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (rows,) = ctx.saved_tensors
        kernels = kernels_of("experts", rows)
        return (kernels.swiglu_gradient if kernels else _swiglu_gradient)(grads[0], rows)


def _spread(x: Tensor, place: Tensor) -> Tensor:
    y = x.new_empty(place.numel(), x.shape[1])
    for places in place.unbind(1):
        y[places] = x
    return y


def _join(rows: Tensor, weights: Optional[Tensor], place: Tensor, dtype: torch.dtype) -> Tensor:
    """Summed in fp32 (of fp64: in fp64), rounded once."""
    total = rows.new_zeros(place.shape[0], rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    for number, places in enumerate(place.unbind(1)):
        if weights is None:
            total += rows[places]
        else:
            total.addcmul_(rows[places].to(total.dtype), weights[:, number, None].to(total.dtype))
    return total.to(dtype)


def _join_gradient(grad: Tensor, rows: Tensor, weights: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    of_rows, of_weights = torch.empty_like(rows), torch.empty_like(weights)
    grad = grad.to(torch.promote_types(rows.dtype, torch.float32))
    for number, places in enumerate(place.unbind(1)):
        of_weights[:, number] = (grad * rows[places]).sum(1)
        of_rows[places] = (grad * weights[:, number, None]).to(rows.dtype)
    return of_rows, of_weights


def _swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return F.silu(gate) * up


def _swiglu_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    of_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([of_gate, grad * F.silu(gate)], -1)
