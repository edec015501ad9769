"""What ranks that share a model log differently is warned of, by name."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch.distributed as dist

from tests.helpers.small_nets import Regressor, strategy, trainer


class Local(Regressor):
    """Logs the norm of what a rank holds from a hook, which no look at a step sees."""

    net: Any

    def on_train_batch_end(self, *args: Any) -> None:
        self.log("weight", self.net.up.weight.norm())
        self.log("alike", self.net.down.bias.norm())


class OnFirst(Regressor):
    """Logs on the first process alone."""

    def on_train_batch_end(self, *args: Any) -> None:
        if dist.get_rank() == 0:
            self.log("here", 1.0, rank_zero_only=True)


@pytest.mark.ranks(2)
def test_a_logged_value_that_differs_on_ranks_that_share_a_model_is_warned_of() -> None:
    first = dist.get_rank() == 0
    with pytest.warns(UserWarning, match=r"logged different values of 'weight' \(.*grad_norm") if first else _nothing():
        trainer(strategy(2)).fit(Local())


@pytest.mark.filterwarnings("error:.*logged different values")
@pytest.mark.ranks(2)
def test_what_one_process_logs_is_no_difference() -> None:
    trainer(strategy(2)).fit(OnFirst())


def _nothing() -> Any:
    return contextlib.nullcontext()
