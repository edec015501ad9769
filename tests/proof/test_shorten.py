"""Models with fewer blocks are judged as they are with all: no block that computes something else is left out."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.model_sources.hf import causal_types
from lightning_autotp.model_sources.small import NOT_RUNNABLE, SWEEP, small_config, small_model
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.proof import dataflow_proof, prover
from lightning_autotp.proof.dataflow_proof import prove_flow
from lightning_autotp.proof.shorten import fewer_blocks
from lightning_autotp.proof.step import loss_of_batch
from lightning_autotp.proof.verdict import Verdict
from lightning_autotp.recipe.make_plan import make_plan
from tests.helpers.meta_models import deep_configs, meta_copy, small_step
from tests.helpers.small_nets import RULES

WIDTH, HIDDEN, BLOCKS = 8, 12, 6


class Block(nn.Module):
    """A residual block of which everything can be changed."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.act: Callable[[Tensor], Tensor] = F.gelu
        self.groups = 2
        self.inner: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.between(x)

    def between(self, x: Tensor) -> Tensor:
        hidden = self.inner(self.act(self.up(self.norm(x))))
        out: Tensor = self.down(hidden.unflatten(-1, (-1, self.groups)).flatten(-2))
        return out


class Subclass(Block):
    def between(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(self.norm(x)).softmax(-1))
        return out


class Power(nn.Module):
    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) if self.whole else x.square()


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    return x.softmax(dim)


def by_default(x: Tensor, *, mixes: bool = False) -> Tensor:
    return x.flip(-1) if mixes else x.relu()


class Settings:
    def __init__(self, mixes: bool) -> None:
        self.mixes = mixes


def by_settings(settings: Settings) -> Callable[[Tensor], Tensor]:
    return lambda x: x.cumsum(-1) if settings.mixes else x.relu()


Change = Callable[[nn.Sequential, int], object]


def put(**attributes: Any) -> Change:
    """Attributes of one block that are others."""

    def change(net: nn.Sequential, at: int) -> None:
        for name, value in attributes.items():
            setattr(net[at], name, value)

    return change


def another(make: Callable[[], nn.Module]) -> Change:
    def change(net: nn.Sequential, at: int) -> None:
        net[at] = make()

    return change


def hooked(net: nn.Sequential, at: int) -> None:
    block: Any = net[at]
    block.up.register_forward_hook(lambda module, args, output: output - output.mean(-1, keepdim=True))


def frozen(net: nn.Sequential, at: int) -> None:
    net[at].requires_grad_(False)


def replaced(net: nn.Sequential, at: int) -> None:
    block: Any = net[at]
    block.between = types.MethodType(Subclass.between, block)


def tied_across(net: nn.Sequential, at: int) -> None:
    block: Any = net[at]
    block.inner = nn.Linear(HIDDEN, HIDDEN, bias=False)  # no rule: it stays whole, and reads what is sharded


def every_other(right: Callable[[], Any], wrong: Callable[[], Any], name: str) -> Change:
    """All blocks have one thing, and one has another of the same class."""

    def change(net: nn.Sequential, at: int) -> None:
        for place, block in enumerate(net):
            setattr(block, name, wrong() if place == at else right())

    return change


WRONG: dict[str, Change] = {
    "another class": another(Subclass),
    "another activation": put(act=softmax),
    "an activation with another argument": every_other(
        lambda: by_default, lambda: functools.partial(by_default, mixes=True), "act"
    ),
    "partial functions that differ": every_other(
        lambda: functools.partial(by_default, mixes=False), lambda: functools.partial(by_default, mixes=True), "act"
    ),
    "closures over settings that differ": every_other(
        lambda: by_settings(Settings(False)), lambda: by_settings(Settings(True)), "act"
    ),
    "modules with a flag that differs": every_other(lambda: Power(False), lambda: Power(True), "inner"),
    "a norm over what is sharded": put(inner=nn.LayerNorm(HIDDEN)),
    "a local shape": put(groups=4),
    "a hook": hooked,
    "a method of its own": replaced,
    "a whole linear on what is sharded": tied_across,
}

RIGHT: dict[str, Change] = {
    "nothing": put(),
    "another width": another(lambda: Block(20)),
    "another activation": put(act=torch.tanh),
    "no norm": put(norm=nn.Identity()),
    "a frozen layer": frozen,
}


def whole_and_short(
    model: nn.Module, plan: ShardingPlan, config: TPTrainingConfig, step: Callable[[nn.Module], Tensor]
) -> tuple[Verdict, Verdict | None]:
    """The verdict of a model with all blocks, and with fewer; None if there are none to leave out."""
    with dataflow_proof.as_traced():
        whole = dataflow_proof._proved(model, plan, config, step, True)
        return whole, dataflow_proof._shortened(model, plan, config, step, True)


def net_with(change: Change, at: int) -> tuple[nn.Module, ShardingPlan, TPTrainingConfig]:
    net = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    change(net, at)
    model = meta_copy(net).train()
    config = TPTrainingConfig(autotp_size=2, partition_config=RULES)
    return model, make_plan(model, config, 2), config


def loss(model: nn.Module) -> Tensor:
    out: Tensor = model(torch.zeros(3, 5, WIDTH, device="meta"))
    return out.square().mean()


