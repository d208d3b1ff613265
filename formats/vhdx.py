"""VHDX: dynamic and fixed disks of Hyper-V, read and written.

Source: [MS-VHDX] 20240423.  Images made by Windows and by qemu-img 7.2 were read and written with
it; what Hyper-V says to what we write is not known.  Not handled: differencing disks (HasParent),
refused at open, and with them sector bitmaps and partially present blocks.

What the specification leaves open, and what we do:

- A block that is not present, undefined or unmapped may read as anything: it reads as zeros.
- State 5 is reserved; it is what version 0.95 of the specification called unmapped: zeros.
- BAT entries of sector bitmaps mean nothing without a parent and are not looked at (older qemu
  left copies of other entries in them).
- A discarded block becomes ZERO, the one state that promises zeros, and with file offset 0: Hyper-V
  does not read ZERO blocks that have one (so qemu's source says).

Writing.  Every change of the BAT goes through the log (vhdx_log.py); data blocks never do.

1. FileWriteGuid and DataWriteGuid change in both headers before anything else is written, then a
   log that was found is applied.
2. The header names our log only once its first entry is durable, and no longer names it before
   the file is cut at the end.
3. The entry that unmaps a block is durable before the block is punched or used again.
4. The file is as long as its blocks need, durably, before an entry maps them: qemu does not make it
   longer when it replays.
"""

from __future__ import annotations

import errno
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar
from uuid import uuid4

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import vhdx_header as headers
from virtmount.formats.vhdx_header import MIB, NIL, Region
from virtmount.formats.vhdx_log import ENTRY_CHANGES, SECTOR, LogWriter, Replay, find_replay
from virtmount.hostfile import HostFile
from virtmount.image import (
    DEFAULTS,
    Caps,
    Dirty,
    Image,
    Kind,
    Layout,
    Leaf,
    Match,
    Options,
    Reservation,
    Rule,
    Run,
    Span,
)
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write

ENTRY = 8  # bytes of a BAT entry
STATE = 7  # mask
PRESENT, ZERO = 6, 2
INVALID = (4, 7)  # reserved, and partially present, which only a block with a parent can be
MAX_LEAF = 4096  # entries
FLAT_ENTRIES = 1 << 16  # of a fixed disk's BAT that is read to see whether all lies in order
SURVEY_ENTRIES = 1 << 20  # BAT entries that are looked at one by one before the file is written
MAX_HOLES = 1 << 16  # between the blocks of a file, that are used again
SURVEY_SIZE = 1 << 44  # ... in a file of at most so many bytes
CHUNK = MIB  # of the BAT, read at once
MAX_HOST = 1 << 60  # the map's limit
GROWTH = 32 * MIB  # the file is made so much longer than the blocks need


