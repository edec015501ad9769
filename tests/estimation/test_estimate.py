"""What a layout would cost: against figures measured on GPUs, against the plan, against arithmetic by hand."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.cli.estimate import main
from lightning_autotp.cli.main import main as command_line
from lightning_autotp.distributed.recording import Collective
from lightning_autotp.estimation import Job, Machine, estimate
from lightning_autotp.estimation.cost import GIB
from lightning_autotp.estimation.memory import memory_of
from lightning_autotp.estimation.step import Held, Step, run_step
from lightning_autotp.estimation.trace import Trace
from lightning_autotp.estimation.tracker import StepTracker
from lightning_autotp.model_sources.small import small_config, small_model

LAYER_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "lp": {"loss_parallel": True},
    "fused": {"loss_parallel": "fused"},
    "sp_lp": {"loss_parallel": True, "sequence_parallel": True},
    "sp_fused": {"loss_parallel": "fused", "sequence_parallel": True},
}


def llama(folder: Path, layers: int, vocabulary: int, **sizes: Any) -> str:
    """The path of a config.json."""
    config = LlamaConfig(
        **{"use_cache": False, "tie_word_embeddings": False, **sizes}, num_hidden_layers=layers, vocab_size=vocabulary
    )
    config.save_pretrained(folder)
    return str(folder / "config.json")


def counted(step: Step) -> Counter[str]:
    """How many collectives of each kind there are."""
    kinds: Counter[str] = Counter()
    for collective, count in (step.collectives + step.once).items():
        kinds[collective.kind] += count
    return kinds


@pytest.fixture(autouse=True)
def no_process_group() -> Any:
    yield
    left = dist.is_initialized()
    if left:
        dist.destroy_process_group()
    assert not left


# -- against what was measured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "options", "own_loop", "measured"),
    [
        (1, "", True, 27.8),
        (2, "", True, 17.9),
        (2, "lp", True, 13.2),
        (2, "sp_lp", True, 12.4),
        (2, "", False, 19.6),  # in Trainer.fit
        (2, "sp_lp", False, 14.4),
    ],
)
def test_memory_is_what_was_measured_on_gpus(
    tp: int, options: str, own_loop: bool, measured: float, tmp_path: Path
) -> None:
    """torch.cuda.max_memory_allocated in GiB on H200s, tests/benchmarks/README.md."""
    model = llama(tmp_path, 8, 128256, **LAYER_8B, max_position_embeddings=4096)
    config = TPTrainingConfig(tp_overlap_comm=True)
    job = Job(model, tp, batch=1, seq=4096, own_loop=own_loop, config=config, **OPTIONS[options])
    assert estimate(job, Machine("h200")).memory.peak / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("layers", "vocabulary", "sizes", "options", "measured"),
    [
        (8, 128256, {}, "sp_lp", 25.6),
        (8, 128256, {}, "sp_fused", 23.3),
        (16, 32000, {"hidden_size": 2048}, "sp_lp", 26.4),
        (4, 32000, {"num_local_experts": 8}, "sp_lp", 29.1),
    ],
    ids=["8b", "8b-fused", "hidden-2048", "mixtral"],
)
def test_memory_of_a_batch_of_four(
    layers: int, vocabulary: int, sizes: dict[str, int], options: str, measured: float, tmp_path: Path
) -> None:
    """The same, with sequence and loss parallelism."""
    sizes = LAYER_8B | sizes | {"max_position_embeddings": 4096, "num_hidden_layers": layers, "vocab_size": vocabulary}
    kind: Any = MixtralConfig if "num_local_experts" in sizes else LlamaConfig
    kind(**sizes, tie_word_embeddings=False, use_cache=False).save_pretrained(tmp_path)
    config = TPTrainingConfig(tp_overlap_comm=True)
    job = Job(str(tmp_path), 2, batch=4, seq=4096, own_loop=True, config=config, **OPTIONS[options])
    assert estimate(job, Machine("h200")).memory.peak / GIB == pytest.approx(measured, rel=0.1)


def test_a_fused_loss_has_no_logits(tmp_path: Path) -> None:
    model = llama(tmp_path, 1, 128256, **LAYER_8B, max_position_embeddings=4096)
    peaks = {
        options: estimate(Job(model, 2, batch=4, seq=4096, own_loop=True, **OPTIONS[options]), Machine()).memory.peak
        for options in ("lp", "fused")
    }
    logits = 4 * 4096 * 128256 // 2 * 2
    # instead of them and their gradient: a quarter of them, the gradient of the weight in fp32, that of the input
    assert peaks["lp"] - peaks["fused"] > 0.5 * logits


def test_a_fake_step_allocates_what_a_real_one_does(tmp_path: Path) -> None:
    path = llama(tmp_path, 2, 131, **TINY)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(path))
    ids = torch.zeros(2, 16, dtype=torch.long)
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    known = [*model.parameters(), *model.buffers(), ids]
    with StepTracker(model, known) as real:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        for tensor in known:
            saved.pop(tensor.untyped_storage()._cdata, None)
        sizes = [-(-tensor.untyped_storage().nbytes() // 512) * 512 for tensor in saved.values()]
        saved.clear()
        real.begin_backward()
        loss.backward()
    fake = run_step(Job(path, batch=2, seq=16, precision="32-true"))
    trace = real.trace
    assert trace.kept == sum(sizes) + 512  # the loss itself
    assert (fake.forward, fake.kept, _flops(fake)) == (trace.most_forward, trace.kept, _flops(trace))
    assert fake.backward == trace.most_backward
    assert max(fake.backward) == pytest.approx(fake.held.trained, rel=0.01)  # at the end; rounded up one by one


# -- against the plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral", "gpt2", "deepseek_v3", "t5"])
def test_weights_gradients_and_optimizer_are_those_of_the_plan(model_type: str, tp: int, tmp_path: Path) -> None:
    config = small_config(model_type)
    config.save_pretrained(tmp_path)
    model = small_model(config)
    layouts = make_plan(model, TPTrainingConfig(), tp).layouts
    size = 2 * sum(prod(layouts[name].local_shape(0)) for name, _ in model.named_parameters())
    step = run_step(Job(str(tmp_path), tp, batch=2, seq=12))
    memory = memory_of(step, Job(str(tmp_path), tp))
    assert (memory.weights - step.held.buffers, memory.all_gradients, memory.optimizer) == (size, size, 2 * size)
    assert step.held.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "a_block", "around"),
    [
        # around the blocks: the embedding's output and the gradient of the head's input; the logits
        ("", {"all-reduce": 4}, {"all-reduce": 2, "all-gather": 1}),
        # the logits are not gathered, three numbers a token are
        ("lp", {"all-reduce": 4}, {"all-reduce": 2, "all-gather": 1}),
        ("fused", {"all-reduce": 4}, {"all-reduce": 2, "all-gather": 1}),
        # also, once a step, the norms' gradients; what enters the blocks is gathered backward, what leaves them forward
        ("sp_lp", {"all-gather": 4, "reduce-scatter": 4}, {"all-reduce": 3, "all-gather": 3}),
    ],
)
def test_a_block_costs_two_collectives_each_way(
    options: str, a_block: dict[str, int], around: dict[str, int], tmp_path: Path
) -> None:
    for layers in (1, 3):
        path = llama(tmp_path, layers, 131, **TINY)
        found = counted(run_step(Job(path, tp=2, batch=2, seq=16, **OPTIONS[options])))
        assert found == {
            kind: a_block.get(kind, 0) * layers + around.get(kind, 0) for kind in a_block.keys() | around.keys()
        }


def test_collectives_have_the_bytes_of_their_full_tensors(tmp_path: Path) -> None:
    path = llama(tmp_path, 1, 132, **TINY)
    found = run_step(Job(path, tp=2, batch=2, seq=16)).collectives
    hidden, logits = 2 * 16 * 64 * 2, 2 * 16 * 132 * 2
    assert found == {Collective("all-reduce", 2, hidden): 6, Collective("all-gather", 2, logits): 1}


def test_key_heads_that_ranks_share_are_summed_over_those_ranks(tmp_path: Path) -> None:
    found = estimate(Job(llama(tmp_path, 1, 131, **TINY), tp=4, batch=2, seq=16), Machine())
    shared = [line for line in found.traffic if line.group == "ranks that share heads"]
    assert [(line.kind, line.ranks, line.size) for line in shared] == [("all-reduce", 2, 2 * 2 * 8 * 64)]  # k and v


def test_checkpointing_keeps_less_and_computes_more(tmp_path: Path) -> None:
    path = llama(tmp_path, 4, 131, **TINY)
    whole = run_step(Job(path, tp=2, batch=2, seq=64))
    less = run_step(Job(path, tp=2, batch=2, seq=64, checkpointing=True))
    assert less.kept < whole.kept / 2
    assert 1.2 < _flops(less) / _flops(whole) < 4 / 3


def _flops(step: Step | Trace) -> int:
    return sum(work.flops * count for work, count in step.work.items())


def test_operations_are_six_a_weight_and_token_and_those_of_attention(tmp_path: Path) -> None:
    layers, tokens = 2, 128
    path = llama(tmp_path, layers, 131, **TINY)
    step = run_step(Job(path, batch=1, seq=tokens))
    weights = step.held.parameters - 131 * 64 - 64 * (2 * layers + 1)  # without what is only looked up, and norms
    causal = layers * 2 * tokens * tokens * 64 * 3.5  # two products forward and five backward, half of each
    rotations = 3 * 2 * tokens * 4  # the outer product of positions and frequencies, at most
    assert _flops(step) == pytest.approx(6 * weights * tokens + causal, abs=rotations)


def test_mixed_precision_keeps_weights_and_gradients_in_fp32(tmp_path: Path) -> None:
    path = llama(tmp_path, 2, 131, **TINY)
    found = {
        precision: memory_of(run_step(job), job)
        for precision in ("bf16-true", "bf16-mixed", "32-true")
        for job in [Job(path, tp=2, batch=2, seq=64, precision=precision)]
    }
    for precision in ("bf16-mixed", "32-true"):
        assert found[precision].all_gradients == 2 * found["bf16-true"].all_gradients
        assert found[precision].optimizer == 2 * found["bf16-true"].optimizer
    assert found["bf16-true"].kept < found["bf16-mixed"].kept < found["32-true"].kept + found["32-true"].weights


# -- arithmetic --------------------------------------------------------------------------------------------------------

HELD = Held(
    parameters=500, weights=1000, trained=800, buffers=8,
    block=100, outside=50, trained_block=80, trained_outside=40,
)  # fmt: skip
STEP = Step(
    HELD, tokens=10, forward=300, kept=280, backward={0: 290, 400: 250, 800: 20},
    work=Counter(), collectives=Counter(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "weights", "gathered", "optimizer", "buckets", "gradients", "activations"),
    [
        ({}, 1008, 0, 1600, 0, 800, 300),  # the last step's gradients in the forward pass
        ({"own_loop": True}, 1008, 0, 1600, 0, 800, 20),
        ({"own_loop": True, "accumulate": 2}, 1008, 0, 1600, 0, 800, 300),
        ({"accumulate": 2}, 1008, 0, 1600, 0, 800, 300),
        ({"dp": 4}, 1008, 0, 1600, 800, 800, 300),
        ({"cp": 4}, 1008, 0, 1600, 800, 800, 300),
        # all weights and a block's buffer at the end of the forward pass
        ({"dp": 4, "zero": 1}, 258, 1000 + 100, 400, 0, 200, 300),
        ({"dp": 4, "zero": 2}, 258, 1000 + 100, 400, 0, 200, 300),
        ({"dp": 4, "zero": 2, "zero_group": 2}, 508, 1000 + 100, 800, 0, 400, 300),
        # (400 - 40 - 80) of 800 are freed; 100 reduced, and those of two blocks and of the root
        ({"dp": 4, "zero": 2, "own_loop": True}, 258, 1000 + 100, 400, 0, 0, 300),
        ({"dp": 4, "zero": 3, "own_loop": True}, 258, 50 + 2 * 100, 400, 0, 100 + 200, 250),
        ({"dp": 4, "zero": 3, "accumulate": 2}, 258, 50 + 2 * 100, 400, 0, 200 + 200, 250),
        ({"dp": 1, "zero": 3}, 1008, 0, 1600, 0, 800, 300),
    ],
)
def test_data_parallelism_and_zero(
    options: dict[str, Any],
    weights: int,
    gathered: int,
    optimizer: int,
    buckets: int,
    gradients: int,
    activations: int,
) -> None:
    memory = memory_of(STEP, Job("llama", **options))
    assert (memory.weights, memory.gathered) == (weights, gathered)
    assert (memory.optimizer, memory.buckets) == (optimizer, buckets)
    assert (memory.gradients, memory.activations) == (gradients, activations)
    assert memory.peak == weights + gathered + optimizer + buckets + gradients + activations


def test_weights_are_freed_as_gradients_come() -> None:
    job = Job("llama", dp=4, zero=2, own_loop=True)
    memory = memory_of(replace(STEP, forward=0, backward={400: 3000}), job)
    assert (memory.gathered, memory.gradients) == (1000 - (400 - 40 - 80) * 1000 // 800, 100 + 40 + 2 * 80)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (0, {"all-reduce": 2 * 7 / 8}),
        (1, {"reduce-scatter": 7 / 8, "all-gather": 7 / 8}),
        (2, {"reduce-scatter": 7 / 8, "all-gather": 7 / 8}),
    ],
)
def test_data_parallel_communication(zero: int, expected: dict[str, float], tmp_path: Path) -> None:
    """Per byte of gradients, over a link of one byte a second."""
    machine = Machine(network=1.0, gpus_per_node=2, link_share=1.0)
    job = Job(llama(tmp_path, 1, 131, **TINY), tp=2, dp=8, zero=zero, batch=1, seq=16)
    found = estimate(job, machine)
    size = run_step(job).held.trained
    lines = {line.kind: line for line in found.traffic if line.group == "data parallel"}
    assert {kind: line.seconds / size for kind, line in lines.items()} == pytest.approx(expected)
    assert all(line.link == "network" for line in lines.values())


def test_zero_3_gathers_blocks_twice_and_groups_reduce_parts(tmp_path: Path) -> None:
    machine = Machine(network=1.0, gpus_per_node=4, link_share=1.0)
    job = Job(llama(tmp_path, 1, 131, **TINY), 2, dp=8, zero=3, zero_group=2, batch=1, seq=16, accumulate=3)
    held = run_step(job).held
    found = {(line.kind, line.group): line for line in estimate(job, machine).traffic if line.beside}
    inside = found["all-gather", "ranks that share weights"], found["reduce-scatter", "ranks that share weights"]
    assert [(line.ranks, line.link) for line in inside] == [(2, "NVLink")] * 2
    assert inside[0].size == 3 * (2 * held.weights - held.outside) and inside[1].size == 3 * held.trained
    across = found["all-reduce", "ranks that hold the same"]
    assert (across.ranks, across.link, across.size) == (4, "network", 3 * (held.trained // 2))


def test_links() -> None:
    machine = Machine("h100", link_share=1.0)
    assert machine.link(8, 1, 1024) == ("NVLink", 450e9)
    assert machine.link(16, 1, 16) == ("network", 400e9)  # through eight GPUs' adapters
    assert machine.link(2, 4, 8) == ("NVLink", 450e9)
    assert machine.link(4, 4, 16) == ("network", 100e9)
    assert machine.link(3, 1, 9) == ("network", 400e9)  # ranks 6, 7 and 8 are on two nodes
    assert machine.link(3, 1, 3) == ("NVLink", 450e9)
    assert machine.link(128, 8, 1024) == ("network", 50e9)
    assert Machine("h100", nvlink=1e9, link_share=0.5).link(2, 1, 2) == ("NVLink", 5e8)


@pytest.mark.parametrize(
    ("layers", "parameters"),
    [pytest.param(12, 42.455e9, id="12-layers"), pytest.param(126, 405.85e9, marks=pytest.mark.long, id="126-layers")],
)
def test_llama_405b_on_1024_gpus_takes_less_than_a_minute(layers: int, parameters: float, tmp_path: Path) -> None:
    """Of all its 126 layers, or of a few of them."""
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8}
    model = llama(tmp_path, layers, 128256, **sizes)
    job = Job(model, tp=8, dp=128, zero=1, seq=4096, sequence_parallel=True, loss_parallel=True)
    found = estimate(job, Machine("h200"))
    assert found.took < 60
    assert found.parameters == pytest.approx(parameters, rel=1e-4)
    assert found.memory.all_gradients == pytest.approx(found.parameters / 8 * 2 / 128, rel=1e-4)
    assert found.fits == (layers < 126) and found.tokens == 128 * 4096
    assert found.flops == pytest.approx(6 * found.parameters / 8 * 4096, rel=0.1)


# -- the command -------------------------------------------------------------------------------------------------------


def reads_values() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A model whose loss depends on what is in its input."""

    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum() * float(x.sum())

    return Reads(4, 4), [{"x": torch.zeros(2, 4)}]


