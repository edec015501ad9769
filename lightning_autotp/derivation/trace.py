"""A run of the unsharded model in which linears hand out atoms, and operators join them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from math import prod
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from lightning_autotp.compat import TorchDispatchMode
from lightning_autotp.derivation.atoms import ENTRY, EVERY, OWN, Atoms, Ids
from lightning_autotp.derivation.canvas import LABELS, Canvas
from lightning_autotp.derivation.labels import FILLED, narrowed
from lightning_autotp.derivation.operators import FILLS, VIEWS, resulting_labels
from lightning_autotp.derivation.stacks import Stack
from lightning_autotp.introspection.layers import features_of, is_conv1d, is_convolution
from lightning_autotp.proof.assumed import assumed_result

MATRIX = "_autotp_matrix"
"""Attribute of what is made of a stack of matrices: the :class:`Stack`."""

MOST_ENTRIES = 1 << 16
"""Entries of a parameter up to which each of them is an atom; of a larger matrix (biases of experts) each column is."""

_PART_OF = "_autotp_part_of"
"""Attribute of what a parameter was moved to: the parameter's name."""

_MOVES = (*VIEWS, "unbind", "index", "index_select", "clone", "_to_copy")

_PRODUCTS = ("mm", "bmm", "_grouped_mm", "grouped_mm_fallback")

_PLAIN = ("FalconLinear",)
"""Classes of linears that compute as nn.Linear does, with a forward of their own."""


