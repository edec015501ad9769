"""Experts in all ways, weights that are made by a net, and nets without attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.derivation.models.attention import Heads
from tests.derivation.models.frame import (
    CLASSES,
    HIDDEN,
    WIDTH,
    Decoder,
    FeedForward,
    frame_batch,
    model,
    vector_batch,
)

EXPERTS = 4


class ExpertsInALoop(nn.Module):
    """Mixtral's: each expert gets the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(FeedForward() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for at, expert in enumerate(self.experts):
            token, place = torch.where(chosen == at)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view_as(x)


class ExpertsByMask(ExpertsInALoop):
    """All experts get all tokens, and are masked."""

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.gate(x).softmax(-1)
        best = probabilities.topk(2, dim=-1).indices
        weights = torch.zeros_like(probabilities).scatter(-1, best, 1.0) * probabilities
        out = torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            out = out + expert(x) * weights[..., at, None]
        return out


class ExpertsInStacks(nn.Module):
    """Switch's: parameters [experts, in, out], bmm over experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.2)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights = self.router(flat).softmax(-1)
        hidden = functional.gelu(torch.bmm(flat.expand(EXPERTS, -1, -1), self.w1))
        out = torch.bmm(hidden, self.w2) * weights.t()[..., None]
        return out.sum(0).view_as(x)


class ExpertsByEinsum(ExpertsInStacks):
    """The same with einsum, gated, and with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.w3 = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.2)
        self.b1 = nn.Parameter(torch.randn(EXPERTS, 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        gate = functional.silu(torch.einsum("bsd,edf->ebsf", x, self.w1) + self.b1[:, None])
        hidden = gate * torch.einsum("bsd,edf->ebsf", x, self.w3)
        return torch.einsum("ebsd,bse->bsd", torch.einsum("ebsf,efd->ebsd", hidden, self.w2), weights)


class SoftExperts(ExpertsInStacks):
    """Soft MoE: slots are mixtures of tokens, tokens are mixtures of slots."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(WIDTH, EXPERTS, 2))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bsd,dep->bsep", x, self.slots)
        dispatch, combine = logits.softmax(1), logits.flatten(2).softmax(-1).view_as(logits)
        slots = torch.einsum("bsd,bsep->ebpd", x, dispatch).flatten(1, 2)
        made = torch.bmm(functional.gelu(torch.bmm(slots, self.w1)), self.w2).unflatten(1, (len(x), 2))
        return torch.einsum("ebpd,bsep->bsd", made, combine)


class SoftExpertsInALoop(ExpertsInALoop):
    """Soft MoE with modules."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(EXPERTS, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bsd,epd->bsep", x, self.slots)
        dispatch, combine = logits.softmax(1), logits.flatten(2).softmax(-1)
        slots = torch.einsum("bsd,bsep->bepd", x, dispatch)
        made = torch.stack([expert(slots[:, at]) for at, expert in enumerate(self.experts)], dim=1)
        return combine @ made.flatten(1, 2)


class Shared(ExpertsInALoop):
    """DeepSeek's: a shared expert besides, and a bias by which experts are chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = FeedForward()
        self.register_buffer("bias", torch.linspace(-0.1, 0.1, EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        scores = self.gate(flat).sigmoid()
        chosen = (scores + self.bias).topk(2, dim=-1).indices
        weights = scores.gather(1, chosen)
        out = torch.zeros_like(flat)
        for at, expert in enumerate(self.experts):
            rows, place = (chosen == at).nonzero(as_tuple=True)
            out[rows] += expert(flat[rows]) * (weights / weights.sum(-1, keepdim=True))[rows, place, None]
        made: Tensor = self.shared(x) + out.view_as(x)
        return made


class HyperNetwork(nn.Module):
    """A linear makes the weights of a layer for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 16))
        self.weights, self.out = nn.Linear(16, WIDTH * 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made = self.weights(self.body(x)).view(len(x), -1, WIDTH)
        hidden = torch.bmm(made, x[:, :, None]).squeeze(-1).relu()
        return functional.mse_loss(self.out(hidden), y)


class FiLM(nn.Module):
    """Hidden features are scaled and shifted by another net."""

    def __init__(self) -> None:
        super().__init__()
        self.film = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 2 * HIDDEN))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale, shift = self.film(x.flip(-1)).chunk(2, dim=-1)
        return functional.mse_loss(self.down((self.up(x) * scale + shift).relu()), y)


