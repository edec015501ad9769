"""Values of another type than the field's are errors, from every source: no quoted word turns a switch on or off."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_autotp import AutoTPStrategy, TPTrainingConfig, verify
from lightning_autotp.estimation.job import Job
from tests.helpers.command_line import autotp, parsed, text_file, write

SWITCHES = (
    "tp_overlap_comm",
    "broadcast_batch",
    "sequence_parallel",
    "compile",
    "shard_saved_activations",
    "check_agreement",
)
OWN_SWITCHES = (
    *("save_distributed_checkpoint", "exclude_frozen_parameters", "find_unused_parameters", "static_graph"),
    *("gradient_as_bucket_view", "broadcast_buffers", "init_sync"),
)
WORDS = ("no", "yes", "false", "true", "", 0, 1, 1.0, [True])
WRONG: list[tuple[str, Any, str]] = [
    *((name, word, f"{name}: {word!r} is neither true nor false; write") for name in SWITCHES for word in WORDS),
    ("compile", "max-autotune", "compile: 'max-autotune' is neither true nor false"),
    *(
        ("loss_parallel", word, f"loss_parallel: {word!r} is none of True, False and 'fused'")
        for word in ("yes", "Fused", 1, 0, "")
    ),
    *(
        ("autotp_size", size, f"autotp_size: {size!r} is not a whole number of ranks; write a number such as 4")
        for size in (True, False, 2.0, 2.5, "2", "four", [2])
    ),
    *(
        ("tensor_parallel", {"tp_size": size}, f"tp_size: {size!r} is not a whole number of ranks; write a number")
        for size in (True, 2.0, "2")
    ),
    ("tensor_parallel", 4, "tensor_parallel: 4 is not a mapping with tp_size, mpu, tp_group; the size alone is"),
    ("preset_model", 3, "preset_model: 3 is not a name; write one of llama, bloom"),
    ("preset_model", True, "preset_model: True is not a name; write one of"),
    ("dtype", True, "dtype: True is not a floating-point dtype; names are bf16"),
    ("dtype", 16, "dtype: 16 is not a floating-point dtype"),
]
IDS = [f"{name}={value!r}" for name, value, _ in WRONG]


def refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=IDS)
def test_a_field_of_another_type_is_refused_from_every_source(
    name: str, value: Any, message: str, tmp_path: Path
) -> None:
    given = {name: value}
    deepspeed = {"train_batch_size": 8, "tensor_parallel": {"autotp_size": 2, **given}}
    (tmp_path / "tp.yaml").write_text(yaml.safe_dump(given))
    (tmp_path / "tp.json").write_text(json.dumps(given))
    (tmp_path / "ds.json").write_text(json.dumps(deepspeed))
    refused(message, lambda: AutoTPStrategy(**given))
    refused(message, lambda: TPTrainingConfig(**given))
    for source in (given, deepspeed, tmp_path / "tp.yaml", str(tmp_path / "tp.json"), tmp_path / "ds.json"):
        refused(message, lambda source=source: AutoTPStrategy(source))  # type: ignore[misc]
    refused(message, lambda: verify("llama", 2, given))


@pytest.mark.parametrize("word", WORDS, ids=repr)
@pytest.mark.parametrize("name", OWN_SWITCHES)
def test_an_argument_that_is_no_bool_is_refused(name: str, word: Any) -> None:
    refused(f"{name}: {word!r} is neither true nor false; write true", lambda: AutoTPStrategy(**{name: word}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"process_group_backend": "gloob"}, "process_group_backend: there is no backend 'gloob'. Did you mean"),
        ({"process_group_backend": "cpu:gloo,cuda:ncl"}, "there is no backend 'ncl'. Did you mean 'nccl'?"),
        ({"process_group_backend": "undefined"}, "there is no backend 'undefined'"),
        ({"process_group_backend": ""}, "there is no backend ''"),
        ({"process_group_backend": True}, "process_group_backend: there is no backend True"),
        ({"timeout": 600}, "timeout: 600 is not a timedelta; write timedelta(minutes=30), say."),
        ({"timeout": "0:10:00"}, "timeout: '0:10:00' is not a timedelta"),
        ({"start_method": "thread"}, "start_method: 'thread' is none of 'popen', 'spawn', 'fork', 'forkserver'."),
    ],
    ids=repr,
)
def test_an_argument_that_is_not_known_is_refused(arguments: dict[str, Any], message: str) -> None:
    refused(message, lambda: AutoTPStrategy(**arguments))


@pytest.mark.parametrize("word", ["no", 1])
def test_verify_and_estimate_refuse_what_the_config_refuses(word: Any) -> None:
    message = f"sequence_parallel: {word!r} is neither true nor false"
    refused(message, lambda: verify("llama", 2, sequence_parallel=word))
    refused(message, lambda: Job("llama", sequence_parallel=word))


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        *(({name: value}, {name: value}) for name in SWITCHES for value in (True, False)),
        *(({"loss_parallel": value}, {"loss_parallel": value}) for value in (True, False, "fused")),
        *(({"autotp_size": size}, {"autotp_size": size}) for size in (0, 1, 4)),
        *(({"dtype": name}, {"dtype": torch.bfloat16}) for name in ("bf16", "torch.bfloat16", torch.bfloat16)),
        ({"tensor_parallel": {"tp_size": 4}}, {"size": 4}),
        ({"preset_model": "LLaMA"}, {"preset_model": "LLaMA"}),
    ],
    ids=repr,
)
def test_what_is_right_is_taken_as_it_is(arguments: dict[str, Any], want: dict[str, Any]) -> None:
    for config in (AutoTPStrategy(**arguments).config, AutoTPStrategy(arguments).config):
        found = {name: getattr(config, name) for name in want}
        assert found == want and {n: type(v) for n, v in found.items()} == {n: type(v) for n, v in want.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        *({name: value} for name in OWN_SWITCHES for value in (True, False)),
        *({"process_group_backend": name} for name in ("gloo", "GLOO", "nccl", "cpu:gloo,cuda:nccl", None)),
        {"broadcast_buffers": None},
        {"timeout": timedelta(minutes=1)},
        *({"start_method": name} for name in ("popen", "spawn", "fork", "forkserver")),
    ],
    ids=repr,
)
def test_arguments_that_are_right_are_taken(arguments: dict[str, Any]) -> None:
    strategy = AutoTPStrategy(**arguments)
    assert strategy.config == TPTrainingConfig()
    if "save_distributed_checkpoint" in arguments:
        assert strategy._save_distributed_checkpoint is arguments["save_distributed_checkpoint"]
    if "process_group_backend" in arguments:
        assert strategy.process_group_backend == arguments["process_group_backend"]


# -- the command line, where jsonargparse reads words as YAML: what arrives here has its type --------------------------


QUOTED = {"sequence_parallel": "no", "save_distributed_checkpoint": "false", "autotp_size": "2"}


@pytest.mark.parametrize(
    ("arguments", "options", "want"),
    [
        (QUOTED, (), (False, False, 2)),
        ({}, ("sequence_parallel=yes", "save_distributed_checkpoint=no", "autotp_size=4"), (True, False, 4)),
    ],
    ids=["quoted", "options"],
)
def test_words_of_the_command_line_mean_what_they_say(
    arguments: dict[str, Any], options: tuple[str, ...], want: tuple[Any, ...], tmp_path: Path
) -> None:
    config = write(tmp_path / "job.yaml", autotp(**arguments), text_file(tmp_path))
    strategy = parsed(config, *(f"--trainer.strategy.init_args.{option}" for option in options))
    found = (strategy.config.sequence_parallel, strategy._save_distributed_checkpoint, strategy.config.autotp_size)
    assert found == want and list(map(type, found)) == list(map(type, want))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"autotp_size": True}, 'Parser key "autotp_size"'),
        ({"autotp_size": 2.0}, 'Parser key "autotp_size"'),
        ({"compile": "max-autotune"}, 'Parser key "compile"'),
        ({"save_distributed_checkpoint": "maybe"}, 'Parser key "save_distributed_checkpoint"'),
        ({"config": {"autotp_size": True}}, "autotp_size: True is not a whole number of ranks"),
        ({"config": {"compile": "max-autotune"}}, "compile: 'max-autotune' is neither true nor false"),
        ({"tensor_parallel": {"tp_size": True}}, "tp_size: True is not a whole number of ranks"),
        ({"process_group_backend": "gloob"}, "process_group_backend: there is no backend 'gloob'"),
    ],
    ids=repr,
)
def test_what_the_command_line_cannot_mean_is_refused_by_name(
    arguments: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "job.yaml", autotp(**arguments), text_file(tmp_path))
    with pytest.raises((SystemExit, ValueError)) as caught:
        parsed(config)
    assert getattr(caught.value, "code", 1) != 0
    assert message in str(caught.value) + capsys.readouterr().err
