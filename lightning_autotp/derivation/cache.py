"""What was derived and proved is kept between runs, in the user's cache: JSON files named by a digest."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")

VARIABLE = "LIGHTNING_AUTOTP_CACHE"
"""The environment variable with another folder, or "off"."""

_MOST = 200
"""Files that are kept; those that were used longest ago are removed."""


def folder() -> Optional[Path]:
    """The folder of derived plans; None where nothing is to be kept."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() in ("off", "0", "false", "no"):
        return None
    if given:
        return Path(given).expanduser() / "plans"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "lightning_autotp" / "plans"


def cached(kind: Any, key: Callable[[], str], make: Callable[[], T], worth: Callable[[T], bool]) -> tuple[T, bool]:
    """What ``make`` returned in an earlier run, or returns now; and whether it is of an earlier run.

    No file, whatever is in it, and no folder that cannot be read or written is an error: then it is made.

    Args:
        kind: the type of what is made, a dataclass.
        key: makes the digest of all that it is made of.
        make: makes it.
        worth: whether to keep it.
    """
    place = folder()
    if place is None:
        return make(), False
    try:
        path, adapter = place / f"{key()}.json", TypeAdapter(kind)
    except Exception:  # a model with an attribute that cannot be looked at
        return make(), False
    found = _read(path, adapter)
    if found is not None:
        return found, True
    made = make()
    if worth(made):
        _write(path, adapter, made)
    return made, False


def _read(path: Path, adapter: TypeAdapter[T]) -> Optional[T]:
    try:
        found = adapter.validate_json(path.read_bytes())
    except (OSError, ValueError):  # none yet, or not one of ours
        return None
    with suppress(OSError):
        os.utime(path)
    return found


def _write(path: Path, adapter: TypeAdapter[T], made: T) -> None:
    half = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError, ValueError):  # the next run derives it again
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(adapter.dump_json(made))
        half.replace(path)
        _remove_old(path.parent)


def _remove_old(place: Path) -> None:
    files = sorted(place.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[: max(0, len(files) - _MOST)]:
        path.unlink(missing_ok=True)
