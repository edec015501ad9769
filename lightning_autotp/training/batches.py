"""Batches of ranks that share a model: met at one place with one structure, or sent by the first of them."""

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from lightning_autotp.compat import collect_random_state, set_random_state
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.same import AT, DisagreementError, different, meet, on

_SAME_BATCHES = (
    "Ranks that share a model must be fed the same batches: split your data by `trainer.strategy.dp_rank` of"
    " `trainer.strategy.dp_size`, not by global rank; or load on one of them, `broadcast_batch=True`"
)

LARGE = 2**16
"""Bytes from which a tensor of a batch is sent by itself."""


def meet_batch(mesh: Mesh, place: str, batch: Any, ended: bool, error: Optional[BaseException]) -> None:
    """See that all ranks that share a model come to ``place`` with a batch of one structure, or to the end.

    Raises:
        DisagreementError: on all of them, if some have ended, or if structures differ.
        RuntimeError: on those that did not fail, if others did.
    """
    state = "failed" if error is not None else "ended" if ended else "goes on"
    facts = {AT: place, "the data": state, **structure_facts(batch, "batch")}
    told = meet(facts, mesh, None if error is None else f"{type(error).__name__}: {error}")
    if not told or error is not None:  # its own error is raised
        return
    failures = [f"rank {rank} failed: {text}" for rank, _, text in told if text is not None]
    if failures:
        raise RuntimeError(f"{place}: {'; '.join(failures)}")
    ended_on = [rank for rank, found, _ in told if found.get("the data") == "ended"]
    if ended_on and len({found[AT] for _, found, _ in told}) == 1:
        others = [rank for rank, *_ in told if rank not in ended_on]
        raise DisagreementError(
            f"{place} is there on {on(others)}, and on {on(ended_on)} the data has ended before it. {_SAME_BATCHES}."
        )
    raise DisagreementError(f"{place}: {different(told)}. {_SAME_BATCHES}.")


def structure_facts(batch: Any, name: str) -> dict[str, str]:
    """Shapes and dtypes of the tensors in ``batch``, and its text and numbers, by where they are."""
    return {where: _described(leaf) for where, leaf in leaves(batch, name)}


def leaves(values: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What is in a nested structure (mappings, sequences, dataclasses, objects that move to devices), by place."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from leaves(value, f"{name}[{key!r}]")
    elif isinstance(values, (list, tuple)):
        for at, value in enumerate(values):
            yield from leaves(value, f"{name}[{at}]")
    elif is_dataclass(values) and not isinstance(values, type):
        for field in fields(values):
            yield from leaves(getattr(values, field.name), f"{name}.{field.name}")
    elif not isinstance(values, Tensor) and hasattr(values, "to") and hasattr(values, "__dict__"):
        for key, value in vars(values).items():
            if isinstance(value, (Tensor, Mapping, list, tuple)):
                yield from leaves(value, f"{name}.{key}")
    else:
        yield name, values


def _described(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{list(leaf.shape)} {leaf.dtype}"
    if isinstance(leaf, (str, bytes, bool, int, float, type(None))):
        return repr(leaf)
    return type(leaf).__name__


class Sender:
    """Sends batches, of whatever can be pickled, from the first of the ranks that share a model to the others.

    Large tensors travel by themselves; random numbers that loading draws are drawn on all.
    """

    def __init__(self, mesh: Mesh, name: str) -> None:
        self.mesh, self.name, self.number = mesh, name, 0

    def next(self, load: Optional[Callable[[], Any]], beside: Callable[[], Any]) -> Optional[tuple[Any, Any]]:
        """The next batch, and what is ``beside`` it on the rank that loads; None at the end.

        Args:
            load: loads a batch, on the first rank; None on the others.
            beside: what is sent with it.

        Raises:
            RuntimeError: if loading failed; on the first rank its own error.
        """
        state, payload, made, error = 0, b"", None, None
        large: list[Tensor] = []
        if load is not None:
            before = collect_random_state(include_cuda=False)
            try:
                made = load()
                after = collect_random_state(include_cuda=False)
                drawn = None if pickle.dumps(before) == pickle.dumps(after) else after
                payload, large = _packed((made, beside(), drawn))
            except StopIteration:
                state = 1
                after = collect_random_state(include_cuda=False)
                payload, _ = _packed(None if pickle.dumps(before) == pickle.dumps(after) else after)
            except Exception as caught:
                state, error = 2, caught
                payload, _ = _packed(f"{type(caught).__name__}: {caught}")
        header = self._send(torch.tensor([state, len(payload)]))
        state = int(header[0])
        if load is None:
            payload = self._send(torch.empty(int(header[1]), dtype=torch.uint8)).numpy().tobytes()
        else:
            self._send(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        for tensor in large:
            self._send(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8))
        place = f"batch {self.number} of {self.name}"
        self.number += 1
        if error is not None:
            raise error
        if load is not None:
            return None if state == 1 else (made, None)
        found = _unpacked(payload, self._received)
        if state == 2:
            raise RuntimeError(f"{place}: rank {self.mesh.collectives.batch_source}, which loads, failed: {found}")
        drawn = found if state == 1 else found[2]
        if drawn is not None:
            set_random_state(drawn)
        return None if state == 1 else (found[0], found[1])

    def _received(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, pin_memory=pinned and torch.cuda.is_available())
        self._send(tensor.view(-1).view(torch.uint8))
        return tensor

    def _send(self, x: Tensor) -> Tensor:
        return self.mesh.collectives.broadcast(x, "host") if x.numel() else x


def _packed(value: Any) -> tuple[bytes, list[Tensor]]:
    """A pickle of ``value`` without its large tensors, and these."""
    out, large = io.BytesIO(), []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            plain = type(obj) is Tensor and obj.layout is torch.strided and not obj.requires_grad
            if not plain or obj.nbytes < LARGE or obj.is_quantized:
                return None
            large.append(obj)
            return tuple(obj.shape), obj.dtype, obj.is_pinned()

    Pickler(out, pickle.HIGHEST_PROTOCOL).dump(value)
    return out.getvalue(), large


def _unpacked(payload: bytes, receive: Callable[..., Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return receive(*pid)

    return Unpickler(io.BytesIO(payload)).load()
