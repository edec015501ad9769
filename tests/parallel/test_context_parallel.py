"""Context parallelism: ranks that split the tokens of a batch give the unsharded numbers, on all ranks in lockstep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.planning.context_parallel import blocks_of
from lightning_autotp.sharding.shard import shard
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.gradients import TPGradients
from tests.helpers.closeness import assert_close

ROWS, TOKENS, HEADS, SIZE = 3, 13, 4, 32


def hugging_face(name: str, attention: str, kv_heads: int = 2, **changes: Any) -> Any:
    config = small_config(name, kv_heads=kv_heads)
    for field, value in changes.items():
        setattr(config, field, value)
    model: Any = small_model(config).double()
    model.config._attn_implementation = attention
    return model.train()


def tokens_of(packed: bool = False, tokens: int = TOKENS) -> dict[str, Tensor]:
    ids = torch.randint(5, 100, (ROWS, tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    if packed:  # two documents a row
        batch["position_ids"] = torch.tensor([[*range(6), *range(tokens - 6)]] * ROWS)
    return batch


def on_ranks(model: nn.Module, batch: dict[str, Tensor], tp_size: int, cp_size: int, step: Any) -> list[Any]:
    switches = TPTrainingConfig(autotp_size=tp_size, context_parallel_size=cp_size)
    plan = make_plan(model, switches, tp_size, warn=False)

    def work(mesh: Mesh) -> Any:
        made = copy.deepcopy(model)
        shard(made, plan, mesh, switches, device=torch.device("cpu"))
        return step(made, batch, mesh)

    return Lockstep[Any](tp_size, cp_size=cp_size).run(work)


def trained(model: Any, batch: dict[str, Tensor], mesh: Mesh | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    found = sharded(model)
    gradients = None if found is None else TPGradients(model, found)
    loss = model(**batch).loss
    loss.backward()
    if gradients is not None and mesh is not None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                mean = mesh.collectives.all_reduce(parameter.grad.contiguous(), "replicas") / mesh.replicas
                parameter.grad = mean
        gradients.complete()
        gradients.remove()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_trains(model: nn.Module, batch: dict[str, Tensor], tp_size: int, cp_size: int, bound: float = 1e-9) -> None:
    loss, want = trained(copy.deepcopy(model), batch)
    layouts = make_plan(model, TPTrainingConfig(autotp_size=tp_size), tp_size, warn=False).layouts
    for number, (mine, got) in enumerate(on_ranks(model, batch, tp_size, cp_size, trained)):
        assert_close({"loss": mine}, {"loss": loss}, bound, f"loss of rank {number}")
        part = {name: layouts[name].shard(gradient, number % tp_size) for name, gradient in want.items()}
        assert_close(got, part, bound, f"gradient of rank {number}")


CASES: dict[str, tuple[Any, bool, int, int]] = {
    "llama, uneven tokens": (("llama", "sdpa"), False, 2, 2),
    "llama, packed": (("llama", "sdpa"), True, 1, 4),
    "llama, eager": (("llama", "eager"), False, 1, 2),
    "llama, keys for two ranks each": (("llama", "sdpa", 2), False, 1, 4),
    "llama, as many keys as queries": (("llama", "sdpa", 8), False, 2, 2),
    "qwen3, packed": (("qwen3", "sdpa"), True, 2, 2),
    "mistral, sliding": (("mistral", "sdpa"), False, 2, 2),
    "mistral, sliding, eager, packed": (("mistral", "eager"), True, 1, 2),
    "gpt_oss, sinks": (("gpt_oss", "eager"), False, 2, 2),
    "gpt2": (("gpt2", "sdpa"), False, 1, 2),
    "llama4, chunks": (("llama4_text", "sdpa"), False, 1, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hugging_face_model_trains_as_unsharded(case: str) -> None:
    made, packed, tp_size, cp_size = CASES[case]
    torch.set_default_dtype(torch.float64)
    try:
        model = hugging_face(*made)
        bound = 1e-9 if made[0] not in ("gpt_oss", "llama4_text") else 1e-5  # their routers compute in fp32
        assert_trains(model, tokens_of(packed), tp_size, cp_size, bound)
    finally:
        torch.set_default_dtype(torch.float32)


class Attention(nn.Module):
    """Hand-written, grouped, with rotations that it is given and a mask."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv, self.out = nn.Linear(SIZE, 2 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = self.qkv(x).split([SIZE, SIZE // 2, SIZE // 2], -1)
        q, k, v = (each.view(rows, tokens, -1, SIZE // HEADS).transpose(1, 2) for each in (q, k, v))
        q, k = q * freqs, k * freqs
        if self.way == "own mask":
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if self.way == "by hand":
            k, v = (each.repeat_interleave(2, 1) for each in (k, v))
            y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.attention, self.norm = Attention(way), nn.LayerNorm(SIZE)
        self.mlp = nn.Sequential(nn.Linear(SIZE, 48), nn.GELU(), nn.Linear(48, SIZE))
        self.way = way

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, first: Tensor, gate: Tensor) -> Tensor:
        if self.way == "shift":
            x = x + F.pad(x, (0, 0, 1, -1))
        x = x + self.attention(self.norm(x), freqs, mask) + 0.1 * first
        return x + gate * self.mlp(x)


class Net(nn.Module):
    """What a language model is at least; ``way``: how its blocks differ."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(100, SIZE)
        self.blocks = nn.ModuleList(Block(way) for _ in range(2))
        self.gate = nn.Linear(1, SIZE)
        self.freqs = nn.Buffer(torch.randn(64, SIZE // HEADS))
        self.head = nn.Linear(SIZE, 100, bias=False)
        self.head.weight = self.embed.weight
        self.way = way

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = first = self.embed(input_ids)
        tokens = x.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        freqs, gate = self.freqs[:tokens], self.gate(x.new_ones(1))
        for block in self.blocks:
            x = block(x, freqs, mask, first, gate)
        logits = self.head(x)[:, :-1]
        return type("Output", (), {"loss": F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())})


@pytest.mark.parametrize("sizes", [(1, 2), (1, 4)], ids=str)
def test_a_hand_written_model_trains_as_unsharded(sizes: tuple[int, int]) -> None:
    """Blocks get rotations ``[S, D]``, a mask, the embeddings once more, and a gate whose gradient is a sum."""
    assert_trains(Net().double(), tokens_of(), *sizes)


@pytest.mark.parametrize(
    ("way", "said"), [("own mask", "is given a mask .* made in the block"), ("by hand", "no block up to blocks.1")]
)
def test_what_cannot_be_right_is_refused_by_name(way: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        on_ranks(Net(way), tokens_of(), 1, 2, trained)


def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_work() -> None:
    with pytest.raises(ValueError, match="8 query heads, 4 on a tensor parallel rank, .* use 1 or 2 or 4"):
        on_ranks(hugging_face("llama", "sdpa"), tokens_of(), 2, 8, trained)
    with pytest.raises(ValueError, match="attention in blocks.0 has 4 query heads, .* use 1 or 2 or 4"):
        on_ranks(Net(), tokens_of(), 1, 3, trained)


def test_fewer_tokens_than_ranks_are_not_split() -> None:
    assert_trains(Net().double(), tokens_of(tokens=3), 1, 4)


def test_nothing_is_split_without_gradients() -> None:
    """What each rank computes then is all of it, so caches and generation are the unsharded ones."""
    model = hugging_face("llama", "sdpa").eval()
    prompts = tokens_of()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = copy.deepcopy(model).generate(prompts, **options)

    def generated(made: Any, batch: dict[str, Tensor], mesh: Mesh) -> Tensor:
        trained(made.train(), batch, mesh)  # a step before, and its cache
        found: Tensor = made.eval().generate(batch["input_ids"], **options)
        return found

    for got in on_ranks(model, tokens_of(), 1, 2, generated):
        assert torch.equal(got, want)


def test_a_cache_of_a_training_step_is_refused_later() -> None:
    def stepped(made: Any, batch: dict[str, Tensor], mesh: Mesh) -> None:
        cache = made(**batch, use_cache=True).past_key_values
        with torch.no_grad():
            made(input_ids=batch["input_ids"][:, :1], past_key_values=cache)

    with pytest.raises(ValueError, match="this cache was filled in a training step"):
        on_ranks(hugging_face("llama", "sdpa"), tokens_of(), 1, 2, stepped)


@pytest.mark.parametrize("name", ["hidden_states", "router_logits"])
def test_what_is_collected_in_blocks_is_refused(name: str) -> None:
    def stepped(made: Any, batch: dict[str, Tensor], mesh: Mesh) -> None:
        made(**batch, **{f"output_{name}": True})

    with pytest.raises(ValueError, match=f"{name} are collected inside of the blocks"):
        on_ranks(hugging_face("mixtral", "sdpa").float(), tokens_of(), 1, 2, stepped)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_train_as_unsharded(reentrant: bool) -> None:
    """Also where another batch goes forward before the first goes backward."""
    model = hugging_face("llama", "sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            one = self.model(input_ids=input_ids, labels=labels).loss
            other = self.model(input_ids=input_ids[:, :9], labels=labels[:, :9]).loss
            return type("Output", (), {"loss": one + other})

    assert_trains(Two().train(), tokens_of(), 2, 2)


def test_activations_shrink() -> None:
    """Of what autograd keeps, the blocks' part is halved on each of two ranks."""
    model = hugging_face("llama", "sdpa", num_hidden_layers=6, layer_types=None)

    def kept(made: Any, batch: dict[str, Tensor], mesh: Mesh | None = None) -> int:
        storages: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            made.model(input_ids=batch["input_ids"], use_cache=False)
        return sum(storages.values())

    batch = tokens_of(tokens=64)
    whole = kept(copy.deepcopy(model), batch)
    each = on_ranks(model, batch, 1, 2, kept)
    assert max(each) < 0.6 * whole


@pytest.mark.parametrize("switch", ["sequence_parallel", "shard_saved_activations", "compile"])
def test_switches_that_do_not_go_together_are_refused(switch: str) -> None:
    with pytest.raises(ValueError, match=f"context_parallel_size: .* turn `{switch}` off"):
        TPTrainingConfig.load({"context_parallel_size": 2, switch: True})
    with pytest.raises(ValueError, match="context_parallel_size: 0 is not a positive number"):
        TPTrainingConfig(context_parallel_size=0)


def test_the_blocks_are_the_list_that_holds_most() -> None:
    assert blocks_of(hugging_face("llama", "sdpa"))[0] == "model.layers.0"
    with pytest.raises(ValueError, match="it needs a list of blocks"):
        blocks_of(nn.Linear(2, 2))
