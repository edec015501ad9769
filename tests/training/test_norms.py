"""Norms of gradients and weights are those of the unsharded model, where key heads are held by several ranks, too."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import grad_norm
from torch import Tensor

from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.model_sources.factory import loss_of
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.sharding.shard import shard
from lightning_autotp.training.gradients import TPGradients
from lightning_autotp.training.norms import Norms


def norms(model: Any, gradients: TPGradients | None = None) -> dict[str, Tensor]:
    """Many norms after a backward pass."""
    ids = torch.randint(131, (3, 8), generator=torch.Generator().manual_seed(0))
    loss_of(model(input_ids=ids, labels=ids)).backward()
    found = Norms(model, gradients)
    block = model.model.layers[0]
    made: dict[str, Tensor] = {}
    for kind in (1, 2.0, 3, float("inf")):
        of = {"all": None, "block": block, "some": [block.self_attn.k_proj.weight], "one": block.mlp.up_proj.weight}
        for name, parameters in of.items():
            made[f"gradient {name} {kind}"] = found.grad_norm(parameters, kind)
            made[f"weight {name} {kind}"] = found.parameter_norm(parameters, kind)
    return made | found.grad_norms(norm_type=2)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_norms_are_those_of_the_unsharded_model(model_type: str, size: int) -> None:
    model: Any = small_model(small_config(model_type)).double().train()
    plain = deepcopy(model)
    want = norms(plain)
    for name, number in grad_norm(plain, 2).items():
        torch.testing.assert_close(want[name], number)
    expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None], 3.0)
    torch.testing.assert_close(want["gradient all 3"], expected)
    config = TPTrainingConfig(autotp_size=size)

    def of_rank(mesh: Mesh) -> dict[str, Tensor]:
        copy = deepcopy(model)
        found = shard(copy, make_plan(copy, config), mesh, config, device=torch.device("cpu"))
        return norms(copy, TPGradients(copy, found))

    for found in Lockstep[dict[str, Tensor]](size).run(of_rank):
        assert found.keys() == want.keys()
        for name, norm in want.items():
            torch.testing.assert_close(found[name], norm, rtol=1e-6, atol=0, msg=name)
