"""Which kind of checkpoint a path is, and the opening of it."""

from typing import Optional

from lightning_autotp.checkpoint.foreign.dcp import is_dcp, is_ours, open_dcp
from lightning_autotp.checkpoint.foreign.deepspeed import LayoutsFor, open_deepspeed
from lightning_autotp.checkpoint.foreign.deepspeed_files import is_deepspeed
from lightning_autotp.checkpoint.foreign.names import listed
from lightning_autotp.checkpoint.places import AnyPath
from lightning_autotp.checkpoint.safe_load import DamagedError
from lightning_autotp.checkpoint.tensors import Checkpoint, open_checkpoint


def is_foreign(path: AnyPath, unsafe: bool = False) -> bool:
    """Whether ``path`` is a directory that others have written, which :func:`open_any` opens.

    Raises:
        ValueError: if a file in it is damaged or could run code.
    """
    return path.is_dir() and not is_ours(path, unsafe)


def open_any(
    path: AnyPath,
    *,
    unsafe: bool = False,
    all_bytes: bool = False,
    layouts_for: Optional[LayoutsFor] = None,
    first_replica: bool = False,
) -> Checkpoint:
    """Open a checkpoint of ours or of others, without processes; tensors are read when they are asked for.

    Args:
        path: a file, or a directory.
        unsafe: whether to load what is neither tensors nor plain containers.
        all_bytes: whether to compare all checksums first, where there are some.
        layouts_for: the plan of the target model, for DeepSpeed's that do not say how they were cut.
        first_replica: whether to take the first rank's where DeepSpeed's ranks should hold alike and do not.

    Raises:
        FileNotFoundError: if there is none, or it is not complete.
        ValueError: if a file is damaged or could run code, or if it cannot be told what is in it.
    """
    if not is_foreign(path, unsafe):
        return open_checkpoint(path, unsafe=unsafe, all_bytes=all_bytes)
    if is_dcp(path):
        return open_dcp(path, unsafe=unsafe)
    if is_deepspeed(path):
        try:
            return open_deepspeed(path, unsafe=unsafe, layouts_for=layouts_for, first_replica=first_replica)
        except (KeyError, AttributeError, TypeError, IndexError) as error:  # of files that hold other things
            said = f"{type(error).__name__}: {error}"
            raise DamagedError(f"{path} is damaged, or of a DeepSpeed that is not known here ({said}).") from error
    there = listed(sorted(entry.name for entry in path.iterdir()))
    raise FileNotFoundError(f"{path} is no checkpoint that is known here: it holds {there or 'nothing'}.")
