"""One collective for all columns that read one input: how often, when not, and that nothing of a pass is kept."""

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

from lightning_autotp.parallel.column_group import ColumnGroup
from lightning_autotp.sharding.state import sharded
from tests.helpers.models import next_token_loss, tiny_llama, token_batches
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharded_layers import (
    LLAMA_SPECS,
    MLP,
    MLP_SPECS,
    assert_same,
    inputs,
    seeded,
    shard,
    spec,
)


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
