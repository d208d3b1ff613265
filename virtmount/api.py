"""Images from Python: open one and read or write it, without root and without a kernel device."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from virtmount import extents
from virtmount.chain import open_chain
from virtmount.disk import Disk
from virtmount.engine import Buffer, Op
from virtmount.extents import Mapped
from virtmount.image import Image, Options
from virtmount.info import ImageInfo, ParentInfo, inspect
from virtmount.overlay import lay_over
from virtmount.pager import Pager

__all__ = ["ImageInfo", "Mapped", "OpenDisk", "ParentInfo", "inspect", "map_extents", "open"]

ALIGN = 512
RANGE_STEP = 1 << 30  # of a discard; every cluster size divides it


def open(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    writable: bool = False,
    cache: str = "writeback",
    allow_outside: bool = False,
    parent_format: str | None = None,
    force: bool = False,
    overlay: str | os.PathLike[str] | None = None,
    options: Options | None = None,
) -> OpenDisk:
    """Open an image, of `format` or by its content, with its parents.

    cache: "writeback" (flush() makes durable), "writethrough" (every write does), or "none"
    (writeback, past the host's page cache where that is possible).  Parents are found in or below
    the image's folder only, unless allow_outside; parent_format is for one whose child does not
    record it; force takes one that was changed since.  `options` says everything else that there
    is to say, and allow_outside then counts in there.  Locked against other users, as qemu does it.

    With `overlay`, a folder, all images are only read; what is written goes to a file without a
    name there, and is thrown away when the disk is closed.
    """
    chain = open_chain(
        path,
        format,
        writable=writable and overlay is None,
        options=options or Options(allow_outside=allow_outside),
        parent_format=parent_format,
        force=force,
    )
    if overlay is not None:
        chain = lay_over(chain, overlay)
    try:
        disk = Disk(chain, cache=cache)
    except BaseException:
        chain.close()
        raise
    try:
        pager = Pager(disk)
    except BaseException:
        disk.close()
        raise
    return OpenDisk(pager.start())


def map_extents(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    allow_outside: bool = False,
    parent_format: str | None = None,
    force: bool = False,
    options: Options | None = None,
) -> Iterator[Mapped]:
    """Where the disk's bytes lie, in order and without gaps, as `qemu-img map` says it."""
    chain = open_chain(
        path,
        format,
        options=options or Options(allow_outside=allow_outside),
        parent_format=parent_format,
        force=force,
    )
    try:
        yield from extents.mapped(chain)
    finally:
        chain.close()


class OpenDisk:
    """An open disk.  Any thread may call anything at any time; offsets need no alignment.

    Requests that overlap are carried out one after the other if one of them writes; a read that
    overlaps a write may see either's bytes, sector by sector.
    """

    def __init__(self, pager: Pager) -> None:
        """Takes over a Pager that has been started."""
        self._pager, self._engine, self._disk = pager, pager.engine, pager.disk
        self.size = self._disk.size
        self.sector_size = self._disk.sector_size
        self.writable = self._disk.writable
        self.path: Path = self._disk.image.files[0].path
        self._changed = threading.Condition()
        self._calls = 0
        self._closed = False
        self._writing: list[tuple[int, int]] = []

    def __enter__(self) -> OpenDisk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def image(self) -> Image:
        """The top image; of another thread's, so only to look at."""
        return self._disk.image

    def pread(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; fewer at the disk's end, none behind it."""
        length = self._clip(offset, length)
        start, end = offset // ALIGN * ALIGN, -(-(offset + length) // ALIGN) * ALIGN
        with self._call():
            if not length:
                return b""
            data = self._engine.read(start, end - start)
        return data if len(data) == length else data[offset - start : offset - start + length]

    def pread_into(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Read into a buffer; returns the count, less than its length only at the disk's end."""
        view = memoryview(buffer).cast("B")
        length = self._clip(offset, len(view))
        if offset % ALIGN or length % ALIGN:
            view[:length] = self.pread(offset, length)
            return length
        with self._call():
            if length:
                self._engine.read_into(offset, view[:length])
        return length

    def pwrite(self, offset: int, data: Buffer) -> int:
        """Write all of `data`; OSError ENOSPC, and nothing written, if it passes the disk's end."""
        view = memoryview(data).cast("B")
        end = offset + len(view)
        self._refuse_outside(offset, len(view))
        first, last = offset // ALIGN * ALIGN, -(-end // ALIGN) * ALIGN
        with self._call(), self._alone(first, last):
            if not view:
                return 0
            if first == offset and last == end:
                self._engine.write(offset, view)
            else:
                self._engine.write(first, self._completed(first, last, offset, view))
        return len(view)

    def _completed(self, first: int, last: int, offset: int, view: memoryview) -> bytearray:
        """The sectors first … last with `view` put over them at `offset`."""
        whole = bytearray(last - first)
        end = offset + len(view)
        if first < offset:
            whole[:ALIGN] = self._engine.read(first, ALIGN)
        if end < last and (last - ALIGN > first or first == offset):
            whole[-ALIGN:] = self._engine.read(last - ALIGN, ALIGN)
        whole[offset - first : end - first] = view
        return whole

    def flush(self) -> None:
        """When this returns, every write that had returned before is durable."""
        with self._call():
            self._engine.io(Op.FLUSH)

    def discard(self, offset: int, length: int) -> None:
        """The range is not needed any more: whole clusters of it are given back where possible."""
        self._refuse_outside(offset, length)
        start, end = -(-offset // ALIGN) * ALIGN, (offset + length) // ALIGN * ALIGN
        with self._call(), self._alone(start, end):
            self._by_steps(Op.DISCARD, start, end)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros, giving its space back where that is possible."""
        self._refuse_outside(offset, length)
        start, end = -(-offset // ALIGN) * ALIGN, (offset + length) // ALIGN * ALIGN
        if start >= end:
            self.pwrite(offset, bytes(length))
            return
        self.pwrite(offset, bytes(start - offset))
        self.pwrite(end, bytes(offset + length - end))
        with self._call(), self._alone(start, end):
            self._by_steps(Op.WRITE_ZEROES, start, end)

    def _by_steps(self, op: Op, start: int, end: int) -> None:
        while start < end:
            stop = min(end, (start // RANGE_STEP + 1) * RANGE_STEP)
            self._engine.io(op, start, stop - start)
            start = stop

    def stats(self) -> dict[str, Any]:
        """Counters of the engine (native/engine.h, struct vm_stats)."""
        with self._call():
            return self._engine.stats()

    def close(self) -> None:
        """Wait for the calls under way, make everything durable, close; harmless when repeated.

        Raises what kept the image from being finished.
        """
        with self._changed:
            self._closed, was = True, self._closed
            self._changed.wait_for(lambda: not self._calls)
        if not was:
            self._pager.close()

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """The engine must not go away under a call."""
        with self._changed:
            if self._closed:
                raise ValueError("the disk is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def _alone(self, start: int, end: int) -> Iterator[None]:
        """No other write touches the range: one to another part of a sector would be undone."""
        mine = (start, end)

        def free() -> bool:
            return not any(low < end and start < high for low, high in self._writing)

        with self._changed:
            self._changed.wait_for(free)
            self._writing.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._writing.remove(mine)
                self._changed.notify_all()

    def _clip(self, offset: int, length: int) -> int:
        if offset < 0 or length < 0:
            raise ValueError(f"{length} bytes at {offset}")
        return max(0, min(length, self.size - offset))

    def _refuse_outside(self, offset: int, length: int) -> None:
        if self._clip(offset, length) < length:
            raise OSError(errno.ENOSPC, f"{length} bytes at {offset}: the disk has {self.size}")
