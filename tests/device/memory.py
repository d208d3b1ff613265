"""A disk in memory that writes down what was asked of it: stands in for the engine."""

from __future__ import annotations

import errno
import mmap
import threading
from typing import NamedTuple


class Asked(NamedTuple):
    what: str
    offset: int = 0
    length: int = 0


class MemoryDisk:
    """What fuse.Served wants.  `hold` set: requests wait for `go_on`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(-1, size)
        self.asked: list[Asked] = []
        self.fail: dict[str, Exception] = {}
        self.go_on = threading.Event()
        self.go_on.set()
        self.lock = threading.Lock()

    def _ask(self, what: str, offset: int = 0, length: int = 0) -> None:
        if not 0 <= offset <= offset + length <= self.size:
            raise OSError(errno.EINVAL, f"{what} {offset}+{length}, the disk ends at {self.size}")
        self.asked.append(Asked(what, offset, length))
        assert self.go_on.wait(60)
        if what in self.fail:
            raise self.fail[what]

    def pread(self, offset: int, length: int) -> bytes:
        self._ask("read", offset, length)
        return self._map[offset : offset + length]

    def pwrite(self, offset: int, data: bytes) -> None:
        self._ask("write", offset, len(data))
        with self.lock:
            self._map[offset : offset + len(data)] = data

    def flush(self) -> None:
        self._ask("flush")

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._ask("unmap" if unmap else "zero", offset, length)
        with self.lock:
            self._map[offset : offset + length] = bytes(length)

    def contents(self) -> bytes:
        return self._map[:]

    def fill(self, data: bytes) -> None:
        self._map[: len(data)] = data

    def count(self, what: str) -> int:
        return sum(1 for asked in self.asked if asked.what == what)
