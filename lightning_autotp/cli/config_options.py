"""What ``lightning-autotp verify`` and ``estimate`` take alike: rules, a preset, overlap."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml

from lightning_autotp.config.training_config import TPTrainingConfig


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`config_of` reads."""
    parser.add_argument("--preset", metavar="NAME", help="preset_model")
    parser.add_argument("--rules", metavar="FILE", help="YAML or JSON: a partition_config, or a whole config")
    parser.add_argument("--overlap", action="store_true", help="tp_overlap_comm")


def config_of(options: argparse.Namespace) -> TPTrainingConfig:
    """The config that the options say.

    Raises:
        ValueError: if it is wrong, with the field and the fix.
        FileNotFoundError: if the file of rules does not exist.
    """
    given: dict[str, Any] = {}
    if options.preset is not None:
        given["preset_model"] = options.preset
    if options.overlap:
        given["tp_overlap_comm"] = True
    if options.rules is None:
        return TPTrainingConfig.load(given)
    if not Path(options.rules).is_file():
        raise FileNotFoundError(f"rules: there is no file {options.rules!r}; give the path of a YAML or JSON file.")
    text = Path(options.rules).read_text()
    document = json.loads(text) if re.search(r"\.json$", options.rules) else yaml.safe_load(text)
    if isinstance(document, dict) and "layer_specs" in document:
        return TPTrainingConfig.load({"partition_config": document, **given})
    return TPTrainingConfig.load(options.rules, **given)
