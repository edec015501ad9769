"""``lightning-autotp estimate``: the memory, communication and time of a layout, without weights and without GPUs."""

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

_GB = 1e9


def main(args: Optional[Sequence[str]] = None) -> int:
    """Run the subcommand; returns the exit status: 0 if there is an estimate, whether it fits or not."""
    options = _parser().parse_args(args)
    sys.path.insert(0, os.getcwd())  # for module:factory, as python -m would
    try:
        found = estimate(_job(options), _machine(options))
    except (ValueError, OSError) as error:
        print(f"estimate: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({**found.as_dict(), "assumed": assumptions(found)}, indent=2))
    else:
        print_estimate(found)
    return 0


def _job(options: argparse.Namespace) -> Job:
    return Job(
        options.model,
        tp=options.tp,
        dp=options.dp,
        zero=options.zero,
        batch=options.batch,
        seq=options.seq,
        precision=options.precision,
        loss_parallel=options.loss_parallel,
        checkpointing=options.checkpointing,
        own_loop=options.own_loop,
        config=config_of(options),
    )


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
        description="What would a layout cost? Memory, communication and time of a step, without weights or GPUs.",
    )
    parser.add_argument("model", help="a model type, a config.json or its directory, a hub name, or module:factory")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel size (1)")
    parser.add_argument("--dp", type=int, default=1, metavar="N", help="data parallel size (1)")
    parser.add_argument("--zero", type=int, default=0, help=f"{', '.join(map(str, STAGES))} (0)")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences a data parallel rank sees (1)")
    parser.add_argument("--seq", type=int, metavar="N", help="tokens a sequence (the model's longest, at most 4096)")
    parser.add_argument("--precision", default="bf16-true", help=f"{', '.join(PRECISIONS)} (bf16-true)")
    add_switch(parser, "--loss-parallel", help="with loss_parallel")
    parser.add_argument(
        "--fused-loss", action="store_const", const="fused", dest="loss_parallel", help="with loss_parallel='fused'"
    )
    parser.add_argument("--checkpointing", action="store_true", help="with Hugging Face's gradient checkpointing")
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
