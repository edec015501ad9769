"""``lightning-autotp verify``: one model in detail, or many in a table."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from lightning_autotp.cli.config_options import add_config_options, config_of
from lightning_autotp.verification.sweep import kind_of, sweep, table
from lightning_autotp.verification.verify import verify

REFUSALS = 5
"""More refused model types than this are a failure of a sweep."""

_MARKERS = "<!-- sweep -->", "<!-- /sweep -->"


def main(args: Optional[Sequence[str]] = None) -> int:
    """Run the subcommand; returns the exit status: 0 if every plan gives the unsharded numbers.

    A sweep passes over what is known not to run unsharded, and bears a few refusals.
    """
    options = _parser().parse_args(args)
    sys.path.insert(0, os.getcwd())  # for module:factory, as python -m would
    sizes: list[int] = options.tp or ([2] if options.sweep is None else [2, 4])
    try:
        config = config_of(options)
    except (ValueError, OSError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 1
    settings = {
        "config": config,
        "steps": options.steps,
        "tolerance": options.tolerance,
        "kv_heads": options.kv_heads,
    }
    models = options.models + [name for name in options.model_types.split(",") if name]
    if options.sweep is not None:
        return _sweep(options.sweep + models, sizes, settings, options)
    if not models:
        _parser().error("name a model, or give --sweep")
    passed = True
    for model in models:
        for size in sizes:
            report = verify(model, size, **settings)
            print(report, flush=True)
            passed &= report.verdict == "pass"
    return 0 if passed else 1


def _sweep(names: list[str], sizes: list[int], settings: dict[str, Any], options: Any) -> int:
    from lightning_autotp.model_sources.hf import causal_types
    from lightning_autotp.model_sources.small import NOT_RUNNABLE, SWEEP

    readme = None if options.write_readme is None else Path(options.write_readme)
    if readme is not None:
        _between_markers(readme.read_text(), "")  # or a missing marker would be found out after the work
    found = sweep(names or [*causal_types(), *SWEEP], sizes, **settings)
    written = table(found)
    if options.table is not None:
        Path(options.table).write_text(written)
    if readme is not None:
        readme.write_text(_between_markers(readme.read_text(), written))
    print(f"\n{written}", end="")
    kinds = [kind_of([*s.preset, *s.derived]) for name, s in found.items() if name not in NOT_RUNNABLE]
    return 1 if {"fail", "error", "not run"} & set(kinds) or kinds.count("refused") > REFUSALS else 0


def _between_markers(text: str, written: str) -> str:
    start, end = _MARKERS
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise SystemExit(f"verify: the file must have one {start} and, behind it, one {end}.")
    return f"{text[: text.index(start)]}{start}\n\n{written}\n{text[text.index(end) :]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-autotp verify",
        description="Train a small model whole and sharded, in this process: do loss, gradients and weights agree?",
    )
    parser.add_argument("models", nargs="*", help="Hugging Face model types, paths of a config.json, or module:factory")
    parser.add_argument("--model-types", default="", metavar="A,B,C", help="more model types")
    parser.add_argument("--tp", type=int, action="append", metavar="N", help="tensor parallel size; may be repeated")
    add_config_options(parser)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (3)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads of the small model (2)")
    parser.add_argument("--tolerance", type=float, help="bound on gradients and weights (1e-4; not in fp64: 1e-3)")
    parser.add_argument("--sweep", nargs="*", metavar="TYPE", help="a table of these types; of all, without names")
    parser.add_argument("--table", metavar="FILE", help="write the sweep's table, in markdown")
    parser.add_argument("--write-readme", metavar="FILE", help=f"write it between {' and '.join(_MARKERS)} of a file")
    return parser
