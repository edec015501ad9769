"""Where Triton kernels serve; what each gives is in the tests of its own room."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_autotp import kernels as room
from lightning_autotp.kernels.dispatch import kernels_of, load_kernels


class Driver:
    """Triton's, which finds a C compiler the second time."""

    def __init__(self) -> None:
        self.asked = 0

    @property
    def active(self) -> object:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("no C compiler")
        return object()


def test_without_a_triton_that_works_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    load: Callable[[str], Any] = load_kernels.__wrapped__
    name = f"{room.__name__}.cross_entropy"
    monkeypatch.delattr(room, "cross_entropy", raising=False)
    monkeypatch.setitem(sys.modules, name, None)  # as if importing it failed
    assert load("cross_entropy") is None
    kernels = SimpleNamespace(triton=SimpleNamespace(runtime=SimpleNamespace(driver=Driver())))
    monkeypatch.setitem(sys.modules, name, kernels)
    with pytest.warns(UserWarning, match=r"cross_entropy\), because Triton fails: no C compiler"):
        assert load("cross_entropy") is None
    assert load("cross_entropy") is kernels


def test_on_a_cpu_torch_serves() -> None:
    assert kernels_of("cross_entropy", torch.zeros(1)) is None
