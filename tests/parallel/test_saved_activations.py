"""Saved activations in parts: the same gradients bit for bit, and a rank keeps its part of what blocks checkpoint."""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_autotp import AutoTPStrategy, TPTrainingConfig
from lightning_autotp.distributed.live import LiveCollectives
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.parallel.saved_activations import SavedActivations
from lightning_autotp.planning.blocks import shared_blocks
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.recipe.make_plan import make_plan
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.consistency import DisagreementError, FirstLook
from lightning_autotp.training.gradients import TPGradients
from tests.helpers import models, small_nets
from tests.helpers.closeness import assert_close
from tests.helpers.corners import corners_of
from tests.helpers.models import Transformer, next_token_loss, quiet_trainer, token_batches
from tests.helpers.plans import column, plan, row
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharded_runs import Record, RecordedModel, assert_parity, batches_for, reference_run, sharded_run
from tests.helpers.sharding import apply_plan

LAYERS = 3
DID_NOTHING = "shard_saved_activations did nothing in the first training step"


class Checkpointed(Transformer):
    """A plain decoder that checkpoints its blocks itself: a block is called inside the checkpoint."""

    reentrant = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def plain(reentrant: bool = False, layers: int = LAYERS) -> Checkpointed:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Checkpointed(layers=layers)
    net.reentrant = reentrant
    return net


def llama(reentrant: bool | None = False, **options: Any) -> Any:
    """Hugging Face's Llama, its blocks checkpointed (not with ``reentrant=None``)."""
    net = models.tiny_llama(**({"kv_heads": 4, "layers": LAYERS} | options))
    if reentrant is not None:
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return net


def qwen3(reentrant: bool = False) -> Any:
    net: Any = small_model(small_config("qwen3"))
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return net.train()


def vocabulary(factory: Callable[..., Any]) -> int:
    return small_config("qwen3").vocab_size if factory is qwen3 else 128


def strategy_for(factory: Callable[..., Any], on: bool, tp_size: int) -> AutoTPStrategy:
    preset = "llama" if factory is plain else None  # its names are Llama's
    return AutoTPStrategy(autotp_size=tp_size, shard_saved_activations=on, preset_model=preset)


def fitted(
    factory: Callable[..., Any], batches: list[Tensor], on: bool, tp_size: int, trainer: Any = None, **options: Any
) -> RecordedModel:
    strategy = strategy_for(factory, on, tp_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=DID_NOTHING)
        return sharded_run(strategy, factory, batches, trainer=trainer or {}, **options)


def assert_bit_equal(got: Record, want: Record) -> None:
    assert len(got.losses) == len(want.losses) > 0 and len(got.gradients) == len(want.gradients) > 0
    assert torch.equal(torch.stack(got.losses), torch.stack(want.losses))
    for ours, theirs in zip([*got.gradients, got.weights], [*want.gradients, want.weights]):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def fit_both(factory: Callable[..., Any], tp_size: int, batches: list[Tensor] | None = None, **options: Any) -> None:
    """With the switch bit for bit as without, and both in the bounds of the unsharded run; two batches a step."""
    batches = batches_for(vocabulary(factory)) if batches is None else batches
    got, want = (fitted(factory, batches, on, tp_size, **options) for on in (True, False))
    assert_bit_equal(got.record, want.record)
    assert_parity(got, partial(reference_run, factory, batches, **options))


@pytest.mark.parametrize(
    ("factory", "reentrant"),
    corners_of(product([llama, qwen3, plain], [False, True]), [(llama, True), (qwen3, False), (plain, True)]),
)
@pytest.mark.ranks(2)
def test_fit_at_tp2(factory: Callable[..., Any], reentrant: bool) -> None:
    fit_both(factory, 2, reentrant=reentrant)


@pytest.mark.parametrize(
    ("factory", "reentrant"),
    corners_of(product([llama, qwen3], [False, True]), [(qwen3, True)]),
)
@pytest.mark.ranks(4)
def test_fit_at_tp4(factory: Callable[..., Any], reentrant: bool) -> None:
    fit_both(factory, 4, reentrant=reentrant)


@pytest.mark.ranks(4)
def test_fit_at_tp2_dp2() -> None:
    fit_both(llama, 2)


