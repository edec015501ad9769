"""``verify``: a right plan passes, a wrong one is told with its parameter, and nothing that breaks leaves a trace."""

from __future__ import annotations

import random
import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from lightning_autotp.cli import main as cli
from lightning_autotp.cli import verify as verify_command
from lightning_autotp.sharding.state import sharded
from lightning_autotp.verification import Report, sweep, verify

HEAD = 4


class Attention(nn.Module):
    """``[B, T, 16] -> [B, T, 16]``: four heads, their queries normalized with a weight ``[4]`` that they share."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.v_proj, self.o_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.q_norm = nn.RMSNorm(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(self.q_norm(q), k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MixedAttention(Attention):
    """Its scores are computed in fp32, whatever dtype it has, as some models of transformers do."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        scores = self.q_norm(q).float() @ k.float().transpose(-1, -2)
        mixed = scores.softmax(-1).to(x.dtype) @ v
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Net(nn.Module):
    """Two attention layers and their loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.idle = nn.Linear(2, 2)  # has no gradient

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        return {"loss": functional.mse_loss(x, torch.ones_like(x))}


def rank_of(model: nn.Module) -> int:
    found = sharded(model)
    return 0 if found is None else found.mesh.tp_rank


class BreaksOnRank1(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if rank_of(self) == 1:
            raise KeyError("rank 1 does not want to")
        return super().forward(x)


class ExitsOnRank1(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if rank_of(self) == 1:
            sys.exit(7)
        return super().forward(x)


class SkipsOnRank1(Net):
    """Rank 1 passes over a layer, and waits in the backward pass where the other waits in the forward pass."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if rank_of(self) == 1:
            return {"loss": functional.mse_loss(x + self.layers[0](x), torch.ones_like(x))}
        return super().forward(x)


class MixedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MixedAttention() for _ in range(2))


class SingleNet(Net):
    """Runs in fp32 alone."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.dtype != torch.float32:
            raise TypeError("fp32 it must be")
        return super().forward(x)


class SingleWhereShardedNet(Net):
    """Runs in fp64 where it is not sharded."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.dtype != torch.float32 and sharded(self) is not None:
            raise TypeError("fp32 it must be")
        return super().forward(x)


class Block(nn.Module):
    """Attention, and beside it what each token differs from the mean of its sequence by."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SequenceAttention()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x - 0.5 * x.mean(1, keepdim=True)


class SequenceAttention(Attention):
    def forward(self, x: Tensor, attention_mask: Any = None) -> Tensor:
        return super().forward(x)


class MixesTokens(Net):
    """A block computes the mean over the tokens that it is given, which under sequence parallelism are a rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"loss": functional.mse_loss(x, torch.ones_like(x))}


