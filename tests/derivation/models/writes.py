"""Models whose sharded features are written at places that indices say, added to products, and normed by batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.derivation.models.frame import CLASSES, HIDDEN, TOKENS, WIDTH, frame_batch, image_batch, model, vector_batch

GROUPS = 4

Mix = Callable[[Tensor, Tensor], Tensor]
"""Of hidden features [B, S, H] and the group [S] of each place: others [B, S', H]."""


class Between(nn.Module):
    """Frames through a hidden layer, whose features are mixed over places by ``mix``, to the loss of frames."""

    group: Tensor

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.mix = mix
        self.register_buffer("group", torch.arange(TOKENS) * 5 % GROUPS)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mixed = self.mix(self.up(x).relu(), self.group)
        seen = self.down(mixed).mean(1, keepdim=True)
        return functional.mse_loss(self.head(x + seen), y)


def scattered_sum(hidden: Tensor, group: Tensor) -> Tensor:
    out = torch.zeros(len(hidden), GROUPS, hidden.shape[-1], dtype=hidden.dtype)
    return out.scatter_add(1, group[None, :, None].expand_as(hidden), hidden).tanh()


def scattered(hidden: Tensor, group: Tensor) -> Tensor:
    """Places in another order, over what was there."""
    order = group.argsort(stable=True)[None, :, None].expand_as(hidden)
    return hidden.scatter(1, order, hidden.sigmoid()) * hidden


def scattered_most(hidden: Tensor, group: Tensor) -> Tensor:
    out = hidden.new_zeros(len(hidden), GROUPS, hidden.shape[-1])
    return out.scatter_reduce(1, group[None, :, None].expand_as(hidden), hidden, "amax", include_self=False)


def messages(hidden: Tensor, group: Tensor) -> Tensor:
    """A graph net's: each place adds to those of the next group."""
    return hidden.index_add(1, (group + 1) % TOKENS, hidden * 0.5).tanh()


def copied(hidden: Tensor, group: Tensor) -> Tensor:
    return torch.zeros_like(hidden).index_copy(1, group.argsort(stable=True), hidden.square())


def put(hidden: Tensor, group: Tensor) -> Tensor:
    """Some places by their numbers, and some by a mask."""
    out = hidden.clone()
    out[:, group == 1] = hidden[:, group == 2].sigmoid()
    out[torch.arange(len(out)) % 2 == 0, 3] += 1.0
    return out


def added_by_index(hidden: Tensor, group: Tensor) -> Tensor:
    """Rows and places by two indices, added up."""
    rows = torch.arange(len(hidden))
    out = torch.zeros(GROUPS, len(hidden), hidden.shape[-1], dtype=hidden.dtype)
    for at in range(TOKENS):
        out.index_put_((group[at].expand(len(rows)), rows), hidden[:, at], accumulate=True)
    return out.transpose(0, 1).tanh()


class Graph(nn.Module):
    """A graph's adjacency times its nodes' features, added to them by addmm and baddbmm."""

    near: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.register_buffer("near", torch.eye(TOKENS).roll(1, 0) + 0.1)
        self.bias = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.up(x).tanh()
        near = self.near.to(hidden.dtype)
        single = torch.stack([torch.addmm(self.bias, near, one, beta=0.5) for one in hidden])
        both = torch.baddbmm(single, near.expand(len(x), -1, -1), hidden.sigmoid(), alpha=0.3)
        return functional.mse_loss(self.down(both.relu()), y)


class Bottleneck(nn.Module):
    """ResNet's: 1x1, 3x3 and 1x1 convolutions, each with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(WIDTH, HIDDEN, 1, bias=False), nn.BatchNorm2d(HIDDEN)
        self.conv2, self.bn2 = nn.Conv2d(HIDDEN, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (x + out).relu()


class BatchNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 4, 4), nn.BatchNorm2d(WIDTH)
        self.blocks = nn.Sequential(Bottleneck(), Bottleneck())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.stem(images)).relu())
        return functional.cross_entropy(self.head(x.mean((2, 3))), labels)


class NormedVectors(nn.Module):
    """A projection head as in contrastive learning; its last norm has no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()),
            *(nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN, affine=False, track_running_stats=False), nn.Tanh()),
            nn.Linear(HIDDEN, CLASSES),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.net(x), y)


MODELS = (
    model("scatter_add", lambda: Between(scattered_sum), 0.51, 0.26, frame_batch, quick=True),
    model("scatter", lambda: Between(scattered), 0.51, 0.26, frame_batch),
    model("scatter_reduce", lambda: Between(scattered_most), 0.51, 0.26, frame_batch),
    model("index_add", lambda: Between(messages), 0.51, 0.26, frame_batch, quick=True),
    model("index_copy", lambda: Between(copied), 0.51, 0.26, frame_batch),
    model("index_put", lambda: Between(put), 0.51, 0.26, frame_batch),
    model("index_put, added up", lambda: Between(added_by_index), 0.51, 0.26, frame_batch),
    model("addmm and baddbmm", Graph, 0.51, 0.26, frame_batch, quick=True),
    model("batch norms of images", BatchNorms, 0.51, 0.26, image_batch, quick=True),
    model("batch norms of vectors", NormedVectors, 0.51, 0.26, vector_batch),
)
