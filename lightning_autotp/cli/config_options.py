"""What ``lightning-autotp verify`` and ``estimate`` take alike: rules, a preset, switches.

An option that is not given is None: what the file of rules says then counts.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_autotp.config.files import read_document
from lightning_autotp.config.training_config import TPTrainingConfig


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`config_of` reads."""
    parser.add_argument("--preset", metavar="NAME", help="preset_model")
    parser.add_argument("--rules", metavar="FILE", help="YAML or JSON: a partition_config, or a whole config")
    add_switch(parser, "--overlap", help="with tp_overlap_comm")
    add_switch(parser, "--sequence-parallel", help="with sequence_parallel")


def add_switch(parser: argparse.ArgumentParser, option: str, help: str) -> None:  # noqa: A002 - argparse's name
    """An option that turns a switch on, and one that turns off what the file of rules turns on."""
    parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=help)


def config_of(options: argparse.Namespace) -> TPTrainingConfig:
    """The config that the options say.

    Raises:
        ValueError: if it is wrong, with the field and the fix.
        FileNotFoundError: if the file of rules does not exist.
    """
    switches = {"tp_overlap_comm": options.overlap, "sequence_parallel": options.sequence_parallel}
    given: dict[str, Any] = {"preset_model": options.preset, **switches}
    given = {name: value for name, value in given.items() if value is not None}
    if options.rules is None:
        return TPTrainingConfig.load(given)
    document = read_document(Path(options.rules), "rules")
    if isinstance(document, Mapping) and "layer_specs" in document:
        return TPTrainingConfig.load({"partition_config": document, **given})
    return TPTrainingConfig.load(options.rules, **given)
