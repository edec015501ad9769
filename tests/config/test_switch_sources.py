"""Every switch from every source, and a new field: it is in all of them without a line of its own."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

from lightning_autotp import AutoTPStrategy, TPTrainingConfig, verify
from lightning_autotp.cli import estimate as estimate_command
from lightning_autotp.cli import verify as verify_command
from lightning_autotp.config.switches import Switch
from lightning_autotp.estimation.job import Job
from lightning_autotp.strategies.arguments import takes_fields_of
from tests.helpers.command_line import autotp, parsed, text_file, write

Source = Callable[[dict[str, Any], Path, pytest.MonkeyPatch], TPTrainingConfig]

SWITCHES: list[tuple[str, Any]] = [
    ("sequence_parallel", True),
    ("loss_parallel", True),
    ("loss_parallel", "fused"),
    ("compile", True),
    ("shard_saved_activations", True),
    ("check_agreement", False),
    ("tp_overlap_comm", True),
    ("unsafe_checkpoint_load", True),
    ("verify_checksums", True),
    ("async_checkpoint", True),
]


class Captured(Exception):
    """Raised where the work would begin."""


def yaml_file(given: dict[str, Any], folder: Path, name: str = "tp.yaml") -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(given))
    return str(path)


def json_file(given: dict[str, Any], folder: Path, name: str = "tp.json") -> str:
    path = folder / name
    path.write_text(json.dumps(given))
    return str(path)


def deepspeed(section: dict[str, Any]) -> dict[str, Any]:
    return {"train_batch_size": 8, "zero_optimization": {"stage": 1}, "tensor_parallel": section}


def from_environment(given: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> TPTrainingConfig:
    monkeypatch.setenv("LIGHTNING_AUTOTP_CONFIG", yaml_file(given, folder))
    strategy = StrategyRegistry.get("autotp")
    assert isinstance(strategy, AutoTPStrategy)
    return strategy.config


def verified(config: Any, **options: Any) -> TPTrainingConfig:
    """The config that ``verify`` runs with."""
    seen: list[Any] = []

    def not_run(case: Any, precision: str) -> None:
        seen.append(case)
        raise Captured

    module = importlib.import_module("lightning_autotp.verification.verify")
    with mock.patch.object(module, "run_unsharded", not_run):
        assert verify("llama", 2, config, **options).verdict == "error"
    case = seen[0]
    assert isinstance(case.config, TPTrainingConfig)
    return case.config


def by_verify_command(monkeypatch: pytest.MonkeyPatch, *options: str) -> TPTrainingConfig:
    seen: list[Any] = []

    def verify_stub(model: str, size: int, **settings: Any) -> None:
        seen.append(settings["config"])
        raise Captured

    monkeypatch.setattr(verify_command, "verify", verify_stub)
    with pytest.raises(Captured):
        verify_command.main(["llama", *options])
    return verified(seen[0])


def by_estimate_command(monkeypatch: pytest.MonkeyPatch, *options: str) -> TPTrainingConfig:
    seen: list[Job] = []

    def estimate_stub(job: Job, machine: Any) -> None:
        seen.append(job)
        raise Captured

    monkeypatch.setattr(estimate_command, "estimate", estimate_stub)
    with pytest.raises(Captured):
        estimate_command.main(["llama", *options])
    return seen[0].config


def command_line(strategy: Any, folder: Path, *options: str) -> TPTrainingConfig:
    return parsed(write(folder / "job.yaml", strategy, text_file(folder)), *options).config


def option(given: dict[str, Any], prefix: str) -> list[str]:
    return [f"--trainer.strategy.{prefix}{name}={json.dumps(value).strip(chr(34))}" for name, value in given.items()]


SOURCES: dict[str, Source] = {
    "arguments": lambda given, folder, patch: AutoTPStrategy(**given).config,
    "object": lambda given, folder, patch: AutoTPStrategy(TPTrainingConfig(**given)).config,
    "dict": lambda given, folder, patch: AutoTPStrategy(given).config,
    "YAML": lambda given, folder, patch: AutoTPStrategy(yaml_file(given, folder)).config,
    "JSON": lambda given, folder, patch: AutoTPStrategy(Path(json_file(given, folder))).config,
    "DeepSpeed file": lambda given, folder, patch: AutoTPStrategy(json_file(deepspeed(given), folder)).config,
    "DeepSpeed dict": lambda given, folder, patch: AutoTPStrategy(deepspeed(given)).config,
    "environment": from_environment,
    "command line, init_args": lambda given, folder, patch: command_line(autotp(**given), folder),
    "command line, config dict": lambda given, folder, patch: command_line(autotp(config=given), folder),
    "command line, config file": lambda given, folder, patch: command_line(
        autotp(config=yaml_file(given, folder)), folder
    ),
    "command line, DeepSpeed file": lambda given, folder, patch: command_line(
        autotp(config=json_file(deepspeed(given), folder)), folder
    ),
    "command line, options": lambda given, folder, patch: command_line(
        "auto", folder, "--trainer.strategy=AutoTPStrategy", *option(given, "")
    ),
    "command line, options behind init_args": lambda given, folder, patch: command_line(
        autotp(), folder, *option(given, "init_args.")
    ),
    "verify": lambda given, folder, patch: verified(given),
    "verify, file": lambda given, folder, patch: verified(yaml_file(given, folder)),
    "verify, DeepSpeed file": lambda given, folder, patch: verified(json_file(deepspeed(given), folder)),
    "verify command": lambda given, folder, patch: by_verify_command(patch, "--rules", yaml_file(given, folder)),
    "estimate": lambda given, folder, patch: Job("llama", config=TPTrainingConfig.load(given)).config,
    "estimate command": lambda given, folder, patch: by_estimate_command(patch, "--rules", yaml_file(given, folder)),
    "estimate command, DeepSpeed file": lambda given, folder, patch: by_estimate_command(
        patch, "--rules", json_file(deepspeed(given), folder)
    ),
}


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), SWITCHES, ids=[f"{name}={value}" for name, value in SWITCHES])
@pytest.mark.parametrize("source", [source for source in SOURCES if not source.startswith("command line")])
def test_a_switch_arrives_from_every_source(
    source: str, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SOURCES[source]({name: value}, tmp_path, monkeypatch)
    assert getattr(config, name) is value or getattr(config, name) == value == "fused"
    assert name in config.model_fields_set
    others = {other: getattr(config, other) for other, _ in SWITCHES if other != name}
    assert others == {other: getattr(TPTrainingConfig(), other) for other in others}


@pytest.mark.parametrize("source", SOURCES)
def test_all_switches_at_once_arrive_from_every_source(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(SWITCHES)
    # the command line takes half a second a time: of switches with two values, it is given the last
    config = SOURCES[source]({"autotp_size": 2, **given}, tmp_path, monkeypatch)
    assert {name: getattr(config, name) for name in given} == given
    assert config.size == 2


OVERRIDES: dict[str, Source] = {
    "arguments": lambda given, folder, patch: AutoTPStrategy(dict(SWITCHES), **given).config,
    "over a file": lambda given, folder, patch: AutoTPStrategy(yaml_file(dict(SWITCHES), folder), **given).config,
    "over a DeepSpeed file": lambda given, folder, patch: (
        AutoTPStrategy(json_file(deepspeed(dict(SWITCHES)), folder), **given).config
    ),
}


@pytest.mark.parametrize(("name", "value"), SWITCHES, ids=[f"{name}={value}" for name, value in SWITCHES])
@pytest.mark.parametrize("source", OVERRIDES)
def test_an_argument_wins_over_the_config_and_one_that_nobody_gave_does_not(
    source: str, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = value is False
    config = OVERRIDES[source]({name: off}, tmp_path, monkeypatch)
    assert getattr(config, name) is off
    assert all(getattr(config, other) == on for other, on in dict(SWITCHES).items() if other != name)


def test_an_option_wins_over_the_config_and_one_that_nobody_gave_does_not(tmp_path: Path) -> None:
    given = option({"compile": False, "loss_parallel": False}, "init_args.")
    config = command_line(autotp(config=yaml_file(dict(SWITCHES), tmp_path)), tmp_path, *given)
    assert (config.compile, config.loss_parallel) == (False, False)
    assert (config.sequence_parallel, config.check_agreement) == (True, False)


def test_verify_and_estimate_override_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on: dict[str, Any] = {"sequence_parallel": True, "loss_parallel": "fused", "tp_overlap_comm": True}
    assert verified(on).sequence_parallel and not verified(on, sequence_parallel=False).sequence_parallel
    assert verified(None, sequence_parallel=True).sequence_parallel

    job = Job("llama", config=TPTrainingConfig(**on))
    assert (job.sequence_parallel, job.loss_parallel) == (True, "fused")
    job = Job("llama", config=TPTrainingConfig(**on), sequence_parallel=False, loss_parallel=True)
    assert (job.sequence_parallel, job.loss_parallel) == (False, True)
    assert (job.config.sequence_parallel, job.config.loss_parallel) == (False, True)

    file = ["--rules", yaml_file(on, tmp_path)]
    assert not by_verify_command(monkeypatch, *file, "--no-sequence-parallel").sequence_parallel
    assert not by_verify_command(monkeypatch, *file, "--no-overlap").tp_overlap_comm
    assert by_verify_command(monkeypatch, "--sequence-parallel").sequence_parallel
    assert not by_estimate_command(monkeypatch, *file, "--no-sequence-parallel").sequence_parallel
    assert by_estimate_command(monkeypatch, *file, "--no-loss-parallel").loss_parallel is False
    assert by_estimate_command(monkeypatch, "--loss-parallel", "--overlap").loss_parallel is True
    assert by_estimate_command(monkeypatch, "--fused-loss").loss_parallel == "fused"


# -- DeepSpeed's names of loss_parallel -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "loss_parallel"),
    [
        ({"vocab_parallel_lm_head": True}, True),
        ({"vocab_parallel_lm_head": False}, False),
        ({"vocab_parallel_lm_head": True, "vocab_parallel_ce_backend": "torch"}, True),
        ({"vocab_parallel_lm_head": True, "vocab_parallel_ce_backend": "liger"}, True),
        ({"vocab_parallel_lm_head": True, "loss_parallel": "fused"}, "fused"),
        ({"vocab_parallel_lm_head": True, "loss_parallel": True}, True),
        ({"vocab_parallel_lm_head": False, "loss_parallel": False}, False),
        ({"vocab_parallel_ce_backend": "torch"}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.vocab_parallel_ce_backend. has no effect here")
def test_a_vocabulary_parallel_head_of_deepspeed_means_loss_parallel(
    section: dict[str, Any], loss_parallel: Any, tmp_path: Path
) -> None:
    path = json_file(deepspeed({"autotp_size": 2, **section}), tmp_path)
    for config in (
        AutoTPStrategy(path).config,
        TPTrainingConfig(**section),
        command_line(autotp(config=path), tmp_path),
    ):
        assert config.loss_parallel == loss_parallel
        assert ("loss_parallel" in config.model_fields_set) == bool({*section} - {"vocab_parallel_ce_backend"})
    assert AutoTPStrategy(path, loss_parallel=not loss_parallel).config.loss_parallel is (not loss_parallel)


def test_the_backend_of_deepspeeds_loss_is_passed_over_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="`vocab_parallel_ce_backend` has no effect here: kernels of the loss"):
        TPTrainingConfig.load({"vocab_parallel_lm_head": True, "vocab_parallel_ce_backend": "liger"})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"vocab_parallel_lm_head": True, "loss_parallel": False}, "head True contradicts loss_parallel False; leave"),
        ({"vocab_parallel_lm_head": False, "loss_parallel": True}, "head False contradicts loss_parallel True; leave"),
        ({"vocab_parallel_lm_head": False, "loss_parallel": "fused"}, "head False contradicts loss_parallel 'fused'"),
        ({"vocab_parallel_ce_backend": "liger", "loss_parallel": False}, "backend 'liger' contradicts loss_parallel F"),
        ({"vocab_parallel_lm_head": "true"}, "vocab_parallel_lm_head: 'true' is neither true nor false"),
        ({"vocab_parallel_ce_backend": "triton"}, "vocab_parallel_ce_backend: 'triton' is neither 'torch' nor 'liger'"),
        ({"vocab_parallel_ce_backend": ["torch"]}, "vocab_parallel_ce_backend: .'torch'. is neither"),
    ],
)
def test_what_contradicts_loss_parallel_is_an_error_that_names_both(
    section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for source in (section, deepspeed(section), json_file(deepspeed(section), tmp_path)):
        with pytest.raises(ValueError, match=message):
            AutoTPStrategy(source)


# -- a new field ------------------------------------------------------------------------------------------------------


class Wide(TPTrainingConfig):
    """A config with one more field."""

    further: Switch = False
    """Whether to go further than others go."""


@takes_fields_of(Wide)
class WideStrategy(AutoTPStrategy):
    pass


def wide(**arguments: Any) -> dict[str, Any]:
    return {"class_path": f"{__name__}.WideStrategy", "init_args": arguments}


WIDE_SOURCES: dict[str, Source] = {
    "arguments": lambda given, folder, patch: WideStrategy(**given).config,
    "object": lambda given, folder, patch: WideStrategy(Wide(**given)).config,
    "dict": lambda given, folder, patch: WideStrategy(given).config,
    "YAML": lambda given, folder, patch: WideStrategy(yaml_file(given, folder)).config,
    "JSON": lambda given, folder, patch: WideStrategy(json_file(given, folder)).config,
    "DeepSpeed file": lambda given, folder, patch: WideStrategy(json_file(deepspeed(given), folder)).config,
    "command line, init_args": lambda given, folder, patch: command_line(wide(**given), folder),
    "command line, config dict": lambda given, folder, patch: command_line(wide(config=given), folder),
    "command line, config file": lambda given, folder, patch: command_line(
        wide(config=yaml_file(given, folder)), folder
    ),
    "command line, options": lambda given, folder, patch: command_line(
        "auto", folder, f"--trainer.strategy={__name__}.WideStrategy", *option(given, "")
    ),
}


@pytest.mark.parametrize("source", WIDE_SOURCES)
def test_a_new_field_arrives_from_every_source(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = WIDE_SOURCES[source]({"autotp_size": 4, "further": True}, tmp_path, monkeypatch)
    assert isinstance(config, Wide) and config.further is True
    assert config.model_fields_set >= {"autotp_size", "further"} and config.size == 4


def test_a_config_without_the_new_field_is_taken_too() -> None:
    config = WideStrategy(TPTrainingConfig(autotp_size=4), further=True).config
    assert isinstance(config, Wide) and (config.size, config.further) == (4, True)
    assert isinstance(Wide.load(TPTrainingConfig()), Wide)
    assert TPTrainingConfig.load(config, autotp_size=2) == Wide(autotp_size=2, further=True)


def test_a_new_field_arrives_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_AUTOTP_CONFIG", yaml_file({"further": True}, tmp_path))
    config = WideStrategy.from_environment().config
    assert isinstance(config, Wide) and config.further is True


def test_a_new_field_is_in_signature_and_docstrings() -> None:
    parameters = inspect.signature(WideStrategy).parameters
    assert parameters["further"].default is None and parameters["further"].annotation == bool | None
    assert list(parameters)[:-2] == list(inspect.signature(AutoTPStrategy).parameters)[:-1]  # at the end: places stay
    for cls in (Wide, WideStrategy):
        assert "    further: whether to go further than others go." in (inspect.getdoc(cls) or "")
    assert "    save_distributed_checkpoint: " in (inspect.getdoc(WideStrategy) or "")
    assert "further" not in inspect.signature(AutoTPStrategy).parameters


@pytest.mark.parametrize(
    ("value", "message"), [("no", "further: 'no' is neither true nor false"), (1, "further: 1 is")]
)
def test_a_new_field_is_as_strict_as_the_others(value: Any, message: str) -> None:
    for make in (lambda: WideStrategy(further=value), lambda: WideStrategy({"further": value})):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_new_field_is_an_option_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        LightningCLI(args=["fit", f"--trainer.strategy.help={__name__}.WideStrategy"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ".further {true,false,null} whether to go further than others go. (type: Optional[bool]" in shown


def test_a_new_field_is_printed_with_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "job.yaml", wide(further=True), text_file(tmp_path))
    with pytest.raises(SystemExit):
        parsed(config, "--print_config")
    arguments = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]["init_args"]
    assert arguments["further"] is True and arguments["sequence_parallel"] is None


# -- the signature ----------------------------------------------------------------------------------------------------


def test_names_and_order_of_arguments_stay() -> None:
    parameters = inspect.signature(AutoTPStrategy).parameters
    assert list(parameters) == [
        *("config", "autotp_size", "dtype", "tp_overlap_comm", "partition_config", "preset_model", "tensor_parallel"),
        *("sequence_parallel", "loss_parallel", "compile", "shard_saved_activations", "save_distributed_checkpoint"),
        *("exclude_frozen_parameters", "check_agreement", "check_every_n_steps", "proof", "process_group_backend"),
        *("timeout", "start_method", "find_unused_parameters", "static_graph", "gradient_as_bucket_view"),
        *(
            "unsafe_checkpoint_load",
            "verify_checksums",
            "async_checkpoint",
            "sample_batch",
            "broadcast_batch",
            "zero_stage",
            "zero_group_size",
            "zero_accumulate_unsharded",
            "context_parallel_size",
            "kwargs",
        ),
    ]
    assert all(parameters[name].default is None for name in TPTrainingConfig.model_fields)
    strategy = AutoTPStrategy({"preset_model": "llama"}, 4, "bf16", True)
    config = strategy.config
    assert (config.preset_model, config.size, str(config.dtype), config.tp_overlap_comm) == (
        *("llama", 4, "torch.bfloat16", True),
    )


def test_editors_see_every_field_as_it_is_at_run_time() -> None:
    init: Any = AutoTPStrategy.__init__
    written, made = inspect.signature(init.__wrapped__), inspect.signature(init)
    assert {n: p.annotation for n, p in written.parameters.items()} == {
        n: p.annotation for n, p in made.parameters.items()
    }


def test_each_field_is_described_once_and_everywhere() -> None:
    for cls in (TPTrainingConfig, AutoTPStrategy):
        doc = inspect.getdoc(cls) or ""
        for name, info in TPTrainingConfig.model_fields.items():
            assert info.description
            assert doc.count(f"\n    {name}: {info.description[:1].lower()}{info.description[1:12]}") == 1, name
        assert max(map(len, doc.splitlines())) <= 120
