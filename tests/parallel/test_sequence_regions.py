"""What the modules around cut layers may do to their input under sequence parallelism, in eager mode and compiled."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.introspection.forward_source import changes_in_place
from lightning_autotp.parallel import overlap
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.gradients import TPGradients
from tests.helpers.closeness import assert_close
from tests.helpers.corners import corners_of
from tests.helpers.models import next_token_loss, token_batches
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharding import apply_plan

VOCABULARY, WIDTH = 50, 16
RULES = {
    "layer_specs": [
        {"patterns": [r".*\.(up|gate)\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.down\.weight$"], "partition_type": "row"},
    ]
}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)
        self.down = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)) * self.gate(x))
        return out


class InPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return super().forward(x)


class Normed(Plain):
    """Has a whole parameter before its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Between(Plain):
    """Changes what its columns read between their calls; only frozen ones may be asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.up.requires_grad_(False)
        self.gate.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        opened = self.up(x)
        x.mul_(2.0)
        out: Tensor = self.down(torch.tanh(opened) * self.gate(x))
        return out


class OnlyUp(Plain):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), mlp

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class Net(nn.Module):
    def __init__(self, kind: type[Plain], shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        first = kind()
        self.layers = nn.ModuleList([Block(first), Block(first if shared else kind())])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


def shard(net: Net, sequence: bool = True, on: bool = False, tp_size: int = 2) -> Any:
    plan = make_plan(net, TPTrainingConfig(autotp_size=tp_size, partition_config=RULES))
    plan = parallel_sequence(net, plan) if sequence else plan
    apply_plan(net, plan, build_mesh(tp_size, TPTrainingConfig().tensor_parallel), rank_device(), overlap=on)
    return net


def gradients(net: Any) -> dict[str, Tensor]:
    found = sharded(net)
    partial = None if found is None else TPGradients(net, found)
    for length in (6, 5):
        tokens = token_batches(n=1, batch=3, seq=length, vocab=VOCABULARY)[0].to(rank_device())
        next_token_loss(net(tokens), tokens).backward()
    if partial is not None:
        partial.complete()
        partial.remove()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def check(kind: type[Plain], *, sequence: bool = True, compiled: bool = False, shared: bool = False) -> Any:
    torch._dynamo.reset()
    want = gradients(Net(kind, shared).to(rank_device()))
    net = shard(Net(kind, shared).to(rank_device()), sequence)
    if compiled:
        for layer in net.layers:
            layer.compile(backend="aot_eager")
    found = sharded(net)
    assert found is not None
    got = gradients(net)
    assert_close(got, {n: found.plan.layouts[n].shard(t, found.mesh.tp_rank) for n, t in want.items()})
    return net


@pytest.mark.parametrize(
    ("kind", "compiled"),
    corners_of(
        product([Plain, InPlace, Normed], [False, True]),
        [(Plain, False), (InPlace, False), (Normed, False), (InPlace, True)],
    ),
)
@pytest.mark.ranks(2, timeout=240)
def test_a_region_that_works_on_its_input(kind: type[Plain], compiled: bool) -> None:
    check(kind, compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compile"])
@pytest.mark.ranks(2, timeout=240)
def test_an_input_that_changes_between_its_columns(compiled: bool) -> None:
    check(Between, sequence=False, compiled=compiled)


@pytest.mark.ranks(2)
def test_a_column_that_is_never_called_has_no_gradient() -> None:
    net = check(OnlyUp)
    assert net.layers[0].mlp.gate.weight.grad is None


@pytest.mark.ranks(2)
def test_one_region_in_two_blocks() -> None:
    check(Plain, shared=True)


@pytest.mark.ranks(2)
def test_a_single_token() -> None:
    whole, net = Net(Plain).to(rank_device()), shard(Net(Plain).to(rank_device()))
    tokens = torch.tensor([[3]], device=rank_device())
    with torch.no_grad():
        assert torch.allclose(net(tokens), whole(tokens), atol=1e-5)


@pytest.mark.ranks(2)
def test_a_copy_is_a_model_of_its_own() -> None:
    net = shard(Net(Plain).to(rank_device()))
    tokens = token_batches(n=1, batch=2, seq=6, vocab=VOCABULARY)[0].to(rank_device())
    net(tokens)
    twin = copy.deepcopy(net)
    group, other = net.layers[0].mlp.up.group, twin.layers[0].mlp.up.group
    assert other is not group and other.members[0] is twin.layers[0].mlp.up and not other.results
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    want = gradients(Net(Plain).to(rank_device()))
    found = sharded(twin)
    assert found is not None
    got = gradients(twin)
    assert_close(got, {n: found.plan.layouts[n].shard(t, found.mesh.tp_rank) for n, t in want.items()})


def test_changes_in_place_are_read_from_the_code() -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

    class Adds(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return super().forward(x)

    class Helped(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.doubled(x))

        def doubled(self, x: Tensor) -> Tensor:
            x[:] = 2 * x
            return x

    assert all(changes_in_place(cls) for cls in (InPlace, Adds, Helped))
    assert not any(changes_in_place(cls) for cls in (Plain, Normed, LlamaAttention, LlamaMLP))


@pytest.mark.ranks(2)
def test_a_measurement_that_fails_leaves_nothing_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = shard(Net(Plain).to(rank_device(), torch.bfloat16), on=True)
    found = sharded(net)
    assert found is not None
    monkeypatch.setattr(overlap, "_shares", lambda mesh: True)
    monkeypatch.setattr(overlap, "_read", lambda path: {})
    monkeypatch.setattr(overlap, "_machine", lambda mesh: "one that has no symmetric memory")

    def measured(work: Any, device: torch.device) -> float:
        if found.overlap.fused_from:
            raise RuntimeError("no symmetric memory")
        return 1.0

    monkeypatch.setattr(overlap, "_milliseconds", measured)
    found.overlap.measure()
    assert found.overlap.fused_from == {}


@pytest.mark.ranks(3)
def test_sizes_that_ranks_do_not_divide_are_measured_and_no_random_number_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = shard(Net(Plain).to(rank_device(), torch.bfloat16), on=True, tp_size=3)
    found = sharded(net)
    assert found is not None
    seen: set[int] = set()
    original = overlap.Overlap._run

    def run(self: overlap.Overlap, form: str, x: Tensor, weights: list[Tensor]) -> Any:
        seen.add(x.shape[0] * (3 if form.startswith("gather") else 1))
        self.fused_from = {}  # what is fused cannot run here
        return original(self, form, x, weights)

    monkeypatch.setattr(overlap, "SIZES", (32, 64))
    monkeypatch.setattr(overlap.Overlap, "_run", run)
    monkeypatch.setattr(overlap, "_milliseconds", lambda work, device: (work(), 1.0)[1])
    before = torch.get_rng_state()
    for form in found.overlap.weights:
        assert found.overlap._times(form, None) == {"nccl": [1.0, 1.0], "fused": [1.0, 1.0]}
    assert seen == {30, 63}
    assert torch.equal(torch.get_rng_state(), before)
