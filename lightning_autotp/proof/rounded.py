"""Whether something is computed in less than fp64, as transformers' norms, routers and losses are whatever is asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_autotp.compat import TorchDispatchMode

_LESS = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)


class Rounded(TorchDispatchMode):
    """Notes it of what is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        self.found = self.found or any(isinstance(one, Tensor) and one.dtype in _LESS for one in made)
        return out