@pytest.mark.parametrize("at", [3, BLOCKS - 1], ids=["middle", "last"])
@pytest.mark.parametrize("name", WRONG)
def test_one_block_that_is_wrong_is_refuted(name: str, at: int) -> None:
    model, plan, config = net_with(WRONG[name], at)
    verdict = prove_flow(model, plan, config, loss)
    assert verdict.kind == "refuted", verdict
    assert prove_flow(*net_with(RIGHT["nothing"], at), loss).kind == "proved"


@pytest.mark.parametrize("at", [3, BLOCKS - 1], ids=["middle", "last"])
@pytest.mark.parametrize("name", RIGHT)
def test_one_block_that_is_another_is_not_left_out(name: str, at: int) -> None:
    model, plan, config = net_with(RIGHT[name], at)
    with fewer_blocks(model, plan) as done:
        left = done.get("", (BLOCKS, BLOCKS))[1]
    assert left == (2 if name == "nothing" else at + 1)
    assert len(list(model.children())) == BLOCKS
    assert prove_flow(model, plan, config, loss).kind == "proved"


class Slotted:
    __slots__ = ("mixes",)

    def __init__(self, mixes: bool) -> None:
        self.mixes = mixes


class Counted(dict[str, int]):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda at: torch.tensor(float(at == 3)),
        lambda at: Slotted(at == 3),
        lambda at: Counted(mixes=at == 3),
        lambda at: functools.partial(by_default, mixes=at == 3),
        lambda at: Settings(at == 3).__getattribute__,
    ],
)
def test_blocks_that_hold_other_things_are_of_another_kind(make: Callable[[int], Any]) -> None:
    net = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    for at, block in enumerate(net):
        block.held = make(at)
    plan = make_plan(net, TPTrainingConfig(autotp_size=2, partition_config=RULES), 2)
    with fewer_blocks(net, plan) as done:
        left = done.get("", (BLOCKS, BLOCKS))[1]
    assert left >= 4


def test_a_sequence_whose_blocks_have_names_keeps_them() -> None:
    net = nn.Sequential()
    for place in range(BLOCKS):
        net.add_module(f"block{place}", Block())
    model = meta_copy(net).train()
    config = TPTrainingConfig(autotp_size=2, partition_config=RULES)
    plan = make_plan(model, config, 2)
    with fewer_blocks(model, plan) as done:
        assert not done
    assert prove_flow(model, plan, config, loss).kind == "proved"


class Indexed(nn.Module):
    """Calls a block by its place, which is gone where there are fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks[BLOCKS - 1](self.blocks[0](x))
        return out


def test_what_does_not_run_with_fewer_blocks_is_proved_with_all() -> None:
    model = meta_copy(Indexed()).train()
    config = TPTrainingConfig(autotp_size=2, partition_config=RULES)
    plan = make_plan(model, config, 2)
    with fewer_blocks(model, plan) as done:
        assert done == {"blocks": (BLOCKS, 2)}
    assert prove_flow(model, plan, config, loss).kind == "proved"


def test_what_ranks_refuse_under_sequence_parallelism_is_said_of_all_blocks() -> None:
    model, plan, config, step = small_step("gemma3n_text", 2, sequence_parallel=True)
    verdict = prove_flow(model, plan, config, step)
    assert verdict.kind == "refuted"
    assert "leave it off for this model" in str(verdict)


@pytest.mark.parametrize("largest", [0.6, 0.0], ids=["by values", "by dataflow"])
def test_fewer_blocks_under_sequence_parallelism_are_proved(largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with deep_configs(BLOCKS):
        model = small_model(small_config("llama")).train()
    size = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(prover, "LARGEST", largest * size)
    config = TPTrainingConfig.load({"sequence_parallel": True})
    made = prover.Prover(model, make_plan(model, config, 2), config)
    made.sharded(model)
    assert made.kept is not None and made.kept.meta is not None
    assert (made.kept.values is None) == (largest == 0.0)
    tokens = torch.arange(36).view(3, 12)
    look = prover.Look("training", ({"input_ids": tokens, "labels": tokens},), call=loss_of_batch)
    found = made.prove(model, look)
    assert found.verdict.kind == "proved", found.verdict


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("switches", [{}, {"sequence_parallel": True}], ids=["plain", "sequence parallel"])
def test_the_verdict_of_every_type_is_that_of_all_its_blocks(
    switches: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[str] = Counter()
    differ = []
    for name in dict.fromkeys([*causal_types(), *SWEEP]):
        if name in NOT_RUNNABLE:
            continue
        try:
            with deep_configs(BLOCKS):
                model, plan, config, step = small_step(name, 2, **switches)
        except ValueError:
            continue
        if plan.blockers:
            continue
        try:
            whole, short = whole_and_short(model, plan, config, step)
        except Exception:  # the full model itself cannot be run so
            counts["not run"] += 1
            continue
        counts[f"{whole.kind}, {'as long' if short is None else short.kind}"] += 1
        if short is not None and short.kind != whole.kind:
            differ.append(f"{name}: {whole}\nwith fewer blocks: {short}")
    with capsys.disabled():
        print(dict(counts), *differ, sep="\n")
    assert not differ
    assert sum(count for kind, count in counts.items() if not kind.endswith("as long")) > 0.5 * counts.total()
