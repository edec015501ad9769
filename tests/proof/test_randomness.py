"""What a proof runs must not end the process, whatever a rank of a wrong plan asks torch for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lightning_autotp.proof.randomness import without_randomness


def test_attention_without_heads_is_an_error_and_not_the_end() -> None:
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 0, 3, 8)
    with without_randomness([]), pytest.raises(ValueError, match=r"attention without heads: \[1, 4, 3, 8\], \[1, 0"):
        functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def test_attention_dropout_is_noted_and_left_out() -> None:
    lines: list[str] = []
    q = torch.randn(1, 2, 5, 8)
    with without_randomness(lines):
        got = functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert torch.equal(got, functional.scaled_dot_product_attention(q, q, q))
    assert len(lines) == 1
    assert "test_randomness.py" in lines[0]
