"""A plugin for runs that take long: one JSON line a test in a file, and what passed there is not run again.

``python -m pytest -m long -p tests.helpers.long_results --results=FILE`` may be stopped at any time; the same command
goes on with what has not passed yet. Only results of the same commit count, and none of a tree with changes.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, required=True, help="file of results, one JSON line a test")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Results(config.getoption("--results"), commit(config.rootpath)))


def commit(root: Path) -> str | None:
    """The commit of the working tree at ``root``; None if files differ from it, or it is no git repository."""
    try:
        changes = subprocess.check_output(["git", "status", "--porcelain"], cwd=root, stderr=subprocess.DEVNULL)
        if changes.strip():
            return None
        return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Results:
    """Writes each test's outcome down as it ends; those that passed at the same commit are deselected."""

    def __init__(self, path: Path, commit: str | None) -> None:
        self.path, self.commit = path, commit
        self.outcomes: dict[str, tuple[str, float]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        passed = {
            result["test"]
            for result in known
            if result["outcome"] == "passed" and self.commit is not None and result["commit"] == self.commit
        }
        done = [item for item in items if item.nodeid in passed]
        items[:] = [item for item in items if item.nodeid not in passed]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome, seconds = self.outcomes.pop(report.nodeid, ("passed", 0.0))
        if outcome == "passed":
            outcome = report.outcome
        seconds += report.duration
        if report.when != "teardown":
            self.outcomes[report.nodeid] = outcome, seconds
            return
        result = {"test": report.nodeid, "outcome": outcome, "seconds": round(seconds, 1), "commit": self.commit}
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
