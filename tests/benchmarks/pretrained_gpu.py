"""Seconds and memory of loading an 8B-shaped Llama as rank 0 of 4 on one GPU, without other ranks.

    python -m tests.benchmarks.pretrained_gpu /tmp/eight stream    # or ordinary, or whole

The first run writes the model: random bf16 weights in nine files, 15 GiB. Ways as in ``pretrained_memory``. Prints one
line of JSON: seconds, MiB of what the rank holds, of anonymous host memory above what importing takes, of the device.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lightning_autotp
from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.sharding.shard import shard
from tests.benchmarks.pretrained_memory import MIB, Peak, anonymous

INDEX = "model.safetensors.index.json"

RANKS = 4


def make(folder: Path) -> None:
    """Write the model."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=32, num_key_value_heads=8)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    files: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in empty.state_dict().items():
        part = int(name.split(".")[2]) // 4 if name.startswith("model.layers") else 8
        files[f"model-{part:05d}.safetensors"][name] = tensor
    for file, named in files.items():
        drawn = {name: torch.randn(t.shape, dtype=t.dtype, device="cuda").cpu() * 0.02 for name, t in named.items()}
        save_file(drawn, folder / file, metadata={"format": "pt"})
    places = {name: file for file, named in files.items() for name in named}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("way", choices=["stream", "ordinary", "whole"])
    given = parser.parse_args()
    if not (given.folder / INDEX).exists():
        make(given.folder)
    torch.zeros(1, device="cuda")
    before, began = anonymous(), time.perf_counter()
    with Peak() as peak:
        if given.way == "stream":
            model = lightning_autotp.from_pretrained(AutoModelForCausalLM, str(given.folder), dtype=torch.bfloat16)
        else:
            model = AutoModelForCausalLM.from_pretrained(str(given.folder), dtype=torch.bfloat16)
        if given.way == "whole":
            model.to("cuda")
        else:
            config = TPTrainingConfig(autotp_size=RANKS)
            plan = make_plan(model, config, RANKS)
            shard(model, plan, silent_mesh(RANKS), config, device=torch.device("cuda"))
        torch.cuda.synchronize()
    found = {
        "way": given.way,
        "seconds": round(time.perf_counter() - began, 1),
        "holds": round(sum(p.numel() * p.element_size() for p in model.parameters()) / MIB),
        "host peak": round(peak.most - before),
        "device peak": round(torch.cuda.max_memory_allocated() / MIB),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
