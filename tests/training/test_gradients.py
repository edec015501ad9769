"""Gradients between the backward pass and the optimizer: what ranks share is completed, and counts once in the norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lightning_autotp import TPConfig, TPTrainingConfig, make_plan
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.gradients import TPGradients
from tests.helpers.closeness import assert_close
from tests.helpers.models import attend
from tests.helpers.plans import config_plan
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharding import apply_plan
from tests.helpers.small_nets import everyones

DIM = 4


class Grouped(nn.Module):
    """Attention over ``[B, S, 16]`` whose keys are normed alike in all heads; its key heads may be few."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim, self.num_heads = DIM, heads
        self.q_proj, self.o_proj = nn.Linear(16, heads * DIM), nn.Linear(heads * DIM, 16)
        self.k_proj, self.v_proj = nn.Linear(16, kv_heads * DIM), nn.Linear(16, kv_heads * DIM)
        self.k_norm = nn.RMSNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, DIM))).flatten(-2)
        out: Tensor = self.o_proj(attend(self.q_proj(x), k, self.v_proj(x), DIM))
        return out


class Packed(nn.Module):
    """The same with q, k and v in one projection: parts of it are a rank's alone, parts are shared."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim, self.num_heads, self.num_kv_heads = DIM, heads, kv_heads
        self.qkv_proj = nn.Linear(16, (heads + 2 * kv_heads) * DIM)
        self.o_proj = nn.Linear(heads * DIM, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).split([self.num_heads * DIM, self.num_kv_heads * DIM, self.num_kv_heads * DIM], -1)
        out: Tensor = self.o_proj(attend(q, k, v, DIM))
        return out


class Net(nn.Module):
    def __init__(self, kind: Any, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), kind(heads, kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attn(self.norm(x))
        return out


def rules(packed: Any = (["q", "kv", "kv"], -1)) -> dict[str, Any]:
    return {
        "layer_specs": [
            {"patterns": [r".*\.[qkv]_proj"]},
            {"patterns": [r".*\.qkv_proj"], "shape": packed},
            {"patterns": [r".*\.o_proj"], "partition_type": "row"},
            {"patterns": [r".*\.k_norm"], "partition_type": "skip", "grad_allreduce": True},
        ]
    }


def build(kind: Any, heads: int, kv_heads: int) -> Net:
    torch.manual_seed(3)
    return Net(kind, heads, kv_heads).to(rank_device())


def shard(model: Net, tp_size: int | None = None, compiled: bool = False) -> TPGradients:
    config = TPTrainingConfig(autotp_size=tp_size or dist.get_world_size(), partition_config=rules())
    plan = make_plan(model, config)
    apply_plan(model, plan, build_mesh(config.size, TPConfig()), rank_device(), overlap=False)
    found = sharded(model)
    assert found is not None
    return TPGradients(model, found, compiled=compiled)


def backward(model: nn.Module, batches: int = 1, after_each: Callable[[], None] = lambda: None) -> None:
    """Backward passes of ``batches`` micro-batches, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(batches):
        x, target = (torch.randn(2, 5, 16, generator=generator).to(rank_device()) for _ in range(2))
        functional.mse_loss(model(x), target).backward()
        after_each()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_parts(model: nn.Module, full: dict[str, Tensor]) -> dict[str, Tensor]:
    found = sharded(model)
    assert found is not None
    return {name: found.plan.layouts[name].shard(tensor, found.mesh.tp_rank) for name, tensor in full.items()}


def full_norm(model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in gradients(model).values()]).norm()


def assert_shared_alike(model: nn.Module) -> None:
    """What several ranks hold has bit-equal gradients on all of them."""
    found = sharded(model)
    assert found is not None
    shared = 0
    for name, grad in gradients(model).items():
        layout, theirs = found.plan.layouts[name], everyones(grad)[: found.mesh.tp_size]
        if layout.is_replicated:
            assert all(torch.equal(other, theirs[0]) for other in theirs), name
            continue
        held: dict[int, Tensor] = {}
        for rank, other in enumerate(theirs):
            indices = [index for start, length in layout.parts[rank] for index in range(start, start + length)]
            for index, slice_ in zip(indices, other.unbind(layout.dim or 0), strict=True):
                shared += index in held
                assert torch.equal(held.setdefault(index, slice_), slice_), f"{name} at {index}"
    assert shared, "or there was nothing to compare"


# heads, key heads: shared by two and two ranks; by all; unevenly; two ranks share a head, and two have their own
SHARED = [(8, 2), (8, 1), (6, 2), (12, 3)]


@pytest.mark.parametrize("heads", SHARED)
@pytest.mark.parametrize("kind", [Grouped, Packed])
@pytest.mark.ranks(4)
def test_completed_gradients_are_the_unsharded_ones(kind: Any, heads: tuple[int, int]) -> None:
    reference = build(kind, *heads)
    backward(reference)
    model = build(kind, *heads)
    completed = shard(model)
    backward(model)
    before = gradients(model)
    completed.complete()
    assert_close(gradients(model), own_parts(model, gradients(reference)), 1e-5)
    assert_shared_alike(model)
    changed = {name for name, grad in gradients(model).items() if not torch.equal(grad, before[name])}
    if heads != (12, 3) or dist.get_rank() < 2:
        assert changed, "or there was nothing to complete"
    assert not changed & {"attn.q_proj.weight", "attn.o_proj.weight", "norm.weight"}


