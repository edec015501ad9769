"""``verify``: a right plan passes, a wrong one is told with its parameter, and nothing that breaks ends the pool."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn import functional

from lightning_autotp.cli import main as cli
from lightning_autotp.cli import verify as verify_command
from lightning_autotp.verification import Pool, Report, sweep, verify

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


class BreaksOnRank1(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if dist.is_initialized() and dist.get_rank() == 1:
            raise KeyError("rank 1 does not want to")
        return super().forward(x)


class DiesOnRank1(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if dist.is_initialized() and dist.get_rank() == 1:
            os._exit(7)
        return super().forward(x)


class NeverRuns(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError("no forward")


class Unlike(Net):
    """A rank's own number goes into a parameter that all hold whole."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return {"loss": super().forward(x)["loss"] + rank * 1e-7 * self.idle.bias.sum()}


class Shifted(Attention):
    """Computes something else where it is sharded."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + dist.is_initialized()


class ShiftedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = Shifted()


def factory(kind: type[Net] = Net) -> tuple[nn.Module, list[dict[str, Any]]]:
    return kind(), [{"x": torch.randn(2, 5, 16)} for _ in range(2)]


def breaking() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(BreaksOnRank1)


def dying() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(DiesOnRank1)


def never_running() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(NeverRuns)


def unlike() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(Unlike)


def shifted() -> tuple[nn.Module, list[dict[str, Any]]]:
    return factory(ShiftedNet)


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
WRONG = {"partition_config": rules()}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as made:
        yield made


def of(name: str, pool: Pool, config: dict[str, Any] = RIGHT, **options: Any) -> Report:
    return verify(f"{__name__}:{name}", 2, config, steps=2, pool=pool, **options)


def test_a_right_plan_passes(pool: Pool) -> None:
    report = of("factory", pool)
    assert report.verdict == "pass", report
    assert report.loss < 1e-5
    rows = {row.name: row for row in report.rows}
    assert set(rows) == {name for name, _ in Net().named_parameters()}
    assert max(row.worst for row in report.rows if not row.noise) < 1e-5
    assert rows["layers.0.q_proj.weight"].cut == "column"
    assert rows["layers.0.q_proj.weight"].rule == r".*\.[qkv]_proj\.weight"
    assert rows["layers.0.q_proj.weight"].source == "user"
    assert rows["layers.0.q_proj.weight"].bit_equal is None
    assert rows["layers.0.q_norm.weight"].bit_equal is True
    assert rows["idle.weight"].gradient == 0.0
    noisy = {row.name for row in report.rows if row.noise}
    assert noisy == {f"layers.{layer}.k_proj.bias" for layer in range(2)}  # their true gradient is zero
    assert "rounding" in str(report)
    cut, whole = 2 * (4 * 16 * 16 + 3 * 16), 2 * (16 + HEAD) + 6
    assert report.share == pytest.approx((cut / 2 + whole) / (cut + whole))
    assert "layers.*.q_proj.weight x2" in str(report)


def test_a_wrong_rule_is_told_with_its_parameter_on_top(pool: Pool) -> None:
    report = of("factory", pool, WRONG)
    assert report.verdict == "fail"
    assert {row.name for row in report.rows[:2]} == {"layers.0.q_norm.weight", "layers.1.q_norm.weight"}
    assert all(row.since == 1 and row.bit_equal is False and row.gradient > 0.1 for row in report.rows[:2])
    top = str(report).splitlines()[2 + len(report.warnings)]
    assert "layers.*.q_norm.weight x2" in top
    assert "not bit-equal" in top


def test_ranks_that_differ_within_the_bound_fail_too(pool: Pool) -> None:
    report = of("unlike", pool, tolerance=10.0)
    assert report.verdict == "fail"
    assert {row.name for row in report.failed} == {"idle.bias"}
    assert report.failed[0].bit_equal is False


def test_a_wrong_forward_pass_is_told_with_the_module(pool: Pool) -> None:
    report = of("shifted", pool)
    assert (report.verdict, report.forward) == ("fail", "layers.1")
    assert report.loss > 0.01
    assert "the forward pass differs first in layers.1" in str(report)


def test_a_run_that_takes_too_long_is_ended(pool: Pool) -> None:
    report = of("breaking", pool, timeout=0.0)
    assert report.verdict == "error"
    assert "within 0 s" in report.message


def test_a_refused_plan_says_why_and_a_wrong_config_raises(pool: Pool) -> None:
    unclosed = {"layer_specs": [{"patterns": [r".*\.q_proj\.weight"], "partition_type": "column"}]}
    report = of("factory", pool, {"partition_config": unclosed})
    assert report.verdict == "refused"
    assert "q_proj" in report.message
    assert not report.rows
    with pytest.raises(ValueError, match="partition"):
        of("factory", pool, {"partition_config": {"layer_specs": [{"patterns": ["a"], "partition_type": "diagonal"}]}})


def test_an_error_of_one_rank_ends_all_and_the_next_model_runs(pool: Pool) -> None:
    report = of("breaking", pool)
    assert (report.verdict, report.unsharded) == ("error", False)
    assert report.message == "KeyError: 'rank 1 does not want to'"
    assert "in forward" in report.details
    assert of("dying", pool).message == "rank 1 died (exit code 7)"
    assert of("factory", pool).verdict == "pass"


def test_an_error_of_the_unsharded_run_is_told_apart(pool: Pool) -> None:
    report = of("never_running", pool)
    assert (report.verdict, report.unsharded, report.message) == ("error", True, "NotImplementedError: no forward")


@pytest.mark.parametrize(("config", "status"), [(RIGHT, 0), (WRONG, 1)])
def test_command_takes_rules_from_a_file(
    config: dict[str, Any], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(config["partition_config"]))
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", f"{__name__}:factory", "--tp", "2", "--rules", str(file), "--steps", "1", "--overlap"])
    assert ended.value.code == status
    assert "layers.*.q_norm.weight x2" in capsys.readouterr().out


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
    assert lines[0] == "| model type | TP=2 | parameters a rank (TP=2) | note |"
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["pass", "pass", "not run"]
    assert "does not run unsharded: there is no such type" in lines[4]
    assert readme.read_text() == f"before\n<!-- sweep -->\n\n{table.read_text()}\n<!-- /sweep -->\nbehind\n"
    assert "llama: TP=2 pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdict", "count", "status"),
    [("pass", 3, 0), ("refused", 5, 0), ("refused", 6, 1), ("fail", 1, 1), ("error", 1, 1)],
)
def test_a_sweep_fails_on_any_failure_and_on_many_refusals(
    verdict: Any, count: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "verify", lambda name, size, **_: Report(name, size, verdict))
    assert verify_command.main(["--sweep", *(f"type{number}" for number in range(count)), "--tp", "2"]) == status


def test_a_file_without_markers_is_refused_before_the_sweep(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="sweep"):
        verify_command.main(["--sweep", "llama", "--write-readme", str(readme)])
