"""``lightning-autotp inspect``: what is in a checkpoint, who wrote it, and whether it is complete."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, Optional

from rich.console import Console
from rich.table import Table

from lightning_autotp.checkpoint.foreign.doors import open_any
from lightning_autotp.checkpoint.manifest import SAVE_ID
from lightning_autotp.checkpoint.places import place_of
from lightning_autotp.checkpoint.tensors import Checkpoint


def main(args: Optional[Sequence[str]] = None) -> int:
    """Run the subcommand; returns the exit status: 0 if the checkpoint is complete."""
    options = _parser().parse_args(args)
    try:
        path = place_of(options.checkpoint)
        found = open_any(path, all_bytes=options.checksums)
    except (ValueError, OSError, ImportError) as error:
        print(f"inspect: {error}", file=sys.stderr)
        return 1
    said: dict[str, Any] = {
        "path": str(path),
        "form": "directory" if path.is_dir() else "file",
        "complete": True,
        "written_by": _writer(found),
        "save_id": None if found.manifest is None else found.manifest.save_id,
        "lightning": found.rest.get("pytorch-lightning_version"),
        "epoch": found.rest.get("epoch"),
        "global_step": found.rest.get("global_step"),
        "entries": sorted(name for name in found.rest if name not in ("state_dict", SAVE_ID)),
        "models": [{key: one[key] for key in ("path", "class", "model_type")} for one in found.models],
        "bytes": sum(shape.nbytes for shape in found.tensors.shapes.values()),
        "tensors": {
            name: {"dtype": str(shape.dtype).removeprefix("torch."), "shape": list(shape.shape), "bytes": shape.nbytes}
            for name, shape in found.tensors.shapes.items()
        },
    }
    if options.json:
        print(json.dumps(said, indent=2))
    else:
        _show(said, compared=options.checksums)
    return 0


def _writer(found: Checkpoint) -> dict[str, Any]:
    if found.manifest is not None:
        return dict(found.manifest.written_by)
    return {"by": found.writer} if found.writer else {}


def _show(said: dict[str, Any], *, compared: bool) -> None:
    console = Console(highlight=False)
    table = Table("tensor", "dtype", "shape", "bytes")
    for name, tensor in said["tensors"].items():
        table.add_row(name, tensor["dtype"], str(tensor["shape"]), f"{tensor['bytes']:,}")
    console.print(table)
    writer = ", ".join(f"{name} {value}" for name, value in said["written_by"].items())
    lightning = said["lightning"]
    console.print(f"{said['path']}: a {said['form']} with {len(said['tensors'])} tensors, {said['bytes']:,} bytes.")
    console.print(f"written by: {writer or f'a version that does not say so (lightning {lightning})'}")
    console.print(f"epoch {said['epoch']}, step {said['global_step']}; entries: {', '.join(said['entries'])}")
    for model in said["models"]:
        console.print(f"Hugging Face model {model['class']} ({model['model_type']}) at {model['path']!r}")
    console.print("complete: all files are there, " + ("every byte as written" if compared else "of the right sizes"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-autotp inspect", description="What is in a checkpoint, who wrote it, and is it complete?"
    )
    parser.add_argument("checkpoint", help="a checkpoint, a directory or a file")
    parser.add_argument("--checksums", action="store_true", help="compare all of a directory with its checksums")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser
