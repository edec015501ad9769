"""What is compared in every step, without waiting for the GPU: it is sent in one step and looked at in the next."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from lightning_autotp.compat import foreach_norm
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.same import DisagreementError, on
from lightning_autotp.sharding.agreement import mark_on_device
from lightning_autotp.training.batches import leaves

SLOTS = 64
"""Numbers that are sent of a batch: one a tensor, and sums of them where there are more."""

_SAME_DATA = (
    "Ranks that share a model must be fed the same data: leave the sampler to the Trainer, or split your data by"
    " `trainer.strategy.dp_rank` of `trainer.strategy.dp_size`, not by global rank; seed random augmentation alike; or"
    " load on one of them, `broadcast_batch=True`."
)

_ONE_RANK = (
    "Ranks that share a model compute the same: one of them drew other numbers, runs code of its own, or has a faulty"
    " device."
)


class EveryStep:
    """Compares digests of batches, and where losses and gradients of replicated parameters are not finite.

    All ranks that share a model must make the same calls in the same order; each sends one small tensor a batch.

    Args:
        mesh: this process's place.
        enabled: whether anything is compared.
    """

    def __init__(self, mesh: Mesh, enabled: bool) -> None:
        self.mesh, self.enabled = mesh, enabled
        self._place = ""
        self._sent: Optional[_Sent] = None
        self._flags: dict[str, Tensor] = {}
        self._norms: tuple[tuple[str, ...], Optional[Tensor]] = (), None

    def batch(self, batch: Any, place: str) -> None:
        """Look at what the last call sent, and send a digest of ``batch``, which is on its device.

        Raises:
            DisagreementError: on all ranks that share a model, with the batch, its key and the ranks.
        """
        if not self.enabled:
            return
        self.look()
        found = {where: leaf for where, leaf in leaves(batch, "batch") if isinstance(leaf, Tensor)}
        marks = [mark_on_device(tensor) for tensor in found.values()]
        self._send(list(found), marks, place)

    def loss(self, output: Any) -> None:
        """Note whether the loss that a training step returns is finite."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if self.enabled and isinstance(loss, Tensor):
            self._flags["loss"] = (~loss.detach().isfinite()).any()

    def gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Note whether complete gradients of parameters that every rank holds whole are finite."""
        if not self.enabled:
            return
        held = {name: grad for name, grad in gradients.items() if grad.layout is torch.strided and grad.numel()}
        if held:
            # fp32, so that those of half precision do not overflow; it is not computed of fp64
            single = [grad.float() if grad.dtype is torch.float64 else grad for grad in held.values()]
            norms = torch.stack(foreach_norm(single, 1, dtype=torch.float32))
            self._norms = tuple(held), norms
            self._flags["gradients"] = (~norms.isfinite()).any()

    def last(self) -> None:
        """Look at all that has not been looked at, at the end of a run."""
        if self.enabled and (self._sent is not None or self._flags):
            self.look()
            if self._flags:
                self._send([], [], "")
                self.look()

    def look(self) -> None:
        """Look at what was sent.

        Raises:
            DisagreementError: see :meth:`batch`.
        """
        sent, self._sent = self._sent, None
        if sent is None:
            return
        everyones = sent.everyones()
        if all(one == everyones[0] for one in everyones):
            return
        names, norms = sent.norms
        bad = [] if norms is None else [n for n, norm in zip(names, norms.tolist()) if not _is_finite(norm)]
        told = self.mesh.collectives.gather_objects((self.mesh.collectives.world_rank, bad), "host")
        ranks = [rank for rank, _ in told]
        wrong = [s for s in range(SLOTS) if len({one[s] for one in everyones}) > 1]
        if wrong:
            keys = [name for at, name in enumerate(sent.batch) if at % SLOTS in wrong]
            kinds: dict[tuple[int, ...], list[int]] = {}
            for rank, one in zip(ranks, everyones):
                kinds.setdefault(tuple(one[s] for s in wrong), []).append(rank)
            raise DisagreementError(
                f"{sent.place}: {', '.join(keys[:5]) or 'the batch'} has different values on"
                f" {' and on '.join(on(held) for held in kinds.values())}. {_SAME_DATA}"
            )
        for slot, what in ((SLOTS, "loss"), (SLOTS + 1, "gradients")):
            where = [rank for rank, one in zip(ranks, everyones) if one[slot]]
            if where and len(where) < len(ranks):
                found: list[str] = next((bad for rank, bad in told if rank in where and bad), [])
                thing = "the loss" if what == "loss" else f"the gradient of {', '.join(found[:5]) or 'a parameter'}"
                others = [rank for rank in ranks if rank not in where]
                raise DisagreementError(
                    f"{sent.before or 'the last step'}: {thing} is not finite (NaN or inf) on {on(where)} alone, and"
                    f" finite on {on(others)}. {_ONE_RANK}"
                )

    def _send(self, names: list[str], marks: list[Tensor], place: str) -> None:
        device = next((one.device for one in (*marks, *self._flags.values())), torch.device("cpu"))
        if self.mesh.collectives.sends_between_gpus and device.type == "cpu":
            device = torch.device("cuda", torch.cuda.current_device())
        slots = torch.zeros(SLOTS, dtype=torch.int64, device=device)
        for first in range(0, len(marks), SLOTS):
            some = torch.stack([mark.to(device) for mark in marks[first : first + SLOTS]])
            slots[: len(some)] += some * (2 * first + 1)
        zero = torch.zeros((), dtype=torch.bool, device=device)
        flags = [self._flags.get(name, zero).to(device) for name in ("loss", "gradients")]
        vector = torch.cat([slots, torch.stack(flags).to(torch.int64)])
        self._sent = _Sent(self.mesh, vector, names, place, self._place, self._norms)
        self._flags, self._norms = {}, ((), None)
        self._place = place or self._place


class _Sent:
    """What is on its way; on a GPU it comes to the host beside what the GPU computes."""

    def __init__(
        self,
        mesh: Mesh,
        vector: Tensor,
        batch: list[str],
        place: str,
        before: str,
        norms: tuple[tuple[str, ...], Optional[Tensor]],
    ) -> None:
        self.batch, self.place, self.before, self.norms = batch, place, before, norms
        self._ranks, self._wait, self._event = mesh.batch_ranks, None, None
        self._vector = vector
        if vector.is_cuda:
            stream = _side_stream(vector.device)
            stream.wait_stream(torch.cuda.current_stream(vector.device))
            with torch.cuda.stream(stream):
                gathered = mesh.collectives.start_all_gather(vector, "batch")()
                self._host = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
                self._host.copy_(gathered, non_blocking=True)
                vector.record_stream(stream)
                self._event = torch.cuda.Event()
                self._event.record(stream)
        else:
            self._wait = mesh.collectives.start_all_gather(vector, "batch")

    def everyones(self) -> list[list[int]]:
        """What each rank sent; waits for it."""
        if self._wait is not None:
            self._host = self._wait()
        elif self._event is not None:
            self._event.synchronize()
        rows: list[list[int]] = self._host.view(self._ranks, -1).tolist()
        return rows


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _is_finite(number: float) -> bool:
    return number - number == 0.0
