"""DCP's files, one a rank, each with the save's id at its end, and its checksum computed while it is written."""

import io
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from lightning_autotp.checkpoint.manifest import Written, seal_for
from lightning_autotp.checkpoint.places import AnyPath, Files

_SMALL = 1 << 16


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
            with ThreadPoolExecutor(1) as beside:
                sealing = _Sealing(stream, beside)
                yield sealing
                self._written[path.name] = sealing.seal(self._save_id, synchronize=isinstance(path, Path))


class _Sealing(io.RawIOBase):
    """A stream that counts and sums up what goes through it."""

    def __init__(self, stream: IO[bytes], beside: ThreadPoolExecutor) -> None:
        super().__init__()
        self._stream, self._beside = stream, beside
        self._size = self._crc = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size < _SMALL:
            self._crc = zlib.crc32(data, self._crc)
            self._stream.write(data)
        else:  # the sum is computed while the system copies
            crc = self._beside.submit(zlib.crc32, data, self._crc)
            try:
                self._stream.write(data)
            finally:
                self._crc = crc.result()
        self._size += size
        return size

    def tell(self) -> int:
        return self._size

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
        return Written(self._size, self._crc)