@pytest.mark.parametrize("heads", SHARED)
@pytest.mark.parametrize("kind", [Grouped, Packed])
@pytest.mark.ranks(4)
def test_norm_is_that_of_the_unsharded_model(kind: Any, heads: tuple[int, int]) -> None:
    reference = build(kind, *heads)
    backward(reference)
    want = full_norm(reference)
    model = build(kind, *heads)
    completed = shard(model)
    backward(model)
    completed.complete()
    norm = completed.total_norm(model.parameters())
    assert torch.allclose(norm, want, rtol=1e-5)
    assert all(torch.equal(other, norm) for other in everyones(norm)), "the same on every rank"
    keys = [p for name, p in model.named_parameters() if "k_proj" in name or "qkv_proj" in name]
    wanted = [p.grad for name, p in reference.named_parameters() if "k_proj" in name or "qkv_proj" in name]
    some = torch.stack([g.norm() for g in wanted if g is not None]).norm()
    assert torch.allclose(completed.total_norm(keys), some, rtol=1e-5), "of some parameters only"


@pytest.mark.ranks(4)
def test_clipping_scales_shared_gradients_alike() -> None:
    reference = build(Grouped, 8, 2)
    backward(reference)
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    model = build(Grouped, 8, 2)
    completed = shard(model)
    backward(model)
    completed.complete()
    completed.clip_norm(model.parameters(), 0.01)
    assert_close(gradients(model), own_parts(model, gradients(reference)), 1e-5)
    assert_shared_alike(model)
    assert torch.allclose(completed.total_norm(model.parameters()), torch.tensor(0.01), rtol=1e-4)


@pytest.mark.parametrize("kind", [Grouped, Packed])
@pytest.mark.ranks(4)
def test_completing_twice_changes_nothing(kind: Any) -> None:
    model = build(kind, 6, 2)
    completed = shard(model)
    backward(model)
    completed.complete()
    once = gradients(model)
    completed.complete()
    assert all(torch.equal(grad, once[name]) for name, grad in gradients(model).items())


