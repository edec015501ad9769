"""A run with dropout is the unsharded Trainer's: the same masks at every size, wherever they are drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.closeness import assert_close
from tests.helpers.dropping import ODD_RULES, Dropping, Oddities, bert, gpt2, llama
from tests.helpers.small_nets import parts_of, strategy, trainer, unsharded, weights

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "odd": (Oddities, {"partition_config": ODD_RULES}, ""),
    "odd-recomputed": (partial(Oddities, "not"), {"partition_config": ODD_RULES}, ""),
    "odd-recomputed-reentrant": (partial(Oddities, "reentrant"), {"partition_config": ODD_RULES}, ""),
    "llama": (llama, {}, ""),
    "llama-eager": (partial(llama, attn_implementation="eager"), {}, ""),
    "llama-recomputed": (llama, {}, "not"),
    "llama-recomputed-reentrant": (llama, {}, "reentrant"),
    "llama-sequence": (llama, {"sequence_parallel": True}, ""),
    "gpt2": (gpt2, {}, ""),
    "gpt2-saved": (gpt2, {"shard_saved_activations": True}, "not"),
    "gpt2-sequence": (gpt2, {"sequence_parallel": True}, ""),
    "gpt2-sequence-recomputed": (gpt2, {"sequence_parallel": True}, "not"),
    "gpt2-sequence-reentrant": (gpt2, {"sequence_parallel": True}, "reentrant"),
    "bert": (bert, {}, ""),
    "bert-derived": (bert, {"preset_model": "auto"}, ""),
}


def assert_unsharded_run(name: str, tp: int) -> None:
    make, options, again = CASES[name]
    options = {"partition_config": None, **options}
    torch.manual_seed(5)
    reference = Dropping(make, again)
    full = unsharded(reference)
    torch.manual_seed(5)
    model = Dropping(make, again)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(strategy(tp, **options)).fit(model)
    said = [str(one.message) for one in caught if "draw" in str(one.message) or "dropout" in str(one.message)]
    assert not said
    assert model.losses == pytest.approx(reference.losses, rel=1e-5)
    assert_close(weights(model), parts_of(model, full), 1e-4, "weight")


QUICK = ("odd", "odd-recomputed-reentrant", "gpt2-sequence-recomputed", "bert-derived")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in CASES])
@pytest.mark.ranks(2)
def test_two_ranks_have_the_masks_of_the_unsharded_run(name: str) -> None:
    assert_unsharded_run(name, 2)


@pytest.mark.parametrize("name", ["odd", pytest.param("gpt2", marks=pytest.mark.long)])
@pytest.mark.ranks(4)
def test_four_ranks_have_the_masks_of_the_unsharded_run(name: str) -> None:
    assert_unsharded_run(name, 4)
