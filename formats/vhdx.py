"""VHDX: dynamic, fixed and differencing disks of Hyper-V, read and written.

Source: [MS-VHDX] 20240423.  Images made by Windows and by qemu-img 7.2 were read and written with
it; differencing disks that it made are read by libvhdi and 7-Zip.  What Hyper-V says to what we
write is not known.

What the specification leaves open, and what we do:

- A block that is not present (without a parent), undefined or unmapped may read as anything: it
  reads as zeros.
- State 5 is reserved; it is what version 0.95 of the specification called unmapped: zeros.
- BAT entries of sector bitmaps mean nothing without a parent and are not looked at (older qemu
  left copies of other entries in them); with one, only where a block is partially present.
- A discarded block becomes ZERO, the one state that promises zeros and hides the parent, and with
  file offset 0: Hyper-V does not read ZERO blocks that have one (so qemu's source says).
- A new block is always whole, so sector bitmaps are read and never written: writing to a block that
  is partially present moves it, and nothing refers to its bits any more.

A log may change guest data too, though no program known to us writes such ones.  Read-only, such
clusters are answered by inflate(); for writing the log has to be replayed first.

Writing.  Every change of the BAT goes through the log (vhdx_log.py); data blocks never do.  Rules 1
and 2 are in vhdx_journal.py.

3. The entry that unmaps a block is durable before the block is punched or used again.
4. The file is as long as its blocks need, durably, before an entry maps them: qemu does not make it
   longer when it replays.
"""

from __future__ import annotations

import errno
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from virtmount.errors import Corrupt, NeedsRecovery, Unsupported
from virtmount.formats import vhdx_bat as bat
from virtmount.formats import vhdx_change, vhdx_check, vhdx_create, vhdx_locator
from virtmount.formats import vhdx_header as headers
from virtmount.formats.vhdx_bat import ENTRY, PARTIAL, PRESENT, STATE, ZERO, runs
from virtmount.formats.vhdx_header import MIB, NIL, Region
from virtmount.formats.vhdx_journal import Journal, apply_in_memory, find_log
from virtmount.hostfile import HostFile
from virtmount.image import (
    DEFAULTS,
    Caps,
    Dirty,
    Extent,
    Image,
    Kind,
    Layout,
    Leaf,
    Match,
    Options,
    ParentRef,
    Reservation,
    Rule,
    Run,
    Span,
    last_place,
)
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate
from virtmount.upkeep import Choice, Finding, New, Progress, Repair

MAX_LEAF = 4096  # entries
FLAT_ENTRIES = 1 << 16  # of a fixed disk's BAT that is read to see whether all lies in order
MAX_HOST = 1 << 60  # the map's limit
GROWTH = 32 * MIB  # the file is made so much longer than the blocks need
PATCHED_CLUSTER = MIB  # of a disk whose data is changed by a log that was replayed in memory

_RUNS = re.compile(r"0+|1+")


