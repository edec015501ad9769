"""The nets are what they say they are: each one, at each of its sizes, judged by numbers."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from torch import nn

from tests.helpers.nets import NETS
from tests.helpers.nets.frame import Net
from tests.helpers.nets.judge import RefusedError, error_of, unsharded

RIGHT, WRONG = 1e-6, 1e-4

READS_VALUES = ("sparse experts in a list",)
"""Of these the meta device cannot say what shapes there are."""


def lines_with(net: Net, model: nn.Module) -> list[str]:
    """The source lines that ``net.line`` is a part of, in all files of the model's classes, descriptions left out."""
    modules = {type(module).__module__ for module in model.modules()}
    files = [sys.modules[name] for name in sorted(modules) if name.startswith("tests.")]
    lines = (line for file in files for line in inspect.getsource(file).splitlines())
    return [line for line in lines if net.line in line and f'"{net.line}"' not in line]


def test_there_are_as_many_as_were_asked_for() -> None:
    assert len({net.name for net in NETS}) == len(NETS)
    assert sum(net.right for net in NETS) >= 32
    assert sum(not net.right and not net.refused for net in NETS) >= 28
    assert sum(not net.right for net in NETS) >= 32


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_a_net_is_right_or_wrong_in_numbers(net: Net) -> None:
    want = unsharded(net)
    for size in net.sizes:
        try:
            error = error_of(net, size, want)
        except RefusedError as why:
            assert net.refused and not net.right, f"TP={size}: {why}"
            continue
        except Exception as raised:
            assert not net.right, f"TP={size}: {type(raised).__name__}: {raised}"
            continue
        assert not net.refused
        assert error < RIGHT if net.right else error > WRONG, f"TP={size}: {error:.1e}"


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_a_net_is_built_alike_every_time_on_any_device_and_names_one_line(net: Net) -> None:
    model, other = net.build(), net.build().state_dict()
    assert model.state_dict().keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())
    assert bool(net.line) is not net.right
    if net.line:
        assert len(lines_with(net, model)) == 1
    if net.name not in READS_VALUES:
        loss = model.to("meta")(**{name: tensor.to("meta") for name, tensor in net.batch().items()})
        loss.backward()
        assert loss.dtype == torch.float32 and loss.is_meta