@pytest.mark.ranks(4)
def test_hidden_states_that_ranks_do_not_divide() -> None:
    batches = token_batches(n=10, batch=1, seq=7)
    assert 7 * 42 % 4
    fit_both(llama, 4, batches, hidden=42, heads=7, kv_heads=7)


@pytest.mark.ranks(2)
def test_bf16() -> None:
    batches, options = batches_for(128), {"trainer": {"precision": "bf16-true"}}
    got, want = (fitted(llama, batches, on, 2, **options) for on in (True, False))
    assert got.record.weights["model.lm_head.weight"].dtype == torch.bfloat16
    assert_bit_equal(got.record, want.record)


# -- what is kept, what is communicated ------------------------------------------------------------------------------


class Created(TorchDispatchMode):
    """Every storage that operations inside it made, and its size."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.storages |= {ref: s.nbytes() for s in made if (ref := StorageWeakRef(s)) not in given}
        return result

    def live(self) -> int:
        """How many bytes of them are left."""
        time.sleep(0.3)  # gloo's threads let go of what a collective was given a moment after it is done
        return sum(size for storage, size in self.storages.items() if not storage.expired())


class Measured(RecordedModel):
    """Measures what a forward pass leaves in memory, and counts all-gathers of each direction."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.created = Created()
        self.gathers = {"forward": 0, "backward": 0}
        self.direction = "forward"
        self.left: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.created.storages.clear()
        with self.created:
            return super().training_step(batch, batch_idx)

    def on_before_backward(self, loss: Tensor) -> None:
        self.left.append(self.created.live())
        self.direction = "backward"

    def on_after_backward(self) -> None:
        self.direction = "forward"


def measured(
    monkeypatch: pytest.MonkeyPatch, factory: Callable[..., Any], on: bool, tp_size: int, **options: Any
) -> Measured:
    model = Measured(batches_for(128, steps=1), factory, **options)
    original = LiveCollectives.all_gather

    def counted(*args: Any, **kwargs: Any) -> Any:
        model.gathers[model.direction] += 1
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(LiveCollectives, "all_gather", counted)
        strategy = strategy_for(factory, on, tp_size)
        quiet_trainer(strategy=strategy, use_distributed_sampler=False).fit(model)
    return model


