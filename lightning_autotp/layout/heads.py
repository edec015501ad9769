"""Heads of attention: how many there are, and which of them each tensor parallel rank computes. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

from lightning_autotp.layout.layout import Interval, even_widths


def share_heads(queries: int, keys: int, tp_size: int) -> tuple[tuple[Interval, ...], tuple[Interval, ...]]:
    """Which heads each rank computes: intervals of the query heads, and of the key (and value) heads.

    A rank's query heads attend to its own key heads and to no others. With at least as many key heads as ranks, whole
    groups (a key head and its query heads) are shared out, the first ranks taking one more where they do not divide.
    With fewer, neighbouring ranks hold the same key head and share its query heads.

    >>> share_heads(6, 2, 4)
    (((0, 2), (2, 1), (3, 2), (5, 1)), ((0, 1), (0, 1), (1, 1), (1, 1)))

    Raises:
        ValueError: if there are more ranks than query heads.
    """
    group = queries // keys
    if tp_size <= keys:
        whole = even_widths(keys, tp_size)
        return tuple((start * group, length * group) for start, length in whole), whole
    if tp_size > queries:
        raise ValueError(
            f"{queries} query heads cannot be shared by {tp_size} ranks; use a tensor parallel size of at most"
            f" {queries}."
        )
    mine: list[Interval] = []
    held: list[Interval] = []
    for head, (_, ranks) in enumerate(even_widths(tp_size, keys)):
        mine += [(head * group + start, length) for start, length in even_widths(group, ranks)]
        held += [(head, 1)] * ranks
    return tuple(mine), tuple(held)


QUERY_COUNTS = (
    *("num_heads", "num_attention_heads", "num_attn_heads", "num_query_heads"),
    *("n_heads", "n_head", "nheads", "nhead", "heads", "num_attention_heads_per_partition"),
)

KEY_COUNTS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "n_head_kv"),
    *("num_multi_query_groups_per_partition", "multi_query_group_num"),
)
"""Names under which modules and configs keep their numbers of query heads, and of key (and value) heads."""

HEAD_DIMS = (
    *("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv", "qk_head_dim"),
    *("hidden_size_per_attention_head", "kv_channels"),
)
"""Names under which modules and configs keep the size of a head."""


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
        q = first_count(config, QUERY_COUNTS)
        hidden = getattr(config, "hidden_size", None)
        dim = first_count(config, HEAD_DIMS) or (hidden // q if hidden and q else None)
        if not q or not dim:
            return None
        return cls(q, first_count(config, KEY_COUNTS) or q, dim)


def count_of(holder: Any, name: str) -> Optional[int]:
    """A positive whole number that ``holder`` keeps as ``name``, if it does."""
    try:
        value = getattr(holder, name, None)
    except Exception:  # configs refuse to answer where layers differ, each in its own way
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def first_count(holder: Any, names: Iterable[str]) -> Optional[int]:
    return next((value for name in names if (value := count_of(holder, name)) is not None), None)
