"""The search for a layout: what it finds, what it leaves out and why, and what it says."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from lightning_autotp.cli.estimate import main
from lightning_autotp.estimation import Found, Job, Machine, Wanted, estimate, search
from lightning_autotp.estimation.context import copies, exchanges, in_context
from lightning_autotp.estimation.hardware import GPU, GPUS
from lightning_autotp.estimation.step import run_step
from lightning_autotp.estimation.trace import Attention

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
SEQ = 64


def llama(folder: Path, **sizes: Any) -> str:
    """The path of a config."""
    given = {**TINY, "num_hidden_layers": 5, "vocab_size": 512, "use_cache": False, **sizes}
    LlamaConfig(**given).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Four GPUs in two nodes."""
    path = llama(tmp_path_factory.mktemp("model"))
    return search(Wanted(path, 4, tokens=8 * SEQ, seq=SEQ), Machine("h100", gpus_per_node=2))


def jobs(found: Found) -> list[Job]:
    return [choice.estimate.job for choice in (*found.best, *found.slower)]


def test_all_layouts_are_looked_at(found: Found) -> None:
    layouts = {(job.tp, job.cp, job.dp, job.zero, job.zero_group) for job in jobs(found)}
    assert len(found.best) == 5 and not found.too_large
    expected = set()
    for tp, cp in ((1, 1), (1, 2), (2, 1)):
        dp = 4 // tp // cp
        groups = [None, *([2] if tp == 1 else [])]  # those of a node
        expected |= {(tp, cp, dp, 0, None)} | {(tp, cp, dp, zero, group) for zero in (2, 3) for group in groups}
    assert layouts == expected
    assert found.left_out["tensor parallel ranks would lie in several nodes"] == ["TP 4"]


def test_steps_have_the_tokens_that_are_asked_for(found: Found) -> None:
    for choice in (*found.best, *found.slower):
        job = choice.estimate.job
        assert job.batch is not None and job.batch * job.accumulate * job.dp == 8
        assert choice.estimate.tokens == 8 * SEQ
        assert 0 < choice.mfu < 0.6


def test_the_best_are_first_and_the_simplest_of_those_alike(found: Found) -> None:
    times = [float(f"{choice.estimate.seconds:.3g}") for choice in (*found.best, *found.slower)]
    assert times == sorted(times)
    for earlier, later in zip(found.best, found.best[1:]):
        if f"{earlier.estimate.seconds:.3g}" == f"{later.estimate.seconds:.3g}":
            assert earlier.estimate.job.zero <= later.estimate.job.zero


def test_a_found_layout_costs_what_its_own_estimate_says(found: Found) -> None:
    for choice in (found.best[0], *[c for c in found.slower if c.estimate.job.cp == 2][:1], found.slower[-1]):
        mine = choice.estimate
        own = estimate(replace(mine.job), mine.machine)
        assert mine.memory.peak == pytest.approx(own.memory.peak, rel=0.02)
        assert mine.seconds == pytest.approx(own.seconds, rel=0.02)
        assert mine.tokens == own.tokens and mine.parameters == own.parameters


@pytest.mark.long
def test_what_does_not_fit_says_by_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama(tmp_path, vocab_size=32768, hidden_size=512, intermediate_size=1024)
    small = GPUS["h100"]._asdict() | {"memory": 3.2}
    monkeypatch.setitem(GPUS, "small", GPU(**small))
    given = Wanted(path, 2, tokens=8 * 256, seq=256, tp=1)
    found = search(given, Machine("small"))
    layouts = len(found.best) + len(found.slower) + len(found.too_large)
    assert layouts == 6 and found.too_large  # DP 2 and CP 2, with ZeRO 0, 2 and 3
    for one in found.too_large:
        own = estimate(one.job, one.machine)
        assert one.lacks > 0 and not own.fits
    for choice in found.best:
        assert choice.estimate.fits
        if choice.larger is not None:
            assert not choice.larger.fits and choice.larger.seconds < choice.estimate.seconds
    monkeypatch.setitem(GPUS, "none", GPU(**small | {"memory": 3.01}))
    nothing = search(given, Machine("none"))
    assert not nothing.best and len(nothing.too_large) == layouts


def test_what_is_given_is_kept(tmp_path: Path) -> None:
    wanted = Wanted(llama(tmp_path), 4, tokens=8 * SEQ, seq=SEQ, tp=2, cp=1, zero=1, batch=2, checkpointing=True)
    found = search(wanted, Machine())
    (job,) = jobs(found)
    assert (job.tp, job.cp, job.dp, job.zero, job.batch, job.accumulate) == (2, 1, 2, 2, 2, 2)
    assert job.checkpointing and job.sequence_parallel and job.loss_parallel


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    path = llama(tmp_path, num_attention_heads=6, num_key_value_heads=2, hidden_size=96)
    found = search(Wanted(path, 4, tokens=4 * SEQ, seq=SEQ, checkpointing=False, sequence_parallel=False), Machine())
    assert found.left_out["6 query heads do not divide"] == ["TP 4"]
    assert found.left_out["heads of a tensor parallel rank do not divide"] == ["TP 1 x CP 4", "TP 2 x CP 2"]


def images() -> Any:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x).relu()
            return x.sum()

    return Net(), [{"x": torch.zeros(2, 16)}]


def test_a_model_of_ones_own_counts_rows() -> None:
    wanted = Wanted("tests.estimation.test_search:images", 2, tokens=16)
    found = search(wanted, Machine())
    assert found.rows == 8 and found.best[0].estimate.tokens == 0
    assert "checkpointing" in found.refused


