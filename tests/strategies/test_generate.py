"""Sampled tokens are the same on the ranks that share a model, though nobody has seeded them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy
from tests.helpers.models import LanguageModel, quiet_trainer, tiny_llama, token_batches
from tests.helpers.small_nets import everyones


class Sampling(LanguageModel):
    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.model.generate(batch, do_sample=True, max_new_tokens=4, pad_token_id=0)  # type: ignore[operator]


@pytest.mark.ranks(2)
def test_sampling_in_predict_without_a_seed_is_alike() -> None:
    model = Sampling(tiny_llama, layers=1)
    torch.manual_seed(dist.get_rank())
    loader: Any = DataLoader(token_batches(n=1, batch=2, seq=4)[0], batch_size=2)  # type: ignore[arg-type]
    found: Any = quiet_trainer(strategy=AutoTPStrategy(autotp_size=2), use_distributed_sampler=False).predict(
        model, loader
    )
    assert found is not None
    assert all(torch.equal(theirs, found[0]) for theirs in everyones(found[0]))
