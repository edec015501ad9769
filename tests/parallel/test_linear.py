"""The sharded layers alone: outputs and every gradient, inputs' included, are those of the unsharded layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_autotp import TPConfig
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.layout.layout import Layout, even_widths
from lightning_autotp.parallel.column_group import ColumnGroup
from lightning_autotp.parallel.embedding import VocabParallelEmbedding
from lightning_autotp.parallel.head_arguments import take_own_heads
from lightning_autotp.parallel.linear import (
    ColumnParallelConv1D,
    ColumnParallelLinear,
    PartialOutputLinear,
    RowParallelConv1D,
    RowParallelLinear,
)
from lightning_autotp.parallel.reduced_module import Boundary, OnFirstRank
from lightning_autotp.plans.plan import HeadInput
from lightning_autotp.sharding.state import sharded
from tests.helpers.closeness import assert_close
from tests.helpers.models import next_token_loss, tiny_llama, token_batches
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharded_layers import (
    LLAMA_SPECS,
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


@pytest.mark.ranks(2)
def test_gradients_of_gradients_are_an_error() -> None:
    """Not zeros, where the gradient that comes in is a constant, as that of a sum is."""
    model = shard(seeded(MLP), *MLP_SPECS)
    x = inputs(5, 16).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


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


@pytest.mark.parametrize("kind", ["row", "column"])
@pytest.mark.ranks(4)
def test_embedding(kind: str) -> None:
    tokens = torch.tensor([[0, 3, 64, 33], [32, 3, 17, 16]], device=rank_device())
    build = lambda: nn.ModuleDict({"tokens": nn.Embedding(65, 8, padding_idx=3)})  # noqa: E731
    run = lambda model, x: model["tokens"](tokens) * x  # noqa: E731
    rule = spec("tokens", kind, **({"gather_output": True} if kind == "column" else {}))
    model = assert_same(build, [rule], inputs(2, 4, 8), run)
    assert model["tokens"].num_embeddings == 65 and model["tokens"].padding_idx == 3


@pytest.mark.ranks(2)
def test_an_index_outside_the_vocabulary_is_an_error() -> None:
    model = shard(nn.ModuleDict({"tokens": nn.Embedding(65, 8)}), spec("tokens", "row"))
    assert isinstance(model["tokens"], VocabParallelEmbedding)
    for index in (65, -1):
        with pytest.raises(RuntimeError, match="out of range for the 65 embeddings"):
            model["tokens"](torch.tensor([1, index]))


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


# -- one collective for all that read one input -----------------------------------------------------------------------


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often ``torch.distributed.all_reduce`` is called, forward and backward apart."""
    calls: Counter[str] = Counter()
    real = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls["backward" if torch._C._current_graph_task_id() != -1 else "forward"] += 1
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        yield calls


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.ranks(2)
def test_a_decoder_block_costs_two_all_reduces_forward_and_two_backward(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for layers in (1, 3):
        llama = tiny_llama(kv_heads=4, layers=layers)
        model = shard(llama, *LLAMA_SPECS, overlap=overlap)
        tokens = token_batches(n=1)[0].to(rank_device())
        for _ in range(2):  # the first pass learns nothing that the second one needs
            with counted(monkeypatch) as calls:
                next_token_loss(model(tokens).logits, tokens).backward()
            counts.append(calls)
    assert counts[0] == counts[1] and counts[2] == counts[3]
    assert {kind: counts[2][kind] - counts[0][kind] for kind in ("forward", "backward")} == {
        "forward": 4,
        "backward": 4,
    }


@pytest.mark.ranks(2)
def test_no_grad_and_then_grad_on_the_same_input() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            model.up(x), model(x)
        out: Tensor = model(x)
        return out

    assert_same(MLP, MLP_SPECS, inputs(3, 5, 16), run)


@pytest.mark.ranks(2)
def test_inference_mode_and_then_grad() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        with torch.inference_mode():
            model(inputs(3, 5, 16))
        out: Tensor = model(x)
        return out

    assert_same(MLP, MLP_SPECS, inputs(3, 5, 16), run)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.ranks(2)
def test_activation_checkpointing(reentrant: bool) -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        hidden = x * 2
        for _ in range(2):  # the same layers twice: a recomputation follows another forward pass
            hidden = checkpoint(model, hidden, use_reentrant=reentrant)
        return hidden

    assert_same(MLP, MLP_SPECS, inputs(3, 5, 16), run)


@pytest.mark.ranks(2)
def test_an_input_changed_in_place_between_siblings_is_read_anew() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        hidden = x * 2
        gate = model.gate(hidden)
        hidden.add_(1)
        out: Tensor = model.down(torch.sigmoid(gate) * model.up(hidden))
        return out

    # the input of `gate` is changed before its backward pass, so only what does not need it can be trained
    def build() -> nn.Module:
        model = MLP()
        model.gate.weight.requires_grad_(False)
        return model

    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        assert_same(build, MLP_SPECS, inputs(3, 5, 16), run)


@pytest.mark.ranks(2)
def test_an_input_that_also_feeds_a_residual_is_summed_once() -> None:
    assert_same(MLP, MLP_SPECS, inputs(3, 5, 16), lambda model, x: x + model(x) * x)


class CrossAttention(nn.Module):
    """q reads one tensor, k and v another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        memory = x.flip(0)
        out: Tensor = self.o(self.q(x) * torch.tanh(self.k(memory)) + self.v(memory))
        return out


@pytest.mark.ranks(2)
def test_siblings_that_read_different_inputs_part_company(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [spec("[qkv]", "column"), spec("o", "row")]
    assert_same(CrossAttention, specs, inputs(3, 5, 16))
    model = shard(seeded(CrossAttention), *specs)
    group, found = model.q.group, sharded(model)
    assert isinstance(group, ColumnGroup) and found is not None
    for _ in range(2):
        x = inputs(3, 5, 16).requires_grad_()
        with counted(monkeypatch) as calls:
            model(x).sum().backward()
        found.settle()
    assert calls == {"forward": 1, "backward": 2}
    assert group.company[1] == group.company[2] != group.company[0] and not group.results


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.ranks(2)
def test_siblings_that_read_different_inputs_are_recomputed_as_they_were_computed(reentrant: bool) -> None:
    specs = [spec("[qkv]", "column"), spec("o", "row")]

    def run(model: Any, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(model, x * 2, use_reentrant=reentrant)
        return out

    assert_same(CrossAttention, specs, inputs(3, 5, 16), run)


@pytest.mark.ranks(2)
def test_siblings_used_in_turn_on_one_leaf_with_accumulation() -> None:
    """A result that waits when the graph is freed must not be taken in the next micro-batch."""

    def run(model: Any, x: Tensor) -> Tensor:
        for name in ("up", "gate"):
            model.down(getattr(model, name)(x)).sum().backward()
        out: Tensor = model(x)
        return out

    assert_same(MLP, MLP_SPECS, inputs(3, 5, 16), run)


@pytest.mark.ranks(2)
def test_siblings_under_different_autocast_do_not_share() -> None:
    model = shard(seeded(MLP), *MLP_SPECS)
    x = inputs(3, 5, 16).requires_grad_() * 1
    with torch.autocast(x.device.type, torch.bfloat16):
        up = model.up(x)
    assert (up.dtype, model.gate(x).dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.ranks(2)
def test_an_empty_batch() -> None:
    assert_same(MLP, MLP_SPECS, inputs(0, 16))
    assert_same(MLP, MLP_SPECS, inputs(0, 3, 16))


@pytest.mark.ranks(2)
def test_layers_keep_nothing_of_a_pass() -> None:
    model = shard(seeded(MLP), *MLP_SPECS)
    x = inputs(5, 16).requires_grad_() * 1
    out = model(x)
    held = ref(x)
    out.sum().backward()
    del x, out
    assert held() is None
    assert model.up.group.input is None and not model.up.group.results


@pytest.mark.ranks(2)
def test_a_copied_model_computes_on_its_own_weights() -> None:
    import copy

    model = shard(seeded(MLP), *MLP_SPECS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = inputs(5, 16).requires_grad_()
    assert twin(x).abs().max() == 0 and model(x).abs().max() > 0
    assert twin.up.group is not model.up.group and twin.up.mesh is model.up.mesh


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


# -- modules whose inside is cut --------------------------------------------------------------------------------------


class Experts(nn.Module):
    """``[T, H]``, ``[T, E]`` -> ``[T, H]``; stored as ``[E, out, in]``, with a bias that is each expert's."""

    def __init__(self, experts: int = 3, width: int = 5) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * width, 16) / 4)
        self.gate_up_bias = nn.Parameter(torch.randn(experts, 2 * width))
        self.down = nn.Parameter(torch.randn(experts, 16, width) / 2)
        self.down_bias = nn.Parameter(torch.randn(experts, 16))
        self.pass_on = nn.Identity()

    def forward(self, hidden: Tensor, *, routing: Tensor) -> Tensor:
        gate, up = (torch.einsum("th,eoh->teo", hidden, self.gate_up) + self.gate_up_bias).chunk(2, -1)
        out = torch.einsum("teo,eho->teh", torch.sigmoid(gate) * up, self.down) + self.down_bias
        first = routing[:, :1] * self.pass_on(hidden)
        return (out * routing[:, :, None]).sum(1) + first


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.after = nn.Linear(16, 3), Experts(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(x + self.experts(x, routing=self.router(x).softmax(-1)))
        return out


EXPERTS = [
    spec(r"experts\.gate_up$", "column", shape=[-1, 2, -1], partition_dim=1),
    spec(r"experts\.gate_up_bias", "column", shape=[-1, 2], partition_dim=1),
    spec(r"experts\.down$", "row"),
    spec(r"experts\.down_bias", "row"),
    spec(r"experts\.pass_on", "row"),
    spec(r"experts$", "skip", boundary=True),
    spec("router|after", "skip"),
]


@pytest.mark.ranks(2)
def test_a_boundary_around_experts() -> None:
    """Their gradients, those of what enters and, through the routing weights, of the router."""
    model = assert_same(Routed, EXPERTS, inputs(7, 16))
    assert isinstance(model.experts, Boundary) and isinstance(model.experts, Experts)
    assert model.experts.gate_up.shape == (3, 2 * (3 - dist.get_rank()), 16)
    assert dict(model.named_parameters())["experts.down_bias"].shape == (3, 16)


@pytest.mark.ranks(4)
def test_a_boundary_over_four() -> None:
    assert_same(Routed, EXPERTS, inputs(7, 16))


@pytest.mark.ranks(2)
def test_a_bias_in_a_boundary_is_added_once_and_stays_a_parameter() -> None:
    model = shard(seeded(Routed), *EXPERTS)
    bias = model.experts.get_parameter("down_bias")
    assert bias is model.experts.down_bias and "experts.down_bias" in model.state_dict()
    seen: list[Tensor] = []
    forward = Experts.forward

    def looking(self: Experts, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(self.down_bias)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts, "forward", looking)
        model(inputs(7, 16))
    assert torch.equal(seen[0], bias if dist.get_rank() == 0 else torch.zeros_like(bias))
    seen[0].sum().backward()
    assert torch.equal(bias.grad, torch.ones_like(bias))
    assert model.experts.down_bias is bias


@pytest.mark.ranks(2)
def test_what_passes_its_input_on_does_so_once() -> None:
    model = shard(seeded(Routed), *EXPERTS)
    assert isinstance(model.experts.pass_on, OnFirstRank)
    x = inputs(7, 16).requires_grad_()
    out = model.experts.pass_on(x)
    assert torch.equal(out, x if dist.get_rank() == 0 else torch.zeros_like(x))
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, float(dist.get_rank() == 0)))


