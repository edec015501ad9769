"""Matmuls beside a gather or a scatter of tokens, and which of them run fused with it through symmetric memory.

torch's ``fused_all_gather_matmul`` and ``fused_matmul_reduce_scatter`` (``torch.distributed._symmetric_memory``) move
one rank's tokens while another's are multiplied. That hides the communication of many tokens and is slower than NCCL
for few, so each shape is measured once and its fused form used from the size on at which it was faster.
"""

import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_autotp.compat import unsafe_view
from lightning_autotp.distributed.mesh import Mesh

SIZES = (8192, 16384, 32768)
"""Numbers of tokens, of all ranks together, at which forms are measured.

For fewer a fused form saves less than its many launches cost the host, which a step of few tokens waits for.
"""

_GAIN = 0.97
"""A fused form is used if it takes at most this share of the other's time: less is within the noise."""


def form_of(kind: str, inputs: int, outputs: Sequence[int]) -> str:
    """The name of a matmul beside a collective, by the sizes of the unsharded weights: alike on every rank.

    Args:
        kind: ``"gather"`` (before the matmuls) or ``"scatter"`` (after it).
        inputs: the features that go in.
        outputs: the features of each product.
    """
    return f"{kind} {inputs} -> {' + '.join(map(str, outputs))}"


@dataclass
class Overlap:
    """How a sharded model's matmuls run beside gathers and scatters of tokens.

    Args:
        mesh: this process's place.
        on: whether anything overlaps (``tp_overlap_comm``).
        fused_from: by form, the number of tokens from which on it runs fused; a form that is not here never does.
        weights: by form, a call that gives this rank's weights, ``[N_i, K]``.
    """

    mesh: Mesh
    on: bool
    fused_from: dict[str, int] = field(default_factory=dict)
    weights: dict[str, Callable[[], list[Tensor]]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Overlap":
        return self

    def fuses(self, form: str, x: Tensor, tokens: int) -> bool:
        """Whether ``form`` runs fused on ``x`` for this many tokens of all ranks; alike on every rank."""
        size = self.fused_from.get(form)
        return size is not None and tokens >= size and x.dtype in (torch.bfloat16, torch.float16)

    def gather_matmul(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Optional[Tensor]], form: str
    ) -> tuple[Tensor, list[Tensor]]:
        """All tokens ``[T, K]`` of every rank's ``[T_r, K]``, and ``x w_i^T + b_i``, ``[T, N_i]``. No autograd."""
        if weights and self.fuses(form, x, x.shape[0] * self.mesh.tp_size):
            full, products = self.mesh.collectives.all_gather_matmul(x, weights)
            return full, [y if b is None else y.add_(b) for y, b in zip(products, biases)]
        full = self.mesh.collectives.all_gather(x.contiguous())
        return full, [F.linear(full, w, b) for w, b in zip(weights, biases)]

    def matmul_scatter(self, x: Tensor, weight: Tensor, form: str) -> Tensor:
        """This rank's tokens ``[T_r, N]`` of the sum over the ranks of ``x w^T``, ``x [T, K_r]``. No autograd."""
        if self.fuses(form, x, x.shape[0]):
            return self.mesh.collectives.matmul_reduce_scatter(x, weight)
        return self.scatter(F.linear(x, weight))()

    def scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """Start a reduce-scatter of partial sums ``[T, N]``; the call that is returned waits, and gives ``[T_r, N]``.

        Without overlap it is done before this returns. ``x`` must not change before the wait. No autograd.
        """
        if self.on or torch.compiler.is_compiling():
            return self.mesh.collectives.start_reduce_scatter(x.contiguous())
        part = self.mesh.collectives.reduce_scatter(x.contiguous())
        return lambda: part

    def measure(self, autocast: Optional[torch.dtype] = None) -> None:
        """Find out which forms to run fused, under autocast or in the weights' dtype; every process must call it.

        What was measured before on such a machine is read from ``~/.cache/lightning_autotp/overlap.json`` (or under
        ``XDG_CACHE_HOME``), where it can be looked at; what was not takes some tenths of a second and is added.
        """
        self.fused_from = {}
        dtypes = {autocast or weight.dtype for weights in self.weights.values() for weight in weights()}
        if not self.on or not dtypes or dtypes - {torch.bfloat16, torch.float16} or not self._everywhere_shared():
            return
        # multicast can take the GPUs of a whole host down, and nothing here needs it
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        path, machine = _cache(), _machine(self.mesh)
        collectives = self.mesh.collectives
        mine = _read(path).get(machine, {}) if collectives.world_rank == 0 else None
        known: dict[str, dict[str, list[float]]] = collectives.broadcast_object(mine, "world")
        try:
            new = {form: self._times(form, autocast) for form in self.weights if form not in known}
        except torch.OutOfMemoryError:  # of this rank alone
            raise
        except RuntimeError as error:  # alike on all ranks: a group has symmetric memory or it has not
            self.fused_from = {}
            rank_zero_warn(f"symmetric memory cannot be used here, NCCL is instead: {error}")
            return
        if new and collectives.world_rank == 0:
            _write(path, machine, new)
        found = {form: _fastest_from((known | new)[form]) for form in self.weights}
        self.fused_from = {form: size for form, size in found.items() if size is not None}

    def _everywhere_shared(self) -> bool:
        return all(self.mesh.collectives.gather_objects(_shares(self.mesh), "world"))

    @torch.no_grad()
    def _times(self, form: str, dtype: Optional[torch.dtype]) -> dict[str, list[float]]:
        """The milliseconds that a form takes on the slowest rank, with NCCL and fused, for each of :data:`SIZES`."""
        weights = [weight.to(dtype or weight.dtype) for weight in self.weights[form]()]
        times: dict[str, list[float]] = {"nccl": [], "fused": []}
        draw = torch.Generator(weights[0].device).manual_seed(0)  # a training's random state stays as it is
        for size in SIZES:
            rows = size // self.mesh.tp_size
            rows = rows if form.startswith("gather") else rows * self.mesh.tp_size  # sizes that ranks need not divide
            # no zeros, which GPUs multiply faster
            x = torch.empty(rows, weights[0].shape[1], dtype=weights[0].dtype, device=weights[0].device)
            x.normal_(generator=draw)
            for way, first in (("nccl", None), ("fused", 0)):
                self.fused_from = {} if first is None else {form: first}
                times[way].append(_milliseconds(lambda x=x: self._run(form, x, weights), x.device))  # type: ignore[misc]
        slowest = torch.tensor([times["nccl"], times["fused"]], dtype=torch.float64, device=weights[0].device)
        slowest = self.mesh.collectives.all_reduce(slowest, "world", op="max")
        return dict(zip(times, slowest.tolist()))

    def _run(self, form: str, x: Tensor, weights: list[Tensor]) -> Any:
        if form.startswith("gather"):
            return self.gather_matmul(x, weights, [None] * len(weights), form)
        return self.matmul_scatter(x, weights[0], form)


