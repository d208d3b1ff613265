"""Is a VHDX sound, and what can be mended: headers, region tables, log, metadata, BAT, leaks.

Source: [MS-VHDX] 20240423.  Looked at in the order in which one thing leads to the next; where one
cannot be trusted, nothing behind it is looked at.

Mended are copies of which the other one is whole, regions that are not marked as required (qemu), a
log that has to be replayed, entries that lead nowhere, two blocks at one place, and space that
nothing uses.  A block whose entry leads nowhere becomes undefined, which is what is known of it: it
reads as zeros, and the disk can be written again.  Of two blocks at one place each reads what it
read before, but the later one from a copy.  Not mended: two headers that contradict each other, a
log without a whole sequence, metadata items that contradict the file, bitmaps that lie nowhere.
Where data has been lost, space is not given back in the same run: the data may lie there.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import replace
from uuid import UUID, uuid4

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import vhdx_header as headers
from virtmount.formats import vhdx_locator
from virtmount.formats.vhdx_bat import (
    BITMAP,
    OLD_UNMAPPED,
    PARTIAL,
    PRESENT,
    RESERVED,
    STATE,
    UNDEFINED,
    UNMAPPED,
    ZERO,
    Table,
    find_bitmap,
    open_table,
)
from virtmount.formats.vhdx_header import MIB, NIL, Disk, Header, Region
from virtmount.formats.vhdx_journal import Journal, apply_in_memory, find_log
from virtmount.hostfile import HostFile
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write
from virtmount.upkeep import Finding, Progress, Repair, Severity

WINDOW = 1 << 26  # MiB of the file that are looked at in one pass: a byte of memory for each
BATCH = 4096  # entries that are mended by one plan
MAX_COPIES = 1 << 16  # blocks that get a place of their own in one check
MAX_PUNCHES = 1 << 14  # holes in one plan
EVERY = 1 << 20  # entries between two words about how far it is
FIRST_SECTOR = 512  # bytes: written wholly or not at all
FREE, BLOCK, NAMED, TAKEN = range(4)  # a MiB of the file: of a block, named only, of the metadata

Item = Finding | Plan | Progress
Items = Iterator[Item]


class Check:
    """One look at a file.  Corrupt, raised by what reads a structure, is the last finding."""

    def __init__(self, file: HostFile, repair: Repair) -> None:
        self._file = file
        self._mend = file.writable and repair is Repair.ALL
        self._trim = file.writable and repair is not Repair.NOTHING
        self._header: Header
        self._slot = 0
        self._journal: Journal | None = None  # once something has been mended
        self._renamed = False  # ... that changes what the disk reads as
        self._entries: dict[int, int] = {}  # to be mended: block -> entry
        self._copies: list[tuple[int, int]] = []  # (block, entry) whose place is another's too
        self._needed = 0  # bytes that the last block needs of the file
        self._present = 0  # blocks
        self._searched = False  # data is missing that may lie where nothing seems to be

    def run(self) -> Items:
        headers.read_creator(self._file)
        try:
            yield from self._headers()
            yield from self._log()
            regions = yield from self._regions()
            disk = headers.read_disk(self._file, regions[headers.METADATA])
            table = open_table(self._file, disk, regions[headers.BAT])
            if disk.has_parent:
                yield from self._locator(disk)
            taken = headers.taken_regions(self._header, regions)
            yield from self._bitmaps(table, taken)
            end, holes = yield from self._blocks(disk, table, taken)
            end = yield from self._mended(table, end)
            yield from self._space(disk, table, end, holes)
        except Corrupt as error:
            yield damage(error.place, error.text)

    # Headers, log, region tables

    def _headers(self) -> Items:
        found, complaints = headers.parse_headers(self._file)
        self._header, self._slot = headers.read_headers(self._file)
        for number, header in enumerate(found):
            if header is None:
                # That is what a cut leaves, and why there are two.
                place, _, text = complaints[0].partition(": ")
                yield Finding(Severity.NOTE, place, text, self._mend)
                if self._mend:
                    older = replace(self._header, sequence=max(0, self._header.sequence - 1))
                    yield Plan(Write(headers.HEADER_OFFSETS[number], older.pack()))

    def _log(self) -> Items:
        header = self._header
        place = f"header {self._slot + 1} at {headers.HEADER_OFFSETS[self._slot]}"
        try:
            journal = Journal(self._file, header, self._slot)
        except (Corrupt, Unsupported) as error:
            yield Finding(Severity.NOTE, place, error.text)
            self._mend = self._trim = False
            return
        if header.log_guid == NIL:
            return
        replay = find_log(self._file, header)
        if replay is None:
            text = "names a log that has no entries (MS-VHDX 2.3.3)"
            yield Finding(Severity.DAMAGE, place, text, self._mend)
        else:
            text = f"to be replayed, {replay.entries} entries"
            yield Finding(Severity.NOTE, f"log at {header.log_offset}", text, self._mend)
        if self._mend:
            yield Plan(*journal.begin(replay, same_data=True))
            self._journal = journal
        else:
            self._trim = False  # nothing may be written before it
            if replay:
                apply_in_memory(self._file, replay)

    def _regions(self) -> Generator[Item, None, dict[UUID, Region]]:
        tables, complaints = headers.read_region_tables(self._file)
        regions, used = headers.read_regions(self._file)
        headers.check_overlaps(self._file, headers.taken_regions(self._header, regions)[1:])
        good = tables[used - 1]
        assert good is not None
        other = 2 - used
        at = headers.REGION_TABLE_OFFSETS[other]
        if tables[other] is None:
            place, _, text = complaints[0].partition(": ")
            yield Finding(Severity.DAMAGE, place, text, self._mend)
        elif tables[other] != good:
            text = f"another one than region table {used}, which is used"
            yield Finding(Severity.DAMAGE, f"region table {other + 1} at {at}", text, self._mend)
        if self._mend and tables[other] != good:
            yield Plan(*self._begin(), Write(at, good))
        required = headers.all_required(good)
        if required != good:
            # Both copies, one after the other: what changes lies in one sector of each.
            mends = self._mend and required[FIRST_SECTOR:] == good[FIRST_SECTOR:]
            place = f"region table {used} at {headers.REGION_TABLE_OFFSETS[used - 1]}"
            text = "the BAT or the metadata region is not marked as required (MS-VHDX 2.2.3.2)"
            yield Finding(Severity.NOTE, place, text, mends)
            if mends:
                first, second = headers.REGION_TABLE_OFFSETS
                new = required[:FIRST_SECTOR]
                yield Plan(*self._begin(), Write(second, new), Barrier, Write(first, new))
        return regions

    def _locator(self, disk: Disk) -> Items:
        item = disk.items[headers.PARENT_LOCATOR]
        try:
            vhdx_locator.parse(self._file, item.offset, item.data)
        except (Corrupt, Unsupported) as error:
            yield damage(error.place, error.text)

    # The table

    def _bitmaps(self, table: Table, taken: list[Region]) -> Items:
        """Those that are needed join `taken`."""
        if not table.has_parent:
            return
        found = []
        for chunk in table.partial_chunks():
            host = find_bitmap(table, chunk, taken)
            if host is None:
                place = f"BAT entry of sector bitmap {chunk} at {table.bitmap_place(chunk)}"
                self._searched = True
                yield damage(place, "leads nowhere, but blocks are partially present")
            else:
                found.append(Region(f"sector bitmap {chunk}", host, BITMAP))
        taken += found

    def _blocks(
        self, disk: Disk, table: Table, taken: list[Region]
    ) -> Generator[Item, None, tuple[int, list[tuple[int, int]]]]:
        """Where the last used MiB ends, and the holes before it: (first MiB, count)."""
        width = table.block_size // MIB
        file_end = -(-self._file.size // MIB)
        end = 0
        holes: list[tuple[int, int]] = []
        reached = bytes(width)  # what the part before has marked of this one
        for low in range(0, file_end, WINDOW):
            used = bytearray(min(WINDOW, file_end - low) + width)
            used[:width] = reached
            for region in taken:
                fill(used, region.offset // MIB - low, region.length // MIB, TAKEN)
            yield from self._window(table, used, low)
            reached = bytes(used[-width:])
            last = len(used.rstrip(b"\0"))
            if last:
                end = max(end, low + last)
            if low + WINDOW < file_end:  # else it may be that nothing more comes
                last = len(used) - width
            for hole in re.finditer(rb"\0+", used[:last]):
                if len(holes) < MAX_PUNCHES:
                    holes.append((low + hole.start(), len(hole[0])))
        holes = [(at, count) for at, count in holes if at < end]
        return end * MIB, holes

    def _window(self, table: Table, used: bytearray, low: int) -> Items:
        """Blocks that begin in this part of the file; what no part has, with the first one."""
        width, size = table.block_size // MIB, self._file.size
        file_end = -(-size // MIB)
        for seen, (number, entry) in enumerate(table.used()):
            if seen % EVERY == 0:
                yield Progress(number, table.count)
            is_bitmap, block = table.which(number)
            state, at = entry & STATE, entry >> 20
            within = at - low
            if is_bitmap:
                if table.has_parent and state == PRESENT:
                    fill(used, within, BITMAP // MIB, NAMED)
                continue
            if state not in (PRESENT, PARTIAL):
                if not low:
                    yield from self._odd(table, block, entry)
                if at:
                    fill(used, within, width, NAMED)
                continue
            if state == PARTIAL and not table.has_parent and not low:
                yield damage(table.describe(block), "partially present, but there is no parent")
            if at >= file_end:
                if not low:
                    yield from self._lost(table, block, f"at {at * MIB}, the file ends at {size}")
                continue
            if not 0 <= within < len(used) - width:
                continue  # another part's
            place = used[within : within + width]
            if TAKEN in place:
                yield from self._lost(table, block, f"at {at * MIB}, where the metadata lies")
            elif BLOCK in place:
                yield from self._twice(table, block, entry)
            else:
                fill(used, within, width, BLOCK)
                self._present += 1
                self._needed = max(self._needed, (at + width) * MIB)
        yield from self._flush(table)

    def _odd(self, table: Table, block: int, entry: int) -> Items:
        state, at = entry & STATE, entry >> 20
        if state == RESERVED:
            text = f"state {state}, which is reserved: the data is lost"
            self._searched = True
            yield Finding(Severity.DAMAGE, table.describe(block), text, self._mend)
            yield from self._replace(table, block, UNDEFINED)
        elif state == OLD_UNMAPPED:
            text = f"state {state}, which version 0.95 of the specification called unmapped"
            yield Finding(Severity.NOTE, table.describe(block), text, self._mend)
            yield from self._replace(table, block, entry & ~STATE | UNMAPPED)
        elif state == ZERO and at:
            text = f"zero, but at {at * MIB}: Hyper-V may refuse the image"
            yield Finding(Severity.NOTE, table.describe(block), text, self._mend)
            yield from self._replace(table, block, ZERO)

    def _lost(self, table: Table, block: int, text: str) -> Items:
        text += ": the data is lost"
        self._searched = True
        yield Finding(Severity.DAMAGE, table.describe(block), text, self._mend)
        yield from self._replace(table, block, UNDEFINED)

    def _twice(self, table: Table, block: int, entry: int) -> Items:
        mends = self._mend and not self._file.is_device and len(self._copies) < MAX_COPIES
        text = f"at {entry >> 20 << 20}, where another block lies"
        yield Finding(Severity.DAMAGE, table.describe(block), text, mends)
        if mends:
            self._copies.append((block, entry))

    def _replace(self, table: Table, block: int, entry: int) -> Items:
        if self._mend:
            self._entries[block] = entry
            if len(self._entries) >= BATCH:
                yield from self._flush(table)

    def _flush(self, table: Table) -> Items:
        if self._entries:
            sectors, _ = table.change(sorted(self._entries.items()))
            self._entries.clear()
            yield self._logged(sectors)

    def _mended(self, table: Table, end: int) -> Generator[Item, None, int]:
        """Places of their own for blocks that share one; then the log is closed.  The new end."""
        size = self._file.size
        if self._needed > size:
            text = f"the file ends at {size}, its last block at {self._needed}"
            yield Finding(Severity.NOTE, "file", text, self._mend and not self._file.is_device)
            if self._mend and not self._file.is_device:
                yield Plan(*self._begin(), Extend(self._needed))
        end = max(end, -(-self._file.size // MIB) * MIB) if self._copies else end
        for block, entry in self._copies:
            start, end = end, end + table.block_size
            old = entry >> 20 << 20
            yield Plan(*self._begin(), Extend(end))
            for at in range(0, table.block_size, MIB):
                data = self._file.pread_padded(old + at, MIB)
                if data.strip(b"\0"):
                    yield Plan(Write(start + at, data))
            assert self._journal
            self._journal.durable_size = end
            sectors, _ = table.change([(block, start | entry & STATE)])
            yield self._logged(sectors)
            self._present += 1
        if self._journal and (steps := self._journal.end()):
            yield Plan(*steps)
        return end

    def _space(self, disk: Disk, table: Table, end: int, holes: list[tuple[int, int]]) -> Items:
        """What is behind the last block, and between blocks."""
        size = self._file.size
        if disk.fixed:  # 2.6.2.1: there has to be room for every block
            end += (table.blocks - self._present) * table.block_size
        trims = self._trim and not self._file.is_device and not self._searched
        if size > end and not self._file.is_device:
            text = f"{size - end} bytes behind the last block, which ends at {end}"
            if self._searched:
                text += "; what is lost may lie there, so it is kept this time"
            yield Finding(Severity.LEAK, "file", text, trims)
            if trims:
                yield Plan(*self._begin(), Truncate(end))
        if holes and not disk.fixed:
            text = f"{sum(count for _, count in holes)} MiB between blocks are free"
            yield Finding(Severity.NOTE, "file", text)
            if trims:
                steps = (Punch(at * MIB, count * MIB) for at, count in holes)
                yield Plan(*self._begin(), *steps)

    # Writing

    def _begin(self) -> list[Step]:
        """Before the first change; what the disk reads as stays."""
        if self._journal is not None:
            return []
        self._journal = Journal(self._file, self._header, self._slot)
        return self._journal.begin(None, same_data=True)

    def _logged(self, sectors: dict[int, bytes]) -> Plan:
        """Entries that change what the disk reads as, so that its children must refuse it."""
        steps = self._begin()
        assert self._journal
        if not self._renamed:
            self._renamed = True
            rename = self._journal.write_header(data_write_guid=uuid4())
            steps += [rename, Barrier, self._journal.write_header(), Barrier]
        steps += self._journal.change(sectors)
        self._journal.barrier()  # each plan is made durable
        return Plan(*steps)


def fill(used: bytearray, start: int, count: int, what: int) -> None:
    """Mark MiB; blocks hide names, and the metadata hides both."""
    low, high = max(0, start), min(start + count, len(used))
    if low >= high:
        return
    if what == NAMED and used[low:high].strip(b"\0"):
        for at in range(low, high):
            used[at] = used[at] or NAMED
    else:
        used[low:high] = bytes([what]) * (high - low)


def damage(place: str, text: str) -> Finding:
    return Finding(Severity.DAMAGE, place, text)
