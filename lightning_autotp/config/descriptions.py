"""The fields of a pydantic model in words, as they stand at the fields: for docstrings and, through them, options."""

import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Optional

from pydantic import BaseModel

_WIDTH = 120


def describe(model: type[BaseModel], names: Optional[Iterable[str]] = None) -> str:
    """An entry of a docstring's ``Args:`` for each field of ``model``, or for those with the given ``names``."""
    fields = model.model_fields
    entries = []
    for name in fields if names is None else names:
        words = " ".join((fields[name].description or "").split())
        words = words[:1].lower() + words[1:]
        entries += textwrap.wrap(
            f"{name}: {words}", _WIDTH - 4, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False
        )
    return "".join(f"{line}\n" for line in entries)


def with_entries(doc: str, entries: str, after: Optional[str] = None) -> str:
    """A docstring with ``entries`` in its ``Args:``: behind the argument ``after``, or as all there are of them."""
    doc = inspect.cleandoc(doc) + "\n"
    if after is not None:
        return re.sub(rf"(?m)^    {after}:.*\n(?:        .*\n)*", lambda found: found[0] + entries, doc, count=1)
    head, raises, tail = doc.partition("\n\nRaises:")
    return f"{head.rstrip()}\n\nArgs:\n{entries}{raises[1:]}{tail}"