def net() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    return Net(4, 4), [{"x": torch.zeros(2, 4)}]


def without_batch() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    return nn.Linear(4, 4), []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("llama --tp 48", "32 query heads cannot be shared by 48 ranks; use a tensor parallel size of at most 32"),
        ("llama --tp 0", "tp: 0 is not a positive number; give 1 or more"),
        ("llama --seq -1", "seq: -1 is not a positive number"),
        ("llama --zero 4", "zero: there is no stage 4; give one of 0, 1, 2, 3"),
        ("llama --precision fp8", "precision: 'fp8' is not known; give one of bf16-true, bf16-mixed, 32-true"),
        ("llama --gpu v100", "gpu: 'v100' is not known; give one of a100, b200, h100, h200"),
        ("llama --network 0", "network: 0.0 is not a bandwidth; give a positive number"),
        ("llama --matmul-share 60", "matmul_share: 60.0 is not a part of the whole"),
        ("llama --rules nowhere.yaml", "rules: there is no file 'nowhere.yaml'"),
        ("lama", "model: 'lama' is neither a model type of transformers, nor the path of a config.json"),
        ("CONFIG", "config.json' cannot be read (KeyError: 'model_type')"),
        ("nowhere:net", "model: 'nowhere:net' cannot be imported (No module named 'nowhere'); give module:factory"),
        (
            "tests.estimation.test_estimate:net --batch 2",
            "batch, seq: tests.estimation.test_estimate:net is a factory that brings its own",
        ),
        ("tests.estimation.test_estimate:net --checkpointing", "checkpointing: Net has no gradient checkpointing"),
        ("tests.estimation.test_estimate:without_batch", "returns no batch; return (model, [batch, ...])"),
        (
            "tests.estimation.test_estimate:reads_values",
            "step depends on the values of its tensors (in aten._local_scalar_dense",
        ),
        ("t5 --tp 2 --sequence-parallel", "sequence_parallel: it needs one list of blocks"),
        ("clip", "model: clip says no image_size and num_channels, so its batch is not known"),
        ("gpt2 --seq 1025", "seq: gpt2 learns its positions, of which it has 1024; give 1024 or less"),
        ("opt --seq 2049", "seq: opt learns its positions, of which it has 2048; give 2048 or less"),
        ("vit --seq 77", "seq: vit reads images; leave it out"),
        ("ODD", "sizes that go together"),
        ("tests.estimation.test_estimate:broken", "gives no model and batches (KeyError: 'key')"),
    ],
)
def test_errors_say_what_and_how(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}))
    assert main(arguments.replace("CONFIG", str(tmp_path)).replace("ODD", str(odd)).split()) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("estimate: ") and message in error


