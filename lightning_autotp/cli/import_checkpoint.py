"""``lightning-autotp import``: a checkpoint of others as one of ours, a directory or one ordinary Lightning file."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Optional

import torch

from lightning_autotp.checkpoint.directory_export import write_directory
from lightning_autotp.checkpoint.file_export import write_file
from lightning_autotp.checkpoint.foreign.doors import open_any
from lightning_autotp.checkpoint.foreign.names import listed, prefix_for
from lightning_autotp.checkpoint.foreign.resume import renamed, with_lightnings_entries
from lightning_autotp.checkpoint.hf_record import Record, tied_names
from lightning_autotp.checkpoint.hf_twin import twin_of
from lightning_autotp.checkpoint.places import place_of
from lightning_autotp.checkpoint.tensors import MODEL, RECORD, Checkpoint
from lightning_autotp.cli.config_options import config_of
from lightning_autotp.cli.export import given_record, local_path, shown_bar
from lightning_autotp.layout.layout import Layout
from lightning_autotp.model_sources.full_size import build
from lightning_autotp.recipe.make_plan import make_plan


def main(args: Optional[Sequence[str]] = None) -> int:
    """Run the subcommand; returns the exit status: 0 if everything is written."""
    options = _parser().parse_args(args)
    try:
        out = local_path(options.out)
        _write(_opened(options), out, options)
    except (ValueError, OSError, ImportError) as error:
        print(f"import: {error}", file=sys.stderr)
        return 1
    print(f"written: {out}")
    return 0


def _opened(options: argparse.Namespace) -> Checkpoint:
    found = open_any(
        place_of(options.checkpoint),
        unsafe=options.unsafe_checkpoint_load,
        layouts_for=partial(_planned, options) if options.model else None,
        first_replica=options.take_first_replica,
    )
    is_file = found.path.is_file()
    if is_file and found.rest.get("optimizer_states") and not options.weights_only:
        raise ValueError(
            f"{found.path} is an ordinary file, which `fit(ckpt_path=...)` resumes from as it is. It numbers its"
            " optimizers' parameters and has no names for them, so that only its weights can be imported"
            " (`--weights-only`)."
        )
    if is_file or options.weights_only:
        others = ("optimizer_states", "state_dict", RECORD)
        found = replace(found, rest={name: value for name, value in found.rest.items() if name not in others})
    found = renamed(found, f"{options.submodule}." if options.submodule else "")
    if options.weights_only:
        own = {name: shape for name, shape in found.tensors.shapes.items() if name.startswith(MODEL)}
        found = replace(found, tensors=replace(found.tensors, shapes=own))
    return replace(found, rest=with_lightnings_entries(found, fitting=True))


def _planned(options: argparse.Namespace, ranks: int, names: Sequence[str]) -> dict[str, Layout]:
    """How the plan of ``--model`` cuts the parameters that are called ``names``."""
    with torch.device("meta"):
        model, _ = build(options.model, dtype=torch.float32)
    layouts = make_plan(model, config_of(options), ranks).layouts
    prefix = prefix_for(layouts, names)
    if prefix is None:
        raise ValueError(
            f"--model: {options.model} has other parameters ({listed(sorted(layouts))}) than the checkpoint"
            f" ({listed(sorted(names))})."
        )
    return {prefix + name: layout for name, layout in layouts.items()}


def _recorded(found: Checkpoint, options: argparse.Namespace) -> Record:
    """What ``--config`` says of the model in ``found``, and where in it that is."""
    record = given_record(options)
    twin = twin_of(record)
    if twin is None:
        return record
    tied = tied_names(twin)
    own = [name for name in twin.state_dict() if name not in tied]
    prefix = prefix_for(own, found.model.shapes)
    if prefix is None:
        raise ValueError(
            f"--config: {options.config} is of a model with other parameters ({listed(own)}) than the checkpoint has"
            f" ({listed(list(found.model.shapes))})."
        )
    return {**record, "path": prefix.removesuffix("."), "tied": tied}


def _write(found: Checkpoint, out: Path, options: argparse.Namespace) -> None:
    if out.is_dir() if options.format == "ckpt" else out.is_file():
        raise FileExistsError(f"{out} is a {'directory' if out.is_dir() else 'file'}; name another place to write to.")
    record = [_recorded(found, options)] if options.config else list(found.models)
    total = sum(shape.nbytes for shape in found.tensors.shapes.values())
    with shown_bar(total) as progress:
        if options.format == "ckpt":
            write_file(replace(found, models=tuple(record)), out, progress)
        else:
            write_directory(found, out, record, progress)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-autotp import",
        description="Make a checkpoint of others one that `fit(ckpt_path=...)` resumes from: directories of Lightning's"
        " ModelParallelStrategy and FSDPStrategy, of torch.distributed.checkpoint, of DeepSpeed (AutoTP, ZeRO,"
        " universal). Needs no GPU and no processes.",
    )
    parser.add_argument("checkpoint", help="the checkpoint of others")
    parser.add_argument("out", help="the directory to write, or the file with --format ckpt")
    parser.add_argument(
        "--format",
        choices=["directory", "ckpt"],
        default="directory",
        help="directory: as this package saves; ckpt: one Lightning file for any Trainer (directory)",
    )
    parser.add_argument("--submodule", metavar="PATH", help="where the model is in the LightningModule, as `model`")
    parser.add_argument("--config", metavar="PATH", help="config.json of a Hugging Face model, for `export` to know it")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="for DeepSpeed's that do not say how they were cut, the model whose plan decides: a model type, a"
        " config.json or its directory, a hub name, or module:factory",
    )
    parser.add_argument("--preset", metavar="NAME", help="of that plan: preset_model")
    parser.add_argument("--rules", metavar="FILE", help="of that plan: YAML or JSON, the DeepSpeed config, say")
    parser.set_defaults(overlap=None, sequence_parallel=None)
    parser.add_argument(
        "--take-first-replica",
        action="store_true",
        help="where DeepSpeed's ranks should hold alike and do not, take the first one's",
    )
    parser.add_argument("--weights-only", action="store_true", help="leave the optimizers' state out")
    parser.add_argument(
        "--unsafe-checkpoint-load", "--unsafe", action="store_true", help="load anything in it, which may run code"
    )
    return parser
