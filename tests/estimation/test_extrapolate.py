"""Steps of any depth and batch, continued from traces of few blocks and small batches: against traces of all of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from lightning_autotp.estimation.depth import _repeat
from lightning_autotp.estimation.extrapolate import NotAffineError, at_depth
from lightning_autotp.estimation.job import Job
from lightning_autotp.estimation.memory import memory_of
from lightning_autotp.estimation.step import Held, Seen, Step, built, run_step, without_values
from lightning_autotp.estimation.trace import Event, Trace
from lightning_autotp.estimation.variants import Variants
from lightning_autotp.model_sources.small import small_config

SEQ = 64


def saved(folder: Path, model: str, layers: int) -> str:
    """The path of a config of a small model."""
    if model == "llama":
        config: Any = LlamaConfig(
            hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2, vocab_size=512,
            num_hidden_layers=layers, use_cache=False,
        )  # fmt: skip
    elif model == "gemma3":  # five of one kind, then one of another
        config = Gemma3TextConfig(
            hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            vocab_size=512, num_hidden_layers=layers, sliding_window=16, use_cache=False,
        )  # fmt: skip
    else:
        config = small_config(model)
        config.num_hidden_layers, config.use_cache = layers, False
        if model == "deepseek_v3":
            config.first_k_dense_replace = 2
    config.save_pretrained(folder)
    return str(folder)


def alike(found: Step, whole: Step) -> None:
    """To two percent, and what does not depend on activations exactly."""
    assert found.held == whole.held and found.tokens == whole.tokens
    pairs: list[tuple[Any, ...]] = [(found.forward, whole.forward), (found.kept, whole.kept)]
    for job in (Job("llama"), Job("llama", dp=4, zero=2), Job("llama", dp=4, zero=3, own_loop=True)):
        pairs.append((memory_of(found, job).peak, memory_of(whole, job).peak))
    for of in ("flops", "moved"):
        pairs.append(tuple(sum(getattr(w, of) * n for w, n in step.work.items()) for step in (found, whole)))
    for of in ("collectives", "once"):
        sent = [{c.kind for c, n in getattr(step, of).items() if n} for step in (found, whole)]
        assert sent[0] == sent[1]
        pairs.append(tuple(sum(c.size * n for c, n in getattr(step, of).items()) for step in (found, whole)))
    for mine, other in pairs:
        assert mine == pytest.approx(other, rel=0.02), pairs


@pytest.mark.parametrize(
    ("model", "layers", "tp"),
    [
        ("llama", 5, 2),
        pytest.param("llama", 7, 1, marks=pytest.mark.long),
        pytest.param("gemma3", 21, 2, marks=pytest.mark.long),
        pytest.param("deepseek_v3", 9, 2, marks=pytest.mark.long),
        pytest.param("mixtral", 6, 2, marks=pytest.mark.long),
    ],
)
def test_few_blocks_and_small_batches_say_what_all_do(model: str, layers: int, tp: int, tmp_path: Path) -> None:
    path, batch = saved(tmp_path, model, layers), 5
    with without_values(path):
        job = Job(path, batch=1, seq=SEQ)
        whole, one = built(job)
        ways = list(Variants(whole, one, job, frozenset()).of(tp))
    if model != "deepseek_v3":  # all blocks of it are traced: two depths do not go together at all batches
        assert all(way.periods is not None for way in ways)
    for way in ways:
        given = way.job
        switches: dict[str, Any] = {"sequence_parallel": given.sequence_parallel, "loss_parallel": given.loss_parallel}
        traced = run_step(Job(path, tp, batch=batch, seq=SEQ, checkpointing=given.checkpointing, **switches))
        alike(way.step(batch, 1), traced)


@pytest.mark.long
def test_a_way_for_each_switch(tmp_path: Path) -> None:
    path = saved(tmp_path, "llama", 4)
    with without_values(path):
        job = Job(path, batch=1, seq=SEQ)
        whole, one = built(job)
        found = {
            tp: [
                (way.job.sequence_parallel, way.job.loss_parallel, way.job.checkpointing)
                for way in Variants(whole, one, job, frozenset()).of(tp)
            ]
            for tp in (1, 2)
        }
        asked = Job(path, batch=1, seq=SEQ, sequence_parallel=False, loss_parallel="fused", checkpointing=True)
        (only,) = Variants(whole, one, asked, frozenset({"sequence_parallel", "loss_parallel", "checkpointing"})).of(2)
    assert found[1] == [(False, False, False), (False, False, True)]
    assert found[2] == [(True, loss, again) for loss in (True, "fused") for again in (False, True)]
    assert (only.job.sequence_parallel, only.job.loss_parallel, only.job.checkpointing) == (False, "fused", True)


def test_switches_that_a_model_refuses_are_off_and_told(tmp_path: Path) -> None:
    path = saved(tmp_path, "t5", 2)
    with without_values(path):
        job = Job(path, batch=1, seq=8)
        whole, one = built(job)
        variants = Variants(whole, one, job, frozenset({"checkpointing"}))
        ways = list(variants.of(2))
    assert {(way.job.sequence_parallel, way.job.loss_parallel) for way in ways} == {(False, False)}
    assert "sequence_parallel" in variants.refused and "loss_parallel" in variants.refused


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaaa", (1, 1)),
        ("baaaa", (1, 1)),
        ("bbaaaaa", (2, 1)),
        ("ababababab", (1, 2)),
        ("aaab" * 4, (1, 4)),
        ("aaaab", None),
        ("abcdef", None),
        ("aab", None),
    ],
)
def test_repeats(kinds: str, expected: tuple[int, int] | None) -> None:
    assert _repeat(list(kinds)) == expected


def test_other_ops_are_no_deeper_model() -> None:
    held = Held(1, 1, 1, 0, 1, 0, 1, 0)

    def seen(*names: str) -> Seen:
        events = tuple(Event(name, None, 0, 0) for name in names)
        return Seen(held, 0, Trace(events, ()), Counter(), Counter())

    with pytest.raises(NotAffineError):
        at_depth(seen("a", "b"), seen("a", "c", "d"), 3)
    with pytest.raises(NotAffineError):
        at_depth(seen("a", "b"), seen("a"), 3)
