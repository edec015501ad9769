"""Lines of a user's code: whose they are, and how they are shown."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Optional

_ROOT = str(Path(__file__).parents[1]) + "/"
_EXAMPLES = f"{_ROOT}examples/"


def is_ours(filename: str) -> bool:
    """Whether a file is this package's, its examples of models aside."""
    return filename.startswith(_ROOT) and not filename.startswith(_EXAMPLES)


def is_theirs(filename: str) -> bool:
    """Whether a file is a user's or a library's with models: neither torch's, Python's, Lightning's nor ours."""
    if filename.startswith("<") or is_ours(filename):
        return False
    return re.search(r"/(torch|lightning|pytorch_lightning)/|/lib/python3[.\d]*/(?!site-packages)", filename) is None


def shown(filename: str, line: int) -> str:
    """A line as ``file:number``, without the path of an installed package's folder."""
    return f"{re.sub(r'.*/site-packages/', '', filename)}:{line}"


def calling_line(skip: int = 1) -> Optional[str]:
    """The innermost line of a user's code that is being run, and what called it if that is a helper.

    None where this package's own code calls torch itself.

    Args:
        skip: how many frames of the caller to leave out.
    """
    frame: Optional[FrameType] = sys._getframe(skip + 1)
    while frame is not None:
        name = frame.f_code.co_filename
        if is_theirs(name):
            line, caller = shown(name, frame.f_lineno), frame.f_back
            if caller is None or not is_theirs(caller.f_code.co_filename):
                return line
            call = shown(caller.f_code.co_filename, caller.f_lineno)
            return line if call == line else f"{line} (called at {call})"
        if is_ours(name):
            return None
        frame = frame.f_back
    return None


def failing_line(error: BaseException) -> str:
    """The innermost line of a user's code in the traceback of ``error``; empty if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_theirs(frame.filename)]
    return shown(frames[-1].filename, frames[-1].lineno or 0) if frames else ""
