"""Hand-written models without rules: derived plans are proved, right by numbers, and shard as much as they did."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.derivation.judge import Judged, judged
from tests.derivation.models import MODELS
from tests.derivation.models.frame import Model

RIGHT = 1e-9
"""The largest error of a right plan in fp64."""

RIGHT_IN_FP32 = 5e-3

IN_FP32 = ("rotary by complex numbers",)
"""These compute some in fp32."""


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines that are printed when all is done."""
    lines: list[str] = []
    yield lines
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(lines))


def check(model: Model, size: int, table: list[str]) -> None:
    found: Judged = judged(model, size)
    table.append(f"{model.name:45} TP={size}  {found.share:6.1%}  {found.seconds:5.1f} s")
    assert found.found.verdict.kind == "proved", found.found.verdict.listed
    assert found.error < (RIGHT_IN_FP32 if model.name in IN_FP32 else RIGHT)
    assert found.share <= model.share[size], f"a rank holds {found.share:.3f} of {model.name}:\n{found.found.plan}"


def test_there_are_as_many_as_were_asked_for() -> None:
    assert len({model.name for model in MODELS}) == len(MODELS) >= 60
    assert all(sum(p.numel() for p in model.build().parameters()) < 110_000 for model in MODELS)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model", [model for model in MODELS if model.quick], ids=lambda model: model.name)
def test_a_derived_plan_is_proved_and_right(model: Model, size: int, table: list[str]) -> None:
    check(model, size, table)


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model", [model for model in MODELS if not model.quick], ids=lambda model: model.name)
def test_all_derived_plans_are_proved_and_right(model: Model, size: int, table: list[str]) -> None:
    check(model, size, table)
