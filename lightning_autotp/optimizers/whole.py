"""Steps of an optimizer that looks at whole tensors: on the ranks that own them, by the user's own object.

Around each step the parameters that a rank owns hold the whole tensor and its whole gradient, and those that others own
are not in its param groups. So state is where the owner is, under the parameter that schedulers and users know.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from types import MethodType
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout
from lightning_autotp.optimizers.owners import Owned, from_owners, owners_of, to_owners
from lightning_autotp.optimizers.trial import Sees, Verdict
from lightning_autotp.optimizers.twin import WHOLE, family, parameter_lists, per_parameter


def whole_steps(optimizer: Any) -> "Optional[WholeSteps]":
    """What makes the steps of ``optimizer`` those of whole tensors, None where it steps parts."""
    return vars(getattr(optimizer, "_optimizer", optimizer)).get(WHOLE)


class WholeSteps:
    """Steps ``optimizer`` on whole tensors; every tensor parallel rank must call the same methods of it.

    Args:
        optimizer: it stays the same object; its ``step``, and other methods that change parameters, are wrapped.
        layouts: how the model's parameters lie.
        mesh: this process's place.
        complete: makes the gradients those of the unsharded model, if they are not yet.
        look: what to do when its param groups are no longer those that it had; it calls :meth:`own`.
    """

    def __init__(
        self,
        optimizer: Any,
        layouts: Mapping[nn.Parameter, Layout],
        mesh: Mesh,
        complete: Callable[[], None],
        look: Callable[[], None],
    ) -> None:
        self.optimizer, self.layouts, self.mesh = optimizer, layouts, mesh
        self.owned: dict[nn.Parameter, Owned] = {}
        self._complete, self._look = complete, look
        self._load = [0] * mesh.tp_size
        self.verdict = Verdict()
        self._groups: Any = None
        self._local: dict[nn.Parameter, tuple[Tensor, Optional[Tensor], Optional[Tensor], int]] = {}
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._wrapped: set[str] = set()
        self._held = False
        setattr(optimizer, WHOLE, self)
        self._wrap("step")

    def own(self, verdict: Verdict) -> None:
        """Give owners to the parameters that must be whole; state that is there already goes to them."""
        self.verdict = verdict
        self._groups = self._key()
        new = [
            p
            for group, sees in zip(self.optimizer.param_groups, verdict.sees)
            for p in group["params"]
            if sees and not self.layouts[p].is_replicated and p not in self.owned
        ]
        everything = Sees.EVERYTHING in verdict.sees
        if everything and any(owned.owner is not None for owned in self.owned.values()):
            raise ValueError(
                f"{type(self.optimizer).__name__} has stepped single tensors, and with its new param groups looks at"
                " all at once: give it all its param groups in `configure_optimizers`."
            )
        layouts = [self.layouts[p] for p in new]
        owners = [None] * len(new) if everything else owners_of(layouts, self.mesh.tp_size, self._load)
        fresh = {p: Owned(layout, owner) for p, layout, owner in zip(new, layouts, owners)}
        for member in family(self.optimizer):
            for p, owned in fresh.items():
                if member.state.get(p):
                    state = self.own_state(owned, member.state[p], partial(_shaped_like, p))
                    if state is None:
                        del member.state[p]
                    else:
                        member.state[p] = state
        self.owned |= fresh
        for name in verdict.methods if self.owned else ():
            self._wrap(name)

    def own_state(
        self, owned: Owned, state: Mapping[str, Any], is_part: Callable[[Tensor], bool]
    ) -> Optional[dict[str, Any]]:
        """A parameter's state with whole tensors where it is owned, None elsewhere.

        Args:
            owned: where the parameter lies.
            state: its state with this rank's parts.
            is_part: whether a tensor in it is this rank's part of one like the parameter.
        """
        device = next(iter(self.layouts)).device
        names = [e for e, value in state.items() if isinstance(value, Tensor) and value.ndim and is_part(value)]
        found = to_owners([state[name].to(device) for name in names], [owned] * len(names), self.mesh)
        return {**state, **dict(zip(names, found))} if owned.is_here(self.mesh) else None

    @property
    def is_held(self) -> bool:
        """Whether parameters are whole just now, in the middle of a step."""
        return self._held

    # -- a step -------------------------------------------------------------------------------------------------------

    def _wrap(self, name: str) -> None:
        if name in self._wrapped:
            return
        self._wrapped.add(name)
        inner = getattr(self.optimizer, name)

        # schedulers take the function out of a bound method, and wrap it again
        @wraps(getattr(inner, "__func__", inner))
        def around(_: Any, *args: Any, **kwargs: Any) -> Any:
            return self._around(inner, *args, **kwargs)

        setattr(self.optimizer, name, MethodType(around, self.optimizer))

    def _around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._held:  # one that is wrapped calls another
            return inner(*args, **kwargs)
        if self._groups != self._key():  # a callback has added parameters, or put other groups there
            self._look()
        if not self.owned:
            return inner(*args, **kwargs)
        closure = kwargs.get("closure", args[0] if args and callable(args[0]) else None)
        if closure is not None:
            again = self._between(closure)
            if "closure" in kwargs:
                kwargs["closure"] = again
            else:
                args = (again, *args[1:])
        with self._whole(later=closure is not None and self.verdict.closure_first):
            return inner(*args, **kwargs)

    def _between(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure``, which computes gradients of the parts, for a step that goes on with whole ones."""

        def again() -> Any:
            if self._held:
                self._put_back()
            with torch.enable_grad():
                loss = closure()
            if isinstance(loss, Tensor) and not self.verdict.closure_first:
                # what the step does next may hang on it, and must be the same on all ranks
                loss = self.mesh.collectives.broadcast(loss.detach().clone().contiguous(), "tp")
            self._take()
            return loss

        return again

    @contextmanager
    def _whole(self, *, later: bool) -> Iterator[None]:
        error = None
        try:
            if not later:
                self._take()
            yield
        except Exception as raised:
            error = raised
        if not self._held and error is not None:  # in the closure, where each rank raises as ever
            raise error
        failed = torch.tensor(int(error is not None), device=next(iter(self.layouts)).device)
        failed = self.mesh.collectives.all_reduce(failed, op="max")
        if error is not None or failed:
            self._put_back(send=False)
            raise error or RuntimeError(f"the step of {type(self.optimizer).__name__} failed on another rank.")
        self._put_back()

    @torch.no_grad()
    def _take(self) -> None:
        self._complete()
        held = [p for group in self.optimizer.param_groups for p in group["params"] if p in self.owned]
        owned = [self.owned[p] for p in held]
        device = next(iter(self.layouts)).device
        flags = torch.tensor([int(p.grad is not None) for p in held], device=device)
        has = self.mesh.collectives.all_reduce(flags, op="max").tolist() if held else []
        with_grad = [p for p, there in zip(held, has) if there]
        grads = [torch.zeros_like(p) if p.grad is None else _dense(p.grad) for p in with_grad]
        weights = to_owners([p.detach() for p in held], owned, self.mesh)
        found = dict(zip(with_grad, to_owners(grads, [self.owned[p] for p in with_grad], self.mesh)))
        self._lists = []
        for _, group in parameter_lists(self.optimizer):
            here = [p not in self.owned or self.owned[p].is_here(self.mesh) for p in group["params"]]
            for values in (group[key] for key in per_parameter(group)):
                self._lists.append((values, list(values)))
                values[:] = [value for value, mine in zip(values, here) if mine]
        for p, weight in zip(held, weights):
            grad = found.get(p)
            self._local[p] = (p.data, p.grad, grad, 0 if grad is None else grad._version)
            if weight is not None:
                p.grad = None
                p.data = weight
                p.grad = grad
        self._held = True

    @torch.no_grad()
    def _put_back(self, *, send: bool = True) -> None:
        for values, before in self._lists:
            values[:] = before
        whole: list[Optional[Tensor]] = []
        for p, (local, grad, full, version) in self._local.items():
            owned = self.owned[p]
            whole.append(p.detach() if owned.is_here(self.mesh) else None)
            if owned.is_here(self.mesh):
                after = p.grad
                p.grad = None
                p.data = local
                if owned.owner is not None or after is not None:
                    p.grad = grad
                in_place = full is not None and after is full and full._version != version
                if owned.owner is None and grad is not None and full is not None and in_place:
                    grad.copy_(owned.layout.shard(full, self.mesh.tp_rank))  # zeroed by the step, as SAM does
        parts = list(self._local)
        self._local, self._held = {}, False
        if send:
            from_owners(whole, parts, [self.owned[p] for p in parts], self.mesh)

    def _key(self) -> Any:
        return [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]


def _shaped_like(parameter: Tensor, value: Tensor) -> bool:
    return value.shape == parameter.shape


def _dense(grad: Tensor) -> Tensor:
    return grad.detach() if grad.layout is torch.strided else grad.detach().to_dense()
