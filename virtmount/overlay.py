"""Writes that are thrown away: a temporary image over a chain that is only read.

The file has no name from its first moment on, so that nothing of it outlives the process that
serves the disk, however that ends.  It holds a table with one entry for each cluster, which is a
hole at first, then clusters in the order in which they were first written.  Nothing in it has to
survive anything, so no plan has a Barrier.

Over an encrypted image it is encrypted too, with a key that nobody keeps.
"""

from __future__ import annotations

import errno
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

from virtmount.disk import round_up
from virtmount.hostfile import HostFile
from virtmount.image import (
    Caps,
    Chain,
    Cipher,
    Dirty,
    Image,
    Kind,
    Layout,
    Leaf,
    Match,
    Reservation,
    Rule,
    Run,
    Span,
)
from virtmount.plan import Extend, Plan, Punch, Write

CLUSTER = 64 << 10
ENTRY = 8
PER_LEAF = 4096
TABLE = 4096  # where it begins; what is below is never a cluster's place
ABSENT, ZERO = 0, 1
STEP = 1 << 20  # bytes of the table that are read at once
MAX_END = 1 << 51  # host offsets in the engine


class Overlay(Image):
    """One file without a name; see above."""

    name: ClassVar[str] = "overlay"

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.NO

    def __init__(self, file: HostFile, below: Image, *, encrypted: bool) -> None:
        """Over `below`; `file` is empty and open for writing."""
        self._file = file
        self.files = [file]
        self.size = round_up(below.size, below.sector_size)
        self.sector_size = below.sector_size
        self.physical_sector_size = below.physical_sector_size
        self.cluster_size = CLUSTER
        self.entries_per_leaf = PER_LEAF
        self._clusters = -(-self.size // CLUSTER)
        leaves = -(-self._clusters // PER_LEAF)
        self._first = self._end = round_up(TABLE + leaves * PER_LEAF * ENTRY, CLUSTER)
        self._free = array("Q")  # host clusters that read as zeros
        self._stale = array("Q")  # ... that do not
        self.layout = Layout(
            width=ENTRY,
            byteorder="little",
            mask=(1 << 63) - CLUSTER,
            rules=(
                Rule((1 << 64) - 1, ABSENT, Kind.ABSENT),
                Rule((1 << 64) - 1, ZERO, Kind.ZERO),
            ),
            low=self._first,
        )
        if encrypted:
            self.cipher = Cipher("xts", os.urandom(64))
        self.caps = Caps(write=True, discard=True, zero_hides_parent=True)
        file.truncate(self._first)

    def leaf(self, index: int) -> Leaf:
        return Leaf(table=TABLE + index * PER_LEAF * ENTRY)

    def metadata(self) -> Iterable[Span]:
        return (Span(0, self._first),)

    def reserve(self, count: int) -> Reservation:
        for places, stale in ((self._free, False), (self._stale, True)):
            if places:
                runs = tuple(Run(places.pop(), 1) for _ in range(min(count, len(places))))
                punches = (Punch(run.host_offset, CLUSTER) for run in runs if stale)
                return Reservation(runs, Plan(*punches))
        start, self._end = self._end, self._end + count * CLUSTER
        if self._end > MAX_END:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return Reservation((Run(start, count),), Plan(Extend(self._end)))

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        return Plan(*self._writes((new.cluster, new.host_offset) for new in dirty))

    def _writes(self, entries: Iterable[tuple[int, int]]) -> Iterator[Write]:
        """The entries of clusters, which ascend; neighbours in one write."""
        first, values = -1, array("Q")
        for cluster, value in entries:
            if values and cluster != first + len(values):
                yield self._write(first, values)
                values = array("Q")
            if not values:
                first = cluster
            values.append(value)
        if values:
            yield self._write(first, values)

    def _write(self, first: int, values: array[int]) -> Write:
        data = b"".join(value.to_bytes(ENTRY, "little") for value in values)
        return Write(TABLE + first * ENTRY, data)

    def discard(self, first: int, count: int) -> Plan:
        punches: list[Punch] = []
        writes: list[Write] = []
        end = min(first + count, self._clusters)
        step = STEP // ENTRY
        for start in range(first, end, step):
            length = min(step, end - start)
            raw = self._file.pread(TABLE + start * ENTRY, length * ENTRY)
            for at in range(0, len(raw), ENTRY):
                host = int.from_bytes(raw[at : at + ENTRY], "little")
                if host > ZERO:
                    punches.append(Punch(host, CLUSTER))
                    self._free.append(host)
            writes += self._writes((cluster, ZERO) for cluster in range(start, start + length))
        # The Pager lets all requests end before the first punch.
        return Plan(*writes, *punches)

    def release(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self._stale.extend(run.host_offset + i * CLUSTER for i in range(run.count))


def lay_over(chain: Chain, folder: str | os.PathLike[str]) -> Chain:
    """The chain with an empty overlay on top, in a file without a name in `folder`.

    The chain was opened read-only; it is taken over, and closed if this fails.
    """
    try:
        try:
            fd, path = tempfile.mkstemp(prefix=".overlay.", suffix=".virtmount", dir=folder)
        except OSError as error:  # which names a file that nobody has heard of
            raise OSError(error.errno, error.strerror, os.fspath(folder)) from error
        try:
            file = HostFile(path, writable=True)
        finally:
            os.close(fd)
            os.unlink(path)
        try:
            encrypted = any(image.cipher is not None for image in chain.images)
            return Chain([Overlay(file, chain.top, encrypted=encrypted), *chain.images])
        except BaseException:
            file.close()
            raise
    except BaseException:
        chain.close()
        raise


def folder() -> str:
    """Where overlays lie unless the user chooses: not /tmp, which may be in memory."""
    return os.environ.get("TMPDIR") or "/var/tmp"
