"""Direct I/O on a device."""

from __future__ import annotations

import mmap
import os


class Direct:
    """A device opened with O_DIRECT: every request reaches the server as it is."""

    def __init__(self, path: str, flags: int = os.O_RDWR) -> None:
        self.fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)

    def __enter__(self) -> Direct:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    def read(self, offset: int, length: int) -> bytes:
        buffer = mmap.mmap(-1, length)
        assert os.preadv(self.fd, [buffer], offset) == length
        return buffer[:]

    def write(self, offset: int, data: bytes) -> None:
        buffer = mmap.mmap(-1, len(data))
        buffer[:] = data
        assert os.pwritev(self.fd, [buffer], offset) == len(data)

    def sync(self) -> None:
        os.fsync(self.fd)
