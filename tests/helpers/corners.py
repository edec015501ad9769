"""Parameters of tests whose full matrix takes long and shows little more than a few of it do."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def corners_of(cases: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """All cases as parameters, long but for those that are tried always.

    Raises:
        ValueError: if one that shall be tried always is no case.
    """
    cases = list(cases)
    unknown = [case for case in always if case not in cases]
    if unknown:
        raise ValueError(f"{unknown} are none of the cases {cases}.")
    of_case = ((case if isinstance(case, tuple) else (case,), case in always) for case in cases)
    return [pytest.param(*values, marks=() if tried else pytest.mark.long) for values, tried in of_case]
