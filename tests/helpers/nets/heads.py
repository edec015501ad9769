"""Nets whose attentions know of their heads in different ways: by name, by constant, by order of features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.nets.frame import (
    HEAD_DIM,
    HEADS,
    QKVO,
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


def split_heads(x: Tensor, count: int) -> Tensor:
    """einops' ``rearrange(x, "b s (h d) -> b h s d", h=count)``."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def eight_heads(x: Tensor, count: int = 8) -> Tensor:
    b, s, width = x.shape
    return x.view(b, s, count, width // count).transpose(1, 2)


class HeadDim(Projections):
    head_dim = HEAD_DIM

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))


class NumHeads(Projections):
    def __init__(self, num_heads: int = HEADS, queries: int = WIDTH) -> None:
        super().__init__(queries, queries=queries)
        self.num_heads = num_heads
        self.head_dim = queries // num_heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.shaped(p(x)) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))

    def shaped(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)


class WidthOverHeads(Projections):
    """Both numbers of the division are a rank's own where they are known by name."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.embed_dim = HEADS, WIDTH

    def forward(self, x: Tensor) -> Tensor:
        size = self.embed_dim // self.num_heads
        q, k, v = (heads_of_size(p(x), size) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))


class SplitBySize(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.stack(p(x).split(HEAD_DIM, dim=-1), dim=1) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))


class HelperOfSize(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), HEAD_DIM) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))


class ShortName(Projections):
    def __init__(self) -> None:
        super().__init__()
        self.h = HEADS

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.h)
        k = split_heads(self.k(x), self.h)
        v = split_heads(self.v(x), self.h)
        return self.o(attend(q, k, v))


@dataclass
class Cfg:
    n_embd: int = WIDTH
    n: int = HEADS


class FromCfg(Projections):
    def __init__(self, cfg: Cfg) -> None:
        super().__init__(cfg.n_embd, queries=cfg.n_embd)
        self.cfg = cfg

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        shape = (b, s, self.cfg.n, -1)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))


class Constant(Projections):
    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).reshape(b, s, HEADS, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))


class Helper(Projections):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(attend(eight_heads(self.q(x)), eight_heads(self.k(x)), eight_heads(self.v(x))))


class Chunks(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.stack(p(x).chunk(HEADS, dim=-1), dim=1) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))


class HeadsInside(Projections):
    """``(d h)``: the features of a head are not side by side in q, k and v, but they are in what ``o`` reads."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, HEAD_DIM, -1).permute(0, 3, 1, 2) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))


class ConstantInside(Projections):
    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, HEADS).permute(0, 3, 1, 2) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v))


class SingleHead(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = q @ k.transpose(-1, -2) * WIDTH**-0.5
        return self.o(scores.softmax(-1) @ v)


class CosineBeforeHeads(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q = functional.normalize(self.q(x), dim=-1)
        k, v = self.k(x), self.v(x)
        return self.o(attend(*(heads_of_size(t, HEAD_DIM) for t in (q, k, v))))


class CosineAfterHeads(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), HEAD_DIM) for p in (self.q, self.k, self.v))
        return self.o(attend(functional.normalize(q, dim=-1), functional.normalize(k, dim=-1), v))


