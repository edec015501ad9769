"""The sharded layers alone: outputs and every gradient, inputs' included, are those of the unsharded layer."""

from __future__ import annotations

from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_autotp import TPConfig
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.layout.layout import Layout, even_widths
from lightning_autotp.parallel.column_group import ColumnGroup
from lightning_autotp.parallel.linear import (
    ColumnParallelConv1D,
    ColumnParallelLinear,
    PartialOutputLinear,
    RowParallelConv1D,
    RowParallelLinear,
)
from lightning_autotp.sharding.state import sharded
from tests.helpers.closeness import assert_close
from tests.helpers.sharded_layers import (
    MLP,
    MLP_SPECS,
    assert_same,
    gradients,
    inputs,
    seeded,
    shard,
    spec,
)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 16), (3, 5, 16), (1, 1, 16)])
@pytest.mark.ranks(2)
def test_column_and_row(shape: tuple[int, ...], bias: bool, overlap: bool) -> None:
    assert_same(lambda: MLP(bias=bias), MLP_SPECS, inputs(*shape), overlap=overlap)


@pytest.mark.ranks(4)
def test_a_width_that_the_ranks_do_not_divide() -> None:
    model = assert_same(lambda: MLP(width=27), MLP_SPECS, inputs(3, 5, 16))
    assert isinstance(model.up, ColumnParallelLinear) and isinstance(model.up, nn.Linear)
    assert model.up.weight.shape[0] == (7, 7, 7, 6)[dist.get_rank()] and model.up.out_features == 27


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.ranks(2)
def test_non_contiguous_inputs_and_gradients(overlap: bool) -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        out = model(x.transpose(0, 1))
        return torch.cat((out.transpose(0, 1).expand(2, *out.transpose(0, 1).shape), out.transpose(0, 1)[None]))

    assert_same(MLP, MLP_SPECS, inputs(3, 5, 16), run, overlap=overlap)
    assert_same(MLP, MLP_SPECS, inputs(16, 6).t(), overlap=overlap)


@pytest.mark.ranks(2)
def test_a_callers_gradient_is_not_overwritten() -> None:
    model = shard(seeded(MLP), *MLP_SPECS)
    x = inputs(5, 16).requires_grad_()
    out = model(x)
    grad = torch.ones_like(out)
    out.backward(grad)
    assert torch.equal(grad, torch.ones_like(out))


GATHERED = [spec("up|gate", "column", gather_output=True), spec("down", "row", split_input=True)]


@pytest.mark.parametrize("specs", [MLP_SPECS, GATHERED], ids=["column-row", "gathered-split"])
@pytest.mark.parametrize("width", [24, 27])
@pytest.mark.ranks(2)
def test_gradients_of_gradients(specs: list[dict[str, Any]], width: int) -> None:
    def slope(model: Any, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return grad

    def of_weights(model: Any, x: Tensor) -> Tensor:
        grads = torch.autograd.grad(model(x).square().sum(), [model.down.bias, x], create_graph=True)
        return torch.cat([grad.reshape(-1) for grad in grads])

    for run in (slope, of_weights):
        assert_same(lambda: MLP(width), specs, inputs(3, 5, 16), run)


@pytest.mark.ranks(2)
def test_gradients_of_torch_func() -> None:
    def slope(model: Any, x: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: model(x).square().sum())(x)
        return found

    for specs in (MLP_SPECS, GATHERED):
        assert_same(MLP, specs, inputs(5, 16), slope)
    with pytest.raises(RuntimeError, match="vmap goes over a layer that is sharded for tensor parallelism"):
        torch.func.vmap(shard(seeded(MLP), *MLP_SPECS))(inputs(5, 16))


@pytest.mark.parametrize("frozen", ["up", "gate", "up|gate", "down", "up|gate|down"])
@pytest.mark.ranks(2)
def test_frozen_weights(frozen: str) -> None:
    def build() -> nn.Module:
        model = MLP()
        for name in frozen.split("|"):
            getattr(model, name).requires_grad_(False)
        return model

    model = assert_same(build, MLP_SPECS, inputs(3, 5, 16), overlap=True)
    assert all(p.grad is None for p in getattr(model, frozen.split("|")[0]).parameters())


@pytest.mark.ranks(2)
def test_a_frozen_column_does_not_keep_its_input() -> None:
    model = shard(seeded(lambda: MLP().requires_grad_(False)), *MLP_SPECS)
    x = inputs(5, 16).requires_grad_() * 1
    held = ref(x)
    out = model.up(x) * model.gate(x)
    del x
    assert held() is None and out.requires_grad


@pytest.mark.parametrize("dims", [(2, 27), (3, 27)])
@pytest.mark.ranks(4)
def test_gathered_output(dims: tuple[int, int]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(16, dims[1]), nn.Tanh(), nn.Linear(dims[1], 3))

    x = inputs(5, 16) if dims[0] == 2 else inputs(2, 5, 16)
    assert_same(build, [spec("0", "column", gather_output=True), spec("2", "skip")], x)


@pytest.mark.ranks(2)
def test_gathered_output_of_a_fused_weight_is_in_the_unsharded_order() -> None:
    rule = spec("0", "column", gather_output=True, shape=[[8, 4, 4], -1])
    assert_same(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3)), [rule, spec("1", "skip")], inputs(5, 16))


