"""A proof runs on one of the processes that share a model: what it runs must not wait for others."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class WithoutProcesses(TorchDispatchMode):
    """Inside, collectives between processes are an error: the others are not there, and it would wait for ever.

    Such are calls of ``torch.distributed`` in a step, and modules that another run has sharded.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            raise RuntimeError(
                f"it asks other processes for something by itself ({func._overloadpacket.__name__}), with"
                " torch.distributed or a model of another run, and the proof runs on one process"
            )
        return func(*args, **(kwargs or {}))
