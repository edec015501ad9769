"""Whole configs for the command line, and the strategy that one makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_autotp import AutoTPStrategy
from lightning_autotp.cli.main import AutoTPCLI, PlanningTrainer

TINY = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 64, "context_length": 32, "warmup_steps": 2}


def text_file(folder: Path) -> Path:
    """Something to train on."""
    path = folder / "text.txt"
    path.write_bytes(b"The quick brown fox jumps over the lazy dog. " * 100)
    return path


def write(path: Path, strategy: Any, text: Path, **options: Any) -> Path:
    """A whole config for a tiny byte model."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "limit_val_batches": 1, **quiet, **options}
    trainer |= {"strategy": strategy, "default_root_dir": str(path.parent)}
    data = {"path": str(text), "seq_length": 32, "batch_size": 4}
    document = {
        "seed_everything": 0,
        "trainer": trainer,
        "model": {"class_path": "lightning_autotp.examples.text.ByteLlama", "init_args": TINY},
        "data": {"class_path": "lightning_autotp.examples.text.TextBytes", "init_args": data},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def autotp(**arguments: Any) -> dict[str, Any]:
    """The strategy, as a config names it."""
    return {"class_path": "lightning_autotp.AutoTPStrategy", "init_args": arguments}


def parsed(config: Path, *arguments: str) -> AutoTPStrategy:
    """The strategy that a config and further arguments make."""
    made = AutoTPCLI(trainer_class=PlanningTrainer, run=False, args=["--config", str(config), *arguments])
    strategy = made.trainer.strategy
    assert isinstance(strategy, AutoTPStrategy)
    return strategy