@pytest.mark.ranks(4)
def test_completing_costs_one_all_reduce_a_set_of_ranks_and_then_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Grouped, 12, 3)
    completed = shard(model)
    backward(model)
    groups: list[Any] = []
    real = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        groups.append(kwargs["group"])
        return real(*args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", counting)
    completed.complete()
    assert len(groups) == (2 if dist.get_rank() < 2 else 1), "for the norm of all, and for the key heads of two ranks"
    completed.complete()
    assert len(groups) == (2 if dist.get_rank() < 2 else 1)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", [Grouped, Packed])
@pytest.mark.ranks(4)
def test_gradients_accumulate_whenever_they_are_completed(kind: Any, each: bool) -> None:
    """Two micro-batches; completing after the first (to log a norm) does not count it twice."""
    reference = build(kind, 8, 2)
    backward(reference, 2)
    model = build(kind, 8, 2)
    completed = shard(model)
    backward(model, 2, completed.complete if each else lambda: None)
    completed.complete()
    assert_close(gradients(model), own_parts(model, gradients(reference)), 1e-5)
    assert_shared_alike(model)
    assert torch.allclose(completed.total_norm(model.parameters()), full_norm(reference), rtol=1e-5)


@pytest.mark.ranks(4)
def test_next_step_starts_anew() -> None:
    """After zero_grad, gradients are partial again and are completed again."""
    reference = build(Grouped, 8, 2)
    backward(reference)
    model = build(Grouped, 8, 2)
    completed = shard(model)
    for _ in range(2):
        model.zero_grad()
        backward(model)
        completed.complete()
    assert_close(gradients(model), own_parts(model, gradients(reference)), 1e-5)


@pytest.mark.parametrize("frozen", ["k_proj", "v_proj", "q_proj"])
@pytest.mark.ranks(4)
def test_frozen_and_thawed_parameters(frozen: str) -> None:
    reference, model = (build(Grouped, 8, 2) for _ in range(2))
    for one in (reference, model):
        one.attn.get_submodule(frozen).requires_grad_(False)
    completed = shard(model)
    for trains in (False, True):
        for one in (reference, model):
            one.attn.get_submodule(frozen).requires_grad_(trains)
            one.zero_grad()
            backward(one)
        completed.complete()
        assert_close(gradients(model), own_parts(model, gradients(reference)), 1e-5)
        assert (f"attn.{frozen}.weight" in gradients(model)) is trains


@pytest.mark.ranks(4)
def test_without_its_hooks_gradients_stay_a_ranks_own() -> None:
    model = build(Grouped, 8, 2)
    completed = shard(model)
    completed.remove()
    backward(model)
    before = gradients(model)
    completed.complete()
    assert all(torch.equal(grad, before[name]) for name, grad in gradients(model).items())
    with pytest.raises(AssertionError):
        assert_shared_alike(model)


@pytest.mark.ranks(4)
def test_nothing_is_shared_where_key_heads_are_enough() -> None:
    reference = build(Packed, 8, 4)
    backward(reference)
    model = build(Packed, 8, 4)
    completed = shard(model)
    assert completed.partial == {}
    backward(model)
    assert_close(gradients(model), own_parts(model, gradients(reference)), 1e-5)
    assert torch.allclose(completed.total_norm(model.parameters()), full_norm(reference), rtol=1e-5)


@pytest.mark.ranks(4)
def test_double_precision_is_kept() -> None:
    reference = build(Grouped, 6, 2).double()
    model = build(Grouped, 6, 2).double()
    completed = shard(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    for one in (reference, model):
        one(x).square().mean().backward()
    completed.complete()
    assert_close(gradients(model), own_parts(model, gradients(reference)), 1e-12)
    norm = completed.total_norm(model.parameters())
    assert norm.dtype == torch.float64 and torch.allclose(norm, full_norm(reference), rtol=1e-12)


@pytest.mark.ranks(6)
def test_two_models_side_by_side_complete_their_own() -> None:
    """Three ranks each, of which two share a key head; each model has seen data of its own."""
    first = dist.get_rank() < 3
    reference = build(Grouped, 6, 2)
    model = build(Grouped, 6, 2)
    completed = shard(model, 3)
    for one in (reference, model):
        backward(one, 1 if first else 2)
    completed.complete()
    assert_close(gradients(model), own_parts(model, gradients(reference)), 1e-5)
    assert torch.allclose(completed.total_norm(model.parameters()), full_norm(reference), rtol=1e-5)
    shares = {run.owners for runs in completed.partial.values() for run in runs}
    assert shares == ({(0, 1), (0, 1, 2)} if dist.get_rank() % 3 < 2 else {(0, 1, 2)})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.ranks(2)
def test_whole_gradients_of_compiled_models_are_averaged(compiled: bool) -> None:
    """Compiled kernels are picked by timing them, and round otherwise on another rank; so do these gradients."""
    model = build(Grouped, 8, 4)
    found = shard(model, compiled=compiled)
    assert not model.norm.bias.requires_grad_(False).requires_grad
    noise = 1e-3 * (dist.get_rank() + 1)
    model.norm.weight.register_hook(lambda grad: grad + noise)
    backward(model, batches=2)
    before = gradients(model)
    found.complete(average=False)
    assert torch.equal(gradients(model)["norm.weight"], before["norm.weight"])
    found.complete()
    found.complete()  # once more changes nothing
    after = gradients(model)
    want = before["norm.weight"] + (2 * (1.5e-3 - noise) if compiled else 0)
    torch.testing.assert_close(after["norm.weight"], want, rtol=1e-6, atol=1e-7)
    first = after["norm.weight"].clone()
    dist.broadcast(first, src=0)
    assert torch.equal(after["norm.weight"], first) == (compiled or dist.get_rank() == 0)
    cut = "attn.o_proj.weight"
    assert torch.equal(after[cut], before[cut]) and "norm.bias" not in after


@pytest.mark.ranks(2)
def test_whole_parameters_of_every_kind_in_a_compiled_model() -> None:
    """Integers take no gradient; sparse gradients, and what fp16 cannot sum; one that is not there on one rank."""
    model: Any = build(Grouped, 8, 4)
    model.index = nn.Parameter(torch.arange(3, device=rank_device()), requires_grad=False)
    model.table = nn.Embedding(5, 2, sparse=True, device=rank_device())
    model.fp16 = nn.Parameter(torch.ones(2, dtype=torch.float16, device=rank_device()))
    model.rare = nn.Parameter(torch.ones(2, device=rank_device()))
    found = shard(model, compiled=True)
    backward(model)
    model.table(torch.tensor([1, 1], device=rank_device())).sum().backward()
    (model.fp16 * 40000).sum().backward()
    if dist.get_rank() == 1:
        model.rare.sum().backward()
    found.complete()
    assert torch.equal(model.fp16.grad, torch.full_like(model.fp16, 40000))
    assert torch.equal(model.table.weight.grad.to_dense()[1], torch.full_like(model.table.weight[1], 2))
    assert (model.rare.grad is None) == (dist.get_rank() == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.ranks(4)
def test_norm_counts_every_element_once_in_every_precision(dtype: torch.dtype, kv_heads: int) -> None:
    model = small_model(small_config("qwen2", kv_heads=kv_heads), tied=True).to(dtype)
    plan = config_plan(model, 4)
    apply_plan(model, plan, build_mesh(4, TPConfig()), rank_device(), overlap=False)
    found = sharded(model)
    assert found is not None
    gradients, total = TPGradients(model, found), 0.0
    for name, parameter in model.named_parameters():
        full = torch.randn(plan.layouts[name].shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
        parameter.grad = plan.layouts[name].shard(full, found.mesh.tp_rank)
        total += float(full.double().square().sum())
    assert float(gradients.total_norm(model.parameters())) == pytest.approx(total**0.5, rel=1e-5)
