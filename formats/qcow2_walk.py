"""Everything in a QCOW2 image that refers to a host cluster, counted.

Source: qemu's docs/interop/qcow2.rst, "Header extensions", "Host cluster management", "Cluster
mapping", "Snapshots", "Bitmaps".  Used by qcow2_check.py only.

A table that several L1 tables name is read once and counts as often as it is named, so the time
depends on the length of the file and not on what the snapshots have in common.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from virtmount.errors import Unsupported
from virtmount.formats.qcow2_head import BITMAPS_BIT, DATA_FILE, EXTENDED_L2, Head
from virtmount.formats.qcow2_header import (
    END_OF_EXTENSIONS,
    EXTENSION,
    MAX_L1,
    MAX_REFCOUNT_TABLE,
)
from virtmount.formats.qcow2_refcount import BLOCK, read_table
from virtmount.formats.qcow2_tally import Tally
from virtmount.hostfile import HostFile
from virtmount.upkeep import Progress

ENTRY = 8
SECTOR = 512
OFFSET = 0x00FFFFFFFFFFFE00  # bits 9-55
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
L2_RESERVED_EXTENDED = L2_RESERVED | ZERO
LOW_HALF = 0xFFFFFFFF

BITMAPS = 0x23852875
LUKS = 0x0537BE77

MAX_CLUSTERS = 1 << 27  # in the file: 8 TiB of the usual ones; a byte of memory each
MAX_TABLES = 1 << 20  # L2 tables; those of a snapshot count again
MAX_WRONG = 10_000  # entries, after which a check gives up
MAX_TABLE_BYTES = 16 << 30  # in all L2 tables
MAX_L1_BYTES = 256 << 20  # in the L1 tables of all snapshots
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_EXTRA = 1024
MAX_BITMAPS = 65535
MAX_DIRECTORY = 64 << 20  # bytes
MAX_BITMAP_TABLES = 256 << 20  # bytes
CHUNK = 64  # entries looked at in one go
PIECE = 1 << 20  # bytes of a long table read at once
STEP = 64  # tables between two signs of life

_SNAPSHOT = struct.Struct(">QIHH20xI")  # L1 offset and size, lengths of id, name and extra data
_BITMAP = struct.Struct(">QIIBBHI")  # table, entries, flags, type, granularity, name, extra data
_BITMAPS = struct.Struct(">IIQQ")  # number, reserved, directory's length and offset
_PLACE = struct.Struct(">QQ")  # offset, length


class Wrong(NamedTuple):
    """Damage: `mended` by new reference counts (REBUILD), a COPIED flag (FLAG), or by nothing."""

    place: str
    text: str
    mended: int = 0


REBUILD, FLAG = 1, 2


class Run(NamedTuple):
    """`count` adjacent L2 tables from `offset` on, each named `times` times."""

    offset: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    times: int


@dataclass
class Walk:
    """What was found on the way through all tables of one image."""

    file: HostFile
    head: Head
    limit: int = 0  # clusters in the file; the last one may be cut short
    # Something could not be followed: what is counted, and seems unused, may be behind it.
    hidden: bool = False
    unsound: bool = False  # the refcount table or its blocks: counts are not written there
    cut_table: bool = False  # the file ends inside an L2 table
    blocks: array[int] = field(default_factory=lambda: array("Q"))  # offsets, 0 where none is sound
    structure: set[int] = field(default_factory=set)  # clusters of the refcount table and blocks
    l1: array[int] = field(default_factory=lambda: array("Q"))  # of the active state
    # Offsets of L2 tables, as often as they are named; sorted once all of them are known.
    _named: array[int] = field(default_factory=lambda: array("Q"))
    _filled: array[int] = field(default_factory=lambda: array("Q"))  # those that are not all zeros
    _runs: list[Run] = field(default_factory=list)
    _l1_bytes: int = 0
    _bitmap_bytes: int = 0

    def __post_init__(self) -> None:
        size = self.head.cluster
        self.limit = -(-self.file.size // size)
        if self.limit > MAX_CLUSTERS:
            raise Unsupported(
                self.file,
                "",
                f"a check of {self.limit} clusters of {size} bytes, the most is {MAX_CLUSTERS}",
            )
        self.tally = Tally(self.limit)
        self.extended = bool(self.head.incompatible & EXTENDED_L2)
        self.data_file = bool(self.head.incompatible & DATA_FILE)
        self.sectors_shift = 62 - (size.bit_length() - 1 - 8)

    @property
    def tables(self) -> int:
        return sum(run.count for run in self._runs)

    def run(self) -> Iterator[Wrong | Progress]:
        yield from self._take(0, 1, "header+0", "the header")
        yield from self._refcounts()
        yield from self._active()
        yield from self._snapshots()
        yield from self._extensions()
        yield from self._l2_places()
        yield from self._l2_tables()

    # Tables

    def _place(self, offset: int, length: int, place: str, what: str) -> Wrong | None:
        """Why `length` bytes of table cannot lie at `offset`."""
        size = self.head.cluster
        if offset % size or not offset:
            return Wrong(place, f"{what} at {offset}, not at a cluster of its own")
        if offset + length > self.limit * size:
            return Wrong(
                place, f"{what} at {offset}: {length} bytes, the file ends at {self.file.size}"
            )
        return None

    def _take(
        self, first: int, count: int, place: str, what: str, times: int = 1
    ) -> Iterator[Wrong]:
        """Clusters of a table, inside of the file."""
        for cluster in range(first, min(first + count, self.limit)):
            self.tally.add(cluster, times)
            if not self.tally.mark(cluster):
                continue
            mended = 0
            if cluster in self.structure:
                self.unsound, mended = True, REBUILD
            at = cluster * self.head.cluster
            yield Wrong(place, f"{what} at {at} overlaps another table", mended)

    def _refcounts(self) -> Iterator[Wrong]:
        head, size = self.head, self.head.cluster
        length = head.refcount_clusters * size
        wrong = self._place(head.refcount_offset, length, "header+48", "refcount table")
        if not 0 < length <= MAX_REFCOUNT_TABLE:
            wrong = Wrong(
                "header+56",
                f"refcount table of {head.refcount_clusters} clusters, "
                f"expected 1 to {MAX_REFCOUNT_TABLE // size}",
            )
        if wrong:
            self.unsound = True
            yield wrong._replace(mended=REBUILD)
            return
        first = head.refcount_offset // size
        for cluster in range(first, first + head.refcount_clusters):
            if not self.tally.is_table(cluster):
                self.structure.add(cluster)
        yield from self._take(first, head.refcount_clusters, "header+48", "refcount table")
        self.blocks = read_table(self.file, head.refcount_offset, length // ENTRY)
        for index, entry in enumerate(self.blocks):
            if not entry:
                continue
            offset = entry & BLOCK
            place = f"refcount table entry {index}"
            wrong = self._place(offset, size, place, "refcount block")
            if entry & ~BLOCK:
                wrong = Wrong(place, f"reserved bits set: {entry:#x}")
            elif not wrong and self.tally.is_table(offset // size):
                wrong = Wrong(place, f"refcount block at {offset} overlaps another table")
            if wrong:
                self.unsound = True
                self.blocks[index] = 0
                yield wrong._replace(mended=REBUILD)
                continue
            self.structure.add(offset // size)
            yield from self._take(offset // size, 1, place, "refcount block")

    def _active(self) -> Iterator[Wrong]:
        head = self.head
        if head.size and not head.l1_size:
            self.hidden = True
            yield Wrong("header+36", f"no L1 table for a disk of {head.size} bytes")
        yield from self._l1_table(head.l1_offset, head.l1_size, "header+40", active=True)

    def _l1_table(
        self, offset: int, entries: int, place: str, *, active: bool = False
    ) -> Iterator[Wrong]:
        size = self.head.cluster
        length = entries * ENTRY
        if not length:
            return
        wrong = self._place(offset, length, place, "L1 table")
        if length > MAX_L1:
            wrong = Wrong(place, f"L1 table of {entries} entries, the most is {MAX_L1 // ENTRY}")
        if wrong:
            self.hidden = True
            yield wrong
            return
        self._l1_bytes += length
        if self._l1_bytes > MAX_L1_BYTES:
            raise Unsupported(
                self.file, place, f"a check of more than {MAX_L1_BYTES} bytes of L1 tables"
            )
        yield from self._take(offset // size, -(-length // size), place, "L1 table")
        table = read_table(self.file, offset, entries)
        if active:
            self.l1 = table
        size = self.head.cluster
        most = self.limit * size - size
        good = [
            offset
            for entry in table
            if entry
            and not entry & L1_RESERVED
            and (offset := entry & OFFSET)
            and not offset % size
            and offset <= most
        ]
        if len(self._named) + len(good) > min(MAX_TABLES, MAX_TABLE_BYTES // size):
            raise Unsupported(
                self.file,
                place,
                f"a check of {len(self._named) + len(good)} L2 tables of {size} bytes, the most "
                f"is {min(MAX_TABLES, MAX_TABLE_BYTES // size)}",
            )
        self._named.extend(good)
        if len(good) < entries - table.count(0):
            for index, entry in enumerate(table):
                if entry:
                    place = f"L1 entry {index} at {offset + index * ENTRY}"
                    yield from self._l1_entry(place, entry, most)

    def _l1_entry(self, place: str, entry: int, most: int) -> Iterator[Wrong]:
        """What is wrong with it."""
        size, table = self.head.cluster, entry & OFFSET
        if entry & L1_RESERVED:
            self.hidden |= bool(table)
            yield Wrong(place, f"reserved bits set: {entry:#x}")
        elif table and (table % size or table > most):
            self.hidden = True
            yield Wrong(
                place,
                f"L2 table at {table}, clusters have {size} bytes and the file ends at "
                f"{self.file.size}",
            )

    def _snapshots(self) -> Iterator[Wrong]:
        head, size = self.head, self.head.cluster
        if not head.snapshots:
            return
        wrong = self._place(head.snapshots_offset, 1, "header+64", "snapshot table")
        if head.snapshots > MAX_SNAPSHOTS:
            wrong = Wrong("header+60", f"{head.snapshots} snapshots, the most is {MAX_SNAPSHOTS}")
        if wrong:
            self.hidden = True
            yield wrong
            return
        at = head.snapshots_offset
        for number in range(head.snapshots):
            raw = self.file.pread_padded(at, _SNAPSHOT.size)
            l1, entries, identity, name, extra = _SNAPSHOT.unpack(raw)
            if at + _SNAPSHOT.size > self.file.size or extra > MAX_SNAPSHOT_EXTRA:
                self.hidden = True
                yield Wrong(f"byte {at}", f"snapshot {number}: no possible entry")
                break
            yield from self._l1_table(l1, entries, f"snapshot {number} at {at}")
            at += -(-(_SNAPSHOT.size + identity + name + extra) // 8) * 8
        first = head.snapshots_offset // size
        yield from self._take(first, -(-at // size) - first, "header+64", "snapshot table")

    # Header extensions

    def _extensions(self) -> Iterator[Wrong]:
        head = self.head
        at, end = head.header_length, head.cluster
        if head.backing_offset:
            end = min(end, head.backing_offset)
        raw = self.file.pread_padded(0, end)
        while at + EXTENSION.size <= end:
            kind, length = EXTENSION.unpack_from(raw, at)
            at += EXTENSION.size
            if kind == END_OF_EXTENSIONS:
                return
            if length > end - at:
                self.hidden = True
                yield Wrong(
                    f"header+{at - 4}",
                    f"extension {kind:#010x} of {length} bytes, {end - at} are left",
                )
                return
            data = raw[at : at + length]
            if kind == LUKS and length >= _PLACE.size:
                offset, size = _PLACE.unpack_from(data)
                yield from self._luks(offset, size, f"header+{at}")
            # Without its bit the extension is out of date: nothing follows it any more.
            if kind == BITMAPS and head.autoclear & BITMAPS_BIT and length >= _BITMAPS.size:
                number, _, directory, offset = _BITMAPS.unpack_from(data)
                yield from self._bitmaps(number, offset, directory, f"header+{at}")
            at += -(-length // 8) * 8

    def _luks(self, offset: int, length: int, place: str) -> Iterator[Wrong]:
        size = self.head.cluster
        if wrong := self._place(offset, length, place, "LUKS header"):
            self.hidden = True
            yield wrong
            return
        yield from self._take(offset // size, -(-length // size), place, "LUKS header")

    def _bitmaps(self, number: int, offset: int, length: int, place: str) -> Iterator[Wrong]:
        size = self.head.cluster
        wrong = self._place(offset, length, place, "bitmap directory")
        if number > MAX_BITMAPS or length > MAX_DIRECTORY:
            wrong = Wrong(place, f"{number} bitmaps in a directory of {length} bytes")
        if wrong:
            self.hidden = True
            yield wrong
            return
        yield from self._take(offset // size, -(-length // size), place, "bitmap directory")
        raw = self.file.pread_padded(offset, length)
        at = 0
        for index in range(number):
            if at + _BITMAP.size > length:
                self.hidden = True
                yield Wrong(f"byte {offset + at}", f"bitmap {index}: past the directory's end")
                return
            table, entries, _, _, _, name, extra = _BITMAP.unpack_from(raw, at)
            yield from self._bitmap(table, entries, f"bitmap {index} at {offset + at}")
            at += -(-(_BITMAP.size + name + extra) // 8) * 8

    def _bitmap(self, offset: int, entries: int, place: str) -> Iterator[Wrong]:
        size, length = self.head.cluster, entries * ENTRY
        if not length:
            return
        if wrong := self._place(offset, length, place, "bitmap table"):
            self.hidden = True
            yield wrong
            return
        self._bitmap_bytes += length
        if self._bitmap_bytes > MAX_BITMAP_TABLES:
            raise Unsupported(
                self.file, place, f"a check of more than {MAX_BITMAP_TABLES} bytes of bitmap tables"
            )
        yield from self._take(offset // size, -(-length // size), place, "bitmap table")
        for start in range(0, length, PIECE):
            part = min(PIECE, length - start)
            for index, entry in enumerate(
                read_table(self.file, offset + start, part // ENTRY), start // ENTRY
            ):
                cluster = entry & OFFSET
                if not cluster:
                    continue
                if wrong := self._place(cluster, size, f"{place}, entry {index}", "bitmap data"):
                    self.hidden = True
                    yield wrong
                    continue
                yield from self._take(cluster // size, 1, f"{place}, entry {index}", "bitmap data")

    # L2 tables

    def _l2_places(self) -> Iterator[Wrong]:
        """The tables, adjacent ones that are named equally often together."""
        size = self.head.cluster
        self._named = array("Q", sorted(self._named))
        self._runs = list(_runs(_repeated(self._named), size))
        if self._named:
            self.cut_table = self._named[-1] + size > self.file.size
        for run in self._runs:
            first = run.offset // size
            if self.tally.take_run(first, run.count, run.times):
                continue
            for cluster in range(first, first + run.count):
                place = f"byte {cluster * size}"
                yield from self._take(cluster, 1, place, "L2 table", run.times)

    def read_l2(self, runs: Iterable[Run]) -> Iterator[tuple[int, array[int], int]]:
        """Offset, words and times named of the L2 tables that are not all zeros.

        With extended entries every second word is a bitmap.
        """
        size = self.head.cluster
        step = max(1, PIECE // size)
        for run in runs:
            for first in range(0, run.count, step):
                count = min(step, run.count - first)
                at = run.offset + first * size
                raw = self.file.pread_padded(at, count * size)
                if raw.count(0) == len(raw):
                    continue
                for i in range(0, len(raw), size):
                    words = array("Q", raw[i : i + size])
                    if sys.byteorder == "little":
                        words.byteswap()
                    yield at + i, words, run.times

    def active_tables(self) -> list[Run]:
        """The L2 tables of the present state, each once, but for those that are all zeros."""
        if not self._filled:
            return []
        filled = set(self._filled)
        found = {entry & OFFSET for entry in self.l1 if entry and not entry & L1_RESERVED}
        return list(_runs(((offset, 1) for offset in sorted(filled & found)), self.head.cluster))

    def _l2_tables(self) -> Iterator[Wrong | Progress]:
        total = 3 * self.tables
        for done, (offset, words, times) in enumerate(self.read_l2(self._runs)):
            if done % STEP == 0:
                yield Progress(done, total)
            self._filled.append(offset)
            yield from self._l2_table(offset, words, times)

    def _l2_table(self, offset: int, words: array[int], times: int) -> list[Wrong]:
        wrong: list[Wrong] = []
        step = 16 if self.extended else ENTRY
        entries = words[::2] if self.extended else words
        for at in range(0, len(entries), CHUNK):
            part = entries[at : at + CHUNK]
            if not any(part) or self._in_a_row(part, times):
                continue
            for index, entry in enumerate(part, at):
                if entry:
                    for text, mended in self._l2_entry(entry, times):
                        wrong.append(Wrong(f"L2 entry at {offset + index * step}", text, mended))
            if len(wrong) > MAX_WRONG:
                return wrong
        if self.extended:
            wrong += self._subclusters(offset, words)
        return wrong

    def _in_a_row(self, part: array[int], times: int) -> bool:
        """Clusters one after the other, as most are: counted at once."""
        size, first = self.head.cluster, part[0]
        host = first & OFFSET
        if (
            self.data_file
            or first & ~(OFFSET | COPIED)
            or host % size
            or not host
            or host + len(part) * size > self.limit * size
            or part != array("Q", range(first, first + len(part) * size, size))
        ):
            return False
        return self.tally.add_run(host // size, len(part), times)

    def _l2_entry(self, entry: int, times: int) -> Iterator[tuple[str, int]]:
        """(what is wrong, what mends it); counts what the entry refers to."""
        size, end = self.head.cluster, self.limit * self.head.cluster
        if entry & COMPRESSED:
            yield from self._compressed(entry, times)
            return
        if entry & (L2_RESERVED_EXTENDED if self.extended else L2_RESERVED):
            yield f"reserved bits set: {entry:#x}", 0
        elif entry & ZERO and self.head.version < 3:
            yield "a zero cluster, which version 2 does not know", 0
        host = entry & OFFSET
        if not host:
            return
        if host % size:
            self.hidden = True
            yield f"a cluster at {host}, not a multiple of {size}", 0
        elif self.data_file:
            return
        elif host >= end:
            self.hidden = True
            yield f"a cluster at {host}, the file ends at {self.file.size}", 0
        else:
            yield from self._data(host // size, times)

    def _data(self, cluster: int, times: int) -> Iterator[tuple[str, int]]:
        self.tally.add(cluster, times)
        if self.tally.is_table(cluster):
            mended = 0
            if cluster in self.structure:
                self.unsound, mended = True, REBUILD
            yield f"guest data at {cluster * self.head.cluster}, where a table lies", mended

    def compressed(self, entry: int) -> tuple[int, int]:
        """Byte offset and longest length of the data of a compressed cluster."""
        start = entry & ((1 << self.sectors_shift) - 1)
        more = (entry & (COMPRESSED - 1)) >> self.sectors_shift
        return start, (more + 1) * SECTOR - start % SECTOR

    def _compressed(self, entry: int, times: int) -> Iterator[tuple[str, int]]:
        size = self.head.cluster
        if entry & COPIED:
            yield "a compressed cluster that is marked as the only user of its place", FLAG
        if self.data_file:
            yield "a compressed cluster in an image with a data file", 0
            return
        start, length = self.compressed(entry)
        if start + length > self.limit * size or start < SECTOR:
            self.hidden = True
            yield f"compressed data at {start}, the file ends at {self.file.size}", 0
            return
        for cluster in range(start // size, (start + length - 1) // size + 1):
            yield from self._data(cluster, times)

    def _subclusters(self, offset: int, words: array[int]) -> Iterable[Wrong]:
        for index, bits in enumerate(words[1::2]):
            if not bits:
                continue
            entry = words[2 * index]
            place = f"L2 entry at {offset + index * 16}"
            if entry & COMPRESSED:
                yield Wrong(place, f"a compressed cluster with subclusters {bits:#x}")
            elif bits >> 32 & bits & LOW_HALF:
                yield Wrong(place, f"subclusters both present and zero: {bits:#x}")
            elif bits & LOW_HALF and not entry & OFFSET and not self.data_file:
                yield Wrong(place, f"subclusters without a place: {bits:#x}")


def _repeated(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Of sorted numbers each once, and how often it is there."""
    last, times = -1, 0
    for number in numbers:
        if number == last:
            times += 1
            continue
        if times:
            yield last, times
        last, times = number, 1
    if times:
        yield last, times


def _runs(tables: Iterable[tuple[int, int]], size: int) -> Iterator[Run]:
    """Of (offset, times), sorted: adjacent ones that are named equally often together."""
    first = end = times = 0
    for offset, number in tables:
        if offset == end and number == times:
            end += size
            continue
        if times:
            yield Run(first, (end - first) // size, times)
        first, end, times = offset, offset + size, number
    if times:
        yield Run(first, (end - first) // size, times)