class VHDX(Image):
    name: ClassVar[str] = "vhdx"
    choices: ClassVar[Mapping[str, Choice]] = vhdx_create.CHOICES
    creates: ClassVar[bool] = True
    checks: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = ("vhdx", "avhdx")

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if head.startswith(headers.SIGNATURE) else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self.file = file
        self.files = [file]
        self._creator = headers.read_creator(file)
        self.header, self.slot = headers.read_headers(file)
        self.replay = find_log(file, self.header)
        if self.replay:
            apply_in_memory(file, self.replay)
        self.regions, self._region_table = headers.read_regions(file)
        self.taken = headers.taken_regions(self.header, self.regions)
        headers.check_overlaps(file, self.taken[1:])
        self.disk = disk = headers.read_disk(file, self.regions[headers.METADATA])
        self.table = bat.open_table(file, disk, self.regions[headers.BAT])

        self.variant = "differencing" if disk.has_parent else "fixed" if disk.fixed else "dynamic"
        self.size = disk.size
        self.sector_size = disk.sector_size
        self.physical_sector_size = disk.physical_sector_size
        self.identity = str(self.header.data_write_guid)
        self._locator = self._read_locator(options) if disk.has_parent else None
        if self._locator:
            identity = str(self._locator.identity)
            self.parent = ParentRef(self._locator.names(file.path.name), "vhdx", identity)
        self._layout = Layout(
            width=ENTRY,
            byteorder="little",
            mask=0xFFFFFFFFFFF00000,
            low=headers.HEADER_SECTION,
            rules=(
                Rule(STATE, 0, Kind.ABSENT),
                Rule(4, 0, Kind.ZERO),  # 1 undefined, 2 zero, 3 unmapped
                Rule(STATE, 5, Kind.ZERO),
                Rule(STATE, 4, Kind.INVALID),
                # Only a block with a parent can be partially present.
                Rule(STATE, PARTIAL, Kind.PARTIAL if disk.has_parent else Kind.INVALID),
            ),
        )
        self._partial = False  # whether any block is partially present
        self.bitmaps: dict[int, int] = {}  # of chunks with such blocks: where the bitmap block is
        if disk.has_parent:
            self._find_bitmaps()
        self._forbidden = Ranges((region.offset, region.end) for region in self.taken)
        self._patched = Ranges(self._changed_data())
        self._changed_block = self._find_changed_block()
        if self._changed_block is None:
            self._patched = Ranges(())  # nothing is read there
        self.cluster_size = PATCHED_CLUSTER if self._patched else disk.block_size
        self.entries_per_leaf = MAX_LEAF if self._patched else min(disk.chunk, MAX_LEAF)
        self.layout = None if self._patched else self._layout
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
        if self._patched:
            return Leaf(kind=Kind.PARTIAL)
        return Leaf(table=self.table.place(index * self.entries_per_leaf))

    @property
    def grain(self) -> int:
        return self.sector_size if self._partial else self.cluster_size

    def slow(self, cluster: int) -> Sequence[Extent]:
        self._finish_begin()
        return list(self._pieces(cluster))

    def inflate(self, cluster: int) -> bytes:
        """Data that a log changes, as it will be: see PATCHED_CLUSTER."""
        block, within = divmod(cluster * self.cluster_size, self.disk.block_size)
        kind, host = self.locate(block)
        if not self._patched or kind not in (Kind.DATA, Kind.PARTIAL):
            raise Corrupt(self.file, self.table.describe(block), "nothing that the log changes")
        return self.file.pread_padded(host + within, self.cluster_size)

    def metadata(self) -> Iterable[Span]:
        return [Span(region.offset, region.length) for region in self.taken]

    def details(self) -> dict[str, Any]:
        header, slot = self.header, self.slot
        if self._begun:
            header, slot = self.journal.header, self.journal.slot
        if self.replay:
            log = f"to be replayed, {self.replay.entries} entries"
        elif header.log_guid != NIL:
            log = "in use" if self._begun else "empty, though the header names one"
        else:
            log = "empty"
        found = {
            "creator": self._creator,
            "block_size": self.disk.block_size,
            "logical_sector_size": self.sector_size,
            "physical_sector_size": self.physical_sector_size,
            "log": log,
            "log_size": header.log_length,
            "header": slot + 1,
            "header_sequence": header.sequence,
            "region_table": self._region_table,
            "disk_id": str(self.disk.disk_id),
            "file_write_guid": str(header.file_write_guid),
            "data_write_guid": str(header.data_write_guid),
        }
        if self._locator:
            for key in vhdx_locator.KEYS:
                if key in self._locator.values:
                    text = self._locator.values[key]
                    found[key] = "".join(c for c in text if c.isprintable())
        return found

    def _read_locator(self, options: Options) -> vhdx_locator.Locator | None:
        item = self.disk.items[headers.PARENT_LOCATOR]
        try:
            return vhdx_locator.parse(self.file, item.offset, item.data)
        except (Corrupt, Unsupported):
            if not options.changing_parent:
                raise
            return None  # it is about to get another one

    def _find_bitmaps(self) -> None:
        """Where the sector bitmap blocks lie that are needed.

        One that lies nowhere is left out: then its blocks are invalid.
        """
        found = []
        for chunk in self.table.partial_chunks():
            self._partial = True
            host = bat.find_bitmap(self.table, chunk, self.taken)
            if host is not None:
                self.bitmaps[chunk] = host
                found.append(Region(f"sector bitmap {chunk}", host, bat.BITMAP))
        self.taken += found

    def locate(self, block: int) -> tuple[Kind, int]:
        """Kind and host offset of a whole block."""
        entry = self.table.entry(block)
        for rule in self._layout.rules:
            if entry & rule.mask == rule.value:
                kind = rule.kind
                break
        else:
            kind = Kind.DATA
        host = entry >> 20 << 20
        if kind not in (Kind.DATA, Kind.PARTIAL):
            return kind, 0
        limit = last_place(self._layout, self.disk.block_size, self.file.size)
        if not MIB <= host < limit or self._touches_metadata(host):
            return Kind.INVALID, 0
        return kind, host

    def _pieces(self, cluster: int) -> Iterator[Extent]:
        block, within = divmod(cluster * self.cluster_size, self.disk.block_size)
        start = cluster * self.cluster_size
        kind, host = self.locate(block)
        data = Kind.DATA
        if kind in (Kind.DATA, Kind.PARTIAL):
            host += within
            if self._patched.touch(host, self.cluster_size):
                data = Kind.COMPRESSED
        if kind is Kind.DATA:
            yield Extent(start, self.cluster_size, data, host if data is Kind.DATA else 0)
            return
        bits = self._bits(block) if kind is Kind.PARTIAL else ""
        if not bits:
            yield Extent(start, self.cluster_size, Kind.INVALID if kind is Kind.PARTIAL else kind)
            return
        sector = self.sector_size
        first = within // sector
        # There may be half a million: what can be said before the loop is.
        absent, start = Kind.ABSENT, start - within
        base = host - within if data is Kind.DATA else -1
        for run in _RUNS.finditer(bits, first, first + self.cluster_size // sector):
            low, high = run.span()
            at = low * sector
            if bits[low] == "0":
                yield Extent(start + at, (high - low) * sector, absent)
            else:
                place = base + at if base >= 0 else 0
                yield Extent(start + at, (high - low) * sector, data, place)

    def _bits(self, block: int) -> str:
        """A digit for each sector of a block, 1 where it lies in this file; empty: no bitmap."""
        chunk, within = divmod(block, self.disk.chunk)
        if chunk not in self.bitmaps:
            return ""
        length = self.disk.block_size // self.sector_size // 8
        raw = self.file.pread(self.bitmaps[chunk] + within * length, length)
        return f"{int.from_bytes(raw, 'little'):0{length * 8}b}"[::-1]

    def _find_flat(self) -> int | None:
        """Where the disk lies in one piece, if it does and nothing else is to be known first."""
        if not self.disk.fixed or self.table.blocks > FLAT_ENTRIES or self.replay:
            return None
        size = self.cluster_size
        base = None
        for first, entries in self.table.entries(0, self.table.blocks):
            if base is None:
                base = entries[0] >> 20 << 20
            for block, entry in enumerate(entries, first):
                if entry & STATE != PRESENT or entry >> 20 << 20 != base + block * size:
                    return None
        assert base is not None
        end = base + self.table.blocks * size
        if base + self.size > self.file.size:
            return None
        if any(base < region.end and region.offset < end for region in self.taken):
            return None
        return base

    def _changed_data(self) -> Iterator[tuple[int, int]]:
        """What the log changes and may be guest data: first byte, end."""
        for change in self.replay.changes if self.replay else ():
            start, end = change.offset, change.offset + change.length
            if not any(region.offset <= start and end <= region.end for region in self.taken):
                yield start, end

    def _find_changed_block(self) -> int | None:
        """A block whose data the log changes."""
        if self._patched:
            for number, entry in self.table.used():
                is_bitmap, block = self.table.which(number)
                if is_bitmap or entry & STATE not in (PRESENT, PARTIAL):
                    continue
                if self._patched.touch(entry >> 20 << 20, self.disk.block_size):
                    return block
        return None

    # Writing

    def _open_for_writing(self) -> None:
        self._refuse_changed_data()
        self.journal = Journal(self.file, self.header, self.slot)
        self._initial_size = self.file.size
        self._free: list[int] = []  # host blocks that read as zeros and held data before
        self._stale: list[int] = []  # the same, of unknown contents
        self._gaps: dict[int, int] = {}  # where no block fits between others: end -> start
        self._end = 0  # nothing is used from here on
        self._resized = False
        survey = bat.survey(self.table, self.taken, self._initial_size)
        if survey:
            self._end, self._stale, self._gaps = survey.end, survey.holes, survey.gaps
        self._surveyed = survey is not None

    def _refuse_changed_data(self) -> None:
        if self._changed_block is not None:
            raise NeedsRecovery(
                self.file,
                f"log at {self.header.log_offset}",
                f"changes the data of block {self._changed_block}: it must be replayed before "
                "writing",
                hint=f"virtmount check --repair {self.file}",
            )

    def begin(self) -> Plan:
        assert not self._begun
        self._begun = True
        steps = self.journal.begin(self.replay)
        if self.replay:
            # What is read from here on is what the plan writes.
            self.file.unpatch()
        self._begin_header = self.journal.header.pack()
        self.identity = str(self.journal.identity)
        return Plan(*steps)

    def _finish_begin(self) -> None:
        """At the first call after begin(): was its plan carried out to the end?

        If not, the log is only partly applied, and reads need it in memory again.
        """
        if not self._begin_header:
            return
        expected, self._begin_header = self._begin_header, b""
        if not self.replay:
            return
        found = self.file.pread(headers.HEADER_OFFSETS[self.journal.slot], len(expected))
        if found == expected:
            self.replay = None
        else:
            apply_in_memory(self.file, self.replay)

    def reserve(self, count: int) -> Reservation:
        self._finish_begin()
        size = self.cluster_size
        if not self._surveyed:
            least = max(self._initial_size, *(region.end for region in self.taken))
            self._end = bat.last_end(self.table, least)
            self._surveyed = True
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
        self.journal.durable_size = end + GROWTH
        return [Extend(end + GROWTH), Barrier]

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        self._finish_begin()
        if not dirty:
            return Plan()
        steps: list[Step] = []
        if any(new.barrier for new in dirty):
            steps.append(self.journal.barrier())
        sectors, before = self.table.change(
            (new.cluster, new.host_offset | PRESENT) for new in dirty
        )
        steps += self.journal.change(sectors)
        return Plan(*steps, *self._give_back(before))

    def discard(self, first: int, count: int) -> Plan:
        self._finish_begin()
        # What still shows through must be hidden: that of the parent, or what cannot be read.
        shown = (PRESENT, PARTIAL, 4, *((0,) if self.disk.has_parent else ()))
        count = min(count, self.table.blocks - first)
        unmapped = [
            (block, ZERO)
            for start, entries in self.table.entries(first, count)
            for block, entry in enumerate(entries, start)
            if entry & STATE in shown
        ]
        if not unmapped:
            return Plan()
        sectors, before = self.table.change(unmapped)
        return Plan(*self.journal.change(sectors), *self._give_back(before))

    def _give_back(self, entries: Iterable[tuple[int, int]]) -> list[Step]:
        """The places of blocks whose entries were these, once others are durable."""
        freed = [
            entry >> 20 << 20
            for _, entry in entries
            if entry & STATE in (PRESENT, PARTIAL) and self._is_data(entry >> 20 << 20)
        ]
        self._free += sorted(freed, reverse=True)
        size = self.cluster_size
        return [Punch(run.host_offset, run.count * size) for run in runs(freed, size)]

    def release(self, runs: Sequence[Run]) -> None:
        self._finish_begin()
        for run in runs:
            self._stale += (run.host_offset + i * self.cluster_size for i in range(run.count))

    def end(self) -> Plan:
        if not self._begun:
            return Plan()
        self._finish_begin()
        steps = self.journal.end()
        free = {*self._free, *self._stale}
        while (before := self._end - self.cluster_size) in free or self._end in self._gaps:
            self._end = before if before in free else self._gaps[self._end]
            self._resized = True
        if self.disk.fixed:
            self._end = max(self._end, self._initial_size)
        if self._resized and not self.file.is_device:
            steps.append(Truncate(self._end))
        return Plan(*steps)

    # Whole images

    @classmethod
    def create(cls, new: New) -> Plan:
        return vhdx_create.create(new)

    @classmethod
    def check(
        cls, file: HostFile, options: Options, repair: Repair
    ) -> Iterator[Finding | Plan | Progress]:
        return vhdx_check.Check(file, repair).run()

    def resize(self, size: int) -> Plan:
        self._refuse_changed_data()
        return vhdx_change.resize(self, size)

    def rebase(self, parent: Image | None, name: str) -> Plan:
        self._refuse_changed_data()
        return vhdx_change.rebase(self, parent, name)

    def forget_patches(self) -> None:
        """A plan replays the log: from here on it is for the file to say what is in it."""
        if self.file.writable:
            self.file.unpatch()

    def used_end(self) -> int:
        """Nothing lies from here on, nor does the file reach further; a whole MiB."""
        least = max(self.file.size, *(region.end for region in self.taken))
        least = max(least, self._end) if self._surveyed else bat.last_end(self.table, least)
        return -(-least // MIB) * MIB

    def _is_data(self, host: int) -> bool:
        """Whether a host block lies where only data can lie."""
        return host + self.disk.block_size <= self.file.size and not self._touches_metadata(host)

    def _touches_metadata(self, host: int) -> bool:
        return self._forbidden.touch(host, self.disk.block_size)


class Ranges:
    """Parts of the file, for a quick answer whether one of them is touched."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(ranges):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            elif start < end:
                self._starts.append(start)
                self._ends.append(end)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def touch(self, offset: int, length: int) -> bool:
        i = bisect_left(self._starts, offset + length)
        return i > 0 and self._ends[i - 1] > offset
