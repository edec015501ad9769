"""Copies that may be run and thrown away: what of the original they share, and what they must not."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_autotp.proof.copying import alias_copy, copied, empty_copy, fill


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(x) * self.scale)
        return out


def test_an_empty_copy_holds_no_parameters_until_it_is_filled() -> None:
    model = Tied()
    made = empty_copy(model)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert torch.equal(made.get_buffer("scale"), torch.tensor(2.0))
    fill(made, model)
    x = torch.arange(7)
    assert torch.equal(made(x), model(x))
    assert made.get_parameter("head.weight") is made.get_parameter("embedding.weight")
    with torch.no_grad():
        made.get_parameter("head.weight").zero_()
    assert model.embedding.weight.any()


def test_an_alias_shares_parameters_and_no_buffers() -> None:
    model = Tied()
    made = alias_copy(model)
    assert made.get_parameter("head.weight").data_ptr() == model.head.weight.data_ptr()
    made.get_buffer("scale").zero_()
    assert model.get_buffer("scale") == 2


def test_frozen_parameters_stay_frozen() -> None:
    model = Tied()
    model.embedding.weight.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in empty_copy(model).parameters())


def test_hooks_act_on_the_copy() -> None:
    model = Tied()
    model.head.register_forward_hook(lambda module, args, output: model.seen.append(output))
    made: Any = alias_copy(model)
    made(torch.arange(3))
    assert len(made.seen) == 1
    assert not model.seen


def test_partial_functions_and_bound_methods_act_on_the_copy() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0
            self.call: Any = partial(self.add, 2)

        def add(self, number: int) -> None:
            self.count += number

    model = Counts()
    made: Any = alias_copy(model)
    made.call()
    assert (made.count, model.count) == (2, 0)


def test_a_function_that_replaced_a_forward_acts_on_the_copy() -> None:
    model: Any = Tied()
    before = model.head.forward
    model.head.forward = lambda x: before(x) + model.head.weight.sum()
    made: Any = copied(model, torch.zeros_like, lambda t: t)
    assert not made(torch.arange(3)).any()
    assert model(torch.arange(3)).any()


def test_what_cannot_be_copied_is_shared() -> None:
    model: Any = Tied()
    model.lock, model.rows = threading.Lock(), iter([1, 2])
    made: Any = empty_copy(model)
    assert made.lock is model.lock
    assert next(model.rows) == 1
    assert made.head is not model.head


def test_data_is_not_copied() -> None:
    class Rows(Dataset[int]):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("data was copied")

    model: Any = Tied()
    model.data = Rows()
    made: Any = empty_copy(model)
    assert made.data is model.data


def test_a_trainer_is_left_out_and_stays_with_the_original() -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Tied()

    model = Module()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model.trainer = trainer
    made: Any = alias_copy(model)
    assert model.trainer is trainer
    with pytest.raises(RuntimeError, match="not attached"):
        made.trainer  # noqa: B018
