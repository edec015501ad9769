"""Nets in which the model around the layers is particular: losses, tied weights, hooks, experts, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.nets.features import Mlp
from tests.helpers.nets.frame import (
    HIDDEN,
    QKVO,
    UP_DOWN,
    VOCAB,
    WIDTH,
    LanguageModel,
    Net,
    next_token_loss,
    right,
    rule,
    rules,
    wrong,
)
from tests.helpers.nets.positions import Rope


class TiedLinear(LanguageModel):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.head.weight = self.embed.weight


class TiedByMatmul(LanguageModel):
    def forward(self, tokens: Tensor, **given: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return next_token_loss(self.norm(x) @ self.embed.weight.T, tokens)


class Parallel(nn.Module):
    """GPT-J's block: attention and MLP read the same norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Rope(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + self.mlp(x)


class Experts(nn.Module):
    """Four MLPs and a router that weighs the outputs of all."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        outputs = [expert(x) * weights[..., at, None] for at, expert in enumerate(self.experts)]
        return torch.stack(outputs).sum(0)


class SparseExperts(Experts):
    """Each token goes to its best two."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for at, expert in enumerate(self.experts):
            token, place = torch.where(chosen == at)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view_as(x)


class WeighedInside(nn.Module):
    """The router's weights are multiplied into activations, before ``down``."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        return self.down(self.first(x) * shares[..., :1] + self.second(x).relu() * shares[..., 1:])


class Loss(LanguageModel):
    """The language model's loss and ``more``, which is given what ``up`` and the blocks put out."""

    def __init__(self) -> None:
        super().__init__(Mlp())
        self.mlp: Mlp = self.layers[0]  # type: ignore[assignment]
        self.seen: list[Tensor] = []
        self.mlp.up.register_forward_hook(lambda module, args, out: self.seen.append(out))

    def forward(self, tokens: Tensor, **given: Tensor) -> Tensor:
        self.seen.clear()
        return super().forward(tokens) + 0.1 * self.more(self.seen, tokens)

    def more(self, activations: list[Tensor], tokens: Tensor) -> Tensor:
        raise NotImplementedError


class ActivationPenalty(Loss):
    def more(self, activations: list[Tensor], tokens: Tensor) -> Tensor:
        return torch.stack([h.pow(2).mean() for h in activations]).sum()


class LoadBalance(Loss):
    """A variance over features of how active they are."""

    def more(self, activations: list[Tensor], tokens: Tensor) -> Tensor:
        return activations[0].relu().mean((0, 1)).var()


class WeightPenalty(Loss):
    def more(self, activations: list[Tensor], tokens: Tensor) -> Tensor:
        return self.mlp.up.weight.norm()


class HeadPenalty(Loss):
    def more(self, activations: list[Tensor], tokens: Tensor) -> Tensor:
        return self.head.weight.pow(2).sum() + self.mlp.down.bias.abs().sum()


class Orthogonality(Loss):
    def more(self, activations: list[Tensor], tokens: Tensor) -> Tensor:
        gram = self.mlp.up.weight.T @ self.mlp.up.weight
        return (gram - torch.eye(WIDTH).to(gram)).pow(2).mean()


class AllParameters(Loss):
    def more(self, activations: list[Tensor], tokens: Tensor) -> Tensor:
        return torch.stack([p.abs().sum() for p in self.parameters()]).sum()


class HiddenLoss(Loss):
    """Something that is asked of what the blocks put out, which is replicated."""

    def more(self, activations: list[Tensor], tokens: Tensor) -> Tensor:
        hidden = self.mlp(self.embed(tokens))
        return (hidden[:, 1:] - hidden[:, :-1]).pow(2).mean()


