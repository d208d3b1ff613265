"""The engines under test: something with pread and pwrite made from a path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import virtmount
from tests.reference import Reference
from virtmount.chain import open_chain


class Disk(Protocol):
    size: int

    def pread(self, offset: int, length: int) -> bytes: ...
    def pwrite(self, offset: int, data: bytes) -> object: ...
    def flush(self) -> object: ...
    def discard(self, offset: int, length: int) -> object: ...
    def write_zeroes(self, offset: int, length: int) -> object: ...
    def close(self) -> object: ...


class ReferenceDisk(Reference):
    """The reference engine over a chain that it opened itself."""

    def __init__(self, path: Path, format: str, *, writable: bool) -> None:
        self._chain = open_chain(path, format, writable=writable)
        try:
            super().__init__(self._chain.images)
        except BaseException:
            self._chain.close()
            raise

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._chain.close()


def open_reference(path: Path, format: str, writable: bool) -> Disk:
    return ReferenceDisk(path, format, writable=writable)


def open_engine(path: Path, format: str, writable: bool) -> Disk:
    return virtmount.open(path, format, writable=writable)


Open = Callable[[Path, str, bool], Disk]
ENGINES: dict[str, Open] = {"reference": open_reference, "engine": open_engine}
