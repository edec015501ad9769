"""Runs that take long go on where they were stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TESTS = """
import os

import pytest

def test_passes():
    pass

def test_fails_at_first():
    assert "FIXED" in os.environ

def test_skips():
    pytest.skip("here")
"""


def run(folder: Path, **environ: str) -> list[dict[str, Any]]:
    """The results that one more run in ``folder`` adds to those that are there."""
    results = folder.parent / "results.jsonl"
    before = len(results.read_text().splitlines()) if results.exists() else 0
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.helpers.long_results", f"--results={results}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environ}
    subprocess.run([sys.executable, "-m", "pytest", *options], cwd=folder, env=env, capture_output=True, timeout=120)
    return [json.loads(line) for line in results.read_text().splitlines()[before:]]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.check_output(["git", *identity, *arguments], cwd=folder, text=True).strip()


def test_what_passed_at_the_same_commit_is_not_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(TESTS)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    first = run(folder)
    outcomes = {"test_passes": "passed", "test_fails_at_first": "failed", "test_skips": "skipped"}
    assert {result["test"].removeprefix("test_it.py::"): result["outcome"] for result in first} == outcomes
    assert {result["commit"] for result in first} == {git(folder, "rev-parse", "HEAD")}
    second = run(folder, FIXED="1")
    assert [result["test"] for result in second] == ["test_it.py::test_fails_at_first", "test_it.py::test_skips"]
    assert second[0]["outcome"] == "passed"
    (folder / "test_it.py").write_text(TESTS + "\n# changed\n")
    changed = run(folder)
    assert len(changed) == 3 and {result["commit"] for result in changed} == {None}
    git(folder, "commit", "--quiet", "-am", "second")
    assert len(run(folder)) == 3
