"""Checksums of files: one that costs next to nothing beside writing them, and that of older checkpoints."""

import zlib
from typing import Any

import numpy as np

_BLOCK = 1 << 16
_BUFFER = 1 << 20


class Checksum:
    """The CRC-32 of sums: of each 64 KiB of a file, as little-endian words of 64 bits, the last ones filled with zeros.

    A changed bit, words or blocks are found, blocks in another order too; words of one block that changed places are
    not. It takes about a third of the time of a CRC-32 of all bytes.
    """

    def __init__(self) -> None:
        self.size = self._filled = self._crc = 0
        self._buffer = np.empty(_BUFFER, dtype=np.uint8)

    def update(self, data: Any) -> None:
        """Take the next bytes, in anything that has a buffer."""
        rest = np.frombuffer(data, dtype=np.uint8)
        self.size += len(rest)
        while len(rest):
            count = min(len(rest), _BUFFER - self._filled)
            self._buffer[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == _BUFFER:
                self._crc, self._filled = self._with(self._filled), 0

    def value(self) -> int:
        """That of the bytes so far."""
        return self._with(self._filled)

    def _with(self, count: int) -> int:
        end = -(-count // _BLOCK) * _BLOCK
        self._buffer[count:end] = 0
        sums = self._buffer[:end].view("<u8").reshape(-1, _BLOCK // 8).sum(axis=1, dtype=np.uint64)
        return zlib.crc32(sums.astype("<u8").tobytes(), self._crc)


class PlainChecksum:
    """The CRC-32 of all bytes, which manifests of format 1 have."""

    def __init__(self) -> None:
        self.size = self._crc = 0

    def update(self, data: Any) -> None:
        """Take the next bytes."""
        self.size += len(data)
        self._crc = zlib.crc32(data, self._crc)

    def value(self) -> int:
        """That of the bytes so far."""
        return self._crc
