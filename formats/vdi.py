"""VirtualBox VDI, version 1.1: dynamic and fixed images, read and written.

Source: VirtualBox, VDICore.h, for the fields; the order of writes is our own, because both
VirtualBox and qemu write without barriers.  Tried with images made by qemu-img 7.2 (data at 1024)
and by VirtualBox 7 (map at 1 MiB).  Refused by name: undo (type 3) and differencing (type 4)
images, headers before 1.1, block extra data, block sizes that are not a power of two.

What the file says while it is written, and why:

1. The map never names a block that the header's count does not cover.  qemu and VirtualBox take
   the count as the number of the next free block, so a count that is too small lets them write
   over data after a crash.  reserve() therefore raises it, durably, before commit() maps.
   A count that is too large costs nothing, and `qemu-img check` reports it.
2. On reading, the count means nothing; the next free block is the largest in the map plus one.
3. A block that discard() freed may be mapped again once its unmapping is durable and it reads
   as zeros.
4. At end() no block below the count is unmapped: two programs that compare the count with
   different things (the number of mapped blocks, the next free one) then both find it right.
   Freed blocks at the end of the file are cut off.  Those in the middle are punched and given to
   guest blocks that hold nothing: they read as zeros as before.  Where there
   are more than MAX_HOLES of them they stay, at the cost of a complaint of `qemu-img check`.
"""

from __future__ import annotations

import errno
import sys
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from construct import Bytes, Const, ConstructError, Int32ul, Int64ul, Padding, Struct

from virtmount.errors import Corrupt, NotAnImage, Unsupported
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

SIGNATURE = (0xBEDA107F).to_bytes(4, "little")
VERSION = 0x00010001
DYNAMIC, FIXED = 1, 2
TYPES = {DYNAMIC: "dynamic", FIXED: "fixed", 3: "undo", 4: "differencing"}

DISCARDED = 0xFFFFFFFE  # VDICore.h calls this "zero"; smaller entries are block numbers
NEVER_WRITTEN = 0xFFFFFFFF  # ... and this "free"
ENTRY = 4
SECTOR = 512
LEAF = 1024  # entries

MIN_BLOCK = 4096
MAX_BLOCK = 256 << 20
MAX_BLOCKS = 1 << 26  # 64 TiB of 1 MiB blocks; a 256 MiB map
MAX_HOLES = 1 << 16  # that one session fills
SCAN = 1 << 16  # bytes of map looked at in one go
NO_UUID = bytes(16)

Header = Struct(
    "banner" / Bytes(64),  # text for people; any value
    "signature" / Const(SIGNATURE),
    "version" / Int32ul,
    "header_size" / Int32ul,  # from this field on
    "type" / Int32ul,
    "flags" / Int32ul,
    "comment" / Bytes(256),
    "map_offset" / Int32ul,  # bytes from the start of the file
    "data_offset" / Int32ul,
    Padding(5 * 4),  # CHS geometry for old guests, sector size, unused
    "disk_size" / Int64ul,
    "block_size" / Int32ul,
    "block_extra" / Int32ul,  # bytes in front of every block
    "blocks" / Int32ul,  # map entries
    "blocks_allocated" / Int32ul,
    "uuid" / Bytes(16),
    "modification_uuid" / Bytes(16),
    "linkage_uuid" / Bytes(16),  # the parent's
    "parent_modification_uuid" / Bytes(16),
)
assert Header.sizeof() == 456
HEADER_SIZE_FROM = 72
HEADER_SIZE_MIN = 384
COUNT_AT = 388
MODIFICATION_UUID_AT = 408

# What a file block is used for.  Every block below _end has one of these in _use.
STALE = 0  # nothing; its content is unknown
MAPPED = 1
RESERVED = 2  # handed out by reserve(), not mapped yet
CLEAN = 3  # nothing; reads as zeros


