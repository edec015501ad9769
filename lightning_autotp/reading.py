"""What a module's forward pass reads of the module: the names in its code."""

import dis
import inspect
from functools import cache
from itertools import pairwise
from types import CodeType
from typing import Any, Optional

from torch.nn import Module


def reads(module: Any) -> frozenset[str]:
    """Names of attributes that the forward pass of ``module``'s class may read, those of methods it calls included."""
    cls: Any = type(module)
    return _reads(cls)


@cache
def _reads(cls: Any) -> frozenset[str]:
    found: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        # a parent's method of that name may be called by super()
        for code in (_code(vars(parent).get(name)) for parent in cls.__mro__ if parent is not Module):
            new = (_names(code) if code is not None else set()) - found
            found |= new
            waiting += new
    return frozenset(found)


def _code(method: Any) -> Optional[CodeType]:
    return getattr(inspect.unwrap(method), "__code__", None) if inspect.isfunction(method) else None


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def delegates(cls: Any) -> bool:
    """Whether the forward of ``cls`` leaves the weight to its base class: it calls ``super().forward`` and not more.

    Asking the weight for its dtype or device is no use of it.
    """
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    if code is None or "__class__" not in code.co_freevars or "forward" not in code.co_names:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "NOP")]
    uses = [after.argval for step, after in pairwise(steps) if step.argval == "weight"]
    return all(use in ("dtype", "device") for use in uses)
