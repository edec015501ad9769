"""Which kind of checkpoint a path is, and the opening of it."""

from lightning_autotp.checkpoint.foreign.dcp import is_dcp, is_ours, open_dcp
from lightning_autotp.checkpoint.foreign.names import listed
from lightning_autotp.checkpoint.places import AnyPath
from lightning_autotp.checkpoint.tensors import Checkpoint, open_checkpoint


def is_foreign(path: AnyPath, unsafe: bool = False) -> bool:
    """Whether ``path`` is a directory that others have written, which :func:`open_any` opens.

    Raises:
        ValueError: if a file in it is damaged or could run code.
    """
    return path.is_dir() and not is_ours(path, unsafe)


def open_any(path: AnyPath, *, unsafe: bool = False, all_bytes: bool = False) -> Checkpoint:
    """Open a checkpoint of ours or of others, without processes; tensors are read when they are asked for.

    Args:
        path: a file, or a directory.
        unsafe: whether to load what is neither tensors nor plain containers.
        all_bytes: whether to compare all checksums first, where there are some.

    Raises:
        FileNotFoundError: if there is none, or it is not complete.
        ValueError: if a file is damaged or could run code, or if it cannot be told what is in it.
    """
    if not is_foreign(path, unsafe):
        return open_checkpoint(path, unsafe=unsafe, all_bytes=all_bytes)
    if is_dcp(path):
        return open_dcp(path, unsafe=unsafe)
    there = listed(sorted(entry.name for entry in path.iterdir()))
    raise FileNotFoundError(f"{path} is no checkpoint that is known here: it holds {there or 'nothing'}.")