@pytest.mark.parametrize("frozen", ["router", "experts"])
@pytest.mark.ranks(2)
def test_a_boundary_with_something_frozen(frozen: str) -> None:
    def build() -> nn.Module:
        model = Routed()
        model.get_submodule(frozen).requires_grad_(False)
        return model

    assert_same(build, EXPERTS, inputs(7, 16))


class Pair(Experts):
    def forward(self, hidden: Tensor, *, routing: Tensor) -> Any:
        return super().forward(hidden, routing=routing), routing


@pytest.mark.ranks(2)
def test_a_boundary_that_returns_more_than_a_tensor_is_an_error() -> None:
    model = seeded(Routed)
    model.experts.__class__ = Pair
    shard(model, *EXPERTS)
    with pytest.raises(TypeError, match="returned tuple; a module with a boundary rule must return one tensor"):
        model(inputs(7, 16))


class RoutedInATuple(Routed):
    """Gives its experts what they need as one argument."""

    class Experts(Experts):
        def forward(self, both: Any) -> Tensor:  # type: ignore[override]
            return super().forward(both[0], routing=both[1])

    def __init__(self) -> None:
        super().__init__()
        self.experts.__class__ = self.Experts

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(x + self.experts((x, self.router(x).softmax(-1))))
        return out


@pytest.mark.ranks(2)
def test_a_boundary_that_is_given_its_tensors_in_a_tuple() -> None:
    """Their gradients are summed all the same: never just a rank's part."""
    assert_same(RoutedInATuple, EXPERTS, inputs(7, 16))


