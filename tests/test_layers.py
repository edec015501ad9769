"""The sharded layers alone: outputs and every gradient, inputs' included, are those of the unsharded layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_autotp import TPConfig, TPTrainingConfig, make_plan
from lightning_autotp.apply import apply_plan, sharded
from lightning_autotp.mesh import build_mesh
from lightning_autotp.parallel.embedding import VocabParallelEmbedding
from lightning_autotp.parallel.linear import ColumnGroup, ColumnParallelLinear, RowParallelLinear
from tests.closeness import assert_close
from tests.models import next_token_loss, tiny_llama, token_batches
from tests.rank_pool import rank_device


def spec(pattern: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"patterns": [pattern], "partition_type": kind, **more}


def shard(model: nn.Module, *specs: dict[str, Any], overlap: bool = False) -> Any:
    """Shard ``model`` in place over all ranks of the test."""
    config = TPTrainingConfig(autotp_size=dist.get_world_size(), partition_config={"layer_specs": list(specs)})
    mesh = build_mesh(config.size, TPConfig())
    apply_plan(model, make_plan(model, config), mesh, rank_device(), overlap=overlap)
    return model


class MLP(nn.Module):
    """Column, row."""

    def __init__(self, width: int = 24, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(16, width, bias=bias)
        self.gate = nn.Linear(16, width, bias=bias)
        self.down = nn.Linear(width, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return out


MLP_SPECS = [spec("up|gate", "column"), spec("down", "row")]


def seeded(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(3)
    return build().to(rank_device())


def gradients(model: nn.Module, run: Callable[[Any, Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """The output, its input's gradient and every parameter's gradient, of one forward and backward pass."""
    x = x.detach().clone().requires_grad_()
    out = run(model, x)
    torch.manual_seed(5)
    (out * torch.randn_like(out)).sum().backward()
    assert x.grad is not None
    found = {"output": out.detach(), "input": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    build: Callable[[], nn.Module],
    specs: list[dict[str, Any]],
    x: Tensor,
    run: Callable[[Any, Tensor], Tensor] = lambda model, x: model(x),
    overlap: bool = False,
) -> Any:
    """The sharded module's output and gradients are this rank's part of the unsharded one's."""
    want = gradients(seeded(build), run, x)
    model = shard(seeded(build), *specs, overlap=overlap)
    got = gradients(model, run, x)
    found = sharded(model)
    assert found is not None
    layouts = found.plan.layouts
    parts = {n: layouts[n].shard(t, found.mesh.tp_rank) if n in layouts else t for n, t in want.items()}
    assert_close(got, parts, 1e-5)
    return model


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(rank_device())


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


LLAMA_SPECS = [
    spec(r".*\.(q|k|v|gate|up)_proj\.weight", "column"),
    spec(r".*\.(o|down)_proj\.weight", "row"),
    spec(r".*embed_tokens\.weight", "row"),
    spec(r".*lm_head\.weight", "column", gather_output=True),
]


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
