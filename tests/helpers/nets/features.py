"""Nets whose layers do something with features between a column and a row cut, in MLPs and gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.helpers.nets.frame import HIDDEN, UP_DOWN, WIDTH, LanguageModel, Net, right, rule, rules, wrong


class Mlp(nn.Module):
    """``up``, something in between, ``down``."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))

    def between(self, h: Tensor) -> Tensor:
        return functional.gelu(h)


class LayerNormNoAffine(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return functional.layer_norm(functional.gelu(h), h.shape[-1:])


class RmsNorm(Mlp):
    def between(self, h: Tensor) -> Tensor:
        variance = h.pow(2).mean(-1, keepdim=True)
        return h * torch.rsqrt(variance + 1e-6)


class NormModule(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def between(self, h: Tensor) -> Tensor:
        return functional.gelu(self.norm(h))


class SoftmaxFeatures(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return functional.softmax(h, dim=-1)


class SoftmaxTokens(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return h * functional.softmax(h, dim=1)


class TopK(Mlp):
    def between(self, h: Tensor) -> Tensor:
        threshold = h.topk(8, dim=-1).values[..., -1:]
        return torch.where(h >= threshold, h, torch.zeros_like(h))


class MeanGate(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(h.mean(-1, keepdim=True))


class TokenMeanGate(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(h.mean(1, keepdim=True))


class FlipFeatures(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return h * h.flip(-1).sigmoid()


class FlipTokens(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return h * h.flip(1).sigmoid()


class RollFeatures(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return h * torch.roll(h, shifts=1, dims=-1)


class ShiftFeatures(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return functional.gelu(h + functional.pad(h, (1, -1)))


class TokenShift(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return functional.relu(h + functional.pad(h, (0, 0, 1, -1))).square()


class ResponseNorm(Mlp):
    """Global response normalization, as ConvNeXt V2 has it."""

    def between(self, h: Tensor) -> Tensor:
        spread = h.norm(dim=1, keepdim=True)
        return h + h * (spread / (spread.mean(dim=-1, keepdim=True) + 1e-6))


class CumulativeFeatures(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return functional.gelu(h.cumsum(dim=-1))


class CumulativeTokens(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return functional.gelu(h.cumsum(dim=1))


class FirstFeaturesLinear(Mlp):
    """A part of the features is not activated."""

    def between(self, h: Tensor) -> Tensor:
        return torch.cat([h[..., :8], functional.gelu(h[..., 8:])], dim=-1)


class SizedScale(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return functional.gelu(h) * h.shape[-1] ** -0.5


class ConstantScale(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return functional.gelu(h) * HIDDEN**-0.5


class ResidualInside(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return h + functional.gelu(h)


class InputSliceInside(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.up(x))
        width = min(h.shape[-1], x.shape[-1])
        h = torch.cat([h[..., :width] + x[..., :width], h[..., width:]], dim=-1)
        return self.down(h)


class ShuffledFeatures(Mlp):
    """ShuffleNet's order of channels."""

    def between(self, h: Tensor) -> Tensor:
        shuffled = h.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)
        return functional.gelu(h) * shuffled


class BatchNormFeatures(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return functional.batch_norm(h.flatten(0, 1), None, None, training=True).view_as(h)


class SharedGain(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def between(self, h: Tensor) -> Tensor:
        return functional.gelu(h) * self.gain


class NoDropout(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def between(self, h: Tensor) -> Tensor:
        return self.drop(functional.silu(h))


class Quantized(Mlp):
    """Activations on a grid whose step is that of the largest one."""

    def between(self, h: Tensor) -> Tensor:
        step = h.abs().amax(dim=-1, keepdim=True) / 7
        return h + ((h / step).round() * step - h).detach()


class OneHot(Mlp):
    def between(self, h: Tensor) -> Tensor:
        best = functional.one_hot(h.argmax(dim=-1), h.shape[-1])
        return functional.gelu(h) * (1 + best)


class Checkpointed(Mlp):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return out


class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class PackedGlu(nn.Module):
    """Gate and value in one linear: ``half`` says how they are told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)


class ChunkedGlu(PackedGlu):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * value)


class FunctionalGlu(PackedGlu):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.glu(self.up(x), dim=-1))


class InterleavedGlu(PackedGlu):
    def forward(self, x: Tensor) -> Tensor:
        both = self.up(x)
        return self.down(functional.silu(both[..., ::2]) * both[..., 1::2])


class PairedGlu(PackedGlu):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(functional.silu(gate) * value)


class TwoBranches(nn.Module):
    """``down`` reads two activations side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, HIDDEN)
        self.b = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([functional.gelu(self.a(x)), torch.tanh(self.b(x))], dim=-1))


class DenseBlock(nn.Module):
    """``down`` reads the input beside the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(WIDTH + HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([x, functional.gelu(self.up(x))], dim=-1))


class SigmoidGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


GATHERED = rules("", "", rule("up", "column", gather_output=True), rule("down", "row", split_input=True))
ALLREDUCED = rules("up", "down", rule(r".*\.gain", "skip", grad_allreduce=True))

NETS: tuple[Net, ...] = (
    right("plain MLP", lambda: LanguageModel(Mlp()), UP_DOWN),
    right("SwiGLU of three linears", lambda: LanguageModel(SwiGlu()), rules("w1|w3", "w2")),
    right("SwiGLU by chunk with shape", lambda: LanguageModel(ChunkedGlu()), rules("up", "down", shape=[2, -1])),
    right("F.glu with shape", lambda: LanguageModel(FunctionalGlu()), rules("up", "down", shape=[2, -1])),
    right("gate and value in turns", lambda: LanguageModel(InterleavedGlu()), rules("up", "down", shape=[-1, -1])),
    right("gate and value in pairs", lambda: LanguageModel(PairedGlu()), rules("up", "down", shape=[-1, -1])),
    right("norm behind gather_output", lambda: LanguageModel(NormModule()), GATHERED),
    right("softmax over tokens", lambda: LanguageModel(SoftmaxTokens()), UP_DOWN),
    right("gate of the mean over tokens", lambda: LanguageModel(TokenMeanGate()), UP_DOWN),
    right("flip over tokens", lambda: LanguageModel(FlipTokens()), UP_DOWN),
    right("token shift of activations", lambda: LanguageModel(TokenShift()), UP_DOWN),
    right("cumsum over tokens", lambda: LanguageModel(CumulativeTokens()), UP_DOWN),
    right("constant scale", lambda: LanguageModel(ConstantScale()), UP_DOWN),
    right("residual inside", lambda: LanguageModel(ResidualInside()), UP_DOWN),
    right("batch norm of each feature", lambda: LanguageModel(BatchNormFeatures()), UP_DOWN),
    right("shared gain with grad_allreduce", lambda: LanguageModel(SharedGain()), ALLREDUCED),
    right("dropout of nothing", lambda: LanguageModel(NoDropout()), UP_DOWN),
    right("sigmoid gate", lambda: LanguageModel(SigmoidGate()), rules("gate|up", "down")),
    right("checkpointed", lambda: LanguageModel(Checkpointed(False)), UP_DOWN),
    right("checkpointed, reentrant", lambda: LanguageModel(Checkpointed(True)), UP_DOWN),
    right(
        "two branches with shape",
        lambda: LanguageModel(TwoBranches()),
        rules("a|b", "", rule("down", "row", shape=[-1, [HIDDEN, HIDDEN]])),
    ),
    wrong(
        "two branches, plain row",
        lambda: LanguageModel(TwoBranches()),
        rules("a|b", "down"),
        "torch.cat([functional.gelu(self.a(x))",
    ),
    wrong(
        "input beside activation",
        lambda: LanguageModel(DenseBlock()),
        UP_DOWN,
        "torch.cat([x, functional.gelu(self.up(x))]",
    ),
    wrong(
        "SwiGLU by chunk, interleaved shape",
        lambda: LanguageModel(ChunkedGlu()),
        rules("up", "down", shape=[-1, -1]),
        "self.up(x).chunk(2, dim=-1)",
    ),
    wrong(
        "SwiGLU by chunk, no shape",
        lambda: LanguageModel(ChunkedGlu()),
        UP_DOWN,
        "self.up(x).chunk(2, dim=-1)",
        refused=True,
    ),
    wrong(
        "gate and value in turns, parts in the shape",
        lambda: LanguageModel(InterleavedGlu()),
        rules("up", "down", shape=[2, -1]),
        "functional.silu(both[..., ::2])",
    ),
    wrong(
        "layer norm without weights",
        lambda: LanguageModel(LayerNormNoAffine()),
        UP_DOWN,
        "functional.layer_norm(functional.gelu(h)",
    ),
    wrong("RMS norm", lambda: LanguageModel(RmsNorm()), UP_DOWN, "variance = h.pow(2).mean(-1"),
    wrong("norm module", lambda: LanguageModel(NormModule()), UP_DOWN, "functional.gelu(self.norm(h))"),
    wrong("softmax over features", lambda: LanguageModel(SoftmaxFeatures()), UP_DOWN, "functional.softmax(h, dim=-1)"),
    wrong("top-k over features", lambda: LanguageModel(TopK()), UP_DOWN, "h.topk(8, dim=-1)"),
    wrong("gate of the mean over features", lambda: LanguageModel(MeanGate()), UP_DOWN, "torch.sigmoid(h.mean(-1"),
    wrong("flip over features", lambda: LanguageModel(FlipFeatures()), UP_DOWN, "h.flip(-1)"),
    wrong("roll over features", lambda: LanguageModel(RollFeatures()), UP_DOWN, "torch.roll(h, shifts=1, dims=-1)"),
    wrong("shift over features", lambda: LanguageModel(ShiftFeatures()), UP_DOWN, "functional.pad(h, (1, -1))"),
    wrong("global response norm", lambda: LanguageModel(ResponseNorm()), UP_DOWN, "spread.mean(dim=-1"),
    wrong("cumsum over features", lambda: LanguageModel(CumulativeFeatures()), UP_DOWN, "h.cumsum(dim=-1)"),
    wrong("first features are linear", lambda: LanguageModel(FirstFeaturesLinear()), UP_DOWN, "h[..., :8]"),
    wrong("scale from the local size", lambda: LanguageModel(SizedScale()), UP_DOWN, "h.shape[-1] ** -0.5"),
    wrong("a slice of the input inside", lambda: LanguageModel(InputSliceInside()), UP_DOWN, "x[..., :width]"),
    wrong("channel shuffle", lambda: LanguageModel(ShuffledFeatures()), UP_DOWN, "h.unflatten(-1, (4, -1))"),
    wrong(
        "shared gain, its gradient partial",
        lambda: LanguageModel(SharedGain()),
        UP_DOWN,
        "functional.gelu(h) * self.gain",
    ),
    wrong("grid of the largest activation", lambda: LanguageModel(Quantized()), UP_DOWN, "h.abs().amax(dim=-1"),
    wrong("argmax over features", lambda: LanguageModel(OneHot()), UP_DOWN, "h.argmax(dim=-1)"),
)