def test_positions_that_are_not_learned_go_on(tmp_path: Path) -> None:
    job = Job(llama(tmp_path, 1, 131, **TINY, max_position_embeddings=16), batch=1, seq=17)
    assert estimate(job, Machine()).memory.peak > 0


def broken() -> None:
    raise KeyError("key")


def test_a_switch_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_parallel: 'fuse' is none of True, False and 'fused'"):
        Job("llama", loss_parallel="fuse")  # type: ignore[arg-type]


def test_a_process_group_of_the_callers_is_left_alone(tmp_path: Path) -> None:
    job = Job(llama(tmp_path, 1, 132, **TINY), tp=2, batch=2, seq=16)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        inside = estimate(job, Machine())
        assert dist.is_initialized() and dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()
    outside = estimate(job, Machine())
    assert (inside.memory, inside.traffic) == (outside.memory, outside.traffic) and inside.traffic


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = llama(tmp_path, 2, 131, **TINY)
    with pytest.raises(SystemExit) as left:
        command_line(["estimate", path, "--tp", "2", "--dp", "8", "--seq", "16", "--gpu", "a100"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for text in ("TP 2 x DP 8 on 16 x A100", "DDP's buckets", "peak", "It fits into A100's 79 GiB", "tokens/s"):
        assert text in printed
    assert main([path, "--tp", "2", "--seq", "16", "--fused-loss"]) == 0
    assert "16 tokens a data parallel rank, loss_parallel fused (" in capsys.readouterr().out
    for text in ("tensor parallel (2 ranks)", "data parallel (8 ranks)", "60% of A100's peak", "NVLink", "network"):
        assert text in printed


def test_json_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = llama(tmp_path, 2, 131, **TINY)
    assert main([path, "--tp", "2", "--seq", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = ("weights", "gathered", "optimizer", "buckets", "gradients", "activations")
    assert found["memory"]["peak"] == sum(found["memory"][part] for part in parts)
    assert found["job"]["tp"] == 2 and found["machine"]["gpu"] == "h100" and found["fits"] is True
    assert found["longest"] == pytest.approx(found["compute"] + found["communication"])
    assert {line["kind"] for line in found["traffic"]} == {"all-reduce", "all-gather"}


def test_sharded_saved_activations_keep_less_and_gather_more(tmp_path: Path) -> None:
    path = llama(tmp_path, 3, 132, **TINY)
    cases: list[dict[str, Any]] = [{"shard_saved_activations": True}, {}]
    on, off = (
        run_step(Job(path, tp=2, batch=4, seq=32, checkpointing=True, config=TPTrainingConfig(**switches)))
        for switches in cases
    )
    hidden = 4 * 32 * 64 * 2
    assert off.kept - on.kept >= 3 * hidden // 2
    assert counted(on)["all-gather"] - counted(off).get("all-gather", 0) == 3
