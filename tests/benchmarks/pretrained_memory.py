"""What a rank holds while a pretrained model is loaded and sharded: anonymous memory above what importing takes.

    torchrun --nproc_per_node 4 tests/benchmarks/pretrained_memory.py /tmp/a-model --way stream [--dtype float32]

The first run makes the folder: a synthetic Llama (or Mixtral) in bf16. Ways: ``stream`` is
``lightning_autotp.from_pretrained``, ``ordinary`` is transformers' own, ``whole`` is that without sharding.
Prints one line of JSON a rank: MiB of its shard, of anonymous memory at the peak and afterwards, and the seconds.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lightning_autotp
from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.distributed.mesh import Mesh, build_mesh
from lightning_autotp.sharding.shard import shard

MIB = 2**20


def anonymous() -> float:
    """MiB of anonymous memory of this process; mapped files are not in it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("this system does not count anonymous memory")


class Peak(threading.Thread):
    """The most anonymous memory between ``with`` and its end."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._ended = anonymous(), threading.Event()

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self.most = max(self.most, anonymous())


def make(folder: Path, model_type: str, layers: int, hidden: int, tied: bool) -> None:
    """Write a synthetic model: random bf16 weights of the right names and shapes."""
    heads = hidden // 64
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "mixtral" else {}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32000} | experts
    config = AutoConfig.for_model(model_type, **sizes, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")


def load(given: argparse.Namespace, way: str) -> nn.Module:
    dtype = {} if given.dtype is None else {"dtype": getattr(torch, given.dtype)}
    if way == "stream":
        model = lightning_autotp.from_pretrained(AutoModelForCausalLM, given.folder, **dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(given.folder, **dtype)
    if given.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    loaded: nn.Module = model
    return loaded


def measure(given: argparse.Namespace, way: str, mesh: Mesh) -> dict[str, Any]:
    """Load and shard a model, and say what that took."""
    switches = TPTrainingConfig(autotp_size=mesh.tp_size)
    dist.barrier()
    base, start = anonymous(), time.perf_counter()
    with Peak() as peak:
        model = load(given, way)
        if way == "whole":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        else:
            shard(model, make_plan(model, switches), mesh, switches, device=torch.device("cpu"))
    return {
        "way": way,
        "rank": mesh.tp_rank,
        "shard": round(sum(p.numel() * p.element_size() for p in model.parameters()) / MIB, 1),
        "peak": round(peak.most - base, 1),
        "after": round(anonymous() - base, 1),
        "seconds": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--way", nargs="+", choices=("stream", "ordinary", "whole"), default=["stream"])
    parser.add_argument("--dtype")
    parser.add_argument("--model-type", default="llama")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--lora", action="store_true")
    given = parser.parse_args()
    dist.init_process_group("gloo")
    if dist.get_rank() == 0 and not (given.folder / "config.json").exists():
        make(given.folder, given.model_type, given.layers, given.hidden, given.tied)
    mesh = build_mesh(dist.get_world_size(), TPTrainingConfig().tensor_parallel)
    # what loading imports is not what it holds
    from safetensors import safe_open  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401

    if given.lora:
        import peft  # noqa: F401
    for way in given.way:
        found: list[Any] = [None] * mesh.tp_size
        dist.all_gather_object(found, measure(given, way, mesh))
        if mesh.tp_rank == 0:
            print("\n".join(json.dumps(one) for one in found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
