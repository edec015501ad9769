"""What a derived plan says of itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.derive import derive
from lightning_autotp.proof.prover import Look
from lightning_autotp.proof.step import loss_of_batch
from tests.derivation.models.frame import WIDTH, Decoder, token_batch


class HeadsInNumbers(nn.Module):
    """Its forward has the number of heads in it, which no rank can have its own of."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, 8, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        seen = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        out: Tensor = self.out(seen.transpose(1, 2).reshape(b, t, WIDTH))
        return out


def test_the_plan_says_which_line_keeps_features_together() -> None:
    torch.manual_seed(0)
    look = Look("training", (token_batch(9),), call=loss_of_batch)
    found = derive(Decoder(HeadsInNumbers), look, TPTrainingConfig(autotp_size=2), 2)
    assert found.verdict.kind == "proved"
    entry = found.plan.parameters["layers.0.q.weight"]
    assert entry.gather_output
    line = HeadsInNumbers.forward.__code__.co_firstlineno + 2
    assert f"its features stay together, since apart {__file__}:{line}" in entry.reason
    assert "shape '[5, 12, 8, 4]' is invalid" in entry.reason
    assert "stay together" not in found.plan.parameters["layers.1.net.0.weight"].reason