def as_sequences(tokens: Tensor, length: int, rows: Optional[int] = None) -> Tensor:
    """``[T, N]`` as ``[B, length, N]``, padding dropped: what is beyond B ``rows``, or without them fills no sequence.

    No view to autograd, which forbids to change views that a function puts out.
    """
    whole = (tokens.shape[0] // length if rows is None else rows) * length
    tokens = tokens if whole == tokens.shape[0] else tokens[:whole].clone()
    return unsafe_view(tokens, [-1, length, tokens.shape[1]])


def _milliseconds(work: Callable[[], Any], device: torch.device, count: int = 10) -> float:
    for _ in range(3):
        work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(torch.cuda.current_stream(device))
    for _ in range(count):
        work()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return start.elapsed_time(end) / count


def _fastest_from(times: dict[str, list[float]]) -> Optional[int]:
    """The size from which on the fused form is faster at every size that was measured."""
    found = None
    for size, nccl, fused in reversed(list(zip(SIZES, times["nccl"], times["fused"]))):
        if fused > _GAIN * nccl:
            break
        found = size
    return found


def _shares(mesh: Mesh) -> bool:
    """Whether the GPUs of this process's tensor parallel group can reach each other's memory."""
    if not torch.cuda.is_available() or not mesh.collectives.sends_between_gpus:
        return False
    device = torch.cuda.current_device()
    everyones = mesh.collectives.gather_objects((socket.gethostname(), device))
    if len({host for host, _ in everyones}) > 1 or len({place for _, place in everyones}) < mesh.tp_size:
        return False
    if any(place >= torch.cuda.device_count() for _, place in everyones):
        return False
    return all(torch.cuda.can_device_access_peer(device, place) for _, place in everyones if place != device)


def _machine(mesh: Mesh) -> str:
    return f"{mesh.tp_size} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "lightning_autotp" / "overlap.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or half a file
        return {}
    if not isinstance(found, dict) or found.get("tokens") != list(SIZES):
        return {}
    return {name: times for name, times in found.items() if name != "tokens"}


def _write(path: Path, machine: str, new: dict[str, Any]) -> None:
    """Add measurements; a cache that cannot be written costs the next run their time and no more."""
    found = _read(path)
    found[machine] = found.get(machine, {}) | new
    half = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps({"tokens": list(SIZES), **found}, indent=1) + "\n")
        half.replace(path)
    except OSError as error:
        rank_zero_warn(f"{path} could not be written, so that the next run measures again: {error}")
