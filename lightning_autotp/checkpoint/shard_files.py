"""DCP's files, one a rank, each with the save's id at its end, and its checksum computed while it is written."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from lightning_autotp.checkpoint.checksums import Checksum
from lightning_autotp.checkpoint.manifest import Written, seal_for
from lightning_autotp.checkpoint.places import AnyPath, Files


class ShardWriter(FileSystemWriter):
    """DCP's writer to a directory; what it has written is complete and on the disk.

    Args:
        directory: where to.
        save_id: the name of the save.

    Attributes:
        written: the files of this process, by name.
    """

    def __init__(self, directory: AnyPath, save_id: str) -> None:
        super().__init__(str(directory), sync_files=False)  # each file is synchronized when it is closed
        self.written: dict[str, Written] = {}
        self.fs = _SealedFiles(save_id, self.written)
        self.path: Any = directory

    @property
    def checkpoint_id(self) -> Any:
        return str(self.path)


class _SealedFiles(Files):
    def __init__(self, save_id: str, written: dict[str, Written]) -> None:
        self._save_id, self._written = save_id, written

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with path.open(mode) as stream:
            if path.suffix != DEFAULT_SUFFIX or mode != "wb":
                yield stream
                return
            sealing = _Sealing(stream)
            yield sealing
            self._written[path.name] = sealing.seal(self._save_id, synchronize=isinstance(path, Path))


class _Sealing(io.RawIOBase):
    """A stream that counts and sums up what goes through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream, self._checksum = stream, Checksum()

    def write(self, data: Any) -> int:
        self._checksum.update(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self._checksum.size

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """Nothing: DCP closes before there is a seal."""

    def seal(self, save_id: str, synchronize: bool) -> Written:
        self.write(seal_for(save_id))
        self._stream.flush()
        if synchronize:
            os.fsync(self._stream.fileno())
        return Written(self._checksum.size, self._checksum.value())