class MeanOverHeads(Projections):
    """All heads look where they do on average."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), HEAD_DIM) for p in (self.q, self.k, self.v))
        probabilities = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)
        shared = probabilities.mean(dim=1, keepdim=True)
        return self.o((shared @ v).transpose(1, 2).flatten(2))


class SoftmaxOverHeads(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), HEAD_DIM) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        return self.o((scores.softmax(dim=1) @ v).transpose(1, 2).flatten(2))


class WholeScale(Projections):
    """The scale is that of a head as all heads share the projection's width, which is a rank's own."""

    count = HEADS

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        scale = (q.shape[-1] // self.count) ** -0.5
        k, v = heads_of_size(self.k(x), HEAD_DIM), heads_of_size(self.v(x), HEAD_DIM)
        scores = heads_of_size(q, HEAD_DIM) @ k.transpose(-1, -2) * scale
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class LocalHeadsScale(Projections):
    """The count is a rank's own, as its name is known; the width is not."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.features = HEADS, WIDTH

    def forward(self, x: Tensor) -> Tensor:
        size = self.features // self.num_heads
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / size**0.5
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Sdpa(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), HEAD_DIM) for p in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class Einsum(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)) for p in (self.q, self.k, self.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
        return self.o(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


class EinsumConstant(Projections):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)) for p in (self.q, self.k, self.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
        return self.o(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


class Bmm(Projections):
    """Heads and rows in one dim, as fairseq has them."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (heads_of_size(p(x), HEAD_DIM).reshape(-1, s, HEAD_DIM) for p in (self.q, self.k, self.v))
        weights = torch.bmm(q, k.transpose(1, 2)).mul(0.5).softmax(-1)
        return self.o(torch.bmm(weights, v).view(b, -1, s, HEAD_DIM).transpose(1, 2).reshape(b, s, -1))


class BmmConstant(Projections):
    """fairseq's ``view(b * heads, s, -1)`` of the tokens first."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).transpose(0, 1).reshape(s, b * HEADS, -1).transpose(0, 1) for p in (self.q, self.k, self.v))
        weights = torch.bmm(q, k.transpose(1, 2)).mul(0.5).softmax(-1)
        return self.o(torch.bmm(weights, v).transpose(0, 1).reshape(s, b, -1).transpose(0, 1))


def lm(layer: Callable[[], nn.Module]) -> LanguageModel:
    return LanguageModel(layer())


VALUES_ONLY = rules("v", "o", rule("q|k", "skip", partial_outputs=WIDTH))

NETS: tuple[Net, ...] = (
    right("heads by head_dim", lambda: lm(HeadDim), QKVO, sizes=(2, 3, 4)),
    right("heads as num_heads", lambda: lm(NumHeads), QKVO),
    right("six heads, uneven at four ranks", lambda: LanguageModel(NumHeads(6, 24)), QKVO, sizes=(2, 3, 4)),
    right("head size as embed_dim over num_heads", lambda: lm(WidthOverHeads), QKVO),
    right("heads by split of their size", lambda: lm(SplitBySize), QKVO),
    right("heads from a helper by their size", lambda: lm(HelperOfSize), QKVO),
    right("cosine of heads", lambda: lm(CosineAfterHeads), QKVO),
    right("sdpa, causal", lambda: lm(Sdpa), QKVO),
    right("einsum", lambda: lm(Einsum), QKVO),
    right("bmm", lambda: lm(Bmm), QKVO),
    right("(d h) with shape", lambda: lm(HeadsInside), rules("q|k|v", "o", shape=[HEAD_DIM, -1])),
    right("single head, values alone sharded", lambda: lm(SingleHead), VALUES_ONLY),
    wrong("heads as self.h", lambda: lm(ShortName), QKVO, "q = split_heads(self.q(x), self.h)"),
    wrong("heads as cfg.n", lambda: LanguageModel(FromCfg(Cfg())), QKVO, "p(x).view(shape)"),
    wrong("heads as a constant", lambda: lm(Constant), QKVO, "p(x).reshape(b, s, HEADS, -1)"),
    wrong("heads from a helper by their count", lambda: lm(Helper), QKVO, "x.view(b, s, count, width // count)"),
    wrong("heads by chunk", lambda: lm(Chunks), QKVO, "p(x).chunk(HEADS, dim=-1)"),
    wrong("(d h) with a plain rule", lambda: lm(HeadsInside), QKVO, "p(x).view(b, s, HEAD_DIM, -1).permute(0, 3"),
    wrong("(d h) with a constant", lambda: lm(ConstantInside), QKVO, "p(x).view(b, s, -1, HEADS)"),
    wrong("single head", lambda: lm(SingleHead), QKVO, "scores = q @ k.transpose(-1, -2) * WIDTH**-0.5"),
    wrong(
        "single head, gradients of q and k partial",
        lambda: lm(SingleHead),
        rules("v", "o", rule("q|k", "skip")),
        "q, k, v = self.q(x), self.k(x), self.v(x)",
    ),
    wrong("cosine of all features", lambda: lm(CosineBeforeHeads), QKVO, "functional.normalize(self.q(x), dim=-1)"),
    wrong("mean over heads", lambda: lm(MeanOverHeads), QKVO, "probabilities.mean(dim=1, keepdim=True)"),
    wrong("softmax over heads", lambda: lm(SoftmaxOverHeads), QKVO, "scores.softmax(dim=1)"),
    wrong("scale of a local width", lambda: lm(WholeScale), QKVO, "scale = (q.shape[-1] // self.count) ** -0.5"),
    wrong("scale of a local count", lambda: lm(LocalHeadsScale), QKVO, "size = self.features // self.num_heads"),
    wrong("einsum with a constant", lambda: lm(EinsumConstant), QKVO, "p(x).unflatten(-1, (HEADS, -1)) for p"),
    wrong("bmm with a constant", lambda: lm(BmmConstant), QKVO, "reshape(s, b * HEADS, -1)"),
)
