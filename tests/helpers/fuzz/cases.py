"""Random nets with random rules and switches: a case of a seed is always the same."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp import cross_entropy
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.recipe.make_plan import make_plan
from tests.helpers.fuzz.layers import Attention, Feed, SequenceAttention, TokenMixer
from tests.helpers.truth import Batch, NotTrainableError, Trained, Trial, unsharded

ROWS, TOKENS = 5, 12


class Block(nn.Module):
    """A part with a norm before it or not, and a way around it or not."""

    def __init__(self, draw: Random, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if draw.random() < 0.7 else nn.Identity()
        kind = draw.choice([*[Feed] * 6, *[SequenceAttention] * 5, Attention, TokenMixer])
        self.part = kind(draw, width)
        self.around = draw.choice(["add", "add", "add", "none", "gate", "cat", "scale"])
        if self.around == "gate":
            self.open = nn.Linear(width, width)
        elif self.around == "cat":
            self.close = nn.Linear(2 * width, width)
        elif self.around == "scale":
            self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(self.norm(x))
        if self.around == "gate":
            return x + out * self.open(x).sigmoid()
        if self.around == "cat":
            return self.close(torch.cat([x, out], dim=-1))
        if self.around == "scale":
            return x + out * self.scale
        return x + out if self.around == "add" else out


class Net(nn.Module):
    """Tokens to a loss, through some blocks."""

    def __init__(self, draw: Random) -> None:
        super().__init__()
        width, vocab = draw.choice([12, 15, 16, 20, 21, 24]), draw.choice([17, 19, 24, 29, 32])
        self.embed = nn.Embedding(vocab, width)
        blocks = [Block(draw, width) for _ in range(draw.choice([1, 1, 1, 2, 2, 3]))]
        if draw.random() < 0.1:
            blocks.append(blocks[0])  # its parameters are used twice
        self.listed = draw.random() < 0.7
        if self.listed:
            self.blocks = nn.ModuleList(blocks)
        else:
            self.amount = len(blocks)
            for at, block in enumerate(blocks):
                self.add_module(f"block{at}", block)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=draw.random() < 0.3)
        if draw.random() < 0.3:
            self.lm_head.weight = self.embed.weight
        self.loss = draw.choice([*["torch"] * 5, *["ours"] * 5, "squares", "squares", "penalty", "penalty", "weights"])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks if self.listed else (getattr(self, f"block{at}") for at in range(self.amount)):
            x = block(x)
        logits = self.lm_head(self.norm(x))[:, :-1]
        target = tokens[:, 1:]
        if self.loss == "ours":
            return cross_entropy(logits, target, self.lm_head)
        if self.loss == "squares":
            return logits.square().mean()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        if self.loss == "weights":
            return loss + 0.001 * torch.stack([p.square().sum() for p in self.parameters()]).sum()
        return loss + 0.01 * x.square().mean() if self.loss == "penalty" else loss


@dataclass(frozen=True)
class Case:
    """A random case: what is tried, the training that is right, and the batch that it is proved with."""

    name: str
    trial: Trial
    want: Trained
    batch: Batch


def _noisy(model: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def _special(net: Net, draw: Random) -> None:
    """Parameters that are zero, one or frozen; no matrix of ones, whose features would be alike but for rounding."""
    for parameter in net.parameters():
        if draw.random() < 0.05:
            ones = draw.random() < 0.3 and parameter.ndim == 1
            nn.init.constant_(parameter, float(ones))
        if draw.random() < 0.05:
            parameter.requires_grad_(False)


def _rule(path: str, kind: str, **fields: Any) -> dict[str, Any]:
    return {"patterns": [rf"{path}$".replace(".", r"\.")], "partition_type": kind, **fields}


def _rules_of(path: str, part: nn.Module, draw: Random) -> list[dict[str, Any]]:
    """Rules as a user would write them, some of them with a mistake."""
    slip = lambda p=0.03: draw.random() < p  # noqa: E731 - short
    if isinstance(part, TokenMixer) or draw.random() < 0.08:
        return []
    gathered = draw.random() < 0.12
    found = []
    names = [n for n in ("q", "k", "v", "qkv", "up", "gate") if isinstance(getattr(part, n, None), nn.Linear)]
    parts = {"packed": 3, "view": 3} if isinstance(part, Attention) else dict.fromkeys(("glu", "split", "view"), 2)
    count = parts.get(part.form if isinstance(part, Attention) else str(part.join))
    for name in names:
        if slip(0.03):
            continue  # it is forgotten
        fields: dict[str, Any] = {}
        if count is not None and not slip(0.1) or count is None and slip(0.02):
            fields["shape"] = [count or 2, -1]
        if gathered != slip(0.03):
            fields["gather_output"] = True
        found.append(_rule(f"{path}.{name}.weight", "column", **fields))
    row = "o" if isinstance(part, Attention) else "down"
    fields = {"split_input": True} if gathered != slip(0.03) else {}
    if isinstance(part, Feed) and part.join == "cat" and not gathered and not slip(0.1):
        fields["shape"] = [-1, 2, part.down.in_features // 2][:2] if slip() else [-1, [part.down.in_features // 2] * 2]
    found.append(_rule(f"{path}.{row}.weight", "row", **fields))
    inside = [n for n, _ in part.named_parameters() if n.startswith(("between.", "q_norm"))]
    for name in inside:
        if not gathered and draw.random() < 0.5 or slip():
            found.append(_rule(f"{path}.{name}", "skip", grad_allreduce=True))
    return found


def case(seed: int) -> Case:
    """The case of a seed: the first net that trains, and whose rules are not refused when its plan is made."""
    for attempt in range(200):
        draw = Random(1000 * seed + attempt)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.randrange(2**31))
            net = Net(draw)
        _noisy(net, draw.randrange(2**31))
        _special(net, draw)
        size = draw.choice([2, 2, 2, 2, 3, 4])
        rules = []
        for path, block in net.named_modules():
            if isinstance(block, Block):
                rules += _rules_of(f"{path}.part", block.part, draw)
        tied = net.lm_head.weight is net.embed.weight
        head = draw.choice(["none", "none", "column", "column", "column", "row"])
        embed = draw.choice(["none", "none", "none", "row", "row", "column"])
        if head == "column":
            rules.append(_rule("lm_head.weight", "column", gather_output=True))
        elif head == "row":
            rules.append(_rule("lm_head.weight", "row", split_input=draw.random() < 0.95))
        if embed == "row" or tied and head == "column":
            rules.append(_rule("embed.weight", "row"))
        elif embed == "column" or tied and head == "row":
            rules.append(_rule("embed.weight", "column", gather_output=draw.random() < 0.95))
        if draw.random() < 0.05:
            rules.append(_rule("norm.weight", "skip", grad_allreduce=True))
        switches = {
            "sequence_parallel": net.listed and draw.random() < 0.25,
            "loss_parallel": head == "column" and net.loss != "squares" and draw.random() < 0.4,
            "tp_overlap_comm": draw.random() < 0.25,
        }
        net.to(draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
        config = {"partition_config": {"layer_specs": rules}, **switches}
        vocab = net.embed.num_embeddings
        try:
            loaded = TPTrainingConfig.load(config)
            plan = make_plan(net, loaded, size)
            trial = Trial(net, plan, loaded, _batches(vocab, ROWS, 3, seed=seed + 1), right=1e-5)
            want = unsharded(trial)
        except (ValueError, NotTrainableError):
            continue
        (batch,) = _batches(vocab, 4 if size == 3 else 3, 1, seed=seed + 10**6)
        on = [name for name, value in switches.items() if value]
        return Case(f"{seed} TP={size} {' '.join(on)}", trial, want, batch)
    raise AssertionError(f"seed {seed} gives no plan")


def _batches(vocab: int, rows: int, count: int, seed: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [{"tokens": torch.randint(vocab, (rows, TOKENS), generator=draw)} for _ in range(count)]
