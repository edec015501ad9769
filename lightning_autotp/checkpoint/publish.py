"""Putting a finished file or directory in the place of an older one: at every moment the name stands for a whole one.

What is written lies beside its place under a name of its own; dead saves leave such names, and the next save of the
same place, or by the machine where they died, removes them.
"""

import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

from lightning_autotp.checkpoint.places import AnyPath, RemotePath

# no "ckpt_" in it: Lightning parses such names when it looks for SLURM checkpoints
_TEMPORARY = re.compile(r"\.autotp-tmp-([0-9a-f]{10})-([0-9a-f]{10})-(\d+)-[0-9a-f]{12}")

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def beside(path: Path) -> Path:
    """A new name in the directory of ``path`` to write to before it takes the place of ``path``."""
    return path.parent / f".autotp-tmp-{_digest(path.name)}-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def put_in_place(made: Path, path: Path) -> None:
    """Give ``made``, complete and synchronized, the name ``path``; what had it goes once the new one stands.

    Where the system can exchange two names (Linux, on most file systems), ``path`` never stands empty; elsewhere it
    does between two renames.
    """
    if made.is_dir() or (path.is_dir() and not path.is_symlink()):
        if not os.path.lexists(path):
            made.rename(path)
        elif not exchange(made, path):
            old = beside(path)
            path.rename(old)
            try:
                made.rename(path)
            except OSError:
                old.rename(path)
                raise
            made = old
    else:
        os.replace(made, path)
    synchronize(path.parent)
    remove(made)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or directories at once; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):  # some network file systems, some sandboxes
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def synchronize(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # directories of some file systems
            raise
    finally:
        os.close(handle)


def write_in_place(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file beside ``path`` and rename it; if that fails, ``path`` is as it was and nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = beside(path)
    try:
        with made.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        put_in_place(made, path)
    except BaseException:
        remove(made)
        raise
    remove_leftovers(path)


def not_saved(path: AnyPath, failures: Mapping[int, str]) -> RuntimeError:
    """The error of a save that has failed on some ranks: which, why, and what the name stands for now."""
    said = "; ".join(f"rank {rank}: {text.rstrip('.')}" for rank, text in sorted(failures.items()))
    is_there = os.path.lexists(path) if isinstance(path, Path) else _exists(path)
    stands = "the checkpoint that was there before, whole" if is_there else "nothing, as before"
    return RuntimeError(f"{path} could not be written. {said}. What has this name is {stands}.")


def _exists(path: RemotePath) -> bool:
    try:
        return path.exists()
    except Exception:  # of a file system that has failed already
        return False


def write_remotely(path: RemotePath, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file to where nothing is renamed; it is there once all of it is, on file systems that have transactions.

    Object stores have, by nature: what is not complete is not there.
    """
    with path.fs.transaction, path.open("wb") as stream:
        write(stream)


def remove(path: AnyPath) -> None:
    """Remove a file, link or directory, if it is there and may be removed."""
    if isinstance(path, RemotePath):
        with suppress(Exception):  # several processes may try
            path.remove()
        return
    with suppress(OSError):  # of a folder that may not be looked into, even this cannot be asked
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        elif path.exists():
            shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what dead saves have left beside ``path``: of this name, or of processes of this machine that have ended.

    To be called when ``path`` stands: until then a leftover may be the only whole copy.
    """
    for entry in path.parent.iterdir():
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None:
            continue
        target, here, process = found[1], found[2] == _machine(), int(found[3])
        others = here and process != os.getpid()
        if not _is_running(process) if others else target == _digest(path.name):
            with suppress(OSError):  # another user's, say: what was saved stands nevertheless
                remove(entry)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:10]


@lru_cache(maxsize=1)
def _machine() -> str:
    """What tells where a process number means a process: this start of this machine, and its space of numbers."""
    known = [os.uname().nodename]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            known.append(os.readlink(source) if source.endswith("pid") else Path(source).read_text())
        except OSError:
            continue
    return _digest(" ".join(known))
