"""The block allocation table of a VHDX file: where its entries lie, and what the file has free.

Source: [MS-VHDX] 20240423, section 2.5.  After the entries of every `chunk` blocks comes one for
the block of their sector bitmap.  An entry is a state (3 bits) and the byte offset of a block, a
multiple of 1 MiB.  The table may be 512 MiB long, most of it zeros: those are passed over quickly.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from virtmount.errors import Corrupt
from virtmount.formats.vhdx_header import MIB, Disk, Region
from virtmount.hostfile import HostFile
from virtmount.image import Run

ENTRY = 8  # bytes
STATE = 7  # mask
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, RESERVED, OLD_UNMAPPED, PRESENT, PARTIAL = range(8)
PIECE = MIB  # of the table, read at once
PAGE = 512  # entries that are passed over together if all are zero
BITMAP = MIB  # bytes of a sector bitmap block
SECTOR = 4096  # what the log changes at once
MAX_HOLES = 1 << 16  # between the blocks of a file, that are used again
MAX_BLOCKS = 1 << 21  # that are looked at one by one before the file is written
MAX_SURVEY = 1 << 46  # ... in a file of at most so many bytes: a byte of memory for each MiB

_ZEROS = bytes(PIECE)
_IS_PARTIAL = bytes(low & STATE == PARTIAL for low in range(256))


@dataclass(frozen=True, slots=True)
class Table:
    """The entries of `blocks` blocks, from byte `offset` of the file on."""

    file: HostFile
    offset: int
    blocks: int
    chunk: int
    block_size: int
    has_parent: bool

    @property
    def count(self) -> int:
        """Entries, those of sector bitmaps included."""
        return count_entries(self.blocks, self.chunk, self.has_parent)

    @property
    def length(self) -> int:
        """Bytes that are needed."""
        return self.count * ENTRY

    @property
    def _last(self) -> int:
        """The last block's number; between it and its bitmap's lie entries that mean nothing."""
        return self.blocks - 1 + (self.blocks - 1) // self.chunk

    def place(self, block: int) -> int:
        """Byte offset of a block's entry in the file."""
        return self.offset + (block + block // self.chunk) * ENTRY

    def bitmap_place(self, chunk: int) -> int:
        """Byte offset of the entry for a sector bitmap block."""
        return self.offset + (chunk * (self.chunk + 1) + self.chunk) * ENTRY

    def describe(self, block: int) -> str:
        return f"BAT entry of block {block} at {self.place(block)}"

    def entry(self, block: int) -> int:
        return int.from_bytes(self.file.pread(self.place(block), ENTRY), "little")

    def entries(self, first: int, count: int) -> Iterator[tuple[int, array[int]]]:
        """The entries of some blocks, in pieces: first block, entries."""
        while count:
            until_bitmap = self.chunk - first % self.chunk
            step = min(count, until_bitmap, PIECE // ENTRY)
            yield first, little(self.file.pread(self.place(first), step * ENTRY))
            first += step
            count -= step

    def used(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """(number in the table, entry) of all entries from `first` on that are not zero."""
        last, bitmap = self._last, self.count - 1
        for start, raw in self._pieces(first):
            for at in range(0, len(raw), PAGE * ENTRY):
                page = raw[at : at + PAGE * ENTRY]
                if page != _ZEROS[: len(page)]:
                    number = start + at // ENTRY
                    for i, entry in enumerate(little(page), number):
                        if entry and (i <= last or i == bitmap):
                            yield i, entry

    def which(self, number: int) -> tuple[bool, int]:
        """Whether an entry is that of a sector bitmap, and of which; else of which block."""
        chunk, within = divmod(number, self.chunk + 1)
        return (True, chunk) if within == self.chunk else (False, number - chunk)

    def partial_chunks(self) -> Iterator[int]:
        """Chunks with blocks that are partially present."""
        before = -1
        for start, raw in self._pieces(0):
            marks = raw[::ENTRY].translate(_IS_PARTIAL)
            at = marks.find(1)
            while at >= 0:
                chunk, within = divmod(start + at, self.chunk + 1)
                if start + at > self._last:
                    return
                if within == self.chunk:
                    at = marks.find(1, at + 1)
                    continue
                if chunk != before:
                    yield chunk
                before = chunk
                at = marks.find(1, at + self.chunk + 1 - within)

    def _pieces(self, first: int) -> Iterator[tuple[int, bytes]]:
        """The raw table from entry `first` on, without pieces that are zero."""
        count = self.count
        while first < count:
            step = min(PIECE // ENTRY, count - first)
            raw = self.file.pread(self.offset + first * ENTRY, step * ENTRY)
            if raw != _ZEROS[: len(raw)]:
                yield first, raw
            first += step

    def change(
        self, entries: Iterable[tuple[int, int]]
    ) -> tuple[dict[int, bytes], list[tuple[int, int]]]:
        """What new (block, entry) make of the table, and (block, entry) as they were.

        The table as its sectors: file offset -> 4096 bytes.
        """
        sectors: dict[int, bytearray] = {}
        before: list[tuple[int, int]] = []
        for block, entry in entries:
            place = self.place(block)
            within = place % SECTOR
            sector = sectors.get(place - within)
            if sector is None:
                sector = bytearray(self.file.pread(place - within, SECTOR))
                sectors[place - within] = sector
            before.append((block, int.from_bytes(sector[within : within + ENTRY], "little")))
            sector[within : within + ENTRY] = entry.to_bytes(ENTRY, "little")
        return {at: bytes(sector) for at, sector in sectors.items()}, before


def count_entries(blocks: int, chunk: int, has_parent: bool) -> int:
    """2.5: only with a parent does the last entry have to be that of a bitmap."""
    if has_parent:
        return -(-blocks // chunk) * (chunk + 1)
    return blocks + (blocks - 1) // chunk


def open_table(file: HostFile, disk: Disk, region: Region) -> Table:
    table = Table(file, region.offset, disk.blocks, disk.chunk, disk.block_size, disk.has_parent)
    if table.length > region.length:
        text = f"{region.length} bytes, {table.length} needed for {table.blocks} blocks"
        raise Corrupt(file, f"BAT at {region.offset}", text)
    return table


def find_bitmap(table: Table, chunk: int, taken: Sequence[Region]) -> int | None:
    """Where the sector bitmap block of a chunk lies, if it lies where one can."""
    place = table.bitmap_place(chunk)
    entry = int.from_bytes(table.file.pread(place, ENTRY), "little")
    host = entry >> 20 << 20
    end = host + BITMAP
    if entry & STATE != PRESENT or host < MIB or end > table.file.size:
        return None
    if any(host < region.end and region.offset < end for region in taken):
        return None
    return host


@dataclass(slots=True)
class Survey:
    """What of a file is used: by the MiB, up to `end`."""

    end: int  # nothing is used from here on, bytes
    holes: list[int] = field(default_factory=list)  # offsets of free blocks, the lowest last
    gaps: dict[int, int] = field(default_factory=dict)  # too small for one: end -> start


def survey(table: Table, taken: Sequence[Region], size: int) -> Survey | None:
    """Find what is free in a file of `size` bytes; None if there is too much to look at.

    Refuses a table that gives one place to two: a discard or a reuse in such an image would
    destroy the other block's data.
    """
    if size > MAX_SURVEY:
        return None
    width = table.block_size // MIB
    file_end = -(-size // MIB)
    used = bytearray(file_end + width)
    for region in taken:
        used[region.offset // MIB : region.end // MIB] = bytes([1]) * (region.length // MIB)
    kept: list[tuple[int, int]] = []
    whole = bytes([1]) * width
    for seen, (number, entry) in enumerate(table.used()):
        if seen >= MAX_BLOCKS:
            return None
        at = entry >> 20
        if not at:
            continue
        is_bitmap, block = table.which(number)
        if is_bitmap:
            # Without a parent it means nothing, and older qemu left copies of other entries there.
            if table.has_parent and entry & STATE == PRESENT:
                kept.append((at, BITMAP // MIB))
            continue
        if entry & STATE not in (PRESENT, PARTIAL):
            kept.append((at, width))  # no data of ours, but the place is named
            continue
        if at >= file_end:
            raise _misplaced(table, block, f"at {at * MIB}, the file ends at {size}")
        if any(used[at : at + width]):
            text = f"at {at * MIB}, where another block or the metadata lies"
            raise _misplaced(table, block, text)
        used[at : at + width] = whole
    for at, length in kept:
        if at < file_end:
            used[at : at + length] = bytes([1]) * min(length, len(used) - at)
    end = used.rfind(1) + 1
    found = Survey(end * MIB)
    for hole in re.finditer(rb"\0+", used[:end]):
        at, stop = hole.span()
        while at + width <= stop and len(found.holes) < MAX_HOLES:
            found.holes.append(at * MIB)
            at += width
        if at < stop and len(found.gaps) < MAX_HOLES:
            found.gaps[stop * MIB] = at * MIB
    found.holes.reverse()
    return found


def _misplaced(table: Table, block: int, text: str) -> Corrupt:
    hint = f"virtmount check --repair {table.file}, or attach it read-only"
    return Corrupt(table.file, table.describe(block), text, hint=hint)


def last_end(table: Table, least: int) -> int:
    """Without a survey: the end of the last place that any entry names, at least `least`.

    Such a place may lie past the end of the file, where it holds no data.  New blocks go behind
    it all the same, or the entry would come to point into them.
    """
    end = -(-least // MIB) * MIB
    for _, raw in table._pieces(0):
        end = max(end, (max(little(raw)) >> 20 << 20) + table.block_size)
    return end


def little(raw: bytes) -> array[int]:
    entries = array("Q", raw)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def runs(offsets: Iterable[int], size: int) -> tuple[Run, ...]:
    """Host blocks as runs of adjacent ones."""
    found: list[Run] = []
    for offset in sorted(offsets):
        if found and found[-1].host_offset + found[-1].count * size == offset:
            found[-1] = found[-1]._replace(count=found[-1].count + 1)
        else:
            found.append(Run(offset, 1))
    return tuple(found)
