"""Change a module's class in place."""

from functools import cache
from typing import Any

from torch import nn

from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.introspection.forward_source import delegates
from lightning_autotp.layout.layout import Layout


def become(module: nn.Module, base: type[nn.Module], mesh: Mesh, layout: Layout) -> Any:
    """Change the class of ``module`` to ``base``, or to a subclass of ``base`` and its own class."""
    module.__class__ = _joined_class(base, type(module))  # type: ignore[arg-type]  # classes do hash
    module.mesh, module.layout = mesh, layout  # type: ignore[assignment]
    return module


@cache
def _joined_class(base: Any, own: Any) -> Any:
    if own in base.__mro__:
        return base
    # a forward of its own that only works on what the base class returns (a scaled embedding) stays in front
    bases = (own, base) if delegates(own) else (base, own)
    return type(f"{base.__name__}{own.__name__}", bases, {"__doc__": own.__doc__})
