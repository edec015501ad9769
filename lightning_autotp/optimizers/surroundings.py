"""What of an optimizer may be tried, and in what surroundings."""

import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch.optim import Optimizer


def own_methods(kind: type) -> list[str]:
    """Names of public methods that a class adds to torch's, which can be called without arguments."""
    found = []
    for name in dir(kind):
        if name.startswith("_") or hasattr(Optimizer, name):
            continue
        method = inspect.getattr_static(kind, name)
        if inspect.isfunction(method):
            with suppress(TypeError, ValueError):
                inspect.signature(method).bind(None)
                found.append(name)
    return found


@contextmanager
def as_before(devices: Sequence[torch.device]) -> Iterator[None]:
    """Inside it, steps run as written, draw no random numbers that others would draw, and need no autograd."""
    state = random.getstate()
    with torch.random.fork_rng(devices=sorted({d.index or 0 for d in devices if d.type == "cuda"})):
        try:
            with torch.compiler.set_stance("force_eager"), torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            random.setstate(state)
