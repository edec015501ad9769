"""A stream of random numbers of a rank's own, which follows from the shared one: no state is kept.

It is seeded by where the shared stream stands, which goes on by as much on every rank. So it is right when a block is
computed again, for which torch puts the shared stream back, and in a resumed run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch


@contextmanager
def own_stream(device: torch.device, rank: int, generator: Optional[torch.Generator] = None) -> Iterator[None]:
    """Inside, numbers drawn on ``device`` are those of the stream of ``rank``; the shared one goes on by one draw.

    Args:
        device: where numbers are drawn.
        rank: the number of the stream.
        generator: what draws them; None is torch's own of the device.
    """
    made = generator if generator is not None else _default(device)
    position = made.get_state()
    seed = hashlib.sha256(position.numpy().tobytes() + rank.to_bytes(4, "little")).digest()
    # the draw that moves the shared stream on has the same size on all ranks
    torch.empty(4, device=made.device).uniform_(generator=made)
    after = made.get_state()
    made.manual_seed(int.from_bytes(seed[:8], "little") >> 1)
    try:
        yield
    finally:
        made.set_state(after)


def _default(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        torch.cuda.init()
        at = device.index if device.index is not None else torch.cuda.current_device()
        return torch.cuda.default_generators[at]
    return torch.default_generator