class VHDX(Image):
    name: ClassVar[str] = "vhdx"

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if head.startswith(headers.SIGNATURE) else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self.file = file
        self.files = [file]
        self._creator = headers.read_creator(file)
        self._header, self._slot = headers.read_headers(file)
        self._replay = self._find_replay()
        if self._replay:
            self._apply_in_memory(self._replay)
        self._regions, self._region_table = headers.read_regions(file)
        taken = list(self._regions.values())
        if self._header.log_length:
            taken.append(Region("log", self._header.log_offset, self._header.log_length))
        headers.check_overlaps(file, taken)
        self._taken = [Region("header section", 0, headers.HEADER_SECTION), *taken]
        disk = headers.read_disk(file, self._regions[headers.METADATA])

        self._disk = disk
        self.variant = "fixed" if disk.fixed else "dynamic"
        self.size = disk.size
        self.sector_size = disk.sector_size
        self.physical_sector_size = disk.physical_sector_size
        self.identity = str(self._header.data_write_guid)
        self.cluster_size = disk.block_size
        # After so many entries comes one for a sector bitmap.
        self._chunk = (disk.sector_size << 23) // disk.block_size
        self.entries_per_leaf = min(self._chunk, MAX_LEAF)
        self.layout = Layout(
            width=ENTRY,
            byteorder="little",
            mask=0xFFFFFFFFFFF00000,
            low=headers.HEADER_SECTION,
            rules=(
                Rule(STATE, 0, Kind.ABSENT),
                Rule(STATE, 5, Kind.ZERO),
                Rule(4, 0, Kind.ZERO),  # 1 undefined, 2 zero, 3 unmapped
                Rule(STATE, PRESENT, Kind.DATA),
                Rule(0, 0, Kind.INVALID),  # INVALID
            ),
        )
        self._blocks = -(-disk.size // disk.block_size)
        self._bat = self._regions[headers.BAT]
        needed = self._entry_offset(self._blocks - 1) + ENTRY - self._bat.offset
        if needed > self._bat.length:
            text = f"{self._bat.length} bytes, {needed} needed for {self._blocks} blocks"
            raise Corrupt(file, f"BAT at {self._bat.offset}", text)
        self.flat = self._find_flat()

        self.caps = Caps(
            write=file.writable,
            discard=file.writable and not disk.fixed,
            zero_hides_parent=True,
        )
        self._begun = False
        self._begin_header = b""  # what begin() left in the file when its plan was carried out
        if file.writable:
            self._open_for_writing()

    # Reading

    def leaf(self, index: int) -> Leaf:
        self._finish_begin()
        return Leaf(table=self._entry_offset(index * self.entries_per_leaf))

    def metadata(self) -> Iterable[Span]:
        return [Span(region.offset, region.length) for region in self._taken]

    def details(self) -> dict[str, Any]:
        header = self._header
        if self._replay:
            log = f"to be replayed, {self._replay.entries} entries"
        elif header.log_guid != NIL:
            log = "in use" if self._begun else "empty, though the header names one"
        else:
            log = "empty"
        return {
            "creator": self._creator,
            "block_size": self.cluster_size,
            "logical_sector_size": self.sector_size,
            "physical_sector_size": self.physical_sector_size,
            "log": log,
            "log_size": header.log_length,
            "header": self._slot + 1,
            "header_sequence": header.sequence,
            "region_table": self._region_table,
            "disk_id": str(self._disk.disk_id),
            "file_write_guid": str(header.file_write_guid),
            "data_write_guid": str(header.data_write_guid),
        }

    def _entry_offset(self, block: int) -> int:
        return self._bat.offset + (block + block // self._chunk) * ENTRY

    def _entries(self, first: int, count: int) -> Iterator[tuple[int, array[int]]]:
        """The BAT entries of some blocks, in pieces: first block, entries."""
        while count:
            until_bitmap = self._chunk - first % self._chunk
            step = min(count, until_bitmap, CHUNK // ENTRY)
            raw = self.file.pread(self._entry_offset(first), step * ENTRY)
            yield first, little(raw)
            first += step
            count -= step

    def _find_replay(self) -> Replay | None:
        header = self._header
        if header.log_guid == NIL:
            return None
        return find_replay(self.file, header.log_offset, header.log_length, header.log_guid)

    def _apply_in_memory(self, found: Replay) -> None:
        size = self.file.size
        if found.size > size:
            self.file.patch_zeros(size, found.size - size)
        for change in found.changes:
            if change.data is None:
                self.file.patch_zeros(change.offset, change.length)
            else:
                self.file.patch(change.offset, change.data)

    def _find_flat(self) -> int | None:
        """Where the disk lies in one piece, if it does and nothing else is to be known first."""
        if not self._disk.fixed or self._blocks > FLAT_ENTRIES or self._replay:
            return None
        size = self.cluster_size
        base = None
        for first, entries in self._entries(0, self._blocks):
            if base is None:
                base = entries[0] >> 20 << 20
            for block, entry in enumerate(entries, first):
                if entry & STATE != PRESENT or entry >> 20 << 20 != base + block * size:
                    return None
        assert base is not None
        end = base + self._blocks * size
        if base + self.size > self.file.size:
            return None
        if any(base < region.end and region.offset < end for region in self._taken):
            return None
        return base

    # Writing

    def _open_for_writing(self) -> None:
        header, place = self._header, f"header {self._slot + 1}"
        if header.log_length == 0:
            raise Unsupported(self.file, place, "writing without a log (log length 0)")
        if header.sequence > headers.MAX_SEQUENCE:
            text = f"sequence number {header.sequence}, at most {headers.MAX_SEQUENCE} for writing"
            raise Corrupt(self.file, place, text)
        self._log = LogWriter(header.log_offset, header.log_length)
        # BAT sectors that the last entry changed: in place, but not known to be durable there.
        self._unsettled: dict[int, bytes] = {}
        self._initial_size = self.file.size
        self._durable_size = self._initial_size  # at most, once the plans are carried out
        self._free: list[int] = []  # host blocks that read as zeros and held data before
        self._stale: list[int] = []  # the same, of unknown contents
        self._end = 0  # nothing is used from here on
        self._resized = False
        surveyed = self._blocks <= SURVEY_ENTRIES and self._initial_size <= SURVEY_SIZE
        if surveyed:
            self._survey()
        self._surveyed = surveyed

    def _survey(self) -> None:
        """Find what is free, and refuse a BAT that gives one place to two.

        A discard or a reuse in such an image would destroy the other block's data.
        """
        size = self.cluster_size // MIB
        file_end = -(-self._initial_size // MIB)
        used = bytearray(file_end + size)  # by MiB
        for region in self._taken:
            used[region.offset // MIB : region.end // MIB] = bytes([1]) * (
                region.end // MIB - region.offset // MIB
            )
        kept = []
        whole = bytes([1]) * size
        for first, entries in self._entries(0, self._blocks):
            for block, entry in enumerate(entries, first):
                at = entry >> 20
                if not at:
                    continue
                if entry & STATE != PRESENT:
                    kept.append(at)  # no data of ours, but the place is named
                    continue
                if at >= file_end:
                    text = f"at {at * MIB}, the file ends at {self._initial_size}"
                    raise Corrupt(self.file, self._place(block), text)
                if any(used[at : at + size]):
                    text = f"at {at * MIB}, where another block or the metadata lies"
                    raise Corrupt(self.file, self._place(block), text)
                used[at : at + size] = whole
        for at in kept:
            if at < file_end:
                used[at : at + size] = whole
        self._end = (used.rfind(1) + 1) * MIB
        hole = bytes(size)
        at = used.find(hole, 0, self._end // MIB)
        while at >= 0 and len(self._stale) < MAX_HOLES:
            self._stale.append(at * MIB)
            at = used.find(hole, at + size, self._end // MIB)
        self._stale.reverse()  # taken from the end: the lowest first

    def _place(self, block: int) -> str:
        return f"BAT entry of block {block} at {self._entry_offset(block)}"

    def _find_end(self) -> None:
        """Without a survey: the end of the last place that any entry names.

        Such a place may lie past the end of the file, where it holds no data.  New blocks go behind
        it all the same, or the entry would come to point into them.
        """
        end = -(-max(self._initial_size, *(region.end for region in self._taken)) // MIB) * MIB
        at = self._bat.offset
        last = self._entry_offset(self._blocks - 1) + ENTRY
        zeros = bytes(CHUNK)
        while at < last:
            raw = self.file.pread(at, min(CHUNK, last - at))
            if raw != zeros:
                end = max(end, (max(little(raw)) >> 20 << 20) + self.cluster_size)
            at += len(raw)
        self._end = end
        self._surveyed = True

    def begin(self) -> Plan:
        assert not self._begun
        self._begun = True
        file_write, data_write = uuid4(), uuid4()
        steps: list[Step] = []
        if self._replay:
            # 2.2.2: the file's GUID changes before the replay; its log stays until all is applied.
            steps += [self._write_header(file_write_guid=file_write), Barrier]
            steps += replay_steps(self._replay)
            steps.append(Barrier)
            # What is read from here on is what the plan writes.
            self.file.unpatch()
        steps += [
            self._write_header(
                file_write_guid=file_write, data_write_guid=data_write, log_guid=NIL, log_version=0
            ),
            Barrier,
            self._write_header(),
            Barrier,
        ]
        self._begin_header = self._header.pack()
        self.identity = str(data_write)
        return Plan(*steps)

    def _finish_begin(self) -> None:
        """At the first call after begin(): was its plan carried out to the end?

        If not, the log is only partly applied, and reads need it in memory again.
        """
        if not self._begin_header:
            return
        expected, self._begin_header = self._begin_header, b""
        if not self._replay:
            return
        found = self.file.pread(headers.HEADER_OFFSETS[self._slot], len(expected))
        if found == expected:
            self._replay = None
        else:
            self._apply_in_memory(self._replay)

    def _write_header(self, **changes: Any) -> Write:
        """Make the other header the current one, with the next sequence number."""
        self._header = replace(self._header, sequence=self._header.sequence + 1, **changes)
        self._slot = 1 - self._slot
        return Write(headers.HEADER_OFFSETS[self._slot], self._header.pack())

    def reserve(self, count: int) -> Reservation:
        self._finish_begin()
        size = self.cluster_size
        if not self._surveyed:
            self._find_end()
        if self._free:
            taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
            return Reservation(runs(taken, size), Plan(), reused=True)
        if self._stale:
            taken = [self._stale.pop() for _ in range(min(count, len(self._stale)))]
            found = runs(taken, size)
            steps: list[Step] = [Punch(run.host_offset, run.count * size) for run in found]
            steps += self._lengthen(found[-1].host_offset + found[-1].count * size)
            return Reservation(found, Plan(*steps), reused=True)
        start, steps = self._end, []
        # An earlier session that was cut off may have left data behind the last block.
        left_over = max(0, self._initial_size - start)
        if left_over:
            count = min(count, -(-left_over // size))
            steps.append(Punch(start, min(left_over, count * size)))
        end = start + count * size
        if end > MAX_HOST:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        steps += self._lengthen(end)
        self._end = end
        return Reservation((Run(start, count),), Plan(*steps), reused=left_over > 0)

    def _lengthen(self, end: int) -> list[Step]:
        """Make the file as long as blocks up to `end` need.

        Longer at once, so that most reservations need no barrier.  If the plan fails, the file is
        as long as it was: so its length is asked for again, here and for every log entry.
        """
        if end <= self.file.size:
            return []
        if self.file.is_device:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._resized = True
        self._durable_size = end + GROWTH
        return [Extend(end + GROWTH), Barrier]

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        self._finish_begin()
        if not dirty:
            return Plan()
        steps: list[Step] = []
        if any(new.barrier for new in dirty):
            steps.append(Barrier)
            self._unsettled.clear()
        changed = self._changed((new.cluster, new.host_offset | PRESENT) for new in dirty)
        return Plan(*steps, *self._logged(changed))

    def discard(self, first: int, count: int) -> Plan:
        self._finish_begin()
        size = self.cluster_size
        unmapped = []
        freed = []
        for start, entries in self._entries(first, min(count, self._blocks - first)):
            for block, entry in enumerate(entries, start):
                if entry & STATE in (PRESENT, *INVALID):
                    unmapped.append((block, ZERO))
                if entry & STATE == PRESENT and self._is_data(entry >> 20 << 20):
                    freed.append(entry >> 20 << 20)
        if not unmapped:
            return Plan()
        steps = self._logged(self._changed(unmapped))
        self._free += sorted(freed, reverse=True)
        steps += (Punch(run.host_offset, run.count * size) for run in runs(freed, size))
        return Plan(*steps)

    def release(self, runs: Sequence[Run]) -> None:
        self._finish_begin()
        for run in runs:
            self._stale += (run.host_offset + i * self.cluster_size for i in range(run.count))

    def end(self) -> Plan:
        if not self._begun:
            return Plan()
        self._finish_begin()
        steps: list[Step] = []
        if self._header.log_guid != NIL:
            steps += [
                Barrier,  # all is in place
                self._write_header(log_guid=NIL),
                Barrier,
                self._write_header(),
                Barrier,
            ]
        self._unsettled.clear()
        free = {*self._free, *self._stale}
        while self._end - self.cluster_size in free:
            self._end -= self.cluster_size
            self._resized = True
        if self._disk.fixed:
            self._end = max(self._end, self._initial_size)
        if self._resized and not self.file.is_device:
            steps.append(Truncate(self._end))
        return Plan(*steps)

    def _is_data(self, host: int) -> bool:
        """Whether a host block lies where only data can lie."""
        end = host + self.cluster_size
        if end > self.file.size:
            return False
        return not any(host < region.end and region.offset < end for region in self._taken)

    def _changed(self, entries: Iterable[tuple[int, int]]) -> dict[int, bytes]:
        """The BAT sectors that these (block, entry) change: file offset -> new contents."""
        sectors: dict[int, bytearray] = {}
        for block, entry in entries:
            within = self._entry_offset(block) % SECTOR
            at = self._entry_offset(block) - within
            if at not in sectors:
                sectors[at] = bytearray(self.file.pread(at, SECTOR))
            sectors[at][within : within + ENTRY] = entry.to_bytes(ENTRY, "little")
        return {at: bytes(sector) for at, sector in sectors.items()}

    def _logged(self, sectors: dict[int, bytes]) -> list[Step]:
        """Write sectors through the log, then in place.

        What the batch before changed is in place, but perhaps not durably: it goes into this one
        as well, or is made durable first.  The new changes are safe at the last Barrier.
        """
        steps: list[Step] = []
        offsets = sorted(sectors)
        room = self._log.capacity
        for start in range(0, len(offsets), room):
            part = {at: sectors[at] for at in offsets[start : start + room]}
            if self._unsettled and len(self._unsettled.keys() | part.keys()) > ENTRY_CHANGES:
                steps.append(Barrier)
                self._unsettled.clear()
            length = min(self._durable_size, self.file.size)
            writes, lap = self._log.append(
                self._unsettled | part,
                flushed_size=length // MIB * MIB,
                last_size=-(-length // MIB) * MIB,
            )
            steps += [*writes, Barrier]
            if lap:
                steps += [self._write_header(log_guid=lap), Barrier, self._write_header()]
            steps += (Write(at, sector) for at, sector in part.items())
            self._unsettled = part
        return steps


def little(raw: bytes) -> array[int]:
    entries = array("Q", raw)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def runs(offsets: Iterable[int], size: int) -> tuple[Run, ...]:
    """Host clusters as runs of adjacent ones."""
    found: list[Run] = []
    for offset in sorted(offsets):
        if found and found[-1].host_offset + found[-1].count * size == offset:
            found[-1] = found[-1]._replace(count=found[-1].count + 1)
        else:
            found.append(Run(offset, 1))
    return tuple(found)


def replay_steps(found: Replay) -> list[Step]:
    steps: list[Step] = [Extend(found.size)]
    for change in found.changes:
        if change.data is None:
            steps.append(Punch(change.offset, change.length))
        else:
            steps.append(Write(change.offset, change.data))
    return steps
