"""Nets whose attentions have packed projections or fewer key heads than query heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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

KEYS = WIDTH // 2


class Packed(nn.Module):
    """q, k and v in one linear; how they lie in it is its subclasses' affair."""

    def __init__(self, keys: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * keys)
        self.o = nn.Linear(WIDTH, WIDTH)


class ByChunk(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.o(attend(*(heads_of_size(t, HEAD_DIM) for t in (q, k, v))))


class BySplit(Packed):
    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x)
        q, k, v = packed.split(packed.shape[-1] // 3, dim=-1)
        return self.o(attend(*(heads_of_size(t, HEAD_DIM) for t in (q, k, v))))


class ByView(Packed):
    """timm's ``reshape(B, N, 3, heads, head_dim).permute(2, 0, 3, 1, 4)``."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, -1, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
        return self.o(attend(q, k, v))


class ByHead(Packed):
    """Head by head: its q, its k, its v."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        each = self.qkv(x).view(b, s, -1, 3 * HEAD_DIM).transpose(1, 2)
        q, k, v = each.chunk(3, dim=-1)
        return self.o(attend(q, k, v))


class UnequalParts(Packed):
    """Multi-query groups: q is twice as wide as k and v."""

    def __init__(self) -> None:
        super().__init__(KEYS)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x)
        unit = packed.shape[-1] // 4
        q, k, v = (heads_of_size(t, HEAD_DIM) for t in packed.split([2 * unit, unit, unit], dim=-1))
        return self.o(attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


class GroupsInterleaved(Packed):
    """Falcon's order: the query heads of a key head, the key, the value."""

    def __init__(self) -> None:
        super().__init__(KEYS)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        groups = self.qkv(x).view(b, s, -1, 4, HEAD_DIM)
        q = groups[..., :2, :].flatten(2, 3).transpose(1, 2)
        k, v = (groups[..., at, :].transpose(1, 2).repeat_interleave(2, 1) for at in (2, 3))
        return self.o(attend(q, k, v))


class Gpt2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(3 * WIDTH, WIDTH)
        self.c_proj = Conv1D(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split(self.c_attn(x).size(-1) // 3, dim=2)
        return self.c_proj(attend(*(heads_of_size(t, HEAD_DIM) for t in (q, k, v))))


class Gpt2Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = Conv1D(2 * WIDTH, WIDTH)
        self.c_out = Conv1D(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_out(torch.tanh(self.c_fc(x)))


class Interleaved(Projections):
    """Neighbouring query heads share a key head."""

    def __init__(self) -> None:
        super().__init__(KEYS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), HEAD_DIM) for p in (self.q, self.k, self.v))
        times = q.shape[1] // k.shape[1]
        return self.o(attend(q, k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)))


class Expanded(Projections):
    """Llama's ``repeat_kv``."""

    def __init__(self) -> None:
        super().__init__(KEYS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), HEAD_DIM) for p in (self.q, self.k, self.v))
        return self.o(attend(q, repeat_kv(k, 2), repeat_kv(v, 2)))


def repeat_kv(x: Tensor, times: int) -> Tensor:
    b, heads, s, d = x.shape
    return x[:, :, None].expand(b, heads, times, s, d).reshape(b, heads * times, s, d)


class Grouped(Projections):
    """Query heads in a dim of their own beside the key heads, which are broadcast."""

    def __init__(self) -> None:
        super().__init__(KEYS)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, -1, 2, HEAD_DIM).permute(0, 2, 3, 1, 4)
        k, v = (heads_of_size(p(x), HEAD_DIM).unsqueeze(2) for p in (self.k, self.v))
        probabilities = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.o((probabilities @ v).permute(0, 3, 1, 2, 4).flatten(2))


class Tiled(Projections):
    """Key heads repeated as a whole: query head i reads key head i modulo their number."""

    def __init__(self) -> None:
        super().__init__(KEYS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), HEAD_DIM) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)))


class TiledByCat(Projections):
    def __init__(self) -> None:
        super().__init__(KEYS)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.k(x), self.v(x)
        k, v = torch.cat([k, k], dim=-1), torch.cat([v, v], dim=-1)
        return self.o(attend(*(heads_of_size(t, HEAD_DIM) for t in (self.q(x), k, v))))


class SharedOut(Projections):
    """Multi-query: one key head for all query heads."""

    def __init__(self) -> None:
        super().__init__(HEAD_DIM)
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, 1, HEAD_DIM

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), self.head_dim) for p in (self.q, self.k, self.v))
        k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
        return self.o(attend(q, k, v))


