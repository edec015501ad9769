"""The sbatch file that ships agrees with its config, and Slurm runs it; `up.sh` brings up a Slurm on one machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "configs" / "slurm" / "train_text.sbatch"
TINY = [
    *("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"),
    *("--model.init_args.hidden_size", "32", "--model.init_args.num_layers", "1"),
    *("--model.init_args.intermediate_size", "64", "--trainer.enable_progress_bar", "false"),
]


def option(name: str) -> str:
    found = re.search(rf"^#SBATCH --{name}=(\S+)$", SBATCH.read_text(), re.MULTILINE)
    assert found, f"no --{name} in {SBATCH.name}"
    return found[1]


def test_the_sbatch_file_agrees_with_its_config() -> None:
    command = re.search(r"^srun .* lightning-autotp fit --config (\S+)", SBATCH.read_text(), re.MULTILINE)
    assert command
    trainer = yaml.safe_load((ROOT / command[1]).read_text())["trainer"]
    tasks, nodes = int(option("ntasks-per-node")), int(option("nodes"))
    assert (tasks, nodes) == (trainer["devices"], trainer.get("num_nodes", 1))
    assert tasks % trainer["strategy"]["init_args"]["autotp_size"] == 0


def run(workdir: Path, *arguments: str) -> tuple[str, str]:
    """The job's final state and its log."""
    shutil.copytree(ROOT / "configs", workdir / "configs")
    submitted = subprocess.run(["sbatch", "--parsable", *arguments], cwd=workdir, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    state = None
    for _ in range(200):
        shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
        state = re.search(r"JobState=(\w+)", shown)
        assert state
        if state[1] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            break
        time.sleep(1)
    assert state
    return state[1], "".join(log.read_text(errors="replace") for log in workdir.glob(f"train-text-{job}.log"))


def slurm_answers() -> bool:
    installed = shutil.which("sinfo") and shutil.which("lightning-autotp")
    return bool(installed) and subprocess.run(["sinfo", "-h"], capture_output=True).returncode == 0


NEEDS_SLURM = pytest.mark.skipif(not slurm_answers(), reason="needs a running Slurm and the installed CLI")


@pytest.mark.parametrize(
    ("options", "more"), [([], []), (["--nodes=2"], ["--trainer.num_nodes", "2"])], ids=["one-node", "two-nodes"]
)
@pytest.mark.slurm
@NEEDS_SLURM
def test_slurm_runs_it(options: list[str], more: list[str], tmp_path: Path) -> None:
    state, log = run(tmp_path, *options, "configs/slurm/train_text.sbatch", *TINY, *more)
    assert state == "COMPLETED", log
    assert f"MEMBER: 1/{4 if more else 2}" in log and "`max_steps=2` reached" in log
    assert (tmp_path / "runs" / "train_text" / "checkpoints" / "last.ckpt" / "meta.pt").is_file()


@pytest.mark.slurm
@NEEDS_SLURM
def test_task_counts_that_do_not_fit_the_devices_are_an_error(tmp_path: Path) -> None:
    state, log = run(tmp_path, "--ntasks-per-node=4", "configs/slurm/train_text.sbatch", *TINY)
    assert state == "FAILED" and "--ntasks-per-node=4` does not match" in log


@pytest.mark.slurm
@NEEDS_SLURM
def test_task_counts_that_the_tensor_parallel_size_does_not_divide_are_an_error(tmp_path: Path) -> None:
    state, log = run(tmp_path, "--ntasks-per-node=3", "configs/slurm/train_text.sbatch", *TINY, "--trainer.devices=3")
    assert state == "FAILED" and "autotp_size: 2 does not divide the 3 processes of this run" in log
