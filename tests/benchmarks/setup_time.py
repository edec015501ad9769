"""How long sharding takes: a Llama-3-8B built on the meta device, as AutoTPStrategy's setup shards and initializes it.

    torchrun --nproc_per_node 4 tests/benchmarks/setup_time.py [--layers 32]

Rank 0 prints the seconds of planning and of sharding, and the peaks of GPU memory and of the process's host memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.sharding.shard import shard


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    given = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    size = dist.get_world_size()
    mesh = build_mesh(size, TPTrainingConfig().tensor_parallel)
    dist.barrier()
    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    config = LlamaConfig(
        **sizes, num_key_value_heads=8, num_hidden_layers=given.layers, vocab_size=128256, tie_word_embeddings=False
    )
    start = time.perf_counter()
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    built = time.perf_counter()
    switches = TPTrainingConfig(autotp_size=size, tp_overlap_comm=True)
    plan = make_plan(model, switches)
    planned = time.perf_counter()
    shard(model, plan, mesh, switches, device=device)
    torch.cuda.synchronize()
    dist.barrier()
    done = time.perf_counter()
    if dist.get_rank() == 0:
        kept = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
        print(
            f"{size} x {torch.cuda.get_device_name()}, {given.layers} layers: built in {built - start:.2f} s, planned"
            f" in {planned - built:.2f} s, sharded in {done - planned:.2f} s; {kept:.2f} GiB of weights a rank, peak"
            f" {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU and"
            f" {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of host memory"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
