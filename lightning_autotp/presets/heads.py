"""Head structure of an attention module, read from its attributes, its projections and its model's config."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

from torch import nn

QUERY_COUNTS = (
    *("num_heads", "num_attention_heads", "num_attn_heads", "num_query_heads"),
    *("n_heads", "n_head", "nheads", "nhead", "heads", "num_attention_heads_per_partition"),
)
KEY_COUNTS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "n_head_kv"),
    *("num_multi_query_groups_per_partition", "multi_query_group_num"),
)
"""Names under which modules and configs keep their numbers of query heads, and of key (and value) heads."""

GROUP_SIZES = ("num_key_value_groups", "num_kv_groups", "num_queries_per_kv", "n_rep", "kv_groups")
"""Names under which modules keep the number of query heads that attend to one key head."""

QUERY_WIDTHS = (
    *("hidden_size", "embed_dim", "all_head_size", "inner_dim", "split_size", "d_model", "embed_size"),
    *("attention_hidden_size", "proj_dim", "query_dim", "dim", "hidden_size_per_partition"),
)
"""Names under which attention modules keep the width of all query heads, to view their output by."""

HEAD_DIMS = (
    *("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv", "qk_head_dim"),
    *("hidden_size_per_attention_head", "kv_channels"),
)
"""Names under which modules and configs keep the size of a head."""

_QUERIES = ("q_proj", "query", "q", "wq", "query_proj", "q_lin", "c_q")
_KEYS = ("k_proj", "key", "k", "wk", "key_proj", "k_lin", "c_k")
_VALUES = ("v_proj", "value", "v", "wv", "value_proj", "v_lin", "c_v")
"""Names of projections, which tell what heads they are of where their widths do not."""


def role_of(name: str) -> Optional[str]:
    """``"q"`` or ``"kv"`` for a projection to query heads, or to key or value heads, that is known by its name."""
    return "q" if name in _QUERIES else "kv" if name in _KEYS + _VALUES else None


@dataclass(frozen=True)
class Heads:
    """``q`` query heads and ``kv`` key (and value) heads; ``q`` is a multiple of ``kv``.

    ``dim`` is the size of a query or key head, ``v_dim`` that of a value head.
    """

    q: int
    kv: int
    dim: int
    v_dim: int = 0

    def size(self, which: str) -> int:
        """The rows of a projection to all ``"q"`` or all ``"kv"`` heads."""
        return {"q": self.q, "kv": self.kv}[which] * self.dim

    @classmethod
    def from_config(cls, config: Any) -> Optional["Heads"]:
        """The heads that a model config speaks of, if it does."""
        q = _first(config, QUERY_COUNTS)
        hidden = getattr(config, "hidden_size", None)
        dim = _first(config, HEAD_DIMS) or (hidden // q if hidden and q else None)
        if not q or not dim:
            return None
        return cls(q, _first(config, KEY_COUNTS) or q, dim)

    @classmethod
    def of(cls, module: nn.Module, config: Any, out_features: Mapping[str, int]) -> Optional["Heads"]:
        """The heads of an attention module; None for a module that keeps neither a head size nor a head count.

        Args:
            module: the module that holds the projections.
            config: the config of the model around it, or None.
            out_features: the widths of its projections that are cut along them, by name.
        """
        dim, q = _first(module, HEAD_DIMS), _first(module, QUERY_COUNTS)
        if dim is None and q is None:
            return None
        known = cls.from_config(config) if config is not None else None
        widths = list(out_features.values())
        q = q or (known.q if known is not None else None)
        if q is None and widths and dim and all(width % dim == 0 for width in widths):
            q = max(widths) // dim
        if q is None:
            return None
        if dim is None:
            dim = known.dim if known is not None else (max(widths) // q if widths else None)
        if not dim:
            return None
        q_width, k_width = _named(out_features, _QUERIES), _named(out_features, _KEYS)
        if q_width and k_width and q_width % (q * dim) and not q_width % dim:
            q = q_width // dim  # this layer has other counts than the config
        kv = _first(module, KEY_COUNTS) or (known.kv if known is not None else None)
        if hasattr(module, "kv_lora_rank"):
            kv = q  # latent attention: every head has its own keys
        elif k_width and k_width % dim == 0:
            kv = k_width // dim
        elif kv is None and q * dim in widths:
            kv = min(widths) // dim  # packed projections: the narrowest is that of the keys
        kv = kv or q
        return None if q % kv else cls(q, kv, dim, _first(module, ("v_head_dim",)) or dim)


def _named(widths: Mapping[str, int], names: Iterable[str]) -> Optional[int]:
    return next((widths[name] for name in names if name in widths), None)


def count_of(holder: Any, name: str) -> Optional[int]:
    """A positive whole number that ``holder`` keeps as ``name``, if it does."""
    try:
        value = getattr(holder, name, None)
    except Exception:  # configs refuse to answer where layers differ, each in its own way
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _first(holder: Any, names: Iterable[str]) -> Optional[int]:
    return next((value for name in names if (value := count_of(holder, name)) is not None), None)
