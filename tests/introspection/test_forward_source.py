"""What a forward pass reads of its module, and whether it leaves the weight to its base class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_autotp.introspection.forward_source import delegates, reads


def decorated(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.counted_by_the_decorator = True
        return method(self, *args, **kwargs)

    return wrapper


class Reader(nn.Module):
    in_lambda: int
    in_first: Tensor
    in_second: Tensor
    in_other: Tensor
    in_property: Any

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + torch.stack([x.view(-1, self.in_lambda) for _ in range(1)])[0] + self.layer(x)

    def first(self, x: Tensor) -> Tensor:
        return self.second(x) * self.in_first

    @decorated
    def second(self, x: Tensor) -> Tensor:
        # in a function inside it, and back to where it was called from
        key = lambda: self.in_second  # noqa: E731
        return x * key() if x.numel() else self.first(x)

    def other(self, x: Tensor) -> Tensor:
        return x * self.in_other

    @property
    def layer(self) -> Any:
        return self.in_property


class Heir(Reader):
    """Its forward is its parent's."""


class Extending(Reader):
    in_extension: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.in_extension


class Decorated(nn.Module):
    inside: Tensor

    @decorated
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return x * self.inside


def test_reads_follows_the_methods_that_forward_calls() -> None:
    found = reads(Reader())
    assert {"in_lambda", "in_first", "in_second", "layer"} <= found
    assert "in_other" not in found


def test_reads_of_a_class_that_inherits_its_forward_are_its_parents() -> None:
    assert {"in_lambda", "first"} <= reads(Heir())
    assert {"in_first", "in_second"} <= reads(Heir()), "methods of the parent are called just so"


def test_reads_follows_a_forward_that_calls_its_parents() -> None:
    assert {"in_extension", "in_lambda", "in_first"} <= reads(Extending())


def test_reads_looks_through_decorators() -> None:
    assert "inside" in reads(Decorated())
    assert "counted_by_the_decorator" not in reads(Decorated())


def test_reads_of_a_module_without_a_forward_are_no_attributes() -> None:
    assert not {"weight", "sinks"} & reads(nn.ModuleDict())


def test_reads_of_plain_layers() -> None:
    assert {"weight", "bias"} <= reads(nn.Linear(2, 2))
    assert "weight" in reads(nn.Embedding(2, 2))


class Scaled(nn.Embedding):
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale.to(self.weight.dtype)


class OnDevice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.device)) + 1


class OldStyle(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super(OldStyle, self).forward(x)  # noqa: UP008 - as older code has it


class Wrapped(nn.Linear):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ByHand(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Both(nn.Linear):
    """Its base computes the output, and its own code reads the weight beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight.sum()


class Regularized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return super().forward(x) + weight.mean()


class OtherBase(nn.Linear):
    """Calls another method of its base class."""

    def forward(self, x: Tensor) -> Tensor:
        super().extra_repr()
        return x


@pytest.mark.parametrize("cls", [Scaled, OnDevice, OldStyle, Wrapped])
def test_class_that_works_on_what_its_base_returns_delegates(cls: type[nn.Module]) -> None:
    assert delegates(cls)


@pytest.mark.parametrize("cls", [ByHand, Both, Regularized, OtherBase, nn.Linear, nn.Embedding, nn.ModuleDict])
def test_class_that_reads_the_weight_itself_does_not_delegate(cls: type[nn.Module]) -> None:
    assert not delegates(cls)


def test_scaled_embeddings_of_transformers_delegate() -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    assert delegates(BartScaledWordEmbedding) and delegates(Gemma3TextScaledWordEmbedding)
