"""Layers are converted in place and stay the objects they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_autotp.parallel.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
)
from tests.helpers.closeness import assert_close
from tests.helpers.sharded_layers import (
    MLP,
    MLP_SPECS,
    inputs,
    seeded,
    shard,
    spec,
)


class Linear(nn.Linear):
    """A subclass that changes nothing of the computation."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.note = "kept"


@pytest.mark.ranks(2)
def test_layers_stay_the_objects_they_were() -> None:
    class Model(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.up = Linear(16, 24)
            self.shared = self.up

    model = seeded(Model)
    before = {name: (module, module.weight) for name, module in model.named_children() if name != "shared"}
    called: list[str] = []
    model.up.register_forward_hook(lambda *_: called.append("hook"))
    shard(model, *MLP_SPECS, spec("shared", "column"))
    for name, (module, weight) in before.items():
        assert getattr(model, name) is module and module.weight is weight
    assert model.shared is model.up and isinstance(model.up, Linear) and isinstance(model.up, ColumnParallelLinear)
    assert model.up.note == "kept" and "column parallel" in repr(model.up)
    assert isinstance(model.down, RowParallelLinear) and "row parallel" in repr(model.down)
    model(inputs(5, 16))
    assert called == ["hook"]


@pytest.mark.ranks(2)
def test_transformer_encoder_layers_do_not_take_their_fast_path() -> None:
    build = lambda: nn.TransformerEncoder(  # noqa: E731
        nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), 2
    )
    want = seeded(build).eval()
    model = shard(seeded(build), spec(r".*linear1\.", "column"), spec(r".*linear2\.", "row")).eval()
    x = inputs(3, 5, 16)
    with torch.no_grad():
        assert_close({"output": model(x)}, {"output": want(x)}, 1e-5)
