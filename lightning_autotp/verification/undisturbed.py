"""What all of a process shares, put back after foreign code has run in it."""

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, nothing warns, torch computes on one thread and the working directory is importable.

    Afterwards warnings, the number of threads, the default dtype, ``sys.path`` and how much transformers logs are what
    they were, also after an error. Random states and grad mode are left to ``Lockstep``, in which all of it runs.
    """
    threads, dtype, path = torch.get_num_threads(), torch.get_default_dtype(), list(sys.path)
    with warnings.catch_warnings(), _quiet_transformers():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        sys.path.append(os.getcwd())
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            sys.path[:] = path


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    try:
        logging = importlib.import_module("transformers").logging
    except ImportError:
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
