"""``lightning-autotp estimate``: the memory, communication and time of a layout, without weights and without GPUs.

With ``--gpus`` it searches for the best layouts; what is given of one is kept.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Optional

from lightning_autotp.cli.config_options import add_config_options, add_switch, config_of
from lightning_autotp.estimation.cost import estimate
from lightning_autotp.estimation.hardware import GPUS, Machine
from lightning_autotp.estimation.job import PRECISIONS, STAGES, Job
from lightning_autotp.estimation.report import assumptions, print_estimate
from lightning_autotp.estimation.search import search
from lightning_autotp.estimation.search_report import print_search, search_assumptions
from lightning_autotp.estimation.wanted import Wanted

_GB = 1e9


def main(args: Optional[Sequence[str]] = None) -> int:
    """Run the subcommand; returns the exit status: 0 if there is an estimate, whether it fits or not."""
    options = _parser().parse_args(args)
    sys.path.insert(0, os.getcwd())  # for module:factory, as python -m would
    try:
        if options.gpus is not None:
            return _search(options)
        found = estimate(_job(options), _machine(options))
    except (ValueError, OSError) as error:
        print(f"estimate: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({**found.as_dict(), "assumed": assumptions(found)}, indent=2))
    else:
        print_estimate(found)
    return 0


def _search(options: argparse.Namespace) -> int:
    if options.accumulate is not None:
        raise ValueError("accumulate: with gpus it follows from tokens; leave it out, or give a layout without gpus.")
    names = ("tokens", "seq", "precision", "own_loop", "tp", "cp", "dp", "zero", "zero_group", "batch")
    given = {name: getattr(options, name) for name in (*names, "loss_parallel", "checkpointing")}
    found = search(Wanted(options.model, options.gpus, config=config_of(options), **given), _machine(options))
    if options.json:
        print(json.dumps({**found.as_dict(), "assumed": search_assumptions(found)}, indent=2))
    else:
        print_search(found)
    return 0


def _job(options: argparse.Namespace) -> Job:
    if options.tokens is not None:
        raise ValueError("tokens: it goes with gpus, a search for a layout; give batch and seq, or gpus.")
    return Job(
        options.model,
        tp=_or(options.tp, 1),
        dp=_or(options.dp, 1),
        zero=_or(options.zero, 0),
        zero_group=options.zero_group,
        cp=_or(options.cp, 1),
        accumulate=_or(options.accumulate, 1),
        batch=options.batch,
        seq=options.seq,
        precision=options.precision,
        loss_parallel=options.loss_parallel,
        checkpointing=bool(options.checkpointing),
        own_loop=options.own_loop,
        config=config_of(options),
    )


def _or(given: Optional[int], default: int) -> int:
    return default if given is None else given


def _machine(options: argparse.Namespace) -> Machine:
    return Machine(
        options.gpu,
        gpus_per_node=options.gpus_per_node,
        nvlink=None if options.nvlink is None else options.nvlink * _GB,
        network=None if options.network is None else options.network * _GB,
        matmul_share=options.matmul_share,
        link_share=options.link_share,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-autotp estimate",
        description="What would a layout cost, and which is the best? Memory, communication and time of a step, without"
        " weights or GPUs.",
    )
    parser.add_argument("model", help="a model type, a config.json or its directory, a hub name, or module:factory")
    parser.add_argument("--gpus", type=int, metavar="N", help="search for the best layouts of so many GPUs")
    parser.add_argument("--tokens", type=int, metavar="N", help="with --gpus: of all GPUs in a step (about a million)")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor parallel size (1)")
    parser.add_argument("--cp", type=int, metavar="N", help="context parallel size (1)")
    parser.add_argument("--dp", type=int, metavar="N", help="data parallel size (1)")
    parser.add_argument("--zero", type=int, help=f"{', '.join(map(str, STAGES))} (0)")
    parser.add_argument("--zero-group", type=int, metavar="N", help="data parallel ranks that share with --zero (all)")
    parser.add_argument("--accumulate", type=int, metavar="N", help="batches a step of the optimizer (1)")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences in a data parallel rank's batch (1)")
    parser.add_argument("--seq", type=int, metavar="N", help="tokens a sequence (the model's longest, at most 4096)")
    parser.add_argument("--precision", default="bf16-true", help=f"{', '.join(PRECISIONS)} (bf16-true)")
    add_switch(parser, "--loss-parallel", help="with loss_parallel")
    parser.add_argument(
        "--fused-loss", action="store_const", const="fused", dest="loss_parallel", help="with loss_parallel='fused'"
    )
    add_switch(parser, "--checkpointing", help="with Hugging Face's gradient checkpointing")
    parser.add_argument("--own-loop", action="store_true", help="gradients are freed before the forward pass")
    add_config_options(parser)
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(sorted(GPUS))} (h100)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs that NVLink joins (8)")
    parser.add_argument("--nvlink", type=float, metavar="GB/S", help="bandwidth inside a node, one direction")
    parser.add_argument("--network", type=float, metavar="GB/S", help="a GPU's bandwidth to other nodes, one direction")
    parser.add_argument("--matmul-share", type=float, default=0.6, metavar="PART", help="of the GPU's peak (0.6)")
    parser.add_argument("--link-share", type=float, default=0.8, metavar="PART", help="of bandwidths (0.8)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser
