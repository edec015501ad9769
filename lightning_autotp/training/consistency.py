"""The net under every plan: tensor parallel ranks must see the same data and come to the same numbers.

Looked at in each run: at its first batches, its first evaluation step and before its first optimizer step, when a
mistake costs least; at later steps what had nothing to compare then; and weights every so many steps.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_autotp.distributed.collectives import Over
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.same import DisagreementError
from lightning_autotp.layout.layout import Layout
from lightning_autotp.training.every_step import EveryStep
from lightning_autotp.training.gradients import TPGradients

_SAME_DATA = (
    "Ranks that share a model must be fed the same data: leave the sampler to the Trainer, or split your data by"
    " `trainer.strategy.dp_rank` of `trainer.strategy.dp_size`, not by global rank; and seed random augmentation alike."
)

_SAME_NUMBERS = (
    "Where a parameter is named: it is used between a column and a row cut and sees only its rank's part; add a rule"
    " for it, {'patterns': [...], 'partition_type': 'skip', 'grad_allreduce': true}. Where only the loss or an output"
    " is named: the ranks drew different random numbers, or code outside a cut layer reads a cut weight."
)

_ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Relative differences that rounding explains; a partial gradient differs by far more. 1e-3 for other floats."""

_SAME_STEP = (
    "Their gradients agreed to rounding, so either the ranks clipped or stepped differently: clip with"
    " `gradient_clip_val` or `self.clip_gradients`, which know the norm over all ranks, and use an elementwise"
    " optimizer. Or a kernel in a layer that is not cut is not deterministic, as the backward pass of flash"
    " attention is not."
)

_SAME_STATE = (
    "Each rank has put its own part of a cut tensor there, and only one of them would be saved: put full tensors into"
    " a checkpoint, or none that follow the model's parameters."
)

_SAME_SAVED = (
    "Under shard_saved_activations each of them would keep a part of it: leave `shard_saved_activations` off for this"
    " model."
)


@dataclass(frozen=True)
class Digest:
    """What is compared of a tensor: its shape and some numbers, which must agree to ``tolerance`` of their size."""

    shape: tuple[int, ...]
    numbers: tuple[float, ...]
    tolerance: float

    @property
    def says_something(self) -> bool:
        """Whether it is of finite numbers that are not all zero."""
        return all(map(math.isfinite, self.numbers)) and any(self.numbers)


