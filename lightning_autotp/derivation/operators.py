"""What operators ask of atoms: which must be on one rank, and which a result consists of.

Labels are arrays of atoms with as many dims as their tensor, of size 1 where it does not depend on a dim. A tensor
without labels is the same on all ranks. Where an operator is not known, what it reads must be on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_autotp.dataflow.event import bound
from lightning_autotp.derivation.atoms import Atoms, Ids
from lightning_autotp.derivation.labels import alike, narrowed, viewed
from lightning_autotp.derivation.norms import NORMS
from lightning_autotp.derivation.writes import WRITES

Labelled = tuple[Optional[Ids], Tensor]

POINTWISE = {
    *("where", "masked_fill", "lerp", "addcmul", "addcdiv", "native_dropout", "_to_copy", "clone", "detach", "alias"),
    *("rsub", "pow", "clamp", "gelu", "silu", "leaky_relu", "softplus", "dropout", "bernoulli", "contiguous", "lift"),
    *("polar", "view_as_complex_copy", "isneginf", "ne", "bitwise_not", "fill", "zero", "copy", "masked_fill_"),
}
"""Operators that work entry by entry, besides those that torch tags so."""

_RESHAPES = ("view", "_unsafe_view", "_reshape_alias", "reshape", "squeeze", "unsqueeze", "flatten")

_OVER_DIMS = (
    *("sum", "mean", "amax", "amin", "prod", "var", "std", "var_mean", "linalg_vector_norm", "norm", "logsumexp"),
    *("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "topk", "sort", "max", "min", "argmax", "any"),
    *("argmin", "all", "softmax", "log_softmax", "flip", "roll", "kthvalue", "median"),
)
"""Operators that mix what lies along some dims."""

_BY_CHANNEL = (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "max_pool2d_with_indices"),
)
"""Operators that mix what lies along all dims but those of rows and channels."""

_PICKS = ("slice", "select", "split", "split_with_sizes", "unbind", "chunk", "narrow")

FILLS = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
"""Operators whose results are one number."""

MORE = {**NORMS, **WRITES}

VIEWS = (*_RESHAPES, "slice", "select", "narrow", "transpose", "t", "permute", "expand", "alias", "detach")
"""Operators that give one view of a tensor."""


def resulting_labels(
    atoms: Atoms, func: Any, args: Any, kwargs: Any, out: Any, labels: Any, sign: int
) -> Optional[list[Optional[Ids]]]:
    """The labels of what an operator gave, output by output; None where it is not known, or nothing is left to label.

    Args:
        atoms: the atoms, which are joined.
        func: the operator.
        args: its arguments.
        kwargs: its named arguments.
        out: what it gave.
        labels: a function of a tensor: its labels, or None.
        sign: tells this call from others.
    """
    name = func._overloadpacket.__name__
    rule = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]  # a number that is read gives none
    if not outs:
        return None
    given = bound(func, args, kwargs)
    call = _Call(atoms, rule, given, outs, labels, sign)
    if torch.Tag.pointwise in func.tags or rule in POINTWISE:
        return call.same_for_all(call.pointwise())
    if rule in _RESHAPES:
        return [call.viewed()]
    if rule in _OVER_DIMS:
        return call.mixed()
    if rule in _PICKS:
        return call.picked()
    if rule in _BY_CHANNEL:
        return call.by_channel()
    if rule in FILLS:
        return call.same_for_all(call.labels(call.x) if rule.endswith("_like") else None)
    if rule in MORE:
        return MORE[rule](call)
    method = getattr(call, f"do_{rule.strip('_')}", None)
    return method() if method is not None else None


class _Call:
    """One call of an operator."""

    def __init__(
        self, atoms: Atoms, name: str, given: dict[str, Any], outs: Sequence[Tensor], labels: Any, sign: int
    ) -> None:
        self.atoms, self.name, self.given, self.outs, self.labels, self.sign = atoms, name, given, outs, labels, sign

    @property
    def x(self) -> Tensor:
        found = self.given.get("self", self.given.get("input"))
        assert isinstance(found, Tensor)
        return found

    def same_for_all(self, ids: Optional[Ids]) -> list[Optional[Ids]]:
        return [ids] * len(self.outs)

    def dim(self, name: str = "dim", default: int = 0) -> int:
        return int(self.given.get(name, default)) % max(self.x.ndim, 1)

    # -- entry by entry -----------------------------------------------------------------------------------------------

    def pointwise(self) -> Optional[Ids]:
        """Atoms that meet; where an operand without labels differs along a dim, all along it are on one rank."""
        tensors = [value for value in self.given.values() if isinstance(value, Tensor)]
        if self.name == "copy":
            tensors = [self.given["src"]]
        return self.met([(self.labels(t), t) for t in tensors], tuple(self.outs[0].shape))

    def met(self, operands: Sequence[Labelled], shape: tuple[int, ...]) -> Optional[Ids]:
        n, out = len(shape), None
        for ids, _ in operands:
            if ids is not None:
                ids = ids.reshape((1,) * (n - ids.ndim) + ids.shape)
                out = np.array(ids) if out is None else narrowed(self.atoms.meet(out, ids))
        if out is None:
            return None
        for ids, t in operands:
            for d in range(n):
                at = d - n + t.ndim
                differs = at >= 0 and out.shape[d] > 1 and not alike(t, at)
                if differs and (ids is None or ids.shape[d - n + ids.ndim] == 1):
                    out = self.atoms.along(out, d)
        return out

    # -- moves --------------------------------------------------------------------------------------------------------

    def viewed(self) -> Optional[Ids]:
        ids = self.labels(self.x)
        return None if ids is None else narrowed(viewed(ids, tuple(self.x.shape), tuple(self.outs[0].shape)))

    def do_transpose(self) -> list[Optional[Ids]]:
        order = list(range(self.x.ndim))
        a, b = self.dim("dim0"), self.dim("dim1")
        order[a], order[b] = b, a
        return [self.labels(self.x).transpose(order)]

    def do_t(self) -> list[Optional[Ids]]:
        return [self.labels(self.x).transpose()]

    def do_permute(self) -> list[Optional[Ids]]:
        return [self.labels(self.x).transpose([d % self.x.ndim for d in self.given["dims"]])]

    def do_expand(self) -> list[Optional[Ids]]:
        ids = self.labels(self.x)
        return [ids.reshape((1,) * (self.outs[0].ndim - ids.ndim) + ids.shape)]

    def do_view_as_complex(self) -> list[Optional[Ids]]:
        ids = self.labels(self.x)
        return [np.take(self.atoms.along(ids, ids.ndim - 1), 0, ids.ndim - 1)]

    def do_view_as_real(self) -> list[Optional[Ids]]:
        return [self.labels(self.x)[..., None]]

    def do_repeat(self) -> list[Optional[Ids]]:
        ids, times = self.labels(self.x), self.given["repeats"]
        ids = ids.reshape((1,) * (len(times) - ids.ndim) + ids.shape)
        return [np.tile(ids, [n if size > 1 else 1 for n, size in zip(times, ids.shape)])]

    def picked(self) -> list[Optional[Ids]]:
        """Labels of slices; atoms that are taken apart are noted as such."""
        ids, d = self.labels(self.x), self.dim()
        if ids.shape[d] == 1:
            gone = self.name in ("select", "unbind")
            return self.same_for_all(np.take(ids, 0, d) if gone else ids)
        if self.name == "slice":
            picks: list[Any] = [slice(*(self.given[key] for key in ("start", "end", "step")))]
        elif self.name == "select":
            picks = [self.given["index"]]
        elif self.name == "unbind":
            picks = list(range(len(self.outs)))
        elif self.name == "narrow":
            picks = [slice(self.given["start"], self.given["start"] + self.given["length"])]
        else:
            ends = np.cumsum([t.shape[d] for t in self.outs])
            picks = [slice(int(end) - t.shape[d], int(end)) for t, end in zip(self.outs, ends)]
        found = [ids[(slice(None),) * d + (pick,)] for pick in picks]
        for at, (pick, one) in enumerate(zip(picks, found)):
            if one.size < ids.size:
                self.atoms.mark(one, hash((self.sign if len(picks) > 1 else str(pick), at)))
        return [narrowed(one) for one in found]

    def do_glu(self) -> list[Optional[Ids]]:
        """One half times a function of the other."""
        ids, d = self.labels(self.x), self.dim(default=-1)
        if ids.shape[d] == 1:
            return [ids]
        halves = np.split(ids, 2, d)
        for at, half in enumerate(halves):
            self.atoms.mark(half, hash((self.sign, at)))
        return [narrowed(self.atoms.meet(*halves))]

    def do_cat(self) -> list[Optional[Ids]]:
        tensors = [t for t in self.given["tensors"] if t.numel()]
        out = self.outs[0]
        d = int(self.given.get("dim", 0)) % out.ndim
        known = [self.labels(t) for t in tensors]
        if any(ids is None for ids in known):
            # what has no labels is the same everywhere: no rank can have a part of this dim
            rest = (*out.shape[:d], 1, *out.shape[d + 1 :])
            met: list[Labelled] = [
                (self.atoms.along(ids, d), t.narrow(d, 0, 1)) for ids, t in zip(known, tensors) if ids is not None
            ]
            met += [(None, t.narrow(d, 0, 1)) for ids, t in zip(known, tensors) if ids is None]
            return [self.met(met, rest)]
        shape = np.broadcast_shapes(*(np.take(ids, [0], d).shape for ids in known))
        wide = [np.broadcast_to(ids, (*shape[:d], t.shape[d], *shape[d + 1 :])) for ids, t in zip(known, tensors)]
        return [narrowed(np.concatenate(wide, d))]

    def do_stack(self) -> list[Optional[Ids]]:
        known = [self.labels(t) for t in self.given["tensors"]]
        if any(ids is None for ids in known):
            self.atoms.everywhere(*(ids for ids in known if ids is not None))
            return [None]
        d = int(self.given.get("dim", 0)) % self.outs[0].ndim
        return [narrowed(np.stack(np.broadcast_arrays(*known), d))]

    # -- dims that are mixed ------------------------------------------------------------------------------------------

    def mixed(self) -> Optional[list[Optional[Ids]]]:
        ids, x = self.labels(self.x), self.x
        over = self.given.get("dim", self.given.get("dims"))
        if over is None and self.name in ("topk", "sort"):
            over = -1
        dims = range(x.ndim) if over is None or over == [] else [over] if isinstance(over, int) else over
        for d in sorted((int(d) % x.ndim for d in dims), reverse=True):
            ids = self.atoms.along(ids, d)
            if self.outs[0].ndim < x.ndim:
                ids = np.take(ids, 0, d)
        return self.same_for_all(ids if ids.ndim == self.outs[0].ndim else None)

    def by_channel(self) -> list[Optional[Ids]]:
        ids = self.labels(self.x)
        for d in range(2, self.x.ndim):
            ids = self.atoms.along(ids, d)
        return self.same_for_all(ids)

    def do_tril(self) -> Optional[list[Optional[Ids]]]:
        ids = self.labels(self.x)
        return [ids] if ids.shape[-1] == ids.shape[-2] == 1 else None

    do_triu = do_tril

    def do_constant_pad_nd(self) -> Optional[list[Optional[Ids]]]:
        ids = self.labels(self.x)
        grown = [d for d in range(self.x.ndim) if self.outs[0].shape[d] != self.x.shape[d]]
        return [ids] if all(ids.shape[d] == 1 for d in grown) else None

    # -- lookups ------------------------------------------------------------------------------------------------------

    def do_embedding(self) -> Optional[list[Optional[Ids]]]:
        ids = self.labels(self.given["weight"])
        if ids is None or self.labels(self.given["indices"]) is not None:
            return None
        row = self.atoms.along(ids, 0)[0]
        return [row.reshape((1,) * (self.outs[0].ndim - 1) + row.shape)]

    def do_index(self) -> Optional[list[Optional[Ids]]]:
        """Indexed dims are mixed; others stay."""
        ids, indices = self.labels(self.x), self.given["indices"]
        if ids is None or any(self.labels(i) is not None for i in indices if isinstance(i, Tensor)):
            return None
        at = [d for d, index in enumerate(indices) if index is not None]
        if not at or at != list(range(at[0], at[-1] + 1)):
            return None
        if any(indices[d].dtype == torch.bool for d in at):
            return None if any(ids.shape[d] > 1 for d in at) else [self._replaced(ids, at, self.outs[0].ndim)]
        for d in at:
            ids = self.atoms.along(ids, d)
        return [self._replaced(ids, at, self.outs[0].ndim)]

    def _replaced(self, ids: Ids, at: Sequence[int], ndim: int) -> Ids:
        """Labels with the dims ``at``, of size 1, replaced by as many as the result has."""
        before, after = ids.shape[: at[0]], ids.shape[at[0] :][len(at) :]
        more = ndim - len(before) - len(after)
        total = prod(ids.shape[d] for d in at)
        assert total == 1 or len(at) == 1
        return ids.reshape((*before, *(1,) * more, *after)) if total == 1 else ids

    def do_index_select(self) -> Optional[list[Optional[Ids]]]:
        ids = self.labels(self.x)
        return None if ids is None else [self.atoms.along(ids, self.dim())]

    def do_gather(self) -> Optional[list[Optional[Ids]]]:
        ids, index = self.labels(self.x), self.given["index"]
        if ids is None or self.labels(index) is not None:
            return None
        return [self.met([(self.atoms.along(ids, self.dim()), self.outs[0]), (None, index)], tuple(index.shape))]

    # -- convolutions -------------------------------------------------------------------------------------------------

    def do_convolution(self) -> Optional[list[Optional[Ids]]]:
        """Channels of a group meet each other and the weights of its outputs; what lies along other dims is mixed."""
        x, weight, bias = self.given["input"], self.given["weight"], self.given["bias"]
        ids, groups_ = self.labels(x), self.given["groups"]
        if ids is None or self.given["transposed"]:
            return None
        for d in range(2, x.ndim):
            ids = self.atoms.along(ids, d)
        batch, outputs = ids.shape[0], weight.shape[0]
        ids = np.broadcast_to(ids, (batch, x.shape[1], *ids.shape[2:])).reshape(batch, groups_, -1)
        made = np.repeat(self.atoms.along(ids, 2)[..., 0], outputs // groups_, axis=1)
        kernel = self.labels(weight)
        if kernel is not None:
            for d in range(1, weight.ndim):
                kernel = self.atoms.along(kernel, d)
            made = self.atoms.meet(made, kernel.reshape(1, -1))
        if bias is not None and self.labels(bias) is not None:
            made = self.atoms.meet(made, self.labels(bias)[None])
        return [narrowed(made.reshape(*made.shape, *(1,) * (x.ndim - 2)))]

    # -- products -----------------------------------------------------------------------------------------------------

    def do_mm(self) -> list[Optional[Ids]]:
        return [self.product(self.given["self"], self.given["mat2"])]

    do_bmm = do_mm

    def do_addmm(self) -> list[Optional[Ids]]:
        out = self.outs[0]
        names = ("mat1", "mat2") if "mat1" in self.given else ("batch1", "batch2")
        made = self.product(*(self.given[name] for name in names))
        return [self.met([(made, out), (self.labels(self.x), self.x)], tuple(out.shape))]

    do_baddbmm = do_addmm

    def product(self, a: Tensor, b: Tensor) -> Optional[Ids]:
        """[.., i, k] x [.., k, j]: what is contracted is on one rank, what is not meets."""
        out = self.outs[0]
        n = out.ndim
        lead = list(range(n - 2))  # then i, k, j

        def placed(t: Tensor, dims: list[int]) -> Optional[Ids]:
            ids = self.labels(t)
            if ids is None:
                return None
            sizes = dict(zip(dims, ids.shape))
            return self.atoms.along(ids.reshape([sizes.get(d, 1) for d in range(n + 1)]), n - 1)

        left, right = placed(a, [*lead, n - 2, n - 1]), placed(b, [*lead, n - 1, n])
        if left is not None and right is not None:
            ids = narrowed(self.atoms.meet(left, right))
        else:
            found = left if left is not None else right
            if found is None:
                return None
            ids, other = found, b if left is not None else a
            for d in lead:
                if ids.shape[d] > 1 and not alike(other, d):
                    ids = self.atoms.along(ids, d)
        return np.take(ids, 0, n - 1)