class FullCountOfKeys(Projections):
    """The group size is that of the full model, but a rank that shares key heads has fewer query heads to each."""

    def __init__(self) -> None:
        super().__init__(2 * HEAD_DIM)
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, 2, HEAD_DIM
        self.times = HEADS // 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(p(x), self.head_dim) for p in (self.q, self.k, self.v))
        q = q.unflatten(1, (-1, self.times))
        probabilities = (q @ k.transpose(-1, -2).unsqueeze(2)).softmax(-1)
        return self.o((probabilities @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2).flatten(2))


PLAIN_MQA = rules("q", "o", rule("k|v", "skip"))
SUMMED_MQA = rules("q", "o", rule("k|v", "skip", partial_outputs=HEAD_DIM))
PARTS = [[WIDTH, KEYS, KEYS], -1]
TILED = rules(
    "", "", rule("q", "column", shape=[2, -1]), rule("k|v", "column"), rule("o", "row", shape=[-1, [KEYS, KEYS]])
)


def lm(layer: type[nn.Module]) -> LanguageModel:
    return LanguageModel(layer())


NETS: tuple[Net, ...] = (
    right("packed by chunk", lambda: lm(ByChunk), rules("qkv", "o", shape=[3, -1])),
    right("packed by split", lambda: lm(BySplit), rules("qkv", "o", shape=[3, -1])),
    right("packed by view, as timm", lambda: lm(ByView), rules("qkv", "o", shape=[3, -1])),
    right("packed head by head", lambda: lm(ByHead), rules("qkv", "o", shape=[-1, -1])),
    right("packed in unequal parts", lambda: lm(UnequalParts), rules("qkv", "o", shape=PARTS)),
    right("packed by groups", lambda: lm(GroupsInterleaved), rules("qkv", "o", shape=[-1, -1])),
    right(
        "Conv1D",
        lambda: LanguageModel(Gpt2(), Gpt2Mlp()),
        rules("c_fc", "c_proj|c_out", rule("c_attn", "column", shape=[3, -1])),
    ),
    right("grouped keys, repeat_interleave", lambda: lm(Interleaved), QKVO),
    right("grouped keys, expand", lambda: lm(Expanded), QKVO),
    right("grouped keys, broadcast", lambda: lm(Grouped), QKVO),
    right("one key head for all, known by name", lambda: lm(SharedOut), QKVO),
    right("one key head for all, replicated", lambda: lm(SharedOut), SUMMED_MQA),
    right("tiled keys with shape", lambda: lm(Tiled), TILED),
    wrong(
        "packed by chunk, rule for heads",
        lambda: lm(ByChunk),
        rules("qkv", "o", shape=[-1, -1]),
        "self.qkv(x).chunk(3, dim=-1)",
    ),
    wrong(
        "packed by chunk, no shape",
        lambda: lm(ByChunk),
        rules("qkv", "o"),
        "self.qkv(x).chunk(3, dim=-1)",
        refused=True,
    ),
    wrong(
        "packed by view, rule for heads",
        lambda: lm(ByView),
        rules("qkv", "o", shape=[-1, -1]),
        "self.qkv(x).reshape(b, s, 3, -1, HEAD_DIM)",
    ),
    wrong(
        "packed head by head, rule for parts",
        lambda: lm(ByHead),
        rules("qkv", "o", shape=[3, -1]),
        "self.qkv(x).view(b, s, -1, 3 * HEAD_DIM)",
    ),
    wrong(
        "packed, parts in another order",
        lambda: lm(UnequalParts),
        rules("qkv", "o", shape=[[KEYS, KEYS, WIDTH], -1]),
        "packed.split([2 * unit, unit, unit]",
    ),
    wrong(
        "packed by groups, rule for parts",
        lambda: lm(GroupsInterleaved),
        rules("qkv", "o", shape=PARTS),
        "self.qkv(x).view(b, s, -1, 4, HEAD_DIM)",
    ),
    wrong("tiled keys", lambda: lm(Tiled), QKVO, "k.repeat(1, 2, 1, 1)"),
    wrong("tiled keys by cat", lambda: lm(TiledByCat), QKVO, "torch.cat([k, k], dim=-1)"),
    wrong("tiled rules for neighbouring heads", lambda: lm(Interleaved), TILED, "k.repeat_interleave(times, dim=1)"),
    wrong(
        "one key head for all, its gradient partial",
        lambda: lm(SharedOut),
        PLAIN_MQA,
        "t.expand(-1, q.shape[1], -1, -1)",
    ),
    wrong(
        "group size of the full model",
        lambda: lm(FullCountOfKeys),
        QKVO,
        "q.unflatten(1, (-1, self.times))",
        sizes=(4,),
    ),
)
