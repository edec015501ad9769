"""Grouped experts: what transformers' own ``grouped_mm`` computes, and its gradients."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lightning_autotp import TPConfig
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.parallel import experts as room
from lightning_autotp.parallel.experts import GroupedExperts, _Join, _Spread, _SwiGLU
from lightning_autotp.parallel.reduced_module import Boundary
from tests.helpers.closeness import assert_close
from tests.helpers.grouped_experts import KINDS, built, routed, run


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_transformers_own(kind: str, implementation: str) -> None:
    experts = built(kind)
    grouped = GroupedExperts.of(experts)
    assert grouped is not None
    for count in (1, 33):
        given = routed(experts, count)
        found = run(experts, lambda *args: grouped(experts, *args), *given)
        experts.config._experts_implementation = implementation
        assert_close(found, run(experts, experts, *given), 1e-5)


def test_tokens_of_no_expert_but_one_and_of_all_of_them() -> None:
    experts = built("gated")
    grouped = GroupedExperts.of(experts)
    assert grouped is not None
    for k in (1, 5):
        given = routed(experts, 9, k)
        assert_close(run(experts, lambda *args: grouped(experts, *args), *given), run(experts, experts, *given), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("kind", ["gated", "own gate, biases, transposed", "no gate"])
def test_parts_that_grouped_matmuls_do_not_take(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """A rank's share of an expert may be of any width."""
    experts = built(kind).to(dtype)
    for name, parameter in experts.named_parameters():
        if name.startswith("down") and not name.endswith("bias"):
            parameter.data = parameter[:, :19] if experts.is_transposed else parameter[..., :19]
        elif not name.startswith("down"):
            dim, width = -1 if experts.is_transposed else 1, 38 if experts.has_gate else 19
            parameter.data = parameter.narrow(dim, 0, width).clone()
    grouped = GroupedExperts.of(experts)
    assert grouped is not None
    hidden, index, weights = routed(experts, 9)
    given = hidden.to(dtype), index, weights.to(dtype)
    found = run(experts, lambda *args: grouped(experts, *args), *given)
    exact = built(kind)
    for ours, wide in zip(exact.parameters(), experts.parameters(), strict=True):
        ours.data = wide.data.double()
    exact.config._experts_implementation = "eager"
    want = run(exact, exact, given[0].double(), index, given[2].double())
    assert_close({n: t.double() for n, t in found.items()}, want, tolerance)


def test_gradients_of_moving_rows_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    place = torch.randperm(12).view(4, 3)
    x, rows, weights, both = (torch.randn(n, m).double().requires_grad_() for n, m in ((4, 5), (12, 5), (4, 3), (7, 6)))
    assert torch.autograd.gradcheck(lambda x: _Spread.apply(x, place), x)
    assert torch.autograd.gradcheck(lambda r, w: _Join.apply(r, w, place, torch.float64), (rows, weights))
    assert torch.autograd.gradcheck(_SwiGLU.apply, both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    """Routing weights are fp32, as most routers give them."""
    torch.manual_seed(0)
    place = torch.randperm(32).view(4, 8)
    rows, weights = torch.randn(32, 64).to(dtype), torch.rand(4, 8)
    found = _Join.apply(rows, weights, place, dtype)
    want = (rows.double()[place] * weights.double().unsqueeze(-1)).sum(1)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_release_with_other_kinds_computes_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = built("gated")
    assert GroupedExperts.of(experts) is not None
    experts.has_post_expert_norm = True
    assert GroupedExperts.of(experts) is None
    experts.has_post_expert_norm = False
    assert GroupedExperts.of(nn.Linear(2, 2)) is None

    def use_experts_implementation(
        experts_class: type, *, experts_interface: Any, has_gate: bool, has_spin: bool
    ) -> None:
        """Of a release to come."""

    monkeypatch.setattr(moe, "use_experts_implementation", use_experts_implementation)
    assert GroupedExperts.of(experts) is None
    monkeypatch.undo()
    monkeypatch.delattr(moe, "_grouped_linear")
    assert GroupedExperts.of(experts) is None


@pytest.mark.ranks(1, device="cpu")
def test_only_grouped_mm_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be chosen at any time, as transformers reads its config in every call."""
    experts = built("gated")
    given = routed(experts, 7)
    want = experts(*given)
    config = experts.config
    boundary = Boundary.convert(experts, build_mesh(1, TPConfig()))
    spread = Mock(side_effect=room._Spread.apply)
    monkeypatch.setattr(room._Spread, "apply", spread)
    for implementation, calls in (("grouped_mm", 1), ("eager", 1), ("batched_mm", 1), ("grouped_mm", 2)):
        config._experts_implementation = implementation
        assert_close({"out": boundary(*given)}, {"out": want}, 1e-5)
        assert spread.call_count == calls


def mine(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Somebody's own experts."""
    return hidden_states * top_k_weights.sum(1, keepdim=True) + self.num_experts


class Mine(MixtralExperts):  # type: ignore[misc]  # has no types here, see setup.cfg
    forward = mine


class Watched(MixtralExperts):  # type: ignore[misc]  # has no types here, see setup.cfg
    """Calls what it inherits, and changes it."""

    def forward(self, *args: Any) -> Tensor:
        return 2 * super().forward(*args)


class Undecorated(nn.Module):
    """Has what transformers' experts have."""

    forward = mine
    num_experts, has_gate, config = 3, True, None

    def _apply_gate(self) -> None: ...


@pytest.mark.parametrize("way", ["subclass", "subclass that calls it", "patched", "registered", "own class"])
@pytest.mark.ranks(1, device="cpu")
def test_somebodys_own_experts_stay_theirs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = built("gated")
    if way.startswith("subclass"):
        experts.__class__ = Mine if way == "subclass" else Watched
    elif way == "patched":
        monkeypatch.setattr(MixtralExperts, "forward", mine)
    elif way == "registered":
        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "grouped_mm", mine)
    given = routed(experts, 7)
    if way == "own class":
        experts = Undecorated()
    want = experts(*given)
    assert GroupedExperts.of(experts) is None
    assert torch.equal(Boundary.convert(experts, build_mesh(1, TPConfig()))(*given), want)


