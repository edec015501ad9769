"""Head structure of an attention module, read from its attributes and its model's config."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

from torch import nn

QUERY_COUNTS = (
    *("num_heads", "num_attention_heads", "num_attn_heads", "num_query_heads"),
    *("n_heads", "n_head", "nheads", "nhead", "heads"),
)
KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
"""Names under which modules and configs keep their numbers of query heads, and of key (and value) heads."""


@dataclass(frozen=True)
class Heads:
    """``q`` query heads and ``kv`` key (and value) heads of ``dim`` features each; ``q`` is a multiple of ``kv``."""

    q: int
    kv: int
    dim: int

    def size(self, which: str) -> int:
        """The rows of a projection to all ``"q"`` or all ``"kv"`` heads."""
        return {"q": self.q, "kv": self.kv}[which] * self.dim

    @classmethod
    def from_config(cls, config: Any) -> Optional["Heads"]:
        """The heads that a model config speaks of, if it does."""
        q = _first(config, QUERY_COUNTS)
        hidden = getattr(config, "hidden_size", None)
        dim = getattr(config, "head_dim", None) or (hidden // q if hidden and q else None)
        if not q or not dim:
            return None
        return cls(q, _first(config, KEY_COUNTS) or q, dim)

    @classmethod
    def of(cls, module: nn.Module, config: Any, out_features: Iterable[int] = ()) -> Optional["Heads"]:
        """The heads of an attention module; None for a module that keeps neither a head size nor a head count.

        Args:
            module: the module that holds the projections.
            config: the config of the model around it, or None.
            out_features: the widths of its separate projections, from which counts follow if only the head size is
                known.
        """
        dim = getattr(module, "head_dim", None)
        q = _first(module, QUERY_COUNTS)
        if not isinstance(dim, int) and q is None:
            return None
        known = cls.from_config(config) if config is not None else None
        widths = list(out_features)
        if q is None and known is not None:
            q = known.q
        if q is None and widths and all(width % dim == 0 for width in widths):  # type: ignore[operator]
            q = max(widths) // dim  # type: ignore[operator]
        if q is None:
            return None
        if not isinstance(dim, int):
            dim = known.dim if known is not None else (max(widths) // q if widths else None)
        kv = _first(module, KEY_COUNTS) or (known.kv if known is not None else None)
        if kv is None and dim and q * dim in widths:
            kv = min(widths) // dim  # separate (or packed) projections: the narrowest is that of the keys
        kv = kv or q
        if not dim or not kv or q % kv:
            return None
        return cls(q, kv, dim)


def _first(holder: Any, names: Iterable[str]) -> Optional[int]:
    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
