"""Experts of transformers, small, and what they give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

KINDS: dict[str, Any] = {
    "gated": lambda: MixtralExperts(MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=5)),
    "gelu": lambda: MixtralExperts(
        MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=5, hidden_act="gelu")
    ),
    "many": lambda: Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=24, moe_intermediate_size=16, num_experts=16)),
    "own gate, biases, transposed": lambda: GptOssExperts(
        GptOssConfig(hidden_size=24, intermediate_size=40, num_local_experts=5)
    ),
    "no gate": lambda: NemotronHExperts(
        NemotronHConfig(hidden_size=24, moe_intermediate_size=40, n_routed_experts=5, moe_latent_size=None)
    ),
}


def built(kind: str) -> Any:
    torch.manual_seed(0)
    experts = KINDS[kind]()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    experts.config._experts_implementation = "grouped_mm"
    return experts


def routed(experts: Any, count: int, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and where they go: one expert gets no token, another one every token."""
    torch.manual_seed(1)
    scores = torch.rand(count, experts.num_experts)
    scores[:, 1], scores[:, 2] = 0, 2
    weights, index = scores.topk(k)
    width = experts.down_proj.shape[-1 if experts.is_transposed else 1]
    return torch.randn(count, width), index, weights


def run(experts: Any, compute: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    experts.zero_grad()
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    out = compute(hidden, index, weights)
    (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    assert hidden.grad is not None and weights.grad is not None
    grads = {name: p.grad for name, p in experts.named_parameters()}
    return {"out": out.detach(), "hidden": hidden.grad, "weights": weights.grad, **grads}
