"""Files that cannot be used: each is an error with a sentence that names the file, and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_autotp import AutoTPStrategy, TPTrainingConfig
from lightning_autotp.cli import estimate as estimate_command
from lightning_autotp.cli import verify as verify_command
from lightning_autotp.config.files import check_keys
from tests.helpers.command_line import autotp, parsed, text_file, write

load = TPTrainingConfig.load
DEEP = 100_000
SECTION = b'"tensor_parallel": {"autotp_size": 2, "sequence_parallel": true}'

BROKEN: list[tuple[str, bytes, str]] = [
    # not a format
    ("bad.yaml", b"autotp_size: [2", r"cannot be read: "),
    ("bad.json", b'{"autotp_size": 2,}', r"cannot be read: "),
    ("tab.yaml", b"autotp_size:\t- 2\n\tx", r"cannot be read: "),
    ("tag.yaml", b"autotp_size: !!python/object:os.system 2", r"cannot be read: "),
    ("two.yaml", b"autotp_size: 2\n---\nautotp_size: 4\n", r"cannot be read: "),
    ("zero.yaml", b"autotp_size: \x002", r"cannot be read: "),
    ("binary.yaml", b"\x80\x02\xff\xfe", r"is not a text file \(byte 0 is no UTF-8\); give the path of a YAML or JSON"),
    ("binary.json", b'{"preset_model": "\xff"}', r"is not a text file \(byte 18 is no UTF-8\)"),
    ("wide.yaml", "autotp_size: 2".encode("utf-16"), r"is not a text file \(byte 0 is no UTF-8\)"),
    # nested too deep
    ("deep.json", b'{"partition_config": ' + b"[" * DEEP + b"]" * DEEP + b"}", r"is nested too deep; no field needs"),
    ("deep.yaml", b"partition_config: " + b"[" * 500 + b"]" * 500, r"is nested too deep; no field needs"),
    # nothing in it
    ("empty.yaml", b"", r"is empty; write fields into it, such as autotp_size"),
    ("empty.json", b" \n", r"is empty; write fields into it, such as autotp_size"),
    ("null.json", b"null", r"is empty"),
    ("comments.yaml", b"# autotp_size: 2\n", r"is empty"),
    # something twice
    ("twice.yaml", b"autotp_size: 2\ndtype: bf16\nautotp_size: 4\n", r"says 'autotp_size' twice \(lines 1 and 3\)"),
    ("twice.json", b'{"autotp_size": 2, "autotp_size": 4}', r"says 'autotp_size' twice; leave one of them out"),
    (
        "nested.yaml",
        b"partition_config:\n  layer_specs:\n  - patterns: [a]\n    patterns: [b]\n",
        r"says 'patterns' twice \(lines 3 and 4\)",
    ),
    ("nested.json", b'{"tensor_parallel": {"tp_size": 2, "tp_size": 2}}', r"says 'tp_size' twice"),
    ("quoted.yaml", b"compile: true\n'compile': false\n", r"says 'compile' twice \(lines 1 and 2\)"),
    # not a mapping, or of other fields
    ("list.yaml", b"- autotp_size\n", r"holds list, not a mapping of fields"),
    ("text.yaml", b"llama\n", r"holds str, not a mapping of fields"),
    ("number.json", b"4", r"holds int, not a mapping of fields"),
    ("other.json", b'{"adam": 1, "f16": {}}', r"has 'adam', 'f16', but neither a `tensor_parallel` section nor any of"),
    # DeepSpeed's
    (
        "ds.json",
        b'{"train_batch_size": 8, "zero_optimization": {"stage": 1}}',
        r"is a DeepSpeed config \(it has 'train_batch_size', 'zero_optimization'\), and its `tensor_parallel` section"
        r" is missing; give it one, such as \{\"autotp_size\": 4\}",
    ),
    ("ds.yaml", b"fp16: {enabled: true}", r"is a DeepSpeed config \(it has 'fp16'\), .* section is missing"),
    ("null_ds.json", b'{"bf16": {}, "tensor_parallel": null}', r"is a .* section is None, not a mapping"),
    ("size_ds.json", b'{"bf16": {}, "tensor_parallel": 4}', r"is a .* section is 4, not a mapping"),
    (
        "beside.json",
        b'{"bf16": {}, "tensor_parallel": {"autotp_size": 2}, "sequence_parallel": true}',
        r"is a DeepSpeed config, .*; move 'sequence_parallel' into it",
    ),
    ("beside.yaml", b"tensor_parallel: {autotp_size: 2}\ncompile: true", r"is a .*; move 'compile' into it"),
    ("no_section.json", b'{"train_batch_size": 8, "autotp_size": 2}', r"is a .*; move 'autotp_size' into it"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_a_file_that_cannot_be_used_is_named(
    name: str, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    monkeypatch.setenv("LIGHTNING_AUTOTP_CONFIG", str(path))
    makers: list[Callable[[], Any]] = [lambda: load(path), lambda: AutoTPStrategy(str(path))]
    for make in (*makers, AutoTPStrategy.from_environment):
        with pytest.raises(ValueError, match=f"(?s)^config: '{path}' {message}"):
            make()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad.yaml", "cannot be read: "),
        ("deep.json", "is nested too deep"),
        ("binary.yaml", "is not a text file"),
        ("twice.yaml", "says 'autotp_size' twice"),
        ("none.yaml", "there is no file"),
        (".", "is a directory"),
        ("ds.json", "`tensor_parallel` section is missing"),
    ],
)
@pytest.mark.parametrize("command", [verify_command, estimate_command], ids=["verify", "estimate"])
def test_commands_name_a_file_of_rules_that_cannot_be_used(
    command: Any, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    content = {name: content for name, content, _ in BROKEN}.get(name)
    if content is not None:
        path.write_bytes(content)
    assert command.main(["llama", "--rules", str(path)]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(f"{command.__name__.rpartition('.')[2]}: ") and message in error and repr(str(path)) in error
    )


@pytest.mark.parametrize("name", ["none.yaml", "none.json", "folder/none.yaml"])
def test_a_file_that_does_not_exist_is_named(name: str, tmp_path: Path) -> None:
    for source in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(FileNotFoundError, match=r"^config: there is no file") as caught:
            load(source)
        assert str(source) in str(caught.value)


def test_a_relative_file_that_does_not_exist_is_named_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file 'none\.yaml'") as caught:
        load("none.yaml")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", [".", "folder.yaml"])
def test_a_directory_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    for source in (path, str(path)):
        with pytest.raises(
            IsADirectoryError, match=f"^config: '{path}' is a directory; give the path of a YAML or JSON"
        ):
            load(source)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tp.yaml"
    path.write_text("autotp_size: 2")

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    if os.geteuid() == 0:  # root may read everything
        monkeypatch.setattr(Path, "read_text", refuse)
    else:
        path.chmod(0)
    with pytest.raises(PermissionError, match=f"^config: '{path}' cannot be read .Permission denied.; give the path"):
        load(path)


def test_an_empty_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_AUTOTP_CONFIG", "")
    with pytest.raises(ValueError, match="^LIGHTNING_AUTOTP_CONFIG: it is empty; give the path"):
        AutoTPStrategy.from_environment()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.yaml", b"\xef\xbb\xbfautotp_size: 2\nsequence_parallel: true"),
        ("bom.json", b'\xef\xbb\xbf{"autotp_size": 2, "sequence_parallel": true}'),
        ("LOUD.JSON", b'{"autotp_size":\t2,\n\t"sequence_parallel": true}'),
        ("json_in.yaml", b'{"autotp_size": 2, "sequence_parallel": true}'),
        ("no_suffix", b"autotp_size: 2\nsequence_parallel: true"),
        ("merge.yaml", b"<<: {autotp_size: 4, sequence_parallel: true}\nautotp_size: 2\n"),
        # DeepSpeed has a section of this name, too
        ("ds.json", b'{"compile": {"deepcompile": true}, ' + SECTION + b"}"),
        ("all_ds.json", b'{"bf16": {}, "compile": {}, ' + SECTION + b"}"),
    ],
)
def test_files_that_can_be_used(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    config = load(path)
    assert (config.size, config.sequence_parallel, config.compile) == (2, True, False)


def test_a_switch_alone_is_a_config() -> None:
    assert load({"sequence_parallel": True}).sequence_parallel
    with pytest.raises(ValueError, match=r"unknown field 'sequence_paralel'\. Did you mean 'sequence_parallel'\?"):
        load({"sequence_paralel": True})


# -- the command line, which reads files itself ------------------------------------------------------------------------


def test_a_job_that_says_something_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write(tmp_path / "job.yaml", autotp(autotp_size=2), text_file(tmp_path))
    job.write_text(job.read_text().replace("autotp_size: 2\n", "autotp_size: 2\n      autotp_size: 4\n"))
    with pytest.raises(SystemExit):
        parsed(job)
    assert "says 'autotp_size' twice (lines " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["twice.yaml", "twice.json", "binary.yaml"])
def test_a_file_that_the_command_line_is_given_is_named(name: str, tmp_path: Path) -> None:
    content, message = next((content, message) for given, content, message in BROKEN if given == name)
    (tmp_path / name).write_bytes(content)
    job = write(tmp_path / "job.yaml", autotp(config=str(tmp_path / name)), text_file(tmp_path))
    with pytest.raises(ValueError, match=f"(?s)config: '{tmp_path / name}' {message}"):
        parsed(job)


@pytest.mark.parametrize(
    "text", ["[" * 500 + "]" * 500, "a: 1\na: 2", "[", "{a: {b: 1, 'b': 2}}"], ids=["deep", "twice", "open", "nested"]
)
def test_what_the_command_line_must_not_read_is_an_error_that_it_knows(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        check_keys(text)


def test_a_job_is_still_read_as_yaml(tmp_path: Path) -> None:
    given = {"autotp_size": 2, "sequence_parallel": True}
    job = write(tmp_path / "job.yaml", autotp(config=json.dumps(given)), text_file(tmp_path), gradient_clip_val="1e-3")
    document = yaml.safe_load(job.read_text())
    assert document["trainer"]["gradient_clip_val"] == "1e-3"
    assert parsed(job).config.sequence_parallel


def test_values_that_plain_yaml_does_not_know_are_not_looked_at_when_keys_are_checked() -> None:
    check_keys("run: 2024-02-30\nmore: [1, {a: 2024-99-01}]\n")
    with pytest.raises(yaml.YAMLError, match=r"says 'a' twice \(lines 2 and 3\)"):
        check_keys("more:\n- a: 1\n  a: 2\n")


def test_a_date_that_is_none_is_an_error_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preset_model: 2024-02-30\n")
    with pytest.raises(ValueError, match=r"config: '.*config.yaml' cannot be read: day is out of range"):
        TPTrainingConfig.load(path)
