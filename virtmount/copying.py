"""Read whole disks, several pieces at once and in order, without what is known to be zeros."""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, TypeVar

from virtmount import extents
from virtmount.api import OpenDisk
from virtmount.chain import open_chain
from virtmount.disk import Disk
from virtmount.errors import VirtmountError
from virtmount.image import DEFAULTS, Chain, Options
from virtmount.pager import Pager
from virtmount.upkeep import Progress

PIECE = 1 << 20  # bytes that are read at once
AHEAD = 8  # pieces in memory
THREADS = min(os.cpu_count() or 1, 4)
GRAIN = 4096  # zeros are left out in multiples of this
STRETCH = 64 << 10  # the smallest part of a disk that a Content tells from the next
MAX_STRETCHES = 1 << 24  # one byte each

Report = Callable[[Progress], None]
T = TypeVar("T")
R = TypeVar("R")

_ZEROS = bytes(PIECE)


def quiet(progress: Progress) -> None:
    """For those who do not want to know."""


class Run(NamedTuple):
    """Guest bytes start … start+length."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Content:
    """Which parts of a disk may hold anything but zeros, to the precision of a stretch.

    Bounded memory, however much an image is fragmented.
    """

    def __init__(self, size: int, stretch: int = STRETCH) -> None:
        """`stretch` is what is wanted; on large disks it is more."""
        self.size = size
        self._stretch = stretch
        while size > self._stretch * MAX_STRETCHES:
            self._stretch *= 2
        self._marks = bytearray(-(-size // self._stretch))

    def mark(self, start: int, length: int) -> None:
        first, last = start // self._stretch, -(-(start + length) // self._stretch)
        self._marks[first:last] = b"\1" * (min(last, len(self._marks)) - first)

    def runs(self) -> Iterator[Run]:
        """What may hold data, in order."""
        marks, end = self._marks, 0
        while (first := marks.find(1, end)) >= 0:
            end = marks.find(0, first)
            end = len(marks) if end < 0 else end
            start = first * self._stretch
            yield Run(start, min(end * self._stretch, self.size) - start)

    @property
    def total(self) -> int:
        """Bytes in all runs."""
        return sum(run.length for run in self.runs())


class Source:
    """A disk that is read from front to back.  A context manager."""

    def __init__(self, chain: Chain) -> None:
        """Takes over the chain."""
        try:
            disk = Disk(chain)
            self.content = Content(disk.size)
            # Before the Pager runs: the driver is its own from then on.
            for extent in extents.mapped(chain):
                if not extent.zero:
                    self.content.mark(extent.start, extent.length)
            pager = Pager(disk)
        except BaseException:
            chain.close()
            raise
        self.chain = chain
        self.disk = OpenDisk(pager.start())
        self.size = self.disk.size

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disk.close()

    def read(self, run: Run) -> bytes:
        """Its bytes, with zeros for what lies past the disk's end; any thread."""
        try:
            data = self.disk.pread(run.start, run.length) if run.start < self.size else b""
        except OSError as error:
            what = f"guest bytes {run.start} to {run.end - 1}: {error.strerror}"
            raise OSError(error.errno, what, str(self.disk.path)) from error
        return data if len(data) == run.length else data + bytes(run.length - len(data))


def open_source(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    parent_format: str | None = None,
    force: bool = False,
    options: Options = DEFAULTS,
) -> Source:
    """The disk in the image at `path`, read-only and locked, with its parents."""
    chain = open_chain(path, format, options=options, parent_format=parent_format, force=force)
    return Source(chain)


def pieces(runs: Iterable[Run], size: int = PIECE) -> Iterator[Run]:
    """The runs cut at multiples of `size`."""
    for run in runs:
        at = run.start
        while at < run.end:
            end = min(run.end, (at // size + 1) * size)
            yield Run(at, end - at)
            at = end


def union(*runs: Iterable[Run]) -> Iterator[Run]:
    """What lies in any of several sorted sequences of runs, merged."""
    open_run: Run | None = None
    for run in heapq.merge(*runs):
        if open_run is None:
            open_run = run
        elif run.start <= open_run.end:
            open_run = Run(open_run.start, max(open_run.end, run.end) - open_run.start)
        else:
            yield open_run
            open_run = run
    if open_run is not None:
        yield open_run


def common(first: Iterator[Run], second: Iterator[Run]) -> Iterator[Run]:
    """What lies in both of two sorted sequences of runs."""
    a, b = next(first, None), next(second, None)
    while a is not None and b is not None:
        start, end = max(a.start, b.start), min(a.end, b.end)
        if start < end:
            yield Run(start, end - start)
        if a.end < b.end:
            a = next(first, None)
        else:
            b = next(second, None)


def in_order(
    work: Callable[[T], R], items: Iterable[T], *, ahead: int = AHEAD
) -> Generator[R, None, None]:
    """work(item) of each, in order, computed by several threads a few items ahead."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="virtmount-copy") as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def is_zero(data: bytes) -> bool:
    if len(data) == PIECE:
        return data == _ZEROS
    return data == bytes(len(data))


def solid(data: bytes) -> Iterator[Run]:
    """Where `data` is not zeros: runs of whole grains, in bytes from its start."""
    if is_zero(data):
        return iter(())
    return differences(data, bytes(len(data)))


def differences(data: bytes, other: bytes) -> Iterator[Run]:
    """Where two equally long pieces differ: runs of whole grains, in bytes from their start."""
    if data == other:
        return
    first = -1
    for at in range(0, len(data), GRAIN):
        if data[at : at + GRAIN] == other[at : at + GRAIN]:
            if first >= 0:
                yield Run(first, at - first)
                first = -1
        elif first < 0:
            first = at
    if first >= 0:
        yield Run(first, len(data) - first)


def copy(source: Source, target: OpenDisk, report: Report = quiet) -> None:
    """Write the source's data to a disk that reads as zeros."""
    done, total = 0, source.content.total

    def read(run: Run) -> tuple[Run, bytes]:
        return run, source.read(run)

    with contextlib.closing(in_order(read, pieces(source.content.runs()))) as parts:
        for run, data in parts:
            view = memoryview(data)
            for part in solid(data):
                target.pwrite(run.start + part.start, view[part.start : part.end])
            done += run.length
            report(Progress(done, total))


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def refuse_range(path: object, offset: int, length: int, size: int) -> None:
    """Only what the disk has."""
    if offset < 0 or length < 0 or offset + length > size:
        text = f"{length} bytes at {offset}, the disk has {size}"
        raise VirtmountError(path, "", text)


def is_same_file(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise
