"""What random nets are made of: parts that read and make ``[B, S, width]``, with choices that a seed makes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Op = Callable[[Tensor, int], Tensor]
"""Changes ``[B, S, F]``; the number is the size of a group of neighbouring features."""


def _in_groups(change: Callable[[Tensor], Tensor]) -> Op:
    return lambda x, group: change(x.unflatten(-1, (-1, group))).flatten(-2)


def _swapped(x: Tensor, group: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


OPS: dict[str, Op] = {
    "gelu": lambda x, group: F.gelu(x),
    "silu": lambda x, group: F.silu(x),
    "tanh": lambda x, group: x.tanh(),
    "scaled": lambda x, group: x * 0.7 + 0.1,
    "gated by itself": lambda x, group: x * x.sigmoid(),
    "in fp32": lambda x, group: x.float().exp().clamp(max=3).to(x.dtype),
    "tokens shifted": lambda x, group: x + F.pad(x, (0, 0, 1, -1)),
    "tokens flipped": lambda x, group: x.flip(1),
    "tokens summed up": lambda x, group: x.cumsum(1) / 4,
    "mean of tokens": lambda x, group: x - x.mean(1, keepdim=True),
    "softmax of tokens": lambda x, group: x.softmax(1) * 4,
    "softmax of groups": _in_groups(lambda x: x.softmax(-1) * 2),
    "norm of groups": _in_groups(lambda x: F.layer_norm(x, x.shape[-1:])),
    "groups flipped inside": _in_groups(lambda x: x.flip(-1)),
    "largest of groups": _in_groups(lambda x: x - x.amax(-1, keepdim=True)),
    "where positive": lambda x, group: torch.where(x > 0.1, x, 0.2 * x),
    "largest two of groups": _in_groups(lambda x: x * (x >= x.topk(2, -1).values[..., -1:])),
    "every group twice": _in_groups(lambda x: x.repeat_interleave(2, -2)[..., ::2, :]),
}
"""Those that a cut of whole groups of features leaves right."""

MIXING: dict[str, Op] = {
    "softmax of features": lambda x, group: x.softmax(-1) * 4,
    "norm of features": lambda x, group: F.layer_norm(x, x.shape[-1:]),
    "mean of features": lambda x, group: x - x.mean(-1, keepdim=True),
    "features flipped": lambda x, group: x.flip(-1),
    "features rolled": lambda x, group: x.roll(1, -1),
    "features summed up": lambda x, group: x.cumsum(-1) / 4,
    "by number of features": lambda x, group: x / x.shape[-1] ** 0.5,
    "halves swapped": _swapped,
    "largest feature": lambda x, group: x - x.amax(-1, keepdim=True),
    "groups flipped": _in_groups(lambda x: x.flip(-2)),
    "mean of groups": _in_groups(lambda x: x - x.mean(-2, keepdim=True)),
    "first half only": lambda x, group: torch.cat([x[..., : x.shape[-1] // 2] * 2, x[..., x.shape[-1] // 2 :]], -1),
    "a little of the mean": lambda x, group: x + 0.02 * x.mean(-1, keepdim=True),
    "largest three": lambda x, group: x * (x >= x.topk(3, -1).values[..., -1:]),
    "twice if wide": lambda x, group: x * 2 if x.shape[-1] > 18 else x,
    "all alike": lambda x, group: x * x.square().mean().rsqrt(),
}
"""Those that see across the cut."""


class Between(nn.Module):
    """Ops one after the other, and a gain of one of some shapes."""

    def __init__(self, draw: Random, features: int, group: int) -> None:
        super().__init__()
        self.group = group
        self.ops = [
            draw.choice(sorted(MIXING if draw.random() < 0.07 else OPS)) for _ in range(draw.choice([0, 1, 1, 2, 3]))
        ]
        self.form = draw.choice(["none"] * 13 + ["one", "group", "group norm"] * 2 + ["all"])
        if self.form in ("one", "group", "all"):
            size = {"one": 1, "group": group, "all": features}[self.form]
            self.gain = nn.Parameter(1 + 0.3 * torch.randn(size))
        elif self.form == "group norm":
            self.norm = nn.LayerNorm(group)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.ops:
            x = {**OPS, **MIXING}[name](x, self.group)
        if self.form == "group":
            x = (x.unflatten(-1, (-1, self.group)) * self.gain).flatten(-2)
        elif self.form == "group norm":
            x = self.norm(x.unflatten(-1, (-1, self.group))).flatten(-2)
        elif self.form != "none":
            x = x * self.gain
        return x


class Feed(nn.Module):
    """One to three column linears, or a packed one, joined in some way; what is between; a row linear."""

    def __init__(self, draw: Random, width: int) -> None:
        super().__init__()
        group = draw.choice([2, 3, 4, 5])
        inner = group * draw.choice([4, 4, 6, 6, 8, 12, 5, 7])
        self.join = draw.choice(["one", "one", "times", "plus", "glu", "split", "view", "cat"])
        self.packed = self.join in ("glu", "split", "view")
        bias = draw.random() < 0.6
        if self.packed:
            self.up = nn.Linear(width, 2 * inner, bias=bias)
        else:
            self.up = nn.Linear(width, inner, bias=bias)
        if self.join in ("times", "plus", "cat"):
            self.gate = nn.Linear(width, inner, bias=bias)
        self.between = Between(draw, inner * (2 if self.join == "cat" else 1), group)
        self.down = nn.Linear(inner * (2 if self.join == "cat" else 1), width, bias=draw.random() < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.join == "glu":
            up = F.glu(up)
        elif self.join == "split":
            first, second = up.split(up.shape[-1] // 2, dim=-1)
            up = first * second.tanh()
        elif self.join == "view":
            first, second = up.unflatten(-1, (2, -1)).unbind(-2)
            up = first * F.silu(second)
        elif self.join == "times":
            up = F.gelu(self.gate(x)) * up
        elif self.join == "plus":
            up = up + self.gate(x).sigmoid()
        elif self.join == "cat":
            up = torch.cat([up, self.gate(x)], dim=-1)
        return self.down(self.between(up))


class Attention(nn.Module):
    """Heads counted in some way, keys shared or not, separate projections or packed ones in two orders."""

    def __init__(self, draw: Random, width: int) -> None:
        super().__init__()
        self.size = draw.choice([2, 3, 4, 5])
        heads = draw.choice([4, 4, 4, 6, 6, 8, 12, 3])
        self.form = draw.choice(["separate", "separate", "separate", "packed", "by head", "view"])
        kv = heads // 2 if self.form == "separate" and heads % 2 == 0 and draw.random() < 0.3 else heads
        self.name = draw.choice(["num_heads", "n_head", "h", "amount", "-1", "-1", "-1", "-1"])
        if self.name != "-1":
            setattr(self, self.name, heads)
        self.groups = heads // kv
        self.causal = draw.random() < 0.5
        self.dim = 1 if draw.random() < 0.03 else -1  # a softmax over heads
        inner = heads * self.size
        bias = draw.random() < 0.5
        if self.form == "separate":
            self.q = nn.Linear(width, inner, bias=bias)
            self.k = nn.Linear(width, kv * self.size, bias=bias)
            self.v = nn.Linear(width, kv * self.size, bias=bias)
        else:
            self.qkv = nn.Linear(width, 3 * inner, bias=bias)
        self.norm_of = draw.choice(["none", "none", "none", "head", "all"])
        if self.norm_of != "none":
            self.q_norm = nn.LayerNorm(self.size if self.norm_of == "head" else inner)
        self.slopes: Tensor | nn.Parameter | None
        if draw.random() < 0.15:
            self.slopes = nn.Parameter(torch.rand(heads))
        else:
            self.register_buffer("slopes", torch.linspace(0.1, 1, heads) if draw.random() < 0.1 else None)
        self.between = Between(draw, inner, self.size)
        self.o = nn.Linear(inner, width, bias=draw.random() < 0.5)

    def heads_of(self, x: Tensor, keys: bool = False) -> Tensor:
        if self.name == "-1":
            shape = (*x.shape[:2], -1, self.size)
        else:
            count = getattr(self, self.name)
            shape = (*x.shape[:2], count // self.groups if keys else count, self.size)
        return x.view(shape).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        if self.form == "separate":
            q, k, v = self.q(x), self.k(x), self.v(x)
            if self.norm_of == "all":
                q = self.q_norm(q)
            q, k, v = self.heads_of(q), self.heads_of(k, True), self.heads_of(v, True)
            if self.groups > 1:
                k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        elif self.form == "packed":
            q, k, v = (self.heads_of(t) for t in self.qkv(x).chunk(3, dim=-1))
        elif self.form == "by head":
            q, k, v = self.qkv(x).view(b, s, -1, 3 * self.size).transpose(1, 2).chunk(3, dim=-1)
        else:
            q, k, v = self.qkv(x).view(b, s, 3, -1, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        if self.norm_of == "head":
            q = self.q_norm(q)
        scores = q @ k.transpose(-1, -2) * self.size**-0.5
        if self.slopes is not None:
            place = torch.arange(s, device=x.device)
            scores = scores - self.slopes[:, None, None] * (place[:, None] - place[None]).abs()
        if self.causal:
            scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1), -1e4)
        mixed = (scores.softmax(self.dim) @ v).transpose(1, 2).reshape(b, s, -1)
        return self.o(self.between(mixed))


class SequenceAttention(Attention):
    """Sequence parallelism knows by its argument that it mixes tokens."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class TokenMixer(nn.Module):
    """Never cut: it sees all tokens of a sequence, or it is wrong."""

    def __init__(self, draw: Random, width: int) -> None:
        super().__init__()
        self.kind = draw.choice(["convolution", "sum", "linear"])
        if self.kind == "convolution":
            self.conv = nn.Conv1d(width, width, 3, padding=1, groups=draw.choice([1, width]))
        elif self.kind == "linear":
            self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "convolution":
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        return x.cumsum(1) / 6 if self.kind == "sum" else self.mix(x)
