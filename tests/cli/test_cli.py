"""The command line: what a config says reaches the strategy, and comes back out of a saved config as it went in."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import StrategyRegistry

import lightning_autotp
from lightning_autotp import TPConfig, TPTrainingConfig
from lightning_autotp.cli import main as cli
from lightning_autotp.cli.main import main
from tests.helpers.command_line import TINY, autotp, parsed, text_file, write
from tests.helpers.hygiene import leave_process_group

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_file(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """``lightning-autotp ARGUMENTS`` in this process."""
    monkeypatch.setattr(sys, "argv", ["lightning-autotp", *map(str, arguments)])
    main()


RULES: dict[str, Any] = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.qkv\.weight$"], "partition_type": "column", "shape": [[4, 2, 2], -1]},
        {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
    ],
}
FIELDS: dict[str, Any] = {
    "autotp_size": 2,
    "dtype": "bfloat16",
    "tp_overlap_comm": True,
    "preset_model": "llama",
    "partition_config": RULES,
}


# ---- from YAML to the strategy


def sources(tmp_path: Path) -> dict[str, dict[str, Any]]:
    (tmp_path / "tp.yaml").write_text(yaml.safe_dump(FIELDS))
    return {
        "fields": FIELDS,
        "dict": {"config": FIELDS},
        "path": {"config": str(tmp_path / "tp.yaml")},
        "dict-and-field": {"config": {**FIELDS, "autotp_size": 4}, "autotp_size": 2},
    }


@pytest.mark.parametrize("source", ["fields", "dict", "path", "dict-and-field"])
def test_every_way_to_write_a_config_gives_the_same_strategy(source: str, tmp_path: Path, text: Path) -> None:
    strategy = parsed(write(tmp_path / "config.yaml", autotp(**sources(tmp_path)[source]), text))
    assert strategy.config == TPTrainingConfig.load(FIELDS)
    assert (strategy.config.size, strategy.config.dtype) == (2, torch.bfloat16)


@pytest.mark.parametrize("source", ["fields", "dict", "path", "printed"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_dtype_counts_as_set_only_where_it_is_written(
    source: str,
    dtype: str | None,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # a dtype is applied where it is set: the default, taken for the user's word, would turn weights into float16
    said = {"autotp_size": 2} | ({"dtype": dtype} if dtype else {})
    (tmp_path / "tp.yaml").write_text(yaml.safe_dump(said))
    arguments: dict[str, dict[str, Any]] = {"fields": said, "path": {"config": str(tmp_path / "tp.yaml")}}
    config = write(tmp_path / "config.yaml", autotp(**arguments.get(source, {"config": said})), text)
    if source == "printed":
        document = printed(monkeypatch, capsys, "fit", "--config", config)
        config.write_text(yaml.safe_dump({name: document[name] for name in ("trainer", "model", "data")}))
    got = parsed(config).config
    assert ("dtype" in got.model_fields_set) == (dtype is not None)
    assert got == TPTrainingConfig.load(said)


def test_a_deepspeed_file_is_read(tmp_path: Path, text: Path) -> None:
    path = CONFIGS / "deepspeed_tp2.json"
    strategy = parsed(write(tmp_path / "config.yaml", autotp(config=str(path)), text))
    assert strategy.config == TPTrainingConfig.load(path)
    assert strategy.config.size == 2


def test_a_nested_section_and_an_interval_are_read(tmp_path: Path, text: Path) -> None:
    arguments = {"tensor_parallel": {"tp_size": 2}, "timeout": "0:10:00", "save_distributed_checkpoint": False}
    strategy = parsed(write(tmp_path / "config.yaml", autotp(**arguments), text))
    assert strategy.config.tensor_parallel == TPConfig(tp_size=2)
    assert strategy._timeout is not None and strategy._timeout.total_seconds() == 600
    assert strategy._save_distributed_checkpoint is False


@pytest.mark.parametrize("value", ["fused", True, False])
def test_the_loss_is_switched_by_a_name_or_a_bool(value: str | bool, tmp_path: Path, text: Path) -> None:
    config = write(tmp_path / "config.yaml", autotp(autotp_size=2, loss_parallel=value), text)
    assert parsed(config).config.loss_parallel == value
    option = f"--trainer.strategy.init_args.loss_parallel={str(value).lower()}"
    assert parsed(write(tmp_path / "config.yaml", autotp(autotp_size=2), text), option).config.loss_parallel == value


@pytest.mark.parametrize("option", ["--trainer.strategy.init_args.autotp_size", "--trainer.strategy.autotp_size"])
def test_the_command_line_wins_over_the_config(option: str, tmp_path: Path, text: Path) -> None:
    config = write(tmp_path / "config.yaml", autotp(**FIELDS), text)
    assert parsed(config, option, "4").config.size == 4


def test_the_short_name_is_known_to_the_command_line(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_AUTOTP_SIZE", "3")
    assert parsed(write(tmp_path / "config.yaml", "autotp", text)).config.size == 3


def test_the_class_name_and_an_argument_are_enough_on_the_command_line(tmp_path: Path, text: Path) -> None:
    config = write(tmp_path / "config.yaml", "auto", text)
    options = ("--trainer.strategy", "AutoTPStrategy", "--trainer.strategy.autotp_size", "3")
    assert parsed(config, *options).config.size == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"autotp_sise": 2}, "autotp_sise"),
        ({"config": {"autotp_sise": 2}}, "unknown field 'autotp_sise'. Did you mean 'autotp_size'"),
        ({"config": "nowhere.yaml"}, "there is no file 'nowhere.yaml'"),
        ({"preset_model": "lama"}, "llama"),
    ],
)
def test_what_is_wrong_in_a_config_is_named(
    arguments: dict[str, Any],
    message: str,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write(tmp_path / "config.yaml", autotp(**arguments), text)
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as raised:
        run(monkeypatch, "fit", "--config", config)
    assert getattr(raised.value, "code", 1) != 0
    assert message in str(raised.value) + capsys.readouterr().err


# ---- and back


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments, "--print_config")
    assert stopped.value.code in (0, None)
    document = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("subcommand", ["fit", "plan"])
@pytest.mark.parametrize("source", ["fields", "dict", "path"])
def test_a_printed_config_reads_back_as_itself(
    source: str,
    subcommand: str,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write(tmp_path / "config.yaml", autotp(**sources(tmp_path)[source]), text)
    first = printed(monkeypatch, capsys, subcommand, "--config", config)
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(first))
    assert printed(monkeypatch, capsys, subcommand, "--config", tmp_path / "printed.yaml") == first
    arguments = first["trainer"]["strategy"]["init_args"]
    if source != "fields":
        # a mapping of plain values, as a person would write it; a file's content stands for the file
        assert arguments["config"]["autotp_size"] == 2 and arguments["config"]["dtype"] == "bfloat16"
        assert arguments["config"]["partition_config"]["layer_specs"] == RULES["layer_specs"]
    else:
        assert (arguments["autotp_size"], arguments["dtype"]) == (2, "bfloat16")
        assert arguments["partition_config"] == RULES


def test_print_config_shows_what_was_given_and_not_what_plan_overrides(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "config.yaml", autotp(**FIELDS), text, devices=2, precision="bf16-true")
    document = printed(monkeypatch, capsys, "plan", "--config", config)
    assert (document["trainer"]["devices"], document["trainer"]["precision"]) == (2, "bf16-true")


@pytest.mark.parametrize("source", ["bare", "dict", "fields"])
def test_the_config_that_a_run_saves_starts_the_same_run(
    source: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = {"autotp_size": 1, "tp_overlap_comm": True}
    arguments: dict[str, dict[str, Any]] = {"bare": {}, "dict": {"config": off}, "fields": off}
    config = write(tmp_path / "config.yaml", autotp(**arguments[source]), text, default_root_dir=str(tmp_path / "x"))
    run(monkeypatch, "fit", "--config", config)
    saved = tmp_path / "config.yaml"  # the run saves its config where it logs, over the one it was given
    first = yaml.safe_load(saved.read_text())
    assert first["trainer"]["strategy"]["class_path"].endswith("AutoTPStrategy")
    leave_process_group()
    run(monkeypatch, "fit", "--config", saved)
    assert yaml.safe_load(saved.read_text()) == first


# ---- plan


def test_plan_prints_the_table_and_succeeds(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "config.yaml", autotp(autotp_size=2, preset_model="llama"), text)
    run(monkeypatch, "plan", "--config", config)
    shown = capsys.readouterr().out
    assert "Tensor parallel plan for 2 ranks" in shown
    line = next(line for line in shown.splitlines() if "q_proj.weight" in line)
    assert "[32, 32]" in line and "[16, 32]" in line and "column" in line


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("train_*.yaml")))
def test_plan_needs_nothing_of_the_machine_that_a_config_is_for(
    config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "plan", "--config", CONFIGS / config)
    assert "Tensor parallel plan for 2 ranks" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # and leaves nothing behind


def test_plan_fails_and_names_linear_layers_that_no_rule_matches(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = {"layer_specs": RULES["layer_specs"][::2]}
    config = write(tmp_path / "config.yaml", autotp(autotp_size=2, partition_config=rules), text)
    with (
        pytest.warns(UserWarning, match=r"no rule matches the linear layers .*gate_proj"),
        pytest.raises(SystemExit) as e,
    ):
        run(monkeypatch, "plan", "--config", config)
    assert e.value.code not in (0, None)
    assert "Tensor parallel plan for 2 ranks" in capsys.readouterr().out


def test_plan_fails_where_setup_would_refuse(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(
        tmp_path / "config.yaml", autotp(autotp_size=2, partition_config=RULES | {"strict_mode": True}), text
    )
    with pytest.raises(SystemExit, match="plan: strict_mode: "):
        run(monkeypatch, "plan", "--config", config)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [(autotp(), "plan: tensor parallelism is off"), ("auto", "plan: the strategy is SingleDeviceStrategy")],
)
def test_plan_fails_where_there_is_nothing_to_plan(
    strategy: Any, message: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "plan", "--config", write(tmp_path / "config.yaml", strategy, text))


# ---- the console script


def test_resume_stands_for_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "AutoTPCLI", lambda **_: seen.append(sys.argv[:]))
    run(monkeypatch, "fit", "--config", "a.yaml", "--resume", "--trainer.max_steps", "4")
    run(monkeypatch, "fit", "--config", "a.yaml")
    given = ["lightning-autotp", "fit", "--config", "a.yaml"]
    # in sys.argv, because that is what Lightning starts its other processes with
    assert seen == [[*given, "--ckpt_path", "last", "--trainer.max_steps", "4"], given]


def test_importing_the_package_again_is_no_error_and_registers_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.reload(lightning_autotp)
    for name in [name for name in sys.modules if name.split(".")[0] == "lightning_autotp"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("lightning_autotp")
    assert StrategyRegistry.available_strategies().count("autotp") == 1


def autotp_command(cwd: Path, *arguments: Any) -> str:
    """Run the installed command, and return what it printed."""
    script = Path(sys.executable).parent / "lightning-autotp"
    if not script.exists():
        pytest.skip("the package is not installed")
    environ = {name: value for name, value in os.environ.items() if name not in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    done = subprocess.run(
        [str(script), *map(str, arguments)], cwd=cwd, env=environ, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_main_job_trains_on_two_processes_saves_and_goes_on_where_it_stopped(tmp_path: Path, text: Path) -> None:
    small = [f"--model.init_args.{name}={value}" for name, value in TINY.items()]
    options = [
        "fit",
        f"--config={CONFIGS / 'train_text_tp2.yaml'}",
        *small,
        f"--data.init_args.path={text}",
        "--data.init_args.seq_length=32",
        "--data.init_args.batch_size=4",
        "--trainer.val_check_interval=2",
    ]
    shown = autotp_command(tmp_path, *options, "--trainer.max_steps=2")
    assert "Tensor parallel plan for 2 ranks" in shown
    assert "Return the " in shown
    last = tmp_path / "runs" / "train_text" / "checkpoints" / "last.ckpt"
    assert steps(last) == 2
    shown = autotp_command(tmp_path, *options, "--trainer.max_steps=6", "--resume")
    assert "Restored all states from the checkpoint" in shown
    assert steps(last) == 6


def steps(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint, of which both processes wrote their part."""
    assert {path.name for path in checkpoint.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    return int(torch.load(checkpoint / "meta.pt", weights_only=False)["global_step"])