def test_exchanges_of_heads() -> None:
    kernel = Attention(heads=8, key_heads=2, query=800, key=200, value=200, output=800)
    assert [copies(kernel, cp) for cp in (1, 2, 4, 8)] == [1, 1, 2, 4]
    sent = exchanges([(kernel, 3)], 4, checkpointing=False)
    assert {c.size: n for c, n in sent.items()} == {800: 2 * 2 * 3, 400: 2 * 2 * 3}
    assert sum(exchanges([(kernel, 3)], 4, checkpointing=True).values()) == sum(sent.values()) * 3 // 2
    with pytest.raises(ValueError, match="cp: 3 ranks cannot share 8 query heads"):
        copies(kernel, 3)


def test_context_parallel_ranks_share_activations(tmp_path: Path) -> None:
    path = llama(tmp_path, num_key_value_heads=8)
    whole = estimate(Job(path, batch=1, seq=256), Machine())
    part = estimate(Job(path, cp=4, batch=1, seq=256), Machine())
    assert part.memory.kept == pytest.approx(whole.memory.kept / 4, rel=0.02)
    assert part.flops == pytest.approx(whole.flops / 4, rel=0.02) and part.tokens == whole.tokens
    (line,) = [line for line in part.traffic if line.kind == "all-to-all"]
    # query, key, value and output, forward and backward, of five blocks
    assert (line.count, line.size) == (4 * 2 * 5, 4 * 2 * 5 * 64 * 64 * 2) and not line.beside
    few = run_step(Job(llama(tmp_path, num_key_value_heads=2), batch=1, seq=256))
    added = in_context(few, 4, checkpointing=False).kept - few.kept
    assert added == 5 * 2 * (256 * 16 * 2)  # each key and value head once more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("CONFIG --gpus 0", "gpus: 0 is not a positive number; give 1 or more"),
        ("CONFIG --gpus 8 --tp 3", "gpus: tp 3 does not divide 8; give a multiple of 3"),
        ("CONFIG --gpus 2 --tokens 100 --seq 64", "tokens: 100 are no whole number of sequences of 64 tokens"),
        ("CONFIG --gpus 2 --zero 5", "zero: there is no stage 5"),
        ("CONFIG --gpus 2 --accumulate 2", "accumulate: with gpus it follows from tokens"),
        ("CONFIG --tokens 64", "tokens: it goes with gpus"),
        ("CONFIG --gpus 2 --tokens 64 --seq 64 --tp 1 --cp 1", "1 sequences of a step cannot be shared evenly"),
        (
            "CONFIG --gpus 2 --seq 64 --zero 3 --tp 2",
            "TP 2 x CP 1: ZeRO needs several data parallel ranks",
        ),
        ("CONFIG --gpus 4 --seq 64 --tp 1 --cp 1 --zero-group 3", "zero_group 3 does not divide data parallel ranks"),
        ("CONFIG --zero-group 2", "zero_group: it goes with zero 1, 2 or 3"),
        ("CONFIG --dp 4 --zero 2 --zero-group 3", "zero_group: 3 does not divide dp x cp, 4"),
        ("CONFIG --cp 3 --seq 64", "cp: 3 ranks do not divide seq, 64 tokens"),
        ("CONFIG --cp 16 --seq 64", "cp: 16 ranks cannot share 8 query heads"),
        ("gpt2-nothing --gpus 2", "model: 'gpt2-nothing' is neither a model type"),
    ],
)
def test_errors_name_the_field(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = llama(tmp_path)
    assert main(arguments.replace("CONFIG", path).split()) == 1
    assert message in capsys.readouterr().err


def test_the_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"gpus": 4, "gpus-per-node": 2, "gpu": "h200", "seq": 64, "tokens": 512}
    arguments = [llama(tmp_path), *(f"--{name}={value}" for name, value in given.items())]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for text in (
        "on 4 x H200, 512 tokens a step",
        "TP 1 x DP 4",
        "tokens/s",
        "MFU",
        "slower than the best",
        "Left out:",
    ):
        assert text in printed
    assert "TP 4: tensor parallel ranks would lie in several nodes" in printed
    assert main([*arguments, "--json", "--tp", "1", "--no-checkpointing"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["job"]["tp"] for one in found["best"]} == {1} and found["best"][0]["fits"] is True
    assert {"mfu", "bound", "tokens_a_second", "memory", "seconds"} <= found["best"][0].keys()


BIG: dict[str, tuple[dict[str, Any], float]] = {
    "llama-3-8b": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}, 8.03e9,
    ),
    "llama-3-70b": (
        {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}, 70.55e9,
    ),
    "mixtral-8x7b": (
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
         "num_experts_per_tok": 2}, 46.70e9,
    ),
    "qwen3-30b-a3b": (
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
         "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
         "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "mlp_only_layers": []}, 30.53e9,
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", BIG)
def test_large_models_take_less_than_a_minute(name: str, tmp_path: Path) -> None:
    sizes, parameters = BIG[name]
    given = {**sizes, "max_position_embeddings": 8192, "tie_word_embeddings": False, "use_cache": False}
    (tmp_path / "config.json").write_text(json.dumps(given))
    before = time.process_time()
    found = search(Wanted(str(tmp_path), 8, seq=4096), Machine("h200"))
    assert time.process_time() - before < 60  # on one core, whatever else it does
    best = found.best[0].estimate
    assert best.parameters == pytest.approx(parameters, rel=1e-3) and best.fits and len(found.best) == 5
    own = estimate(best.job, best.machine)  # all blocks, and its own batch
    assert best.memory.peak == pytest.approx(own.memory.peak, rel=0.02)
    assert best.seconds == pytest.approx(own.seconds, rel=0.02)