class Tracer(TorchDispatchMode):
    """Records which features meet inside :meth:`running`.

    Args:
        model: the model that runs.
        shared: by the path of a linear, or the name of a stack of matrices, the levels of its outputs, where they are
            not all dealt out.
        whole: names of parameters whose entries every rank has.
        direct: names of parameters of linears and embeddings that are known to be read by others than these.
    """

    def __init__(self, model: nn.Module, shared: Mapping[str, Ids], whole: Set[str], direct: Set[str]) -> None:
        super().__init__()
        self.model, self.shared, self.whole = model, shared, whole
        self.direct = set(direct)
        self._guarded = _guarded(model)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self.atoms = Atoms()
        self.columns: dict[str, Ids] = {}
        self.rows: dict[str, Ids] = {}
        self.entries: dict[str, Ids] = {}
        self.dims: dict[str, tuple[int, int]] = {}
        """By the name of a stack of matrices, its dims of outputs and of inputs."""
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.read: dict[str, int] = {}
        """By the name of a parameter, the first operator that did more with it than to move it, by its number."""
        self.summed: dict[str, int] = {}
        """By the path of a linear, or the name of a stack of matrices, the first product that contracted features."""
        self.given_up: dict[str, str] = {}
        """Operators that no rule follows, and one place of each."""
        self.canvas = Canvas(self.atoms)
        self._paused = 0
        self._calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, _ = assumed_result(func, args, kwargs)
        if self._paused:
            return out
        self._calls += 1
        name = func._overloadpacket.__name__
        self._note_reads(name, args, kwargs, out)
        if self._matrices(name, args, out):
            return out
        if name in FILLS:
            setattr(out, FILLED, True)
        self.canvas.view(func, name, args, kwargs, out)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name != "embedding":
            self.direct.update(self._guarded[id(t)] for t in tensors if id(t) in self._guarded)
        known = [found for t in tensors if (found := self.labels(t)) is not None]
        if not known:
            for one in tree_leaves(out):
                if isinstance(one, Tensor) and getattr(one, LABELS, None) is not None:
                    self._written(one, None)
            return out
        made = resulting_labels(self.atoms, func, args, kwargs, out, self.labels, self._calls)
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if made is None:
            if any(self.atoms.has_own(ids) for ids in known):
                self.given_up.setdefault(name, "")
            self.atoms.everywhere(*known)
            made = [None] * len(outs)
        for one, ids in zip(outs, made):
            fits = ids is not None and one.numel() and all(a in (1, b) for a, b in zip(ids.shape, one.shape))
            if ids is not None and not fits:
                self.atoms.everywhere(ids)
            self._written(one, ids if fits and one.ndim == ids.ndim else None)  # type: ignore[union-attr]
        return out

    def _note_reads(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        for t in tree_leaves((args, kwargs)):
            held = self._names.get(id(t)) or getattr(t, _PART_OF, None)
            if held is None:
                continue
            if name not in _MOVES or t is not args[0]:
                self.read.setdefault(held, self._calls)
                continue
            for one in [out] if isinstance(out, Tensor) else out:
                setattr(one, _PART_OF, held)

    def _written(self, tensor: Tensor, ids: Optional[Ids]) -> None:
        setattr(tensor, LABELS, ids)
        self.canvas.write(tensor, ids)

    def labels(self, tensor: Tensor) -> Optional[Ids]:
        """The atoms of a tensor; None if every rank has all of it."""
        ids: Optional[Ids] = getattr(tensor, LABELS, None)
        if ids is None:
            return None
        return None if (self.atoms.find(ids) == EVERY).all() else ids

    # -- stacks of matrices -------------------------------------------------------------------------------------------

    def _matrices(self, name: str, args: Any, out: Any) -> bool:
        """Whether this was a product with an expert's matrix, noted as a linear's is; moves of it are followed."""
        held: Optional[Stack] = getattr(args[0], MATRIX, None) if args and isinstance(args[0], Tensor) else None
        if held is not None:
            for t in [out] if isinstance(out, Tensor) else out:
                setattr(t, MATRIX, held.moved(name, args, t))
            return False
        held = getattr(args[1], MATRIX, None) if name in _PRODUCTS else None
        product = None if held is None else held.product()
        if held is None or product is None:
            return False
        self.dims[held.path] = product.dims
        outputs, inputs = (self.sizes[held.path][dim] for dim in product.dims)
        self.linear(held.path, outputs, inputs, args[0], out, places=(product.inputs, product.outputs))
        return True

    # -- linears ------------------------------------------------------------------------------------------------------

    def linear(
        self,
        path: str,
        outputs: int,
        inputs: int,
        x: Tensor,
        out: Tensor,
        dim: int = -1,
        places: Optional[tuple[Ids, Ids]] = None,
    ) -> None:
        """Note that the linear at ``path`` reads ``inputs`` features along ``dim`` of ``x`` and makes ``outputs``.

        ``places`` says of each entry along ``dim`` which input it is, and which output, if these are not all in order.
        """
        ids = self.labels(x)
        if f"{path}.weight" in self.direct or f"{path}.bias" in self.direct:
            if ids is not None:
                self.atoms.everywhere(ids)
            setattr(out, LABELS, None)
            return
        if ids is not None:
            features = np.array(np.broadcast_to(ids.swapaxes(dim, -1)[(0,) * (x.ndim - 1)], (x.shape[dim],)))
            mixed = ids.size > ids.shape[dim] or ids.shape[dim] == 1
            if not mixed and self.atoms.are_own(features):
                if places is not None:  # one input of several experts is one feature
                    first = np.unique(places[0], return_index=True)[1]
                    self.atoms.join(features, features[first][places[0]])
                    features = features[first]
                self._contracted(path, features, out)
                return
            self.atoms.everywhere(ids)
        if path in self.rows:
            self.atoms.everywhere(self.rows[path])
            setattr(out, LABELS, None)
            return
        if path not in self.columns:
            levels = self.shared.get(path)
            self.columns[path] = self.atoms.fresh(np.full(outputs, OWN) if levels is None else levels)
        shape = [1] * out.ndim
        made = self.columns[path] if places is None else self.columns[path][places[1]]
        shape[dim] = len(made)
        setattr(out, LABELS, narrowed(made.reshape(shape)))

    def _contracted(self, path: str, features: Ids, out: Tensor) -> None:
        self.summed.setdefault(path, self._calls)
        setattr(out, LABELS, None)
        if path in self.columns:  # it has read replicated features, too
            self.atoms.everywhere(features, self.columns[path])
        elif path in self.rows:
            self.atoms.join(self.rows[path], features)
        else:
            self.rows[path] = features

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, linears and parameters have atoms."""
        changed: list[nn.Module] = []
        of_linears = {id(m.weight) for m in self.model.modules() if is_plain(m)}
        of_linears |= {id(m.bias) for m in self.model.modules() if is_plain(m) and m.bias is not None}
        for path, module in self.model.named_modules():
            if is_plain(module):
                module.forward = self._forward(path, module)
                changed.append(module)
        parameters = [(n, p) for n, p in self.model.named_parameters() if id(p) not in of_linears]
        for name, parameter in parameters:
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                setattr(parameter, MATRIX, Stack.of(name, parameter))
                self.sizes[name] = tuple(parameter.shape)
            shape = _apart(tuple(parameter.shape))
            if shape is not None and name not in self.whole:
                self.entries[name] = self.atoms.fresh(np.full(prod(shape), ENTRY)).reshape(shape)
                setattr(parameter, LABELS, self.entries[name])
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), self:
                yield
        finally:
            for module in changed:
                del module.forward
            for _, parameter in parameters:
                for attribute in (LABELS, MATRIX):
                    if hasattr(parameter, attribute):
                        delattr(parameter, attribute)

    def _forward(self, path: str, module: nn.Module) -> Callable[..., Tensor]:
        own, (outputs, inputs) = module.forward, sizes_of(module) or (0, 0)
        dim = 1 - module.get_parameter("weight").ndim if is_convolution(module) else -1

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._paused += 1
            try:
                out: Tensor = own(x, *args, **kwargs)
            finally:
                self._paused -= 1
            self.linear(path, outputs, inputs, x, out, dim)
            return out

        return forward


def _apart(shape: tuple[int, ...]) -> Optional[tuple[int, ...]]:
    """The shape of a parameter's atoms, with 1 for a dim along which there is one; None if there are too many."""
    if prod(shape) <= MOST_ENTRIES:
        return shape
    return (1, shape[1]) if len(shape) == 2 and shape[1] <= MOST_ENTRIES else None


def _guarded(model: nn.Module) -> dict[int, str]:
    """Parameters that a sharded layer has its own way with, so that nobody else may read them."""
    layers = (path for path, module in model.named_modules() if is_plain(module) or isinstance(module, nn.Embedding))
    of = {f"{path}.{name}" for path in layers for name in ("weight", "bias")}
    return {id(p): name for name, p in model.named_parameters() if name in of}


def is_plain(module: Any) -> bool:
    """Whether this is a linear that computes as nn.Linear does, or a convolution that computes as torch's do."""
    if "forward" in vars(module) or hasattr(module, "parametrizations"):
        return False
    own = type(module).forward is nn.Linear.forward or type(module).__name__ in _PLAIN
    return is_conv1d(module) or is_convolution(module) or isinstance(module, nn.Linear) and own


def sizes_of(module: nn.Module) -> Optional[tuple[int, int]]:
    """(out, in) features of a linear, or channels of a convolution; None for anything else."""
    if is_convolution(module):
        return module.out_channels, module.in_channels  # type: ignore[return-value]
    return features_of(module)
