"""A Hugging Face directory from a model that runs sharded."""

import os
from functools import partial
from pathlib import Path
from typing import Optional, Union

import torch.distributed as dist
from torch import nn

from lightning_autotp.checkpoint.hf_export import SHARD_SIZE, chosen, write_model
from lightning_autotp.checkpoint.hf_record import models_in
from lightning_autotp.checkpoint.state_dict import Placement
from lightning_autotp.checkpoint.tensors import tensors_of
from lightning_autotp.distributed.errors import raised_together
from lightning_autotp.sharding.state import inside, sharded


def save_pretrained(
    model: nn.Module,
    directory: Union[str, os.PathLike[str]],
    *,
    merge: bool = False,
    submodule: Optional[str] = None,
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Write the full Hugging Face model that the ranks share, for ``from_pretrained``; every process must call it.

    Tensors are gathered one at a time, and global rank 0 writes. Of a PEFT model the adapters are written.

    Args:
        model: the Hugging Face or PEFT model, or a module that it is in, such as the LightningModule.
        directory: where to write; rank 0's counts.
        merge: write a PEFT model's base with its adapter merged in.
        submodule: the path of the Hugging Face model in ``model``, if there are several.
        max_shard_size: the bytes of tensors that go into one file.

    Raises:
        ValueError: if there is no Hugging Face model in ``model``, or several and none was chosen.
    """
    model = getattr(model, "module", model) if type(model).__name__ == "DistributedDataParallel" else model
    record = chosen(models_in(model), submodule, type(model).__name__)
    found = sharded(model)
    part = inside(model) if found is None else None
    placement = None
    if found is not None:
        placement = Placement.of(model, found.plan.layouts, found.mesh)
    elif part is not None:
        placement = Placement.of(model, part.layouts, part.mesh)
    running = dist.is_available() and dist.is_initialized()
    shared = [os.fspath(directory)]
    if running:
        dist.broadcast_object_list(shared, src=0)
    write = partial(
        write_model,
        record,
        tensors_of(model, placement),
        Path(shared[0]),
        merge=merge,
        shard_size=max_shard_size,
        writes=not running or dist.get_rank() == 0,
    )
    raised_together(write) if running else write()
