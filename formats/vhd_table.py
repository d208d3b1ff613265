"""VHD: the block allocation table and the places in the file that blocks take.

A block is its bitmap, padded to a sector, and behind that its data; it may begin at any sector.
What is said of the table here is said by one pass over it, in bounded memory.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from virtmount.errors import Unsupported
from virtmount.formats.vhd_footer import ENTRY, FREE, SECTOR
from virtmount.hostfile import HostFile
from virtmount.image import Span
from virtmount.plan import Write

SCAN = 1 << 16  # bytes of table looked at in one go
MAX_SLOTS = 1 << 23  # places for blocks in one file: a table of 32 MiB while it is looked at
MAX_HOLES = 1 << 16  # free places that one session knows
ALIGN = 4096  # of the data of new blocks
ZEROS, ONES = b"\0", b"\xff"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where an image's table is, and how long its blocks are; all in bytes."""

    table: int
    blocks: int  # that the disk has; the table may have more entries
    block: int
    spans: tuple[Span, ...]  # the metadata, but for the footer at the end

    @property
    def bitmap(self) -> int:
        """Of one block, as long as it is in the file."""
        return -(-self.bits // SECTOR) * SECTOR

    @property
    def bits(self) -> int:
        """Bytes of the bitmap that say something."""
        return self.block // SECTOR // 8

    @property
    def stride(self) -> int:
        return self.bitmap + self.block

    @property
    def metadata_end(self) -> int:
        return sector_up(max(span.offset + span.length for span in self.spans))

    @property
    def full(self) -> bytes:
        """The bitmap of a block that is all there."""
        return (ONES * self.bits).ljust(self.bitmap, ZEROS)

    def entry_at(self, index: int) -> int:
        return self.table + index * ENTRY


class Wrong(NamedTuple):
    """A table entry that cannot be right."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    start: int  # byte where its block begins
    text: str
    cut: bool = False  # it is the file that ends too early, inside of the block
    shared: bool = False  # it lies over another block


def pieces(
    file: HostFile, geometry: Geometry, first: int, count: int
) -> Iterator[tuple[int, array[int]]]:
    """(index, entries) of the table; pieces without any block may be left out."""
    step = SCAN // ENTRY
    for at in range(first, first + count, step):
        length = min(step, first + count - at)
        raw = file.pread(geometry.entry_at(at), length * ENTRY)
        if raw.count(ONES) == len(raw):
            continue
        entries = array("I")
        assert entries.itemsize == ENTRY
        entries.frombytes(raw)
        if sys.byteorder == "little":
            entries.byteswap()
        yield at, entries


class Scan:
    """One pass over the table: what is wrong in it, and then what is free.

    The file is divided into slots as long as a block: two blocks that begin in one slot overlap,
    and else only with those of the slots beside.  `end` is where metadata and blocks end.
    """

    def __init__(self, file: HostFile, geometry: Geometry, limit: int) -> None:
        """Blocks have to end at `limit`, where the footer is."""
        self.geometry, self._file, self._limit = geometry, file, limit
        count = limit // geometry.stride + 2
        if count > MAX_SLOTS:
            text = f"{limit} bytes in blocks of {geometry.block}, too many places to look at"
            raise Unsupported(file, "", f"{text}: not written and not checked")
        self._slots = array("I", [0]) * count
        self._end = 0  # of the blocks
        self.mapped = 0

    def run(self) -> Iterator[Wrong]:
        geometry, slots = self.geometry, self._slots
        stride, limit = geometry.stride, self._limit
        per_block = stride // SECTOR
        low, high = geometry.spans, geometry.metadata_end
        for first, entries in pieces(self._file, geometry, 0, geometry.blocks):
            for index, entry in enumerate(entries, first):
                if entry == FREE:
                    continue
                start = entry * SECTOR
                if start < high and (span := touched(low, start, stride)):
                    text = f"block at {start} lies over metadata at {span.offset}"
                    yield Wrong(index, start, text)
                    continue
                if start + stride > limit:
                    inside = start + geometry.bitmap < limit
                    text = f"block from {start} to {start + stride}, the blocks end at {limit}"
                    yield Wrong(index, start, text, cut=inside)
                    if not inside:
                        continue
                slot = start // stride
                before = slots[slot - 1] if slot else 0
                if (
                    slots[slot]
                    or (before and entry - before < per_block)
                    or (slots[slot + 1] and slots[slot + 1] - entry < per_block)
                ):
                    other = slots[slot] or slots[slot + 1]
                    if before and entry - before < per_block:
                        other = before
                    text = f"block at {start} lies over the one at {other * SECTOR}"
                    yield Wrong(index, start, text, shared=True)
                    continue
                slots[slot] = entry
                self.mapped += 1
                if start + stride > self._end:
                    self._end = start + stride

    @property
    def end(self) -> int:
        return max(self._end, self.geometry.metadata_end)

    def holes(self) -> Iterator[int]:
        """Where further blocks may begin, between the others; at most MAX_HOLES."""
        geometry, stride = self.geometry, self.geometry.stride
        spans = [(span.offset, span.offset + span.length) for span in geometry.spans]
        found = 0
        previous = SECTOR
        for entry in self._slots:
            if not entry:
                continue
            start = entry * SECTOR
            if start - previous >= stride:
                for low, high in without(previous, start, spans):
                    for place in _places(low, high, geometry):
                        yield place
                        found += 1
                        if found == MAX_HOLES:
                            return
            previous = start + stride


def _places(low: int, high: int, geometry: Geometry) -> Iterator[int]:
    """Blocks with aligned data in low … high; else one that is not, if there is room."""
    low = sector_up(low)  # a parent's path ends anywhere
    start = aligned(low, geometry)
    if start + geometry.stride > high >= low + geometry.stride:
        yield low
        return
    while start + geometry.stride <= high:
        yield start
        start = aligned(start + geometry.stride, geometry)


def sector_up(offset: int) -> int:
    return -(-offset // SECTOR) * SECTOR


def aligned(low: int, geometry: Geometry) -> int:
    """The first place from `low` on at which a block's data is aligned."""
    return -(-(low + geometry.bitmap) // ALIGN) * ALIGN - geometry.bitmap


def without(low: int, high: int, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What is left of low … high where nothing of `spans` lies."""
    for start, end in sorted(spans):
        if end <= low or start >= high:
            continue
        if low < start:
            yield low, start
        low = max(low, end)
    if low < high:
        yield low, high


def touched(spans: Iterable[Span], start: int, length: int) -> Span | None:
    for span in spans:
        if start < span.offset + span.length and span.offset < start + length:
            return span
    return None


def table_writes(file: HostFile, geometry: Geometry, changes: Mapping[int, int]) -> Iterator[Write]:
    """Table sectors with the entries in `changes` (index to entry) replaced.

    Whole sectors, because a disk tears at sectors only.  Neighbours are joined.
    """
    first = -1
    data = bytearray()
    for index in sorted(changes):
        at = geometry.entry_at(index)
        sector = at // SECTOR * SECTOR
        if first < 0 or sector > first + len(data):
            if data:
                yield Write(first, bytes(data))
            first, data = sector, bytearray()
        if sector == first + len(data):
            data += file.pread_padded(sector, SECTOR)
        data[at - first : at - first + ENTRY] = changes[index].to_bytes(ENTRY, "big")
    if data:
        yield Write(first, bytes(data))


def last_block(file: HostFile, geometry: Geometry) -> int:
    """Where the last block that the table names ends; 0 without any."""
    last = 0
    for _, entries in pieces(file, geometry, 0, geometry.blocks):
        last = max(last, max((entry for entry in entries if entry != FREE), default=0))
    return last * SECTOR + geometry.stride if last else 0
