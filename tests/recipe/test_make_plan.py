"""``make_plan`` is the whole proposal: what the rules say, and sequence parallelism where the config asks for it."""

from __future__ import annotations

import pytest

from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.planning.planner import propose_plan
from lightning_autotp.planning.sequence_parallel import parallel_sequence


def test_the_switch_of_the_config_is_in_the_plan() -> None:
    model = small_model(small_config("llama"))
    on, off = (TPTrainingConfig(autotp_size=2, sequence_parallel=value) for value in (True, False))
    plain = propose_plan(model, on)
    assert make_plan(model, off) == plain and plain.sequence is None
    assert make_plan(model, on) == parallel_sequence(model, plain)


@pytest.mark.parametrize("size", [None, 1])
def test_one_rank_has_no_tokens_to_share_out(size: int | None) -> None:
    config = TPTrainingConfig(autotp_size=2 if size else 1, sequence_parallel=True)
    assert make_plan(small_model(small_config("llama")), config, size).sequence is None


def test_a_given_size_wins_over_that_of_the_config() -> None:
    config = TPTrainingConfig(sequence_parallel=True)
    plan = make_plan(small_model(small_config("llama")), config, 2)
    assert plan.tp_size == 2 and plan.sequence is not None


def test_blocks_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^sequence_parallel: .*one list of blocks"):
        make_plan(small_model(small_config("t5")), TPTrainingConfig(autotp_size=2, sequence_parallel=True))