class FirstLook:
    """The comparisons of one run, each made once; nothing happens where there is no one to compare with.

    Every process of the run must make the same calls in the same order.
    """

    def __init__(self, mesh: Mesh, enabled: bool, every: int = 0) -> None:
        self.mesh, self.every = mesh, every
        self.enabled = enabled and mesh.batch_ranks > 1
        self.each = EveryStep(mesh, self.enabled)
        self._seen: set[object] = set()
        self._loss: dict[str, Digest] = {}
        self._steps: Counter[int] = Counter()
        self._due: dict[int, set[str]] = {}

    def batch(self, batch: Any, loader: object) -> None:
        """Compare the first batch of each ``loader``, bit for bit."""
        if self._first(("batch", loader)):
            require_agreement(digests(batch, "batch", exact=True), self.mesh, _SAME_DATA, over="batch")

    def shared(self, name: str, tensor: Tensor) -> None:
        """Compare what each rank is to keep a part of, bit for bit, once for each ``name``; though others are off."""
        if name not in self._seen:
            self._seen.add(name)
            require_agreement(digests(tensor, name, exact=True), self.mesh, _SAME_SAVED, over="tp")

    def loss(self, output: Any) -> None:
        """Note what a training step returns, until :meth:`gradients` compares it."""
        self.each.loss(output)
        if self.enabled and not self._seen & {"weights"}:
            loss = output.get("loss") if isinstance(output, Mapping) else output
            self._loss = digests(loss, "the loss")

    def gradients(self, gradients: TPGradients, optimizer: object) -> None:
        """Compare the last loss and the gradients of whole parameters at the first step of each ``optimizer``.

        A gradient that is zero or not finite (of a layer that starts at zero, that thaws later, or that overflowed) has
        shown nothing: it is compared again at the next steps, less and less often, until it has.

        To be called before partial gradients are completed, because one that is alike on all ranks is none, and before
        those of whole parameters are averaged, because then none differ.
        """
        if not self.enabled:
            return
        self._steps[id(optimizer)] += 1
        step = self._steps[id(optimizer)]
        due = self._due.setdefault(id(optimizer), set(gradients.whole_parameters()))
        if step & (step - 1) or not due:  # steps 1, 2, 4, 8 and so on
            return
        if step == 1:
            self._refuse_complete(gradients)
        gradients.complete(average=False)
        values = dict(self._loss) if step == 1 else {}
        found = {
            name: digests(grad, f"the gradient of {name}") for name, grad in gradients.whole().items() if name in due
        }
        for of_one in found.values():
            values |= of_one
        require_agreement(values, self.mesh, _SAME_NUMBERS)
        told = {name for name, of_one in found.items() if any(digest.says_something for digest in of_one.values())}
        if gradients.zero is not None:  # data parallel ranks hold other rows, and must go on comparing alike
            told = set().union(*self.mesh.collectives.gather_objects(told, "replicas"))
        due -= told

    def weights(self, whole: Callable[[], Mapping[str, Tensor]], optimizer: object) -> None:
        """Warn where parameters that are whole are no longer bit-equal after the first step of each ``optimizer``.

        And again every ``every`` steps of it.
        """
        if self._first(("weights", id(optimizer))):
            self._seen.add("weights")
        elif not self.enabled or not self.every or self._steps[id(optimizer)] % self.every:
            return
        checksums = _checksums(whole())
        if _alike(checksums, self.mesh):
            return
        found = disagreements(checksums, self.mesh)
        if found:
            rank_zero_warn(f"tensor parallel ranks drift apart in {_shown(found)}. {_SAME_STEP}")

    def step(self, models: Iterable[nn.Module], step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of an evaluation step; at the first one, it and what ``models`` gave in it are compared.

        Tensors of four and more dims are left out: attention weights and caches hold each rank's own heads.
        """
        if not self._first("step"):
            return step(*args, **kwargs)
        outputs: list[Any] = []
        handles = [m.register_forward_hook(lambda _, __, output: outputs.append(output)) for m in models]
        try:
            result = step(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        values = digests(outputs, "the model's output") | digests(result, "the step's output")
        require_agreement({n: d for n, d in values.items() if len(d.shape) < 4}, self.mesh, _SAME_NUMBERS)
        return result

    def _refuse_complete(self, gradients: TPGradients) -> None:
        mine = digests(gradients.incomplete(), "", exact=True)
        everyones = self.mesh.collectives.gather_objects(mine)
        alike = [name for name in mine if all(theirs.get(name) == mine[name] for theirs in everyones)]
        wrong = [name for name, grad in gradients.incomplete().items() if f"[{name!r}]" in alike and grad.any()]
        if wrong:
            raise DisagreementError(
                f"the gradient of {', '.join(wrong[:5])} is the same on every tensor parallel rank: it is complete, and"
                " summing it would multiply it. Remove `grad_allreduce: true` from the rule for it."
            )

    def _first(self, what: object) -> bool:
        if not self.enabled or what in self._seen:
            return False
        self._seen.add(what)
        return True


def digests(values: Any, name: str, exact: bool = False) -> dict[str, Digest]:
    """A digest for every tensor in a nested structure, by a name that says where it is.

    Args:
        values: a tensor, or mappings, sequences and dataclasses of them; all else is passed over.
        name: the name of the whole.
        exact: whether floating-point tensors, too, must agree bit for bit.
    """
    return {where: _digest(tensor.detach(), exact) for where, tensor in _tensors(values, name)}


def require_alike(checkpoint: Mapping[str, Any], layouts: Iterable[Layout], mesh: Mesh) -> None:
    """Refuse parts of cut tensors in a checkpoint, besides the model's and the optimizers' own state.

    Raises:
        DisagreementError: on all processes alike, with the places of such tensors.
    """
    if mesh.tp_size == 1:
        return
    parts = {layout.local_shape(rank) for layout in layouts if not layout.is_replicated for rank in range(mesh.tp_size)}
    rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    found = {name: digest for name, digest in digests(rest, "checkpoint", exact=True).items() if digest.shape in parts}
    require_agreement(found, mesh, _SAME_STATE)


def require_agreement(values: Mapping[str, Digest], mesh: Mesh, fix: str, over: Over = "world") -> None:
    """Compare ``values`` among ranks that share a model, or with ``"batch"`` see one; all of ``over`` must call it.

    Raises:
        DisagreementError: on all ranks of ``over`` alike, with the names of what differs and ``fix``.
    """
    found = disagreements(values, mesh, over)
    if found:
        raise DisagreementError(f"tensor parallel ranks disagree on {_shown(found)}. {fix}")


def disagreements(values: Mapping[str, Digest], mesh: Mesh, over: Over = "world") -> list[str]:
    """What of ``values`` differs among any ranks of ``over`` that share a model, alike on all of them."""
    source = mesh.collectives.batch_source if over == "batch" else mesh.tp_source
    everyones = mesh.collectives.gather_objects((mesh.collectives.world_rank, source, dict(values)), over)
    reference = {source: theirs for rank, source, theirs in everyones if rank == source}
    wrong: dict[str, str] = {}
    for rank, source, theirs in everyones:
        wanted = reference[source]
        for name in [*wanted, *(n for n in theirs if n not in wanted)]:
            difference = _difference(wanted.get(name), theirs.get(name))
            if difference:
                wrong.setdefault(name, f"{name} ({difference} between ranks {source} and {rank})")
    return list(wrong.values())


def _alike(values: Mapping[str, Digest], mesh: Mesh) -> bool:
    """Whether ``values`` are the same on all ranks that share a model, whichever: one number a rank says so."""
    whole = hashlib.blake2b(repr(sorted(values.items())).encode(), digest_size=16).digest()
    everyones = mesh.collectives.gather_objects((mesh.tp_source, whole), "world")
    return len(set(everyones)) == len({source for source, _ in everyones})


def _shown(found: list[str]) -> str:
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _tensors(values: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(values, Tensor):
        yield name, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _tensors(value, f"{name}[{key!r}]")
    elif isinstance(values, (list, tuple)):
        for at, value in enumerate(values):
            yield from _tensors(value, f"{name}[{at}]")
    elif is_dataclass(values) and not isinstance(values, type):
        for field in fields(values):
            yield from _tensors(getattr(values, field.name), f"{name}.{field.name}")


def _digest(tensor: Tensor, exact: bool) -> Digest:
    shape = tuple(tensor.shape)
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    if exact or not tensor.is_floating_point():
        content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        whole = hashlib.blake2b(content, digest_size=18).digest()
        # 6 bytes at a time, which a float holds exactly
        return Digest(shape, tuple(float(int.from_bytes(whole[at : at + 6], "big")) for at in (0, 6, 12)), 0.0)
    one, two = (torch.linalg.vector_norm(tensor, order, dtype=torch.float64) for order in (1, 2))
    numbers = torch.stack((tensor.sum(dtype=torch.float64), one, two)).tolist()
    return Digest(shape, tuple(numbers), _ROUNDING.get(tensor.dtype, 1e-3))


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, Digest]:
    """A sum of the bits of each tensor, computed where the tensors are and read at once."""
    held = {name: tensor.detach() for name, tensor in tensors.items() if tensor.numel()}
    bits = [t.contiguous().view(-1).view(_BITS.get(t.element_size(), torch.int64)) for t in held.values()]
    sums = torch.stack([b.sum(dtype=torch.int64) for b in bits]).tolist() if bits else []
    # modulo what a float holds exactly
    return {n: Digest(tuple(t.shape), (float(total % 2**52),), 0.0) for (n, t), total in zip(held.items(), sums)}


def _difference(want: "Digest | None", got: "Digest | None") -> str:
    if want is None or got is None:
        return "missing on one"
    if want.shape != got.shape:
        return f"shapes {list(want.shape)} and {list(got.shape)}"
    finite = [all(map(math.isfinite, digest.numbers)) for digest in (want, got)]
    if not all(finite):
        return "not finite on one" if any(finite) else ""
    if not want.tolerance:
        return "" if want.numbers == got.numbers else "different values"
    # a sum may cancel: its difference is measured against the 1-norm
    scales = [max(abs(a), abs(b)) for a, b in zip(want.numbers, got.numbers)]
    scales[0] = scales[1]
    apart = max(abs(a - b) / scale if scale else 0.0 for a, b, scale in zip(want.numbers, got.numbers, scales))
    return f"{apart:.1%} apart" if apart > want.tolerance else ""
