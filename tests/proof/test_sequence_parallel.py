"""Sequence parallelism by values: nets that do things with tokens are right, or refuted with their line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.proof import repair
from lightning_autotp.proof.compared import Proof
from lightning_autotp.proof.step import loss_of_batch, loss_step
from lightning_autotp.proof.values import prove_values
from lightning_autotp.recipe.make_plan import make_plan
from tests.helpers.nets.frame import Net, right
from tests.helpers.nets.judge import error_of, unsharded
from tests.helpers.nets.sequence_mistakes import MISTAKES
from tests.helpers.nets.sequences import RIGHT, SWITCHED, Accumulated

NAMED = 0.9
"""How many of the mistakes must be refuted with the very line; the others name one that follows from it."""


def prove(net: Net, size: int) -> Proof:
    config, model = TPTrainingConfig.load(net.config), net.build()
    return prove_values(model, make_plan(model, config, size), config, loss_step(loss_of_batch, net.batch()))


def count(nets: Iterable[tuple[Net, int]]) -> Counter[str]:
    """How many mistakes there are of each kind; asserts that none is proved."""
    counts: Counter[str] = Counter()
    for net, size in nets:
        if net.refused:
            with pytest.raises(ValueError, match=r"^sequence_parallel: .*[Ll]eave"):
                prove(net, size)
            counts["refused at planning"] += 1
            continue
        verdict = prove(net, size).verdict
        assert verdict.kind == "refuted", f"{net.name} at TP={size}: {verdict}"
        places = re.findall(r"([^\s`:(]*\.py):(\d+)", str(verdict))
        lines = [Path(file).read_text().splitlines()[int(number) - 1] for file, number in places]
        assert lines, f"{net.name} at TP={size}: {verdict}"
        counts["refuted" + (" with its line" if any(net.line in line for line in lines) else "")] += 1
    print(dict(counts))
    return counts


def every_size(nets: Iterable[Net]) -> list[tuple[Net, int]]:
    return [(net, size) for net in nets for size in net.sizes]


def one_size(nets: Iterable[Net]) -> list[tuple[Net, int]]:
    """Each net at one of its sizes, by turns."""
    return [(net, net.sizes[at % len(net.sizes)]) for at, net in enumerate(nets)]


def test_mistakes_are_refuted_with_their_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "SECONDS", 0.3)  # what is looked for is not there
    counts = count(one_size(MISTAKES))
    refuted = counts["refuted with its line"]
    assert refuted >= 25
    assert refuted >= NAMED * (refuted + counts["refuted"])
    assert counts["refused at planning"] == 3


@pytest.mark.long
@pytest.mark.timeout(600)
def test_mistakes_at_all_sizes() -> None:
    counts = count(every_size(MISTAKES))
    refuted = counts["refuted with its line"]
    assert refuted >= NAMED * (refuted + counts["refuted"])


@pytest.mark.parametrize(("net", "size"), every_size(RIGHT), ids=lambda value: getattr(value, "name", value))
def test_right_nets_are_proved(net: Net, size: int) -> None:
    found = prove(net, size)
    assert found.verdict.kind == "proved", found
    assert not found.repairs


@pytest.mark.long
def test_right_nets_are_right_by_numbers() -> None:
    for net, size in every_size(RIGHT):
        assert error_of(net, size, unsharded(net)) < 1e-6, net.name


def regions(name: str) -> dict[str, bool]:
    """The regions of a net's first block, and whether they are sharded."""
    (net,) = (net for net in RIGHT if net.name == name)
    sequence = make_plan(net.build(), TPTrainingConfig.load(net.config), 2).sequence
    assert sequence is not None
    return {region.module: region.sharded for region in sequence.regions if region.block == sequence.blocks[0]}


def test_what_may_mix_tokens_is_given_all_of_them_and_what_surely_does_not_is_left_alone() -> None:
    usual = {"blocks.0.attention": True, "blocks.0.mlp": True}
    assert regions("attention without telling arguments") == usual
    assert regions("norm of one's own over features") == usual
    assert regions("norm over tokens") == usual | {"blocks.0.extra": False}
    assert regions("unsharded nn.MultiheadAttention") == usual | {"blocks.0.attention": False}


class Reentrant(Accumulated):
    """What was checkpointed is given new tensors, which say nothing of their shape."""

    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return x


def test_two_shapes_that_cannot_be_told_apart_are_refuted_with_what_to_do() -> None:
    found = prove(right("", Reentrant, SWITCHED), 2).verdict
    assert found.kind == "refuted"
    assert "must be of one shape, not 2 x 30 and 5 x 12" in str(found)