def test_a_forward_that_is_no_function_is_left_alone() -> None:
    kind = type("Called", (nn.Module,), {"forward": Mock(return_value=torch.ones(1))})
    assert GroupedExperts.of(kind()) is None


@pytest.mark.parametrize("way", ["gate of its own", "hook", "replaced", "patched"])
@pytest.mark.ranks(1, device="cpu")
def test_somebodys_own_gates_stay_theirs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = built("gated")
    swiglu = Mock(side_effect=room._SwiGLU.apply)
    monkeypatch.setattr(room._SwiGLU, "apply", swiglu)
    if way == "gate of its own":
        experts._apply_gate = lambda rows: rows.chunk(2, -1)[1]
    boundary = Boundary.convert(experts, build_mesh(1, TPConfig()))
    given = routed(experts, 7)
    usual = boundary(*given)
    assert swiglu.call_count == (way != "gate of its own")
    if way == "hook":
        experts.act_fn.register_forward_hook(lambda module, args, output: output + 1)
    elif way == "replaced":
        experts.act_fn = nn.Sigmoid()
    elif way == "patched":
        experts.act_fn.forward = torch.sigmoid
    found = boundary(*given)
    assert swiglu.call_count == (way != "gate of its own")
    experts.config._experts_implementation = "eager"
    if way == "gate of its own":  # transformers' eager form gates by itself
        assert not torch.allclose(found, boundary(*given), atol=1e-2)
        return
    assert_close({"out": found}, {"out": boundary(*given)}, 1e-5)
    assert not torch.allclose(found, usual, atol=1e-2)


@pytest.mark.ranks(1, device="cpu")
def test_the_tokens_that_transformers_spreads_itself_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It marks tokens of other ranks' experts by an id beyond the last."""
    experts = built("gated")
    hidden, index, weights = routed(experts, 7)
    index[::2, 0] = experts.num_experts
    weights = weights.masked_fill(index == experts.num_experts, 0)
    experts._is_expert_parallel = True
    want = experts(hidden, index, weights)
    boundary = Boundary.convert(experts, build_mesh(1, TPConfig()))
    monkeypatch.setattr(room._Spread, "apply", Mock(side_effect=AssertionError))
    assert torch.equal(boundary(hidden, index, weights), want)


def test_gradients_of_gradients_are_an_error() -> None:
    """Not zeros, where the gradient that comes in is a constant, as that of a sum is."""
    experts = built("gated")
    grouped = GroupedExperts.of(experts)
    assert grouped is not None
    hidden, index, weights = routed(experts, 7)
    weights.requires_grad_()
    (first,) = torch.autograd.grad(grouped(experts, hidden, index, weights).sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


@pytest.mark.ranks(1, device="cpu")
def test_a_graph_of_them_is_whole() -> None:
    experts = built("gated")
    given = routed(experts, 33)
    want = run(experts, experts, *given)
    boundary = Boundary.convert(experts, build_mesh(1, TPConfig()))
    compiled = torch.compile(boundary, backend="aot_eager", fullgraph=True)
    assert_close(run(experts, compiled, *given), want, 1e-5)