class ChangesItsBatch(Net):
    """Takes nested inputs, and writes into them."""

    def forward(self, inputs: list[Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(inputs[0].mul_(2))


class NotCopied(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("it cannot be copied")


class NeverRuns(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError("no forward")


class Unlike(Net):
    """A rank's own number goes into a parameter that all hold whole."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": super().forward(x)["loss"] + rank_of(self) * 1e-7 * self.idle.bias.sum()}


class Shifted(Attention):
    """Computes something else where it is sharded."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.q_proj.weight.shape[0] < 16)


class ShiftedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = Shifted()


def factory(kind: type[Net] = Net, rows: int = 2, tokens: int = 5) -> tuple[nn.Module, list[dict[str, Any]]]:
    return kind(), [{"x": torch.randn(rows, tokens, 16)} for _ in range(2)]


def breaking() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(BreaksOnRank1)


def exiting() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(ExitsOnRank1)


def skipping() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(SkipsOnRank1)


def never_running() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(NeverRuns)


def unlike() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(Unlike)


def shifted() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(ShiftedNet)


def partly_fp32() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(MixedNet)


def single() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(SingleNet)


def single_where_sharded() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(SingleWhereShardedNet)


def mixing_2() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(MixesTokens, 2, 12)


def mixing_5() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(MixesTokens, 5, 12)


def not_copied() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(NotCopied)


def changing() -> tuple[nn.Module, list[dict[str, Any]]]:
    model, batches = factory(ChangesItsBatch)
    return model, [{"inputs": [batch["x"]]} for batch in batches]


ONE = Net()


def always_the_same() -> tuple[nn.Module, list[dict[str, Any]]]:
    return ONE, factory()[1]


def disturbing() -> tuple[nn.Module, list[dict[str, Any]]]:
    random.seed(1)
    warnings.simplefilter("error")
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    sys.path.insert(0, "/nowhere")
    return factory(NeverRuns)


def rules(**norm: Any) -> dict[str, Any]:
    """Heads are cut; ``norm`` says more about the norm between the cuts."""
    specs = [
        {"patterns": [r".*\.[qkv]_proj\.weight"], "partition_type": "column"},
        {"patterns": [r".*\.o_proj\.weight"], "partition_type": "row"},
        {"patterns": ["idle"], "partition_type": "skip"},
        {"patterns": [r".*\.q_norm\.weight"], "partition_type": "skip", **norm},
    ]
    return {"layer_specs": specs}


RIGHT = {"partition_config": rules(grad_allreduce=True)}
LACKING = {"partition_config": rules()}
WRONG = {**LACKING, "proof": "off"}
NEEDLESS = {
    "partition_config": {
        "layer_specs": [
            {"patterns": [r"layers\.1\."], "partition_type": "skip", "grad_allreduce": True},
            *rules(grad_allreduce=True)["layer_specs"],
        ]
    }
}
"""The second layer is replicated, and its gradients complete."""

WRONG_FOR_QWEN3 = {
    "preset_model": "qwen3",
    "partition_config": {"layer_specs": [{"patterns": [r".*self_attn\.[qk]_norm"], "partition_type": "skip"}]},
    "proof": "off",
}


def of(name: str, config: dict[str, Any] = RIGHT, tp_size: int = 2, **options: Any) -> Report:
    return verify(f"{__name__}:{name}", tp_size, config, steps=2, **options)


def test_a_right_plan_passes() -> None:
    report = of("factory")
    assert (report.verdict, report.precision) == ("pass", "fp64"), report
    assert report.loss < 1e-14
    rows = {row.name: row for row in report.rows}
    assert set(rows) == {name for name, _ in Net().named_parameters()}
    assert max(row.worst for row in report.rows) < 1e-8
    assert rows["layers.0.q_proj.weight"].cut == "column"
    assert rows["layers.0.q_proj.weight"].rule == r".*\.[qkv]_proj\.weight"
    assert rows["layers.0.q_proj.weight"].source == "user"
    assert rows["layers.0.q_proj.weight"].bit_equal is None
    assert rows["layers.0.q_norm.weight"].bit_equal is True
    assert rows["idle.weight"].gradient == 0.0
    cut, whole = 2 * (4 * 16 * 16 + 3 * 16), 2 * (16 + HEAD) + 6
    assert report.share == pytest.approx((cut / 2 + whole) / (cut + whole))
    assert "layers.*.q_proj.weight x2" in str(report)


@pytest.mark.parametrize("name", ["single", "single_where_sharded"])
def test_what_does_not_run_in_fp64_runs_in_fp32(name: str) -> None:
    report = of(name)
    assert (report.verdict, report.precision) == ("pass" if name != "single" else report.verdict, "fp32"), report
    assert report.loss < 1e-5
    assert 1e-9 < max(row.gradient for row in report.rows if "q_proj" in row.name) < 1e-5
    zero = {f"layers.{layer}.k_proj.bias" for layer in range(2)}  # their true gradient
    assert max(row.worst for row in report.rows if row.name not in zero) < 1e-5
    if name == "single":  # what fp32 cannot compute is known by fp64 alone
        assert not any(row.noise for row in report.rows)
        assert {row.name for row in report.failed} <= zero
    else:
        assert {row.name for row in report.rows if row.noise} == zero
        assert "rounding: fp32 itself misses fp64" in str(report)


def test_what_a_model_computes_in_fp32_is_rounding_in_fp64_too() -> None:
    report = of("partly_fp32", tolerance=1e-20)
    assert report.precision == "fp64"
    noisy = {row.name for row in report.rows if row.noise}
    assert noisy == {f"layers.{layer}.k_proj.bias" for layer in range(2)}
    assert not noisy & {row.name for row in report.failed}


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_sizes(tp_size: int) -> None:
    for model_type in ("llama", "bloom", "mixtral"):  # 8 heads on 3 ranks: 3, 3, 2
        report = verify(model_type, tp_size, steps=1, sequence_parallel=model_type != "bloom")
        assert (report.verdict, report.precision) == ("pass", "fp64"), report
    assert verify("qwen3", tp_size, WRONG_FOR_QWEN3, steps=1).verdict == "fail"


def test_experts_that_stay_whole_run_in_fp64_too() -> None:
    """By transformers' own functions, whose grouped matmul does not know it."""
    report = verify("mixtral", 1, steps=1)
    assert (report.verdict, report.precision) == ("pass", "fp64"), report


def test_a_mistake_that_hides_where_each_rank_has_whole_sequences_shows_at_five_rows() -> None:
    hidden = of("mixing_2", sequence_parallel=True)
    assert hidden.verdict == "pass", hidden
    assert of("mixing_5").verdict == "pass"
    report = of("mixing_5", sequence_parallel=True)
    assert report.verdict == "fail"
    assert report.loss > 1e-4
    assert report.rows[0].name.startswith("layers.") and report.rows[0].since == 1


def test_it_takes_no_second() -> None:
    verify("llama", 2)  # imports
    started = time.process_time()
    assert verify("llama", 2).verdict == "pass"
    assert time.process_time() - started < 3  # 0.3 on a quiet machine


def test_models_are_built_and_not_copied() -> None:
    with pytest.raises(TypeError, match="cannot be copied"):
        deepcopy(NotCopied())
    assert of("not_copied").verdict == "pass"


def test_nested_batches_are_each_ranks_own() -> None:
    report = of("changing")
    assert (report.verdict, report.precision) == ("pass", "fp64"), report


def test_a_factory_that_builds_nothing_new_is_told() -> None:
    report = of("always_the_same")
    assert report.verdict == "error"
    assert "always_the_same returns the same parameters every time it is called" in report.message


@pytest.mark.parametrize("name", ["disturbing", "breaking", "factory"])
def test_what_the_process_shares_is_put_back(name: str) -> None:
    random.seed(3)
    torch.manual_seed(3)

    def state() -> tuple[Any, ...]:
        shared = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), list(sys.path)
        return (*shared, list(warnings.filters), random.getstate(), torch.get_rng_state().tolist())

    before = state()
    assert of(name).verdict == ("pass" if name == "factory" else "error")
    assert state() == before


def test_the_working_directory_is_importable_and_grad_mode_is_the_ranks_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = "import torch\ntorch.rand(3)\n"  # when it is imported, which is done once
    (tmp_path / "net_of_a_user.py").write_text(f"from {__name__} import factory\n{drawing}")
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        report = verify("net_of_a_user:factory", 2, RIGHT, steps=1)
    assert report.verdict == "pass", report
    del sys.modules["net_of_a_user"]


def test_a_wrong_rule_is_told_with_its_parameter_on_top() -> None:
    report = of("factory", WRONG)
    assert report.verdict == "fail"
    assert {row.name for row in report.rows[:2]} == {"layers.0.q_norm.weight", "layers.1.q_norm.weight"}
    assert all(row.since == 1 and row.bit_equal is False and row.gradient > 0.1 for row in report.rows[:2])
    top = str(report).splitlines()[2 + len(report.warnings)]
    assert "layers.*.q_norm.weight x2" in top
    assert "not bit-equal" in top


def test_what_a_plan_lacks_is_repaired_and_told() -> None:
    report = of("factory", LACKING)
    assert report.verdict == "pass", report
    assert "repaired: the gradients of layers.*.q_norm.weight are partial sums on each rank" in str(report)


def test_what_a_rule_says_needlessly_is_told_with_the_fix() -> None:
    report = of("factory", NEEDLESS)
    assert report.verdict == "fail"
    assert any("remove `grad_allreduce: true`" in finding for finding in report.findings), report.findings
    assert not report.repaired


def test_ranks_that_differ_within_the_bound_fail_too() -> None:
    report = of("unlike", tolerance=10.0)
    assert report.verdict == "fail"
    assert {row.name for row in report.failed} == {"idle.bias"}
    assert report.failed[0].bit_equal is False


def test_a_wrong_forward_pass_is_told_with_the_module() -> None:
    report = of("shifted")
    assert (report.verdict, report.forward) == ("fail", "layers.1")
    assert report.loss > 0.01
    assert "the forward pass differs first in layers.1" in str(report)
    assert "the first value that differs is that of" in str(report)
    assert "test_verify.py:" in str(report)


def test_a_refused_plan_says_why_and_a_wrong_config_raises() -> None:
    unclosed = {"layer_specs": [{"patterns": [r".*\.q_proj\.weight"], "partition_type": "column"}]}
    report = of("factory", {"partition_config": unclosed})
    assert report.verdict == "refused"
    assert "q_proj" in report.message
    assert not report.rows
    with pytest.raises(ValueError, match="partition"):
        of("factory", {"partition_config": {"layer_specs": [{"patterns": ["a"], "partition_type": "diagonal"}]}})


def test_an_error_of_one_rank_ends_all_and_the_next_model_runs() -> None:
    report = of("breaking")
    assert (report.verdict, report.unsharded) == ("error", False)
    assert report.message == "KeyError: 'rank 1 does not want to'"
    assert "in forward" in report.details
    assert "rank_run.py" not in report.details and "lockstep.py" not in report.details
    assert of("exiting").message == "SystemExit: 7"
    assert of("factory").verdict == "pass"


def test_ranks_that_wait_for_each_other_are_told_with_their_lines() -> None:
    report = of("skipping")
    assert (report.verdict, report.unsharded) == ("error", False)
    assert report.message.startswith("CollectiveMismatchError: ")
    assert "rank 0" in report.message and "rank 1" in report.message and ".py:" in report.message


def test_an_error_of_the_unsharded_run_is_told_apart() -> None:
    report = of("never_running")
    assert (report.verdict, report.unsharded, report.message) == ("error", True, "NotImplementedError: no forward")


@pytest.mark.parametrize(("config", "status"), [(RIGHT, 0), (LACKING, 0), (NEEDLESS, 1)])
def test_command_takes_rules_from_a_file(
    config: dict[str, Any], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(config["partition_config"]))
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", f"{__name__}:factory", "--tp", "2", "--rules", str(file), "--steps", "1", "--overlap"])
    assert ended.value.code == status
    assert "q_norm.weight" in capsys.readouterr().out


def test_a_sweep_writes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = pytest.importorskip("lightning_autotp.model_sources.small")
    monkeypatch.setitem(small.NOT_RUNNABLE, "nothing", "there is no such type")
    readme, table = tmp_path / "README.md", tmp_path / "table.md"
    readme.write_text("before\n<!-- sweep -->\nold\n<!-- /sweep -->\nbehind\n")
    names = ["llama", "qwen2", "nothing"]
    status = verify_command.main(
        ["--sweep", *names, "--tp", "2", "--steps", "1", "--table", str(table), "--write-readme", str(readme)]
    )
    assert status == 0
    lines = table.read_text().splitlines()
    assert lines[0] == "| model type | rules, TP=2 | derived, TP=2 | note |"
    cells = [line.split(" | ")[1:3] for line in lines[2:5]]
    assert cells == [["pass, proved, 50%", "pass, proved, 50%"]] * 2 + [["not run", "not run"]]
    assert "does not run unsharded: there is no such type" in lines[4]
    assert readme.read_text() == f"before\n<!-- sweep -->\n\n{table.read_text()}\n<!-- /sweep -->\nbehind\n"
    assert "by rules 2 pass, 1 not run; on average a rank holds 50." in lines[-1]
    assert "llama: rules TP=2 pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdict", "count", "status"),
    [("pass", 3, 0), ("refused", 5, 0), ("refused", 6, 1), ("fail", 1, 1), ("error", 1, 1)],
)
def test_a_sweep_fails_on_any_failure_and_on_many_refusals(
    verdict: Any, count: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "verify", lambda name, size, config, **_: Report(name, size, verdict))
    assert verify_command.main(["--sweep", *(f"type{number}" for number in range(count)), "--tp", "2"]) == status


def test_a_file_without_markers_is_refused_before_the_sweep(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="sweep"):
        verify_command.main(["--sweep", "llama", "--write-readme", str(readme)])