@pytest.mark.ranks(2)
def test_a_boundary_under_no_grad_and_checkpointed() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            model(x)
        out: Tensor = checkpoint(model, x * 2, use_reentrant=False)
        return out

    assert_same(Routed, EXPERTS, inputs(7, 16), run)


# -- arguments with an entry for each head ----------------------------------------------------------------------------


class Biased(nn.Module):
    """Scales what each of its heads gets by that head's entry of ``bias``."""

    def __init__(self, heads: int = 6) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.o = nn.Linear(16, 4 * heads), nn.Linear(4 * heads, 16)

    def forward(self, x: Tensor, bias: Tensor, batched: Tensor | None = None) -> Tensor:
        heads = self.q(x).unflatten(-1, (self.num_heads, 4)) * bias[..., None]
        if batched is not None:
            heads = heads * batched.view(len(x), self.num_heads, 1)
        out: Tensor = self.o(heads.flatten(-2))
        return out


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.ranks(4)
def test_a_module_takes_its_own_heads_entries_of_an_argument(by_name: bool) -> None:
    x, bias, batched = inputs(5, 16), inputs(6), inputs(5 * 6)
    parts = ((0, 2), (2, 2), (4, 1), (5, 1))

    def run(model: Any, x: Tensor) -> Tensor:
        attention = model["attn"]
        if sharded(model) is not None:
            take_own_heads(attention, HeadInput("attn", "bias", 0, 6, parts), dist.get_rank())
            take_own_heads(attention, HeadInput("attn", "batched", 0, 6, parts, batched=True), dist.get_rank())
        out: Tensor = attention(x, bias=bias, batched=batched) if by_name else attention(x, bias, batched)
        return out

    model = assert_same(lambda: nn.ModuleDict({"attn": Biased()}), [spec(".*q", "column"), spec(".*o", "row")], x, run)
    assert model["attn"].num_heads == parts[dist.get_rank()][1]


