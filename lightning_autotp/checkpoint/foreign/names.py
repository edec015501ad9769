"""Names of another's parameters beside this model's."""

from collections.abc import Collection, Sequence
from typing import Optional

MOST = 3
"""Names that a message lists."""


def listed(names: Sequence[str]) -> str:
    """Some names and how many more there are.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def prefix_for(theirs: Collection[str], ours: Collection[str]) -> Optional[str]:
    """What has to stand before ``theirs`` to make them names in ``ours``: where the model sits in this module.

    Returns "" where some are the same already, None where there is no single answer.

    >>> prefix_for(["norm.weight"], ["net.norm.weight", "net.up.weight"])
    'net.'
    """
    known = set(ours)
    if not theirs or any(name in known for name in theirs):
        return ""
    first = next(iter(theirs))
    found = {name[: -len(first)] for name in known if name.endswith(f".{first}")}
    found = {prefix for prefix in found if all(prefix + name in known for name in theirs)}
    return found.pop() if len(found) == 1 else None
