"""``lightning-autotp export``: a checkpoint as a Hugging Face directory, or as one ordinary Lightning file."""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_autotp.checkpoint.file_export import write_file
from lightning_autotp.checkpoint.hf_export import SHARD_SIZE, chosen, total_bytes, write_model
from lightning_autotp.checkpoint.hf_record import Record
from lightning_autotp.checkpoint.places import place_of
from lightning_autotp.checkpoint.tensors import Checkpoint, open_checkpoint

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(args: Optional[Sequence[str]] = None) -> int:
    """Run the subcommand; returns the exit status: 0 if everything is written."""
    options = _parser().parse_args(args)
    try:
        out = local_path(options.out)
        found = open_checkpoint(
            place_of(options.checkpoint), unsafe=options.unsafe_checkpoint_load, all_bytes=options.checksums
        )
        if options.format == "ckpt":
            _to_file(found, out)
        else:
            _to_hugging_face(found, out, options)
    except (ValueError, OSError, ImportError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.out}")
    return 0


def _to_file(found: Checkpoint, out: Path) -> None:
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a directory; name a file to write.")
    with shown_bar(sum(shape.nbytes for shape in found.tensors.shapes.values())) as progress:
        write_file(found, out, progress)


def _to_hugging_face(found: Checkpoint, out: Path, options: argparse.Namespace) -> None:
    record = given_record(options) if options.config else chosen(found.models, options.submodule, str(found.path))
    here = [found.path, found.path.parent] if found.path.is_dir() else [found.path.parent]
    beside = [place for place in here if isinstance(place, Path)]
    folders = [Path(options.tokenizer)] if options.tokenizer else beside
    model = found.state(options.state)
    with shown_bar(total_bytes(record, model)) as progress:
        write_model(
            record,
            model,
            out,
            merge=options.merge,
            shard_size=_bytes(options.max_shard_size),
            tokenizer=folders,
            progress=progress,
        )


def local_path(out: str) -> Path:
    """The path of what is to be written.

    Raises:
        ValueError: if it is a URL: files are written in place, which no object store can.
    """
    if "://" in out:
        raise ValueError(f"{out} is a URL; write to a local path and copy that (`aws s3 cp`, say).")
    return Path(out)


def given_record(options: argparse.Namespace) -> Record:
    """The record of a model that the checkpoint says nothing of, from a config.json."""
    path = Path(options.config)
    config = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    (known,) = config.get("architectures") or [None]
    if known is None or "model_type" not in config:
        raise ValueError(f"{path} has no `architectures` and `model_type`; it must be the model's config.json.")
    return {
        "path": options.submodule or "",
        "class": known,
        "known_class": known,
        "config": config,
        "model_type": config["model_type"],
        "generation_config": None,
        "tied": {},
        "inner": "",
        "adapters": {},
    }


@contextmanager
def shown_bar(total: int) -> Iterator[Any]:
    """A progress bar over ``total`` bytes; yields what to call with each number of bytes."""
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("writing", total=total)
        yield lambda count: shown.advance(task, count)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"--max-shard-size: {text!r} is no size; write 5GB, say.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-autotp export",
        description="Write a checkpoint, a directory or a file, for others to read. Needs no GPU and no processes.",
    )
    parser.add_argument("checkpoint", help="the checkpoint")
    parser.add_argument("out", help="the directory to write, or the file with --format ckpt")
    parser.add_argument(
        "--format",
        choices=["hf", "ckpt"],
        default="hf",
        help="hf: safetensors and config for from_pretrained; ckpt: one Lightning file, optimizers included (hf)",
    )
    parser.add_argument("--submodule", metavar="PATH", help="where the model is in the LightningModule, as `model`")
    parser.add_argument(
        "--state",
        metavar="KEY",
        default="state_dict",
        help="which weights, where there are averages of them, as current_model_state (state_dict)",
    )
    parser.add_argument("--merge", action="store_true", help="merge adapters (PEFT) into their base")
    parser.add_argument("--max-shard-size", default=f"{SHARD_SIZE // 10**9}GB", metavar="SIZE", help="of a file (5GB)")
    parser.add_argument("--config", metavar="PATH", help="config.json, for checkpoints that do not say theirs")
    parser.add_argument("--tokenizer", metavar="PATH", help="where tokenizer files are (in or beside the checkpoint)")
    parser.add_argument("--checksums", action="store_true", help="compare all checksums first")
    parser.add_argument(
        "--unsafe-checkpoint-load", action="store_true", help="load anything that it holds, which may run code"
    )
    return parser