@pytest.mark.ranks(2)
def test_a_row_fed_all_features_says_what_is_wrong() -> None:
    model = shard(seeded(MLP), *MLP_SPECS)
    with pytest.raises(ValueError, match="row parallel linear of 24 input features got 24 .* its part is 12"):
        model.down(inputs(5, 24))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.ranks(2)
def test_autocast_gives_what_autocast_gives_unsharded(overlap: bool) -> None:
    """bf16 error against fp32 is at most 1.5 times the unsharded bf16 run's own."""

    def autocast(model: Any, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            out: Tensor = model(x)
        assert out.dtype == torch.bfloat16
        return out.float()

    x = inputs(6, 64, 16)
    exact = gradients(seeded(MLP), lambda model, x: model(x), x)
    unsharded = gradients(seeded(MLP), autocast, x)
    model = shard(seeded(MLP), *MLP_SPECS, overlap=overlap)
    got = gradients(model, autocast, x)
    found = sharded(model)
    assert found is not None
    layouts, rank = found.plan.layouts, found.mesh.tp_rank
    for name, tensor in got.items():
        part = lambda t, name=name: layouts[name].shard(t, rank) if name in layouts else t  # noqa: E731
        own_error = (part(unsharded[name]) - part(exact[name])).norm()
        assert (tensor - part(exact[name])).norm() <= 1.5 * own_error, name
        assert tensor.dtype == unsharded[name].dtype


# -- rows that split their input, and linears stored the other way round ----------------------------------------------


class SplitInput(nn.Module):
    """The first layer is whole; the second reads all of it on every rank."""

    def __init__(self, width: int = 27) -> None:
        super().__init__()
        self.first, self.down = nn.Linear(16, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        out: Tensor = self.down(hidden)
        return out * hidden.sum(-1, keepdim=True)  # a second use of what is split


SPLIT = [spec("first", "skip"), spec("down", "row", split_input=True)]


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (0, 16)])
@pytest.mark.ranks(2)
def test_a_row_that_splits_its_input(shape: tuple[int, ...]) -> None:
    model = assert_same(SplitInput, SPLIT, inputs(*shape))
    assert isinstance(model.down, RowParallelLinear) and model.down.weight.shape == (8, 14 - dist.get_rank())
    assert "split_input" in repr(model.down)


@pytest.mark.ranks(4)
def test_a_row_that_splits_its_input_unevenly_over_four() -> None:
    gathered = [spec("first", "column", gather_output=True), spec("down", "row", split_input=True)]
    for specs in (SPLIT, gathered):
        assert_same(SplitInput, specs, inputs(3, 5, 16), overlap=True)


@pytest.mark.ranks(2)
def test_a_row_that_splits_the_parts_of_a_fused_input() -> None:
    fused = spec("down", "row", split_input=True, shape=[-1, [19, 8]])
    assert_same(SplitInput, [spec("first", "skip"), fused], inputs(5, 16))


class Conv1DMLP(nn.Module):
    """GPT-2's fused projection and its output, with a gate in place of the attention."""

    def __init__(self, width: int = 9) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_attn, self.c_proj = Conv1D(3 * width, 16), Conv1D(16, width)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)  # biases included, which start as zeros

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, -1)
        out: Tensor = self.c_proj(torch.tanh(q * k) + v)
        return out


