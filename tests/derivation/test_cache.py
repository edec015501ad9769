"""Derived plans of earlier runs: found again, unless something has changed that they were derived from."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation import cache
from lightning_autotp.derivation.digest import digest_of
from lightning_autotp.proof.prover import Look
from lightning_autotp.recipe import deriving
from lightning_autotp.recipe.found import Found, kept
from tests.helpers.small_nets import WIDTH, Rows

MODEL = """
import torch
from torch import nn
import {helper} as helper

SCALE = {scale}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(helper.gate(self.up(x){extra}) * SCALE)
"""

HELPER = "import torch\n\ndef gate(x):\n    return torch.{function}(x)\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def net(place: Path, name: str, function: str = "tanh", extra: str = "", scale: float = 2.0) -> nn.Module:
    """A model out of files of its own, whose names do not depend on what is in them."""
    (place / f"{name}_helper.py").write_text(HELPER.format(function=function))
    (place / f"{name}.py").write_text(MODEL.format(helper=f"{name}_helper", extra=extra, scale=scale))
    importlib.invalidate_caches()
    for each in (f"{name}_helper", name):
        sys.modules.pop(each, None)
    for pycache in place.glob("__pycache__/*"):
        pycache.unlink()
    made: nn.Module = importlib.import_module(name).Net()
    return made


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def derived(model: nn.Module, rows: int = 6, tp_size: int = 2, **fields: Any) -> tuple[Found, bool]:
    config = TPTrainingConfig(**fields)
    look = Look("training", (Rows(rows).rows,), call=squares)
    return kept(model, look, config, tp_size, "", lambda: deriving._derived(model, look, config, tp_size))


def test_a_plan_is_found_again(place: Path) -> None:
    first, old = derived(net(place, "one"))
    assert not old
    assert not first.plan.layouts["up.weight"].is_replicated
    again, old = derived(net(place, "one"))  # with other weights
    assert old
    assert again == first
    assert len(list((place / "cache" / "plans").iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"function": "sigmoid"},
        {"extra": ".abs()"},
        {"scale": 3.0},
    ],
)
def test_other_code_in_a_forward_in_what_it_calls_or_reads_is_another_model(place: Path, change: Any) -> None:
    derived(net(place, "other"))
    assert not derived(net(place, "other", **change))[1]


def test_other_settings_samples_and_attributes_are_looked_at_anew(place: Path) -> None:
    model: Any = net(place, "same")
    derived(model)
    assert derived(model)[1]
    assert not derived(model, rows=9)[1]
    found, old = derived(model, tp_size=4)
    assert not old
    assert found.plan.tp_size == 4
    assert not derived(model, loss_parallel=True)[1]
    model.config = {"heads": 2}
    assert not derived(model)[1]
    model.config = {"heads": 4}
    assert not derived(model)[1]
    assert derived(model)[1]
    model.up = nn.Linear(8, 12, bias=False)
    assert not derived(model)[1]
    model.up.forward = lambda x: x @ model.up.weight.T
    assert not derived(model)[1]


def test_without_a_proof_to_come_nothing_is_taken_from_the_cache(place: Path) -> None:
    model = net(place, "off")
    derived(model)
    assert not derived(model, proof="off")[1]


def test_a_cache_that_is_off_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "home"))
    assert not derived(net(place, "none"))[1]
    assert not (place / "home").exists()
    monkeypatch.delenv(cache.VARIABLE)
    assert cache.folder() == place / "home" / "lightning_autotp" / "plans"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"plan": 1}', b"\xff\x00", "half"])
def test_a_file_that_is_not_whole_is_made_anew(place: Path, content: Any) -> None:
    first, _ = derived(net(place, "broken"))
    (path,) = (place / "cache" / "plans").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert derived(net(place, "broken")) == (first, False)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_no_error(place: Path) -> None:
    (place / "cache").write_text("a file")
    assert not derived(net(place, "file"))[1]
    assert not derived(net(place, "file"))[1]


def test_old_files_are_removed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MOST", 2)
    for rows in (4, 5, 6, 7):
        derived(net(place, "many"), rows=rows)
    assert len(list((place / "cache" / "plans").iterdir())) == 2


def test_digests_do_not_depend_on_the_process() -> None:
    code = (
        "import torch; from tests.derivation.test_cache import squares, Odd;"
        "from lightning_autotp.derivation.digest import digest_of; print(digest_of(Odd(), squares))"
    )
    environments = (
        {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))} for seed in "12"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for environment in environments
    ]
    made = [process.communicate()[0] for process in running]
    assert made[0] == made[1]
    assert len(made[0].strip()) == 64


class Odd(nn.Module):
    """A model with attributes whose order or numbers are others in each process."""

    def __init__(self) -> None:
        super().__init__()
        self.names = {"a", "b", "c", "d"}
        self.up = nn.Linear(WIDTH, WIDTH)
        self.up.register_forward_hook(lambda *_: None)
        self.register_buffer("order", torch.arange(3))
        self._some_hash = hash("x")
        self.held = object()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(x) if x.shape[0] in {"a", "b", 2} else x
        return out


def test_buffers_that_may_be_indices_count_and_weights_do_not() -> None:
    model = Odd()
    before = digest_of(model)
    with torch.no_grad():
        model.up.weight.add_(1)
    assert digest_of(model) == before
    order: Any = model.order
    order[0] = 2
    assert digest_of(model) != before
