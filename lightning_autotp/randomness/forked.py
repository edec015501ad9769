"""A stretch of a step in which each rank draws random numbers of its own, though all begin with the same states."""

import hashlib

import torch
from torch import Tensor


class Forked:
    """A fork of the generators' states, which are the same on all ranks before, and are again once it is joined.

    Args:
        rank: this rank's number among those that draw numbers of their own.
        device: whose generator is forked besides the CPU's.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.device = device
        self._before = self._states()
        whole = hashlib.blake2b(digest_size=7)
        for state in self._before:
            whole.update(state.numpy().tobytes())
        torch.manual_seed(int.from_bytes(whole.digest(), "big") + rank)
        self._seeded = self._states()

    def join(self) -> None:
        """Draw the same numbers on all ranks again."""
        used = any(not torch.equal(now, then) for now, then in zip(self._states(), self._seeded))
        torch.set_rng_state(self._before[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._before[1], self.device)
        if used:  # or the next step would draw the same
            torch.rand(())
            torch.rand((), device=self.device)

    def _states(self) -> list[Tensor]:
        of_device = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *of_device]
