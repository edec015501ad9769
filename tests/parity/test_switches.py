"""The speed switches of the strategy, alone and together: every combination trains the unsharded run's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_autotp import AutoTPStrategy, TPTrainingConfig, make_plan
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.training.compile import compile_blocks, is_compiled
from tests.helpers import models
from tests.helpers.corners import corners_of
from tests.helpers.loss_runs import LossModel, checkpointed_llama
from tests.helpers.sharded_runs import RecordedModel, assert_parity, batches_for, reference_run, sharded_run

SWITCHES = ("sequence_parallel", "loss_parallel", "tp_overlap_comm", "compile")
EAGER, COMPILED = (
    [{name: name in on for name in SWITCHES} for on in switches]
    for switches in (
        (*combinations(SWITCHES[:3], 2), SWITCHES[:3]),
        (("compile",), ("sequence_parallel", "compile"), SWITCHES),
    )
)

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]
"""What blocks are compiled with. Tracing and differentiating are ours to get right; C++ compilers take a minute."""


def name_of(switches: dict[str, bool]) -> str:
    return "+".join(name.partition("_")[0] for name, on in switches.items() if on)


def check(
    tp_size: int,
    switches: dict[str, Any],
    factory: Any = models.tiny_llama,
    reference: Any = models.tiny_llama,
    backend: str = "inductor",
    **trainer: Any,
) -> LossModel:
    torch._dynamo.reset()
    options: dict[str, Any] = {"kv_heads": 2, "tied": True, "vocab": 131}
    batches = batches_for(131)
    model = LossModel(batches, factory, "hf", **options)
    defaults = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "use_distributed_sampler": False}
    strategy = AutoTPStrategy(autotp_size=tp_size, **switches)
    with compiled_by(backend):
        models.quiet_trainer(strategy=strategy, **defaults, **trainer).fit(model)
    assert_parity(model, partial(reference_run, reference, batches, **options))
    compiled = [layer._compiled_call_impl is not None for layer in model.model.get_submodule("model.layers").children()]
    assert compiled == [switches["compile"]] * len(compiled)
    return model


@contextmanager
def compiled_by(backend: str) -> Iterator[None]:
    """Inside, what modules are compiled with by default is another backend, whose options are its own."""
    by_default = nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        if backend != "inductor":
            patch.setattr(nn.Module, "compile", lambda self, **options: by_default(self, backend=backend))
        yield


@pytest.mark.parametrize("switches", EAGER, ids=name_of)
@pytest.mark.ranks(2, timeout=240)
def test_a_run_with_switches_is_the_unsharded_run_at_tp2(switches: dict[str, bool]) -> None:
    check(2, switches)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("switches", corners_of(COMPILED, (COMPILED[0], COMPILED[-1])), ids=name_of)
@pytest.mark.ranks(2, timeout=240)
def test_a_compiled_run_with_switches_is_the_unsharded_run_at_tp2(switches: dict[str, bool], backend: str) -> None:
    check(2, switches, backend=backend)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.ranks(4, timeout=240)
def test_eager_switches_at_tp2_dp2_and_at_tp4_with_shared_key_heads(tp_size: int) -> None:
    check(tp_size, dict.fromkeys(SWITCHES, True) | {"compile": False})


@pytest.mark.ranks(2, timeout=240)
def test_all_switches_with_checkpointed_blocks() -> None:
    """The one run in which C++ is compiled always."""
    check(2, dict.fromkeys(SWITCHES, True), checkpointed_llama)


def tiny_mixtral(kv_heads: int, tied: bool, vocab: int, experts: str = "eager") -> MixtralForCausalLM:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "num_local_experts": 4,
        "tie_word_embeddings": tied,
        "use_cache": False,
        "experts_implementation": experts,
    }
    return MixtralForCausalLM(MixtralConfig(**options))


@pytest.mark.ranks(2)
def test_eager_switches_with_experts() -> None:
    """They are grouped, as transformers does by default but cannot in fp64."""
    switches = dict.fromkeys(SWITCHES, True) | {"compile": False}
    check(2, switches, partial(tiny_mixtral, experts="grouped_mm"), tiny_mixtral)


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on", [pytest.param(("compile",), marks=pytest.mark.long), SWITCHES], ids="+".join)
@pytest.mark.ranks(2, timeout=240)
def test_compiled_switches_with_experts(on: tuple[str, ...], backend: str) -> None:
    switches = {name: name in on for name in SWITCHES}
    check(2, switches, partial(tiny_mixtral, experts="grouped_mm"), tiny_mixtral, backend)


@pytest.mark.parametrize("sequence", [False, True])
def test_kernels_before_a_router_round_alike_on_all_ranks(sequence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else ranks might choose other experts of one token, each a part of its own choice."""
    seen: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: seen.append(options))
    for model in (tiny_mixtral(8, False, 131), models.tiny_llama()):
        plan = make_plan(model, TPTrainingConfig(autotp_size=2))
        compile_blocks(model, parallel_sequence(model, plan) if sequence else plan)
    alike = {"options": {"deterministic": True}}
    assert seen == [{"options": None} if sequence else alike] * 2 + [{"options": None}] * 2


FUSED: dict[str, Any] = {"loss_parallel": "fused"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on", [pytest.param(("compile",), marks=pytest.mark.long), SWITCHES], ids="+".join)
@pytest.mark.ranks(2, timeout=240)
def test_a_fused_loss_beside_other_switches_and_checkpointed_blocks(on: tuple[str, ...], backend: str) -> None:
    model = check(2, {name: name in on for name in SWITCHES} | FUSED, checkpointed_llama, backend=backend)
    assert model.widths == {0}


@pytest.mark.ranks(4, timeout=240)
def test_a_fused_loss_beside_eager_switches_at_tp4() -> None:
    model = check(4, dict.fromkeys(SWITCHES, True) | {"compile": False} | FUSED)
    assert model.widths == {0}


@pytest.mark.ranks(2, timeout=240)
def test_compile_needs_blocks() -> None:
    rules = {"layer_specs": [{"patterns": [r".*head\.weight$"], "partition_type": "column", "gather_output": True}]}
    strategy = AutoTPStrategy(autotp_size=2, compile=True, partition_config=rules)
    with pytest.raises(ValueError, match=r"^compile: it needs lists of blocks"):
        sharded_run(strategy, Headed, batches_for(128)[:2])


def test_every_way_of_compiling_is_seen() -> None:
    def of(compile_it: Callable[[Any], Any]) -> Any:
        model = Headed()
        compiled = compile_it(model)
        return model if compiled is None else compiled

    def forward(model: Any) -> None:
        model.forward = torch.compile(model.forward)

    def child(model: Any) -> None:
        model.head = torch.compile(model.head)

    assert all(is_compiled(of(way)) for way in (torch.compile, nn.Module.compile, forward, child))
    lit = RecordedModel([], Headed)
    assert not is_compiled(lit) and not is_compiled(Headed())
    assert is_compiled(from_compiled(torch.compile(lit)))  # type: ignore[arg-type]


class Headed(nn.Module):
    """Nothing but an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 16)
        self.head = nn.Linear(16, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(tokens))
        return logits
