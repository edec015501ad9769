"""Head structure of an attention module, read from its attributes, its projections and its model's config."""

from collections.abc import Iterable, Mapping
from typing import Any, Optional

from torch import nn

from lightning_autotp.layout.heads import HEAD_DIMS, KEY_COUNTS, QUERY_COUNTS, Heads, first_count

GROUP_SIZES = ("num_key_value_groups", "num_kv_groups", "num_queries_per_kv", "n_rep", "kv_groups")
"""Names under which modules keep the number of query heads that attend to one key head."""

QUERY_WIDTHS = (
    *("hidden_size", "embed_dim", "all_head_size", "inner_dim", "split_size", "d_model", "embed_size"),
    *("attention_hidden_size", "proj_dim", "query_dim", "dim", "hidden_size_per_partition"),
)
"""Names under which attention modules keep the width of all query heads, to view their output by."""

_QUERIES = ("q_proj", "query", "q", "wq", "query_proj", "q_lin", "c_q")

_KEYS = ("k_proj", "key", "k", "wk", "key_proj", "k_lin", "c_k")

_VALUES = ("v_proj", "value", "v", "wv", "value_proj", "v_lin", "c_v")
"""Names of projections, which tell what heads they are of where their widths do not."""


def role_of(name: str) -> Optional[str]:
    """``"q"`` or ``"kv"`` for a projection to query heads, or to key or value heads, that is known by its name."""
    return "q" if name in _QUERIES else "kv" if name in _KEYS + _VALUES else None


def heads_of(module: nn.Module, config: Any, out_features: Mapping[str, int]) -> Optional[Heads]:
    """The heads of an attention module; None for a module that keeps neither a head size nor a head count.

    Args:
        module: the module that holds the projections.
        config: the config of the model around it, or None.
        out_features: the widths of its projections that are cut along them, by name.
    """
    dim, q = first_count(module, HEAD_DIMS), first_count(module, QUERY_COUNTS)
    if dim is None and q is None:
        return None
    known = Heads.from_config(config) if config is not None else None
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
    kv = first_count(module, KEY_COUNTS) or (known.kv if known is not None else None)
    if hasattr(module, "kv_lora_rank"):
        kv = q  # latent attention: every head has its own keys
    elif k_width and k_width % dim == 0:
        kv = k_width // dim
    elif kv is None and q * dim in widths:
        kv = min(widths) // dim  # packed projections: the narrowest is that of the keys
    kv = kv or q
    return None if q % kv else Heads(q, kv, dim, first_count(module, ("v_head_dim",)) or dim)


def _named(widths: Mapping[str, int], names: Iterable[str]) -> Optional[int]:
    return next((widths[name] for name in names if name in widths), None)
