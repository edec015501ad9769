"""Twelve architectures, one of each family, through ``verify``; ``tox -e sweep`` takes all of them."""

from __future__ import annotations

import pytest

from lightning_autotp.verification import verify

DENSE = ["llama", "qwen3", "gemma2", "phi3", "olmo2", "gpt_neox", "bloom", "t5"]
OTHERS = ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"]


@pytest.mark.parametrize("tp_size", [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("model_type", [*DENSE, *OTHERS])
def test_an_architecture_is_the_unsharded_run(model_type: str, tp_size: int) -> None:
    report = verify(model_type, tp_size)  # 8 query heads, and 2 key heads where there may be fewer
    assert report.verdict == "pass", report
    assert report.precision == "fp64"
    assert report.loss <= 1e-6 and all(row.bit_equal is not False for row in report.rows)
    assert tp_size > 2 or report.share < 0.6 or model_type not in DENSE