@pytest.mark.ranks(2)
def test_an_argument_without_an_entry_for_each_head_is_left_alone() -> None:
    """A mask that is the same for all heads, or none at all."""

    class Echo(nn.Module):
        def forward(self, x: Tensor, mask: Any = None) -> Any:
            return mask

    module = Echo()
    take_own_heads(module, HeadInput("", "mask", 1, 6, ((0, 3), (3, 3))), dist.get_rank())
    one, all_heads = inputs(2, 1, 4), inputs(2, 6, 4)
    assert module(one, one) is one and module(one) is None and module(one, mask="x") == "x"
    mine = all_heads[:, :3] if dist.get_rank() == 0 else all_heads[:, 3:]
    assert torch.equal(module(one, all_heads), mine) and torch.equal(module(one, mask=all_heads), mine)


# -- conversion in place ----------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A subclass that changes nothing of the computation."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.note = "kept"


@pytest.mark.ranks(2)
def test_layers_stay_the_objects_they_were() -> None:
    class Model(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.up = Linear(16, 24)
            self.shared = self.up

    model = seeded(Model)
    before = {name: (module, module.weight) for name, module in model.named_children() if name != "shared"}
    called: list[str] = []
    model.up.register_forward_hook(lambda *_: called.append("hook"))
    shard(model, *MLP_SPECS, spec("shared", "column"))
    for name, (module, weight) in before.items():
        assert getattr(model, name) is module and module.weight is weight
    assert model.shared is model.up and isinstance(model.up, Linear) and isinstance(model.up, ColumnParallelLinear)
    assert model.up.note == "kept" and "column parallel" in repr(model.up)
    assert isinstance(model.down, RowParallelLinear) and "row parallel" in repr(model.down)
    model(inputs(5, 16))
    assert called == ["hook"]


@pytest.mark.ranks(2)
def test_transformer_encoder_layers_do_not_take_their_fast_path() -> None:
    build = lambda: nn.TransformerEncoder(  # noqa: E731
        nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), 2
    )
    want = seeded(build).eval()
    model = shard(seeded(build), spec(r".*linear1\.", "column"), spec(r".*linear2\.", "row")).eval()
    x = inputs(3, 5, 16)
    with torch.no_grad():
        assert_close({"output": model(x)}, {"output": want(x)}, 1e-5)


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
