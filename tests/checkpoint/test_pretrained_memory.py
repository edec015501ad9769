"""What a rank holds of a pretrained model while it is loaded and sharded: little more than its shard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import pretrained_memory

SCRIPT = Path(pretrained_memory.__file__)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not count anonymous memory")
def test_a_rank_holds_its_shard_and_no_full_model(tmp_path: Path) -> None:
    pretrained_memory.make(tmp_path / "model", "llama", layers=2, hidden=1280, tied=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    run = subprocess.run(
        [*command, str(tmp_path / "model"), "--way", "stream", "ordinary"],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parents[2],
        timeout=170,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines()]
    assert [one["way"] for one in found] == ["stream", "stream", "ordinary", "ordinary"]
    for one in found:
        assert one["shard"] > 100
        assert max(one["peak"], one["after"]) < 1.2 * one["shard"], one
