"""Whether two runs of an optimizer have come to the same, bit for bit, one of them on parts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_autotp.optimizers.samples import Sample


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, in shape and dtype, too; what is no number equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def same_parts(full: Tensor, parts: Sequence[Tensor], sample: Sample) -> bool:
    """Whether ``parts`` are what the ranks hold of ``full``."""
    return all(same(want, got.detach()) for want, got in zip(sample.cut(full.detach()), parts))


def same_state(full: Any, parts: Sequence[Any], sample: Sample) -> bool:
    """Whether the state of a parameter is elementwise: shaped like it, or of single values that all ranks have alike.

    State of another shape belongs to whole rows, blocks or tensors, whatever the first steps made of it.
    """
    if isinstance(full, Tensor):
        if not all(isinstance(part, Tensor) for part in parts):
            return False
        if full.numel() == 1 and all(part.numel() == 1 for part in parts):
            return all(same(full.detach(), part.detach()) for part in parts)
        plain = type(full) in (Tensor, torch.nn.Parameter)  # a subclass may hold blocks
        return plain and full.shape == sample.value.shape and same_parts(full, parts, sample)
    if isinstance(full, Mapping):
        if not all(isinstance(part, Mapping) and part.keys() == full.keys() for part in parts):
            return False
        return all(same_state(value, [part[key] for part in parts], sample) for key, value in full.items())
    if isinstance(full, (list, tuple)):
        if not all(isinstance(part, type(full)) and len(part) == len(full) for part in parts):
            return False
        return all(same_state(value, [part[at] for part in parts], sample) for at, value in enumerate(full))
    return all(same_value(full, part) for part in parts)


def same_value(a: Any, b: Any) -> bool:
    """Whether two values are equal, as far as they are numbers, text, tensors or containers of them."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        if type(a) not in (Tensor, torch.nn.Parameter):
            return type(a) is type(b) and a.shape == b.shape
        return same(a.detach(), b.detach())
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same_value(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, (bool, int, float, complex, str, bytes, type(None))):
        return type(a) is type(b) and (a == b or a != a)
    return True


def same_options(full: Mapping[str, Any], other: Mapping[str, Any], but: Sequence[str]) -> bool:
    """Whether a param group's options are equal, what is there for each parameter (``but``) left out."""
    ours = {key: value for key, value in full.items() if key not in but}
    return same_value(ours, {key: value for key, value in other.items() if key not in but})