class RBF(nn.Module):
    """Distances to centres, then linears."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.centres = nn.Linear(WIDTH, HIDDEN), nn.Parameter(torch.randn(24, HIDDEN))
        self.log_width, self.out = nn.Parameter(torch.zeros(24) - 3), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        distance = (self.features(x)[:, None] - self.centres[None]).pow(2).sum(-1)
        return functional.mse_loss(self.out((-distance * self.log_width.exp()).exp()), y)


class Siamese(nn.Module):
    """One encoder for two sides; their similarity is what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.project = nn.Linear(HIDDEN, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = (functional.normalize(self.project(self.encoder(t)), dim=-1) for t in (x, x.flip(-1) * y.mean()))
        return functional.cross_entropy(a @ b.t() * 5.0, torch.arange(len(a), device=a.device))


class Bilinear(nn.Module):
    """Two towers whose hidden features are multiplied and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, HIDDEN), nn.Linear(CLASSES, HIDDEN)
        self.scores, self.out = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = self.left(x).tanh() * self.right(y).sigmoid()
        return functional.mse_loss(self.out(self.scores(both).relu()).squeeze(-1), y.sum(-1))


class Maxout(nn.Module):
    """The larger of two features, and groups that are normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(WIDTH, 128), nn.LayerNorm(8), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.up(x).unflatten(-1, (-1, 2)).amax(-1)
        return functional.mse_loss(self.down(self.norm(hidden.unflatten(-1, (-1, 8))).flatten(-2)), y)


class Pooled(nn.Module):
    """Frames are pooled by attention with learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.kv = nn.Parameter(torch.randn(8, 4)), nn.Linear(WIDTH, 2 * WIDTH)
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, -1, 4)).unbind(2)
        weights = torch.einsum("hd,bshd->bhs", self.query, k).softmax(-1)
        pooled = self.out(torch.einsum("bhs,bshd->bhd", weights, v).flatten(1))
        return functional.mse_loss(self.head(pooled.relu()), y.mean(1))


MODELS = (
    model("experts in a loop", lambda: Decoder(Heads, ExpertsInALoop), 0.52, 0.28, quick=True),
    model("experts by mask", lambda: Decoder(Heads, ExpertsByMask), 0.52, 0.28),
    model("experts in stacks", lambda: Decoder(Heads, ExpertsInStacks), 0.52, 0.27),
    model("experts by einsum", lambda: Decoder(Heads, ExpertsByEinsum), 0.51, 0.27),
    model("soft experts in stacks", lambda: Decoder(Heads, SoftExperts), 0.52, 0.28),
    model("soft experts in a loop", lambda: Decoder(Heads, SoftExpertsInALoop), 0.52, 0.28),
    model("a shared expert", lambda: Decoder(Heads, Shared), 0.52, 0.27),
    model("hyper-network", HyperNetwork, 0.51, 0.26, vector_batch),
    model("FiLM", FiLM, 0.52, 0.27, vector_batch),
    model("RBF", RBF, 0.71, 0.56, vector_batch),
    model("Siamese", Siamese, 0.51, 0.26, vector_batch),
    model("bilinear towers", Bilinear, 0.51, 0.27, vector_batch),
    model("maxout", Maxout, 0.51, 0.26, vector_batch),
    model("pooled by attention", Pooled, 0.51, 0.26, frame_batch),
)