class VDI(Image):
    name: ClassVar[str] = "vdi"

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if head[64:68] == SIGNATURE else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._file = file
        self.files = [file]
        self._sector = bytearray(file.pread(0, SECTOR))  # the whole header: written at once
        try:
            header = Header.parse(bytes(self._sector))
        except ConstructError as error:
            raise NotAnImage(file, "header+64", "no VDI signature") from error
        self._check(header)
        self._header = header
        self._map_offset: int = header.map_offset
        self._data_offset: int = header.data_offset
        self._blocks: int = header.blocks
        self.variant = TYPES[header.type]
        # VirtualBox rounds down, qemu up; up shows all that was ever written.
        self.size = -(-header.disk_size // SECTOR) * SECTOR
        self.cluster_size = header.block_size
        self.entries_per_leaf = LEAF
        self.layout = Layout(
            width=ENTRY,
            byteorder="little",
            mask=0xFFFFFFFF,
            scale=header.block_size,
            bias=header.data_offset,
            rules=(
                Rule(0xFFFFFFFF, NEVER_WRITTEN, Kind.ABSENT),
                Rule(0xFFFFFFFF, DISCARDED, Kind.ZERO),
            ),
            low=header.data_offset,
        )
        self.identity = str(uuid.UUID(bytes_le=header.uuid))
        self.caps = Caps(write=file.writable, discard=file.writable, zero_hides_parent=True)

        self._use = bytearray(self._blocks)
        in_order = self._scan()
        self._mapped = self._use.count(MAPPED)
        in_file = -(-max(0, file.size - self._data_offset) // self.cluster_size)
        self._end = max(self._use.rfind(MAPPED) + 1, min(in_file, self._blocks))
        if header.type == FIXED and in_order and file.size >= self._data_offset + self.size:
            self.flat = self._data_offset
        if not file.writable:
            self._use = bytearray()  # only writing asks for it
        elif self._mapped and self._host(self._use.rfind(MAPPED)) >= file.size:
            # Growing the file would turn what is missing into zeros.
            text = f"block {self._use.rfind(MAPPED)} lies past the end of the file at {file.size}"
            raise Corrupt(file, "map", f"{text}: not written", hint="open it read-only")
        self._begun = False

    def _check(self, header: Any) -> None:
        file = self._file
        version = header.version
        if version != VERSION:
            text = f"version {version >> 16}.{version & 0xFFFF}, know 1.1"
            raise Unsupported(file, "header+68", text)
        if header.header_size < HEADER_SIZE_MIN:
            text = f"header of {header.header_size} bytes, at least {HEADER_SIZE_MIN} expected"
            raise Corrupt(file, "header+72", text)
        if header.type not in (DYNAMIC, FIXED):
            name = TYPES.get(header.type, "unknown")
            text = f"image type {header.type} ({name}), know 1 (dynamic) and 2 (fixed)"
            raise Unsupported(file, "header+76", text)
        for field, at in (("linkage_uuid", 424), ("parent_modification_uuid", 440)):
            if header[field] != NO_UUID:
                text = f"{field} names a parent, but a {TYPES[header.type]} image has none"
                raise Unsupported(file, f"header+{at}", text)
        if header.block_extra:
            text = f"{header.block_extra} bytes of extra data a block, know 0"
            raise Unsupported(file, "header+380", text)
        size = header.block_size
        if size & (size - 1) or not MIN_BLOCK <= size <= MAX_BLOCK:
            text = f"block size {size}, know powers of two from {MIN_BLOCK} to {MAX_BLOCK}"
            raise Unsupported(file, "header+376", text)
        if not header.disk_size:
            raise Corrupt(file, "header+368", "disk size 0")
        if header.blocks > MAX_BLOCKS:
            text = f"{header.blocks} blocks, at most {MAX_BLOCKS} are supported"
            raise Unsupported(file, "header+384", text)
        if header.disk_size > header.blocks * size:
            text = f"{header.blocks} blocks of {size} bytes for a disk of {header.disk_size}"
            raise Corrupt(file, "header+384", text)
        for field, at in (("map_offset", 340), ("data_offset", 344)):
            if header[field] % SECTOR:
                text = f"{field} {header[field]}, not a multiple of {SECTOR}"
                raise Unsupported(file, f"header+{at}", text)
        if header.map_offset < HEADER_SIZE_FROM + header.header_size:
            text = f"map_offset {header.map_offset} lies inside the header"
            raise Corrupt(file, "header+340", text)
        map_end = header.map_offset + header.blocks * ENTRY
        if map_end > file.size:
            text = f"map ends at {map_end}, the file at {file.size}"
            raise Corrupt(file, "header+340", text)
        if header.data_offset < map_end:
            text = f"data_offset {header.data_offset} lies before the map's end at {map_end}"
            raise Corrupt(file, "header+344", text)

    def _scan(self) -> bool:
        """Mark every mapped block in _use; True if the map is 0, 1, 2 … without a gap.

        Two owners of one block cannot both be right, so nothing is served then.
        """
        use, blocks = self._use, self._blocks
        in_order = 0  # entries
        for first, entries in self._entries(0, blocks):
            start, end = entries[0], entries[0] + len(entries)
            # Most stretches of most maps are runs.
            if (
                end <= blocks
                and entries == array("I", range(start, end))
                and use.find(MAPPED, start, end) < 0
            ):
                use[start:end] = bytes([MAPPED]) * len(entries)
                in_order += len(entries) if start == first else 0
                continue
            for index, block in enumerate(entries, first):
                if block >= DISCARDED:
                    continue
                if block >= blocks or use[block]:
                    raise self._wrong_entry(index, block)
                use[block] = MAPPED
        return in_order == blocks

    def _wrong_entry(self, index: int, block: int) -> Corrupt:
        text = f"block {block} has another owner as well"
        if block >= self._blocks:
            text = f"block {block}, know 0 to {self._blocks - 1}"
        return Corrupt(self._file, f"map entry {index} at {self._map_offset + index * ENTRY}", text)

    def _entries(self, first: int, count: int) -> Iterator[tuple[int, array[int]]]:
        """(index, entries) of the map in pieces; pieces of NEVER_WRITTEN only may be left out."""
        step = SCAN // ENTRY
        for at in range(first, first + count, step):
            length = min(step, first + count - at)
            raw = self._file.pread(self._map_offset + at * ENTRY, length * ENTRY)
            if raw.count(0xFF) == len(raw):
                continue
            entries = array("I")
            assert entries.itemsize == ENTRY
            entries.frombytes(raw)
            if sys.byteorder == "big":
                entries.byteswap()
            yield at, entries

    def leaf(self, index: int) -> Leaf:
        return Leaf(table=self._map_offset + index * LEAF * ENTRY)

    def details(self) -> dict[str, Any]:
        header = self._header
        return {
            "version": "1.1",
            "block_size": self.cluster_size,
            "blocks": self._blocks,
            "blocks_mapped": self._mapped,
            "blocks_allocated": header.blocks_allocated,
            "map_offset": self._map_offset,
            "data_offset": self._data_offset,
            "uuid": self.identity,
            "modification_uuid": str(uuid.UUID(bytes_le=header.modification_uuid)),
            "comment": header.comment.split(b"\0")[0].decode("utf-8", "replace"),
        }

    def metadata(self) -> Iterable[Span]:
        return (Span(0, self._data_offset),)

    # Writing

    def begin(self) -> Plan:
        """VirtualBox changes the modification UUID once a session; children compare it."""
        self._begun = True
        self._sector[MODIFICATION_UUID_AT : MODIFICATION_UUID_AT + 16] = uuid.uuid4().bytes_le
        return Plan(self._write_header(), Barrier)

    def _write_header(self) -> Write:
        self._sector[COUNT_AT : COUNT_AT + 4] = self._end.to_bytes(4, "little")
        return Write(0, bytes(self._sector))

    def _host(self, block: int) -> int:
        return self._data_offset + block * self.cluster_size

    def reserve(self, count: int) -> Reservation:
        for state in (CLEAN, STALE):
            run = self._free_run(state, count)
            if run:
                self._use[run[0] : run[1]] = bytes([RESERVED]) * (run[1] - run[0])
                plan = Plan() if state == CLEAN else Plan(self._punch(*run))
                if self._file.size < self._host(run[1]) or self._counted() < run[1]:
                    # Left by a reservation whose plan has failed.
                    plan += Plan(Extend(self._host(run[1])), self._write_header(), Barrier)
                return Reservation((self._run(*run),), plan, reused=True)
        first, last = self._end, min(self._end + max(1, count), self._blocks)
        if first == last:
            raise OSError(errno.ENOSPC, f"{self._file}: all {self._blocks} blocks are in use")
        self._use[first:last] = bytes([RESERVED]) * (last - first)
        self._end = last
        plan = Plan(Extend(self._host(last)), self._write_header(), Barrier)
        return Reservation((self._run(first, last),), plan)

    def _counted(self) -> int:
        """The count that the file's header has."""
        return int.from_bytes(self._file.pread(COUNT_AT, 4), "little")

    def _run(self, first: int, last: int) -> Run:
        return Run(self._host(first), last - first)

    def _punch(self, first: int, last: int) -> Punch:
        return Punch(self._host(first), (last - first) * self.cluster_size)

    def _free_run(self, state: int, count: int) -> tuple[int, int] | None:
        """First and one past the last block of the first run in this state."""
        first = self._use.find(state, 0, self._end)
        if first < 0:
            return None
        last = first + 1
        while last < self._end and last - first < count and self._use[last] == state:
            last += 1
        return first, last

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        if not dirty:
            return Plan()
        changes = {}
        for item in dirty:
            block = (item.host_offset - self._data_offset) // self.cluster_size
            assert self._use[block] == RESERVED
            self._use[block] = MAPPED
            changes[item.cluster] = block
        self._mapped += len(changes)
        first = [Barrier] if any(item.barrier for item in dirty) else []
        return Plan(*first, *self._map_writes(changes), Barrier)

    def _map_writes(self, changes: dict[int, int]) -> Iterator[Write]:
        """Map sectors with the entries in `changes` (index to entry) replaced.

        Whole sectors, because a disk tears at sectors only.  Neighbours are joined.
        """
        by_sector: dict[int, list[int]] = {}
        for index in sorted(changes):
            by_sector.setdefault((self._map_offset + index * ENTRY) // SECTOR, []).append(index)
        for run in runs(by_sector):
            start = run[0] * SECTOR
            data = bytearray(self._file.pread_padded(start, len(run) * SECTOR))
            for sector in run:
                for index in by_sector[sector]:
                    at = self._map_offset + index * ENTRY - start
                    data[at : at + ENTRY] = changes[index].to_bytes(ENTRY, "little")
            yield Write(start, bytes(data))

    def discard(self, first: int, count: int) -> Plan:
        """Fixed images keep their blocks: they are punched where they lie."""
        freed: list[int] = []
        changes: dict[int, int] = {}
        for start, entries in self._entries(first, min(count, self._blocks - first)):
            for index, block in enumerate(entries, start):
                if block < DISCARDED:
                    freed.append(block)
                    changes[index] = DISCARDED
        if not freed:
            return Plan()
        punches = [self._punch(run[0], run[-1] + 1) for run in runs(sorted(freed))]
        if self._header.type == FIXED:
            return Plan(*punches)
        for block in freed:
            self._use[block] = CLEAN
        self._mapped -= len(freed)
        return Plan(*self._map_writes(changes), Barrier, *punches)

    def release(self, runs: Sequence[Run]) -> None:
        for run in runs:
            first = (run.host_offset - self._data_offset) // self.cluster_size
            assert self._use.count(RESERVED, first, first + run.count) == run.count
            self._use[first : first + run.count] = bytes([STALE]) * run.count

    def end(self) -> Plan:
        if not self._begun:
            return Plan()
        self._end = self._use.rfind(MAPPED) + 1
        steps: list[Step] = []
        holes = self._holes()
        if holes:
            stale = [block for block in holes if self._use[block] == STALE]
            steps += [self._punch(run[0], run[-1] + 1) for run in runs(stale)]
            steps.append(Barrier)
            steps += self._map_writes(dict(zip(self._unmapped(), holes, strict=False)))
            steps.append(Barrier)
            for block in holes:
                self._use[block] = MAPPED
            self._mapped += len(holes)
        steps.append(self._write_header())
        if self._host(self._end) < self._file.size <= self._host(self._blocks):
            steps.append(Truncate(self._host(self._end)))
        return Plan(*steps, Barrier)

    def _holes(self) -> list[int]:
        """The blocks below _end that are not mapped, unless a stranger's map has too many."""
        if self._end - self._mapped > MAX_HOLES:
            return []
        stale, clean = bytes([STALE]), bytes([CLEAN])
        return sorted([*self._all(stale), *self._all(clean)])

    def _all(self, state: bytes) -> Iterator[int]:
        block = self._use.find(state, 0, self._end)
        while block >= 0:
            yield block
            block = self._use.find(state, block + 1, self._end)

    def _unmapped(self) -> Iterator[int]:
        """Guest blocks that hold nothing, in order."""
        done = 0
        for first, entries in self._entries(0, self._blocks):
            yield from range(done, first)
            for index, block in enumerate(entries, first):
                if block >= DISCARDED:
                    yield index
            done = first + len(entries)
        yield from range(done, self._blocks)


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """Sorted numbers as lists of neighbours: 1 2 5 -> [1, 2] [5]."""
    ordered = list(numbers)
    if not ordered:
        return []
    answer = [[ordered[0]]]
    for previous, number in pairwise(ordered):
        if number == previous + 1:
            answer[-1].append(number)
        else:
            answer.append([number])
    return answer