class MapEntropy(nn.Module):
    """Asks the attention maps of ``layer`` to be sharp."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LanguageModel(Rope())
        self.maps: list[Tensor] = []
        self.model.layers[0].biased = self.kept  # type: ignore[assignment]

    def kept(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        self.maps.append(scores.softmax(-1))
        return scores

    def forward(self, tokens: Tensor) -> Tensor:
        self.maps.clear()
        loss: Tensor = self.model(tokens)
        entropy = -(self.maps[0] * self.maps[0].log()).sum(-1)
        return loss + 0.1 * entropy.mean()


class Classifier(nn.Module):
    """A class for each row, of logits that stay sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, HIDDEN)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1)
        x = x + self.down(self.up(x).relu())
        logits = self.head(x)
        return functional.cross_entropy(logits, tokens[:, 0] % 16)


class Autoencoder(nn.Module):
    """Decodes by the transpose of what it encodes with."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.embed = nn.Embedding(VOCAB, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        codes = self.mlp.up(x).relu()
        decoded = functional.linear(codes, self.mlp.up.weight.t())
        return (decoded - x).pow(2).mean() + self.mlp(x).pow(2).mean()


class TiedLayers(LanguageModel):
    """Two MLPs with one ``up`` weight."""

    def __init__(self) -> None:
        super().__init__(Mlp(), Mlp())
        first, second = self.layers
        second.up.weight = first.up.weight  # type: ignore[union-attr]


def shared_layers() -> LanguageModel:
    """ALBERT's: one block, three times."""
    block = Parallel()
    return LanguageModel(block, block, block)


def standardized(layer: str, change: Callable[[nn.Module, Any], None]) -> LanguageModel:
    """A model whose weights are changed by a pre-hook of the layer of that name."""
    block = Parallel()
    block.get_submodule(layer).register_forward_pre_hook(change)
    return LanguageModel(block)


@torch.no_grad()
def center_rows(module: nn.Module, args: Any) -> None:
    weight = module.weight
    weight.sub_(weight.mean(1, keepdim=True))  # type: ignore[operator]


def halve(module: nn.Module, args: Any) -> None:
    module.weight.data.mul_(0.5)  # type: ignore[operator]


@torch.no_grad()
def halve_seen(module: nn.Module, args: Any) -> None:
    module.weight.mul_(0.5)  # type: ignore[operator]


class Conv(nn.Module):
    """Mixes neighbouring tokens before an MLP, and channels by a 1x1 convolution behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.mlp = Mlp()
        self.point = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(self.mix(x.transpose(1, 2)).transpose(1, 2))
        return self.point(x.transpose(1, 2)).transpose(1, 2)


class DepthwiseInside(Mlp):
    """A kernel for each channel, of the first of which a rank takes as many as it has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(HIDDEN, 1, 3))

    def between(self, h: Tensor) -> Tensor:
        channels = h.shape[-1]
        out = functional.conv1d(h.transpose(1, 2), self.kernel[:channels], padding=1, groups=channels)
        return out.transpose(1, 2)


class SmoothInside(Mlp):
    """One kernel, which is not learned, for all channels."""

    def between(self, h: Tensor) -> Tensor:
        kernel = torch.tensor([0.25, 0.5, 0.25]).to(h).expand(h.shape[-1], 1, 3)
        return functional.conv1d(h.transpose(1, 2), kernel, padding=1, groups=h.shape[-1]).transpose(1, 2)