@pytest.mark.parametrize(
    ("factory", "reentrant"),
    corners_of(product((llama, plain), (False, True)), [(llama, False)]),
)
@pytest.mark.ranks(4)
def test_a_rank_keeps_its_part_and_gathers_once_a_block(
    monkeypatch: pytest.MonkeyPatch, factory: Callable[..., Any], reentrant: bool
) -> None:
    got, want = (measured(monkeypatch, factory, on, 4, reentrant=reentrant) for on in (True, False))
    # outside a checkpoint that is not reentrant, nothing has told yet that the first block is coming
    blocks = LAYERS - 1 if factory is plain and not reentrant else LAYERS
    hidden = 4 * 12 * 64 * 4  # bytes of one block's input
    assert [a - b for a, b in zip(want.left, got.left)] == [blocks * hidden * 3 // 4] * 2
    assert got.gathers["forward"] == want.gathers["forward"]
    assert got.gathers["backward"] - want.gathers["backward"] == 2 * blocks


# -- by hand, without a Trainer --------------------------------------------------------------------------------------


def by_hand(net: Any, tp_size: int, *rules: dict[str, Any]) -> SavedActivations:
    """Shard ``net`` in place."""
    config = TPTrainingConfig(autotp_size=tp_size, partition_config={"layer_specs": list(rules)} if rules else None)
    made = make_plan(net, config)
    mesh = build_mesh(tp_size, config.tensor_parallel)
    apply_plan(net, made, mesh, rank_device(), overlap=False)
    return SavedActivations(shared_blocks(net, made), mesh, FirstLook(mesh, False).shared)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """Those of the last backward passes, complete, which are forgotten."""
    found = sharded(net)
    if found is not None:
        TPGradients(net, found).complete()
    taken = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return taken


@contextmanager
def counted_gathers(monkeypatch: pytest.MonkeyPatch, size: int) -> Iterator[list[int]]:
    """The sizes of all-gathers of ``size`` elements on each rank."""
    original, seen = LiveCollectives.all_gather, []

    def counted(self: LiveCollectives, part: Tensor, *args: Any) -> Any:
        seen.extend([part.numel()] if part.numel() == size else [])
        return original(self, part, *args)

    with monkeypatch.context() as patched:
        patched.setattr(LiveCollectives, "all_gather", counted)
        yield seen


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.ranks(2)
def test_a_second_backward_pass_over_a_retained_graph(monkeypatch: pytest.MonkeyPatch, reentrant: bool) -> None:
    net = llama(reentrant).to(rank_device())
    saved = by_hand(net, 2)
    tokens = token_batches(n=1)[0].to(rank_device())
    with saved.step():
        loss = next_token_loss(net(tokens).logits, tokens)
    grads = []
    with counted_gathers(monkeypatch, tokens.numel() * 64 // 2) as seen:
        for again in (True, False):
            loss.backward(retain_graph=again)
            grads.append(gradients(net))
    assert len(seen) == 2 * LAYERS
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.ranks(2)
def test_a_backward_pass_inside_the_step_and_a_forward_pass_without_gradients(
    monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    """As manual optimization does it: hooks are still there when the backward pass computes blocks again."""
    net = llama(reentrant).to(rank_device())
    saved = by_hand(net, 2)
    tokens = token_batches(n=1)[0].to(rank_device())
    next_token_loss(net(tokens).logits, tokens).backward()
    want = gradients(net)
    with saved.step(), counted_gathers(monkeypatch, tokens.numel() * 64 // 2) as seen:
        with torch.no_grad():
            net(tokens)
        loss = next_token_loss(net(tokens).logits, tokens)
        assert not seen
        loss.backward()
    got = gradients(net)
    assert len(seen) == LAYERS
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.ranks(2)
def test_blocks_in_two_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Any:
        net: Any = small_model(small_config("t5")).to(rank_device())
        net.gradient_checkpointing_enable({"use_reentrant": False})
        return net.train()

    def losses(net: Any) -> Tensor:
        torch.manual_seed(3)  # of dropout
        loss: Tensor = net(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    net = build()
    tokens = torch.arange(2 * 6, device=rank_device()).view(2, 6) % 11 + 2
    saved = by_hand(net, 2)
    losses(net).backward()
    want = gradients(net)
    with saved.step():
        loss = losses(net)
    with counted_gathers(monkeypatch, tokens.numel() * net.config.d_model // 2) as seen:
        loss.backward()
    got = gradients(net)
    assert len(seen) == net.config.num_layers + net.config.num_decoder_layers
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


class Exponential(nn.Module):
    """Changes in place what the backward pass of ``exp`` needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([small_nets.Net()])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x).exp()
        y.add_(1)
        return y.sum()


NET_RULES = (column("up"), row("down"))


@pytest.mark.filterwarnings(f"ignore:{DID_NOTHING}")
@pytest.mark.ranks(2)
def test_a_saved_tensor_that_is_changed_in_place_is_still_an_error() -> None:
    net = Exponential().to(rank_device())
    saved = by_hand(net, 2, *NET_RULES)
    with saved.step():
        loss = net(torch.ones(4, small_nets.WIDTH, device=rank_device()))
    with pytest.raises(RuntimeError, match=r"a tensor \[4, 8\] .* was changed in place"):
        loss.backward()


@pytest.mark.ranks(2)
def test_inference_mode_between_training_steps() -> None:
    """As Lightning validates over NCCL; its tensors have no versions."""
    net = llama().to(rank_device())
    by_hand(net, 2)
    tokens = token_batches(n=1)[0].to(rank_device())
    with torch.inference_mode():
        logits = net(tokens).logits
    assert torch.equal(logits, net(tokens).logits)


class InPlace(nn.Module):
    """The input of the second block is changed after the first has handed it on."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList([small_nets.Net(), small_nets.Net()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x).mul_(2)
        x = checkpoint(self.layers[1], x, use_reentrant=False)
        return x.square().sum()


@pytest.mark.filterwarnings(f"ignore:{DID_NOTHING}")
@pytest.mark.ranks(2)
def test_what_was_changed_since_it_left_a_block_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    net = InPlace().to(rank_device())
    saved = by_hand(net, 2, *NET_RULES)
    x = torch.ones(4, small_nets.WIDTH, device=rank_device())
    with saved.step():
        loss = net(x)
    with counted_gathers(monkeypatch, x.numel() // 2) as seen:
        loss.backward()
    assert not seen


# -- refusals ---------------------------------------------------------------------------------------------------------


class Crossed(nn.Module):
    """A block that closes the cut before it and opens the next."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out


class Interleaved(nn.Module):
    """What its blocks hand on is each rank's own, and the plan does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.layers = nn.ModuleList([Crossed(), Crossed()])
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        out: Tensor = self.last(x)
        return out


class Layers(nn.Module):
    """A list of single layers: each second one hands on parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])


LAYER_RULES = (column(r"layers\.0"), row(r"layers\.1"))
INTERLEAVED_RULES = (column("first", "up"), row("down", "last"))


@pytest.mark.ranks(2)
def test_blocks_that_hand_on_parts_are_found_by_comparing() -> None:
    net = Interleaved().to(rank_device())
    saved = by_hand(net, 2, *INTERLEAVED_RULES)
    message = r"disagree on the output of layers\.0 .* leave `shard_saved_activations` off"
    with pytest.raises(DisagreementError, match=message), saved.step():
        net(torch.ones(4, 8, device=rank_device()))


def test_blocks_that_open_a_cut_are_refused() -> None:
    net = Layers()
    with pytest.raises(ValueError, match=r"^shard_saved_activations: layers\.0 opens a cut .* in another block"):
        shared_blocks(net, plan(net, *LAYER_RULES))


def test_models_without_a_list_of_blocks_are_refused() -> None:
    net = small_nets.Net()
    with pytest.raises(ValueError, match=r"^shard_saved_activations: it needs a list of blocks .* Net has none"):
        shared_blocks(net, plan(net, *NET_RULES))


def test_sequence_parallel_is_refused() -> None:
    net = llama()
    with pytest.raises(ValueError, match=r"^shard_saved_activations: with sequence_parallel each rank keeps its own"):
        shared_blocks(net, parallel_sequence(net, plan(net)))


@pytest.mark.ranks(2)
def test_the_trainer_refuses_it_beside_sequence_parallel() -> None:
    strategy = AutoTPStrategy(autotp_size=2, shard_saved_activations=True, sequence_parallel=True)
    with pytest.raises(ValueError, match=r"leave shard_saved_activations off, or sequence_parallel\."):
        sharded_run(strategy, llama, batches_for(128, steps=1))


def nothing_done(factory: Callable[..., Any], **options: Any) -> int:
    """How often a fit of several steps says that the switch did nothing, its numbers being those without it."""
    batches = batches_for(128, steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = AutoTPStrategy(autotp_size=2, shard_saved_activations=True)
        got = sharded_run(strategy, factory, batches, **options)
    want = fitted(factory, batches, False, 2, **options)
    assert_bit_equal(got.record, want.record)
    found = [str(w.message) for w in caught if DID_NOTHING in str(w.message)]
    assert all("gradient_checkpointing_enable()" in message for message in found)
    return len(found)


@pytest.mark.ranks(2)
def test_a_model_without_checkpointing_is_told_once() -> None:
    # Lightning lets the first rank of a run warn
    assert nothing_done(llama, reentrant=None) == int(torch.distributed.get_rank() == 0)


def compiled(**options: Any) -> Any:
    net = llama(**options)
    for layer in net.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return net


@pytest.mark.long
@pytest.mark.ranks(2, timeout=240)
def test_blocks_compiled_with_their_checkpoints_inside_are_left_alone() -> None:
    torch._dynamo.reset()
    assert nothing_done(compiled) == int(torch.distributed.get_rank() == 0)


@pytest.mark.ranks(2)
def test_one_rank_a_model_has_nothing_to_share() -> None:
    batches = batches_for(128, steps=1)
    got = fitted(llama, batches, True, 1)
    assert_close(got.record.weights, fitted(llama, batches, False, 1).record.weights, 0.0)


def test_an_output_that_its_own_op_saves_is_freed_without_a_backward_pass() -> None:
    """Softmax, tanh and exp save what they put out: kept by a hook as it is, it would keep itself."""
    mesh: Any = None  # nothing is cut here
    saved = SavedActivations({}, mesh, lambda place, x: None)
    x = torch.ones(3, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=DID_NOTHING)
        with saved.step():
            probabilities = x.softmax(-1)
    alive = weakref.ref(probabilities)
    assert alive() is not None
    del probabilities
    gc.collect()
    assert alive() is None
