"""Nets whose layers use operators that are met less often, over tokens, features or heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.nets.features import Mlp
from tests.helpers.nets.frame import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    QKVO,
    UP_DOWN,
    WIDTH,
    LanguageModel,
    Net,
    Projections,
    attend,
    heads_of_size,
    right,
    rule,
    rules,
    wrong,
)


class NormedHeads(Projections):
    """Qwen3's: queries and keys of each head are normed by one shared norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), HEAD_DIM) for p in (self.q, self.k, self.v))
        return self.o(attend(self.q_norm(q), self.k_norm(k), v))


class NormedQueries(Projections):
    """OLMo2's: all query heads are normed together."""

    def forward(self, x: Tensor) -> Tensor:
        q = functional.layer_norm(self.q(x), self.q(x).shape[-1:])
        return self.o(attend(*(heads_of_size(t, HEAD_DIM) for t in (q, self.k(x), self.v(x)))))


class LinearAttention(Projections):
    """Keys and values are summed up over the tokens seen."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), HEAD_DIM) for p in (self.q, self.k, self.v))
        state = torch.einsum("bhsd,bhse->bhsde", functional.elu(k) + 1, v).cumsum(dim=2)
        return self.o(torch.einsum("bhsd,bhsde->bhse", functional.elu(q) + 1, state).transpose(1, 2).flatten(2))


class WholeState(Projections):
    """The same with one state of all features instead of one a head."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).sigmoid(), self.k(x).sigmoid(), self.v(x)
        state = torch.einsum("bsd,bse->bsde", k, v).cumsum(dim=1)
        out = torch.einsum("bsd,bsde->bse", q, state)
        return self.o(out)


class SharedKeys(nn.Module):
    """Two key heads for eight query heads, known by name; the group size is that of the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, 2, HEAD_DIM
        self.q_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, 2 * HEAD_DIM), nn.Linear(WIDTH, 2 * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        times = q.shape[1] // k.shape[1]
        return self.o_proj(attend(q, k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)))


class UnnamedHeads(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))


class Scan(Mlp):
    """A gated recurrence of each channel over tokens."""

    def between(self, h: Tensor) -> Tensor:
        state, states = torch.zeros_like(h[:, 0]), []
        for token in h.unbind(1):
            state = state * torch.sigmoid(token) + token.tanh()
            states.append(state)
        return torch.stack(states, dim=1)


class Recurrent(nn.Module):
    """A GRU, not sharded, before an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.mlp = nn.GRU(WIDTH, WIDTH, batch_first=True), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.gru(x)[0])


