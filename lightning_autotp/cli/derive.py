"""``lightning-autotp plan --derive MODEL``: a plan without rules, and the rules that make it, to keep and to edit."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Optional

import torch
import yaml
from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.derive import derive
from lightning_autotp.derivation.rules import rules_of
from lightning_autotp.model_sources.full_size import build
from lightning_autotp.model_sources.small import group_experts
from lightning_autotp.plans.plan_table import print_plan
from lightning_autotp.proof.prover import Look
from lightning_autotp.proof.step import loss_of_batch

ROWS, TOKENS = 3, 16


def main(args: Optional[Sequence[str]] = None) -> int:
    """Run the subcommand; returns the exit status: 0 if a plan was derived and proved."""
    options = _parser().parse_args(args)
    sys.path.insert(0, os.getcwd())  # for module:factory, as python -m would
    try:
        model, batch = _model(options.model)
        config = TPTrainingConfig(autotp_size=options.tp)
        found = derive(model, Look("training", (batch,), call=loss_of_batch), config, options.tp)
    except (ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 1
    if not options.rules_only:
        print_plan(found.plan)
        print(f"# {found.verdict.kind}" + (f"\n{found.verdict.listed}" if found.verdict.findings else ""))
        for names, why in found.dropped:
            print(f"# replicated or gathered, since sharding it was refuted: {names}\n#   {why}")
    rules, lost = rules_of(model, found.plan)
    print(yaml.safe_dump({"partition_config": rules}, sort_keys=False, default_flow_style=None, width=120), end="")
    for name in lost:
        print(f"# no rule says how {name} is sharded; with these rules it is replicated or refused")
    return 0 if found.verdict.kind == "proved" else 1


def _model(source: str) -> tuple[nn.Module, Any]:
    """A model and a batch for it: of a factory with values, or a Hugging Face model on the meta device."""
    of_factory = ":" in source and not os.path.exists(source)
    with nullcontext() if of_factory else torch.device("meta"):
        model, batch = build(source, dtype=torch.float32 if of_factory else torch.bfloat16, batch=ROWS, seq=TOKENS)
    group_experts(model)
    return model, batch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-autotp plan --derive", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a model type, a folder or hub id with a config, module:factory")
    parser.add_argument("--tp", type=int, default=2, help="the tensor parallel size (default 2)")
    parser.add_argument("--rules-only", action="store_true", help="print the YAML alone")
    return parser