class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = Mlp(), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mlp(x).transpose(1, 2)).transpose(1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.squeeze, self.excite = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        return h * self.excite(self.squeeze(h.mean(1, keepdim=True)).relu()).sigmoid()


class ExciteInside(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(HIDDEN, 4), nn.Linear(4, HIDDEN)

    def between(self, h: Tensor) -> Tensor:
        pooled = h.mean(1, keepdim=True)
        return h * self.excite(self.squeeze(pooled).relu()).sigmoid()


class ShiftBefore(nn.Module):
    """RWKV's: half of the features come from the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.mix = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        shifted = functional.pad(x, (0, 0, 1, -1))
        return self.mlp(x * self.mix + shifted * (1 - self.mix))


BOTH = rules("q|k|v|up", "o|down")
VOCABULARY = rules("up", "down", rule("embed", "row"), rule("head", "column", gather_output=True))
INSIDE = rules("first|second", "down")
INSIDE_SUMMED = rules("first|second", "down", rule("router", "skip", partial_outputs=2))

NETS: tuple[Net, ...] = (
    right("vocabulary cut, tied head", lambda: TiedLinear(Mlp()), VOCABULARY),
    right("vocabulary cut, head of its own", lambda: LanguageModel(Mlp()), VOCABULARY),
    right("attention beside MLP", lambda: LanguageModel(Parallel()), BOTH),
    right("experts in a list", lambda: LanguageModel(Experts()), UP_DOWN),
    right("sparse experts in a list", lambda: LanguageModel(SparseExperts()), UP_DOWN),
    right("router inside with partial_outputs", lambda: LanguageModel(WeighedInside()), INSIDE_SUMMED),
    right("penalty of replicated weights", HeadPenalty, UP_DOWN),
    right("loss of hidden states", HiddenLoss, UP_DOWN),
    right("tied layers", TiedLayers, UP_DOWN),
    right("shared blocks", shared_layers, BOTH),
    right("convolutions around", lambda: LanguageModel(Conv()), UP_DOWN),
    right("fixed convolution of channels inside", lambda: LanguageModel(SmoothInside()), UP_DOWN),
    right("batch norm behind", lambda: LanguageModel(BatchNorm()), UP_DOWN),
    right("squeeze and excite behind", lambda: LanguageModel(SqueezeExcite()), UP_DOWN),
    right("token shift before", lambda: LanguageModel(ShiftBefore()), UP_DOWN),
    wrong("tied head by matmul", lambda: TiedByMatmul(Mlp()), VOCABULARY, "self.norm(x) @ self.embed.weight.T"),
    wrong(
        "router inside, its gradient partial",
        lambda: LanguageModel(WeighedInside()),
        INSIDE,
        "self.first(x) * shares[..., :1]",
    ),
    wrong("penalty of activations", ActivationPenalty, UP_DOWN, "h.pow(2).mean() for h in activations"),
    wrong("variance of activations", LoadBalance, UP_DOWN, "activations[0].relu().mean((0, 1)).var()"),
    wrong("penalty of a sharded weight", WeightPenalty, UP_DOWN, "self.mlp.up.weight.norm()"),
    wrong("orthogonality of a sharded weight", Orthogonality, UP_DOWN, "(gram - torch.eye(WIDTH).to(gram)).pow(2)"),
    wrong("penalty of all parameters", AllParameters, UP_DOWN, "p.abs().sum() for p in self.parameters()"),
    wrong("entropy of attention maps", MapEntropy, QKVO, "loss + 0.1 * entropy.mean()"),
    wrong(
        "sharded logits", Classifier, rules("up|head", "down"), "functional.cross_entropy(logits, tokens[:, 0] % 16)"
    ),
    wrong("transpose of a sharded weight", Autoencoder, UP_DOWN, "functional.linear(codes, self.mlp.up.weight.t())"),
    wrong(
        "rows centered by a pre-hook",
        lambda: standardized("mlp.down", center_rows),
        BOTH,
        "weight.sub_(weight.mean(1, keepdim=True))",
    ),
    wrong(
        "a column of a group halved by a pre-hook",
        lambda: standardized("attention.k", halve),
        BOTH,
        "module.weight.data.mul_(0.5)",
    ),
    wrong(
        "a column of a group halved where autograd sees it",
        lambda: standardized("attention.k", halve_seen),
        BOTH,
        "module.weight.mul_(0.5)",
    ),
    wrong(
        "convolution of the first channels", lambda: LanguageModel(DepthwiseInside()), UP_DOWN, "self.kernel[:channels]"
    ),
    wrong(
        "squeeze and excite inside",
        lambda: LanguageModel(ExciteInside()),
        UP_DOWN,
        "self.excite(self.squeeze(pooled).relu())",
    ),
)