class TokenFourier(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return torch.fft.fft(h, dim=1).real


class FeatureFourier(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return torch.fft.fft(h, dim=-1).real


class LogSumExp(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return h - torch.logsumexp(h, dim=-1, keepdim=True)


class Sorted(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return h.sort(dim=-1).values


class Groups(Mlp):
    """GroupNorm without weights: a group of a rank is not one of the model."""

    def between(self, h: Tensor) -> Tensor:
        return functional.group_norm(h.flatten(0, 1), 8).view_as(h)


class LocalGroups(Mlp):
    """Groups by their size, which are whole on every rank."""

    def between(self, h: Tensor) -> Tensor:
        groups = h.unflatten(-1, (-1, 8))
        return functional.layer_norm(groups, (8,)).flatten(-2)


class Ramp(Mlp):
    def between(self, h: Tensor) -> Tensor:
        return h * torch.linspace(0, 1, h.shape[-1], device=h.device, dtype=h.dtype)


class FixedRamp(Mlp):
    ramp: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ramp", torch.linspace(0, 1, HIDDEN))

    def between(self, h: Tensor) -> Tensor:
        return h * self.ramp[: h.size(-1)]


class Window(Mlp):
    """The largest of three neighbouring features."""

    def between(self, h: Tensor) -> Tensor:
        return functional.max_pool1d(h, 3, stride=1, padding=1)


class FirstFeatureZero(Mlp):
    def between(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[..., 0] = 0
        return h


class FirstTokenZero(Mlp):
    def between(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[:, 0] = 0
        return h


class Standardized(Mlp):
    """Activations in units of their spread over the whole batch."""

    def between(self, h: Tensor) -> Tensor:
        return h / (h.std() + 1e-6)


class Affinity(Mlp):
    """Tokens are mixed by how alike their activations are."""

    def between(self, h: Tensor) -> Tensor:
        alike = torch.matmul(h, h.transpose(1, 2)) / HIDDEN
        return alike.softmax(-1) @ h


class Mixer(nn.Module):
    """MLP-Mixer's: one MLP over tokens, one over features."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.mlp(x)


class TokenMlpInside(Mlp):
    """An MLP over tokens between the two cuts: its weights see a rank's features only."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(12, 12)

    def between(self, h: Tensor) -> Tensor:
        return functional.gelu(self.tokens(h.transpose(1, 2)).transpose(1, 2))


class Encoder(nn.Module):
    """torch's own layer, of which the MLP is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Sequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU6(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class BareSequential(nn.Module):
    """With a softmax of its own between the linears."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Softmax(dim=-1), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def lm(layer: type[nn.Module]) -> LanguageModel:
    return LanguageModel(layer())


SUMMED = {"grad_allreduce": True}
NORMS = rules("q|k|v", "o", rule("q_norm|k_norm", "skip", **SUMMED))
TOKENS_SUMMED = rules("up", "down", rule("tokens", "skip", **SUMMED), rule(r".*\.tokens\.bias", "skip", **SUMMED))
FIRST_LAST = rules("", "", rule(r".*layers\.0\.layers\.0\.weight", "column"), rule(r".*layers\.2\.weight", "row"))
NAMED = rules("q_proj|k_proj|v_proj", "o_proj")
ANY = (2, 3, 4)

NETS: tuple[Net, ...] = (
    right("norm of each head with grad_allreduce", lambda: lm(NormedHeads), NORMS),
    right("linear attention by heads", lambda: lm(LinearAttention), QKVO),
    right("fewer key heads than ranks, three ranks", lambda: lm(SharedKeys), NAMED, sizes=ANY),
    right("scan over tokens", lambda: lm(Scan), UP_DOWN, sizes=ANY),
    right("GRU before", lambda: lm(Recurrent), UP_DOWN),
    right("fft over tokens", lambda: lm(TokenFourier), UP_DOWN),
    right("norm of groups by their size", lambda: lm(LocalGroups), UP_DOWN),
    right("first token zero", lambda: lm(FirstTokenZero), UP_DOWN),
    right("MLP over tokens before", lambda: lm(Mixer), UP_DOWN),
    right("MLP over tokens inside with grad_allreduce", lambda: lm(TokenMlpInside), TOKENS_SUMMED),
    right("TransformerEncoderLayer's MLP", lambda: lm(Encoder), rules("linear1", "linear2")),
    right("nn.Sequential", lambda: lm(Sequential), FIRST_LAST),
    wrong("softmax in nn.Sequential", lambda: lm(BareSequential), FIRST_LAST, "out: Tensor = self.layers(x)"),
    wrong(
        "norm of each head, its gradient partial",
        lambda: lm(NormedHeads),
        QKVO,
        "attend(self.q_norm(q), self.k_norm(k), v)",
    ),
    wrong(
        "norm of all query heads",
        lambda: lm(NormedQueries),
        QKVO,
        "functional.layer_norm(self.q(x), self.q(x).shape[-1:])",
    ),
    wrong("linear attention of all features", lambda: lm(WholeState), QKVO, "out = torch.einsum("),
    wrong(
        "heads that nobody knows, three ranks",
        lambda: lm(UnnamedHeads),
        QKVO,
        "p(x).unflatten(-1, (-1, HEAD_DIM))",
        sizes=(3,),
    ),
    wrong("fft over features", lambda: lm(FeatureFourier), UP_DOWN, "torch.fft.fft(h, dim=-1)"),
    wrong("logsumexp over features", lambda: lm(LogSumExp), UP_DOWN, "torch.logsumexp(h, dim=-1, keepdim=True)"),
    wrong("sort of features", lambda: lm(Sorted), UP_DOWN, "h.sort(dim=-1).values"),
    wrong("group norm by a count", lambda: lm(Groups), UP_DOWN, "functional.group_norm(h.flatten(0, 1), 8)"),
    wrong("ramp of a local width", lambda: lm(Ramp), UP_DOWN, "torch.linspace(0, 1, h.shape[-1]"),
    wrong("slice of a ramp", lambda: lm(FixedRamp), UP_DOWN, "self.ramp[: h.size(-1)]"),
    wrong("window over features", lambda: lm(Window), UP_DOWN, "functional.max_pool1d(h, 3, stride=1, padding=1)"),
    wrong("first feature zero", lambda: lm(FirstFeatureZero), UP_DOWN, "h[..., 0] = 0"),
    wrong("spread of all activations", lambda: lm(Standardized), UP_DOWN, "h / (h.std() + 1e-6)"),
    wrong("affinity of activations", lambda: lm(Affinity), UP_DOWN, "torch.matmul(h, h.transpose(1, 2))"),
    wrong(
        "MLP over tokens inside, its gradient partial",
        lambda: lm(TokenMlpInside),
        UP_DOWN,
        "self.tokens(h.transpose(1, 2)).transpose(1, 2)",
    ),
)