CONV1D = [spec("c_attn", "column", shape=[3, -1]), spec("c_proj", "row")]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shape", [(5, 16), (3, 5, 16)])
@pytest.mark.ranks(2)
def test_conv1d_column_and_row(shape: tuple[int, ...], overlap: bool) -> None:
    model = assert_same(Conv1DMLP, CONV1D, inputs(*shape), overlap=overlap)
    assert isinstance(model.c_attn, ColumnParallelConv1D) and isinstance(model.c_proj, RowParallelConv1D)
    width = 5 - dist.get_rank()
    assert (model.c_attn.weight.shape, model.c_proj.weight.shape) == ((16, 3 * width), (width, 16))


@pytest.mark.ranks(4)
def test_conv1d_over_four() -> None:
    assert_same(Conv1DMLP, CONV1D, inputs(3, 5, 16))


@pytest.mark.ranks(2)
def test_conv1d_that_gathers_and_splits() -> None:
    rules = [
        spec("c_attn", "column", shape=[3, -1], gather_output=True),
        spec("c_proj", "row", split_input=True),
    ]
    assert_same(Conv1DMLP, rules, inputs(5, 16))


# -- whole layers whose last outputs feed every rank's own heads ------------------------------------------------------


class Latent(nn.Module):
    """What ``kv_a`` gives is expanded by ``kv_b``, but its last 3 features, which every head reads as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_a, self.kv_b, self.o = nn.Linear(16, 9), nn.Linear(6, 20), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.kv_a(x).split([6, 3], -1)
        expanded = self.kv_b(torch.tanh(latent))
        out: Tensor = self.o(expanded * rotary.sin().prod(-1, keepdim=True))
        return out


@pytest.mark.ranks(2)
def test_partial_outputs() -> None:
    rules = [spec("kv_a", "skip", partial_outputs=3), spec("kv_b", "column"), spec("o", "row")]
    model = assert_same(Latent, rules, inputs(3, 5, 16))
    assert isinstance(model.kv_a, PartialOutputLinear) and model.kv_a.count == 3


@pytest.mark.ranks(4)
def test_partial_outputs_over_four_and_without_them() -> None:
    """The rule makes the difference: without it the gradients of what is whole are wrong."""
    cut = [spec("kv_b", "column"), spec("o", "row")]
    assert_same(Latent, [spec("kv_a", "skip", partial_outputs=3), *cut], inputs(3, 5, 16))
    with pytest.raises(AssertionError, match=r"tensors differ .*(?s:.*)kv_a\.weight"):
        assert_same(Latent, [spec("kv_a", "skip"), *cut], inputs(3, 5, 16))


def column_and_row(overlap: bool = False) -> tuple[nn.Sequential, nn.Sequential]:
    """Two linears, whole and cut for this rank."""
    mesh = build_mesh(2, TPConfig())
    torch.manual_seed(0)
    whole, cut = (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)) for _ in range(2))
    cut.load_state_dict(whole.state_dict())
    widths = [even_widths(8, 2)]
    rows, columns = Layout.cut((8, 6), 0, 2, widths), Layout.cut((6, 8), 1, 2, widths)
    for name, layout in (("0.weight", rows), ("0.bias", rows.along(8)), ("1.weight", columns)):
        parameter = cut.get_parameter(name)
        parameter.data = layout.shard(parameter.data, mesh.tp_rank)
    first = ColumnParallelLinear.convert(cut[0], mesh, rows, overlap=overlap, gather=False)
    first.group, first.place = ColumnGroup([first]), 0
    RowParallelLinear.convert(cut[1], mesh, columns)
    return whole, cut


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.ranks(2)
def test_what_is_not_contiguous_is_reduced_and_an_expanded_gradient_is_left_alone(overlap: bool) -> None:
    whole, cut = column_and_row(overlap)
    column_major = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).t()
    inputs = [column_major.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    assert not inputs[0].is_contiguous()
    seed = torch.randn(6, generator=torch.Generator().manual_seed(2)).expand(5, 6)
    before = seed.clone()
    for net, x in zip((whole, cut), inputs):
        net(x).backward(seed)
    assert_close({"x": inputs[1].grad}, {"x": inputs[0].grad}, 1e-5)  # type: ignore[dict-item]
    assert torch.equal(seed, before)
