"""Tensor parallelism in a training loop of one's own: 2 ranks share a model, and the ranks are replicas of such pairs.

``torchrun --nproc_per_node 4 -m lightning_autotp.examples.torch_loop [SAVE [RESUME]]`` trains 5 steps and saves them in
the folder SAVE; with RESUME, it goes on from what is in that folder.
"""

import os
import sys
from contextlib import nullcontext
from typing import Optional

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_autotp.recipe.parallelize import parallelize
from lightning_autotp.recipe.parallelized import Parallelized

ACCUMULATE, STEPS, MAX_NORM = 2, 5, 0.5


def train(run: Parallelized, optimizer: Optimizer, rows: Tensor, batch: int) -> list[Tensor]:
    """Train on token ids ``rows [N, S]``, ``batch`` a replica and forward pass; returns the losses of this replica."""
    data, losses = TensorDataset(rows), []
    loader = DataLoader(data, batch, sampler=DistributedSampler(data, shuffle=False, **run.sampler_kwargs))
    for number, (tokens,) in enumerate(loader, start=1):
        is_last = number % ACCUMULATE == 0
        with nullcontext() if is_last else run.no_sync():
            loss = run.model(input_ids=tokens, labels=tokens).loss
            (loss / ACCUMULATE).backward()
        losses.append(loss.detach())
        if is_last:
            run.step(optimizer, max_norm=MAX_NORM, loss=loss)
            optimizer.zero_grad()
    return losses


def main(save: str = "torch_loop_checkpoint", resume: Optional[str] = None) -> None:
    """Train a small Llama on random tokens, save it in ``save``; begin with what is in ``resume``, if it is given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    run = parallelize(LlamaForCausalLM(config), autotp_size=2, sequence_parallel=True)
    optimizer = AdamW(run.module.parameters(), lr=1e-3)
    done = {"step": 0}
    if resume is not None:
        run.load_state_dict(resume, optimizer)
        dcp.load(done, checkpoint_id=resume)
    seeded = torch.Generator().manual_seed(done["step"])
    rows = torch.randint(128, (STEPS * ACCUMULATE * 4, 16), generator=seeded).to(next(run.module.parameters()).device)
    losses = train(run, optimizer, rows, batch=2)
    step = done["step"] + STEPS
    if dist.get_rank() == 0:
        print(f"steps {done['step'] + 1} to {step}: loss {losses[0]:.4f} to {losses[-1]:.4f}")
    dcp.save({**run.state_dict(optimizer), "step": step}, checkpoint_id=save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
