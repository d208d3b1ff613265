"""Checking and mending a VDI.

What can be wrong: a block with two owners, a block that is not in the file, a count that does not
cover a block (then other programs write over it), and space that nothing uses.  The second owner of
a block gets a copy of its own; a block that is not there becomes one of zeros, because that is all
that can still be said about it.  Nothing else is touched: the map is all that a VDI has.

Two passes over the map, one byte for every block.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from virtmount.formats import vdi_map
from virtmount.formats.vdi_header import (
    BASES,
    ENTRY,
    NO_UUID,
    SECTOR,
    TYPES,
    Header,
    put,
    read,
    validate,
)
from virtmount.formats.vdi_map import DISCARDED, NEVER_WRITTEN
from virtmount.hostfile import HostFile
from virtmount.image import Options
from virtmount.plan import Barrier, Extend, Plan, Write
from virtmount.upkeep import Finding, Progress, Repair, Severity

if TYPE_CHECKING:
    from virtmount.formats.vdi import VDI

FREE, USED, OWNED = 0, 1, 2  # OWNED: its first owner was met in the second pass
MAX_FINDINGS = 1000  # of one map; the rest is counted
MAX_COPIES = 1000  # blocks: more second owners than that are no accident
STEP = 1 << 20

Item = Finding | Plan | Progress


def check(driver: type[VDI], file: HostFile, options: Options, repair: Repair) -> Iterator[Item]:
    """See Image.check().  Whatever validate() refuses cannot be looked into and is raised."""
    sector, header = read(file)
    validate(file, sector, header, any_parent=True)
    mending = file.writable and not header.old and header.in_sectors
    look = _Check(file, sector, header, mending and repair is Repair.ALL)
    yield from look.header_fields()
    yield from look.mark()
    yield from look.count()
    yield from look.entries()
    may = mending and repair is not Repair.NOTHING and not look.damaged
    yield from look.leaks(may)
    if may and look.leaking:
        # Everything that the constructor refuses is mended by now.
        yield driver(file, dataclasses.replace(options, changing_parent=True)).tidy()
    for text in look.notes():
        yield Finding(Severity.NOTE, "", text)


class _Check:
    def __init__(self, file: HostFile, sector: bytearray, header: Header, mend: bool) -> None:
        self.file, self.sector, self.header, self.mend = file, sector, header, mend
        self.size = file.size  # before anything is mended
        self.use = bytearray(header.blocks)
        self.mapped = 0  # entries that name a block, each block once
        self.zeros = 0  # entries that may be given a free block
        self.highest = -1  # block that is in the file
        self.counted = header.blocks_allocated
        self.damaged = False  # and not mended
        self.leaking = False
        self._found = 0
        self._copies = 0
        self._free = 0  # blocks below it are in use

    def header_fields(self) -> Iterator[Item]:
        header = self.header
        named = header.linkage_uuid != NO_UUID
        if named == (header.type in BASES):
            says = "names a parent" if named else "names no parent"
            text = f"linkage_uuid {says} in a {TYPES[header.type]} image"
            yield self._damage(header.place("linkage_uuid"), text, mended=False)
        for field in ("uuid", "modification_uuid"):
            if getattr(header, field) == NO_UUID:
                text = f"{field} is null: VirtualBox refuses such images"
                yield Finding(Severity.NOTE, header.place(field), text, repaired=self.mend)
                if self.mend:
                    put(self.sector, {field: uuid.uuid4()})
                    yield Plan(self._header(), Barrier)
        if header.disk_size % SECTOR:
            text = f"disk size {header.disk_size}, not a multiple of {SECTOR}"
            yield Finding(Severity.NOTE, header.place("disk_size"), text)

    def mark(self) -> Iterator[Item]:
        """The first pass: which blocks are in use."""
        use, blocks = self.use, self.header.blocks
        for at, raw in vdi_map.pieces(self.file, self.header, 0, blocks):
            yield Progress(at, 2 * blocks)
            over_parent = self.header.type not in BASES
            if vdi_map.is_empty(raw):
                self.zeros += 0 if over_parent else len(raw) // ENTRY
                continue
            for block in vdi_map.unpacked(raw):
                if block < blocks:
                    self.mapped += not use[block]
                    use[block] = USED
                elif block == DISCARDED or (block == NEVER_WRITTEN and not over_parent):
                    self.zeros += 1
        in_file = -(-max(0, self.size - self.header.first) // self.header.stride)
        self.highest = use.rfind(USED, 0, in_file)
        self.mapped -= use.count(USED, in_file)

    def count(self) -> Iterator[Item]:
        if self.counted > self.highest:
            return
        text = (
            f"count {self.counted} does not cover block {self.highest}: other programs would "
            "write over what is in use"
        )
        yield self._damage(self.header.place("blocks_allocated"), text, mended=self.mend)
        if self.mend:
            self.counted = self.highest + 1
            yield Plan(self._header(), Barrier)

    def entries(self) -> Iterator[Item]:
        """The second pass: every entry that cannot be right."""
        blocks = self.header.blocks
        for at, raw in vdi_map.pieces(self.file, self.header, 0, blocks):
            yield Progress(blocks + at, 2 * blocks)
            if vdi_map.is_empty(raw):
                continue
            lost: dict[int, int] = {}
            for index, block in enumerate(vdi_map.unpacked(raw), at):
                if block >= DISCARDED:
                    continue
                if block >= blocks or self._host(block) >= self.size:
                    lost[index] = DISCARDED
                    text = f"block {block}, know 0 to {blocks - 1}"
                    if block < blocks:
                        text = f"block {block} lies past the end of the file at {self.size}"
                    yield from self._entry(index, f"{text}: reads as zeros when mended", self.mend)
                elif self.use[block] == OWNED:
                    text = f"block {block} has another owner: gets a copy when mended"
                    mended = self.mend and self._copies < MAX_COPIES
                    yield from self._entry(index, text, mended)
                    if mended:
                        yield from self._copy(index, block)
                else:
                    self.use[block] = OWNED
                    yield from self._end_of(index, block)
            if lost and self.mend:
                changes = vdi_map.writes(self.file, self.header.map_offset, lost)
                yield Plan(*changes, Barrier)
                self.zeros += len(lost)
        if self._found > MAX_FINDINGS:
            text = f"{self._found - MAX_FINDINGS} more entries that cannot be right"
            yield Finding(Severity.DAMAGE, "map", text, repaired=not self.damaged)

    def _entry(self, index: int, text: str, mended: bool) -> Iterator[Item]:
        self._found += 1
        finding = self._damage(self._place(index), text, mended=mended)
        if self._found <= MAX_FINDINGS:
            yield finding

    def _end_of(self, index: int, block: int) -> Iterator[Item]:
        """The file may end inside the last block."""
        header = self.header
        end = self._host(block) + header.block_size
        if end <= self.size:
            return
        needed = min(end, self._host(block) + header.disk_size - index * header.block_size)
        text = f"the file ends at {self.size}, inside block {block}"
        if self.size >= needed:
            yield Finding(Severity.NOTE, self._place(index), text, repaired=self.mend)
        else:
            yield self._damage(self._place(index), text, mended=self.mend)
        if self.mend:
            yield Plan(Extend(end), Barrier)

    def _copy(self, index: int, block: int) -> Iterator[Item]:
        """Give guest block `index` a copy of the block that it shares."""
        # As many blocks as entries, and two entries have one: one is free.
        target = self._free = self.use.index(FREE, self._free)
        self.use[target] = OWNED
        self._copies += 1
        self.mapped += 1
        self.highest = max(self.highest, target)
        self.counted = max(self.counted, target + 1)
        end = self.header.data_offset + (target + 1) * self.header.stride
        yield Plan(Extend(end), self._header(), Barrier)
        size = self.header.block_size
        for within in range(0, size, STEP):
            length = min(STEP, size - within)
            data = self.file.pread_padded(self._host(block) + within, length)
            yield Plan(Write(self._host(target) + within, data))
        changes = vdi_map.writes(self.file, self.header.map_offset, {index: target})
        yield Plan(Barrier, *changes, Barrier)

    def leaks(self, may: bool) -> Iterator[Item]:
        """Space that nothing uses, once everything else is right."""
        from virtmount.formats.vdi import MAX_HOLES, MAX_MOVED

        header = self.header
        used = self.highest + 1
        holes = used - self.mapped
        if holes:
            moved = max(0, holes - self.zeros) * header.block_size
            mended = may and holes <= MAX_HOLES and moved <= MAX_MOVED
            text = f"{holes} of the first {used} blocks are not used"
            yield Finding(Severity.LEAK, "map", text, repaired=mended)
        if self.counted > used:
            text = f"count {self.counted}, the last block in use is {self.highest}"
            yield Finding(Severity.LEAK, header.place("blocks_allocated"), text, repaired=may)
        end = header.data_offset + used * header.stride
        longest = header.data_offset + header.blocks * header.stride
        behind = end < self.file.size <= longest
        if behind:
            text = f"the file ends at {self.file.size}, its last block at {end}"
            yield Finding(Severity.LEAK, f"byte {end}", text, repaired=may)
        self.leaking = bool(holes) or self.counted > used or behind

    def notes(self) -> Iterator[str]:
        header = self.header
        longest = header.data_offset + header.blocks * header.stride
        if self.file.size > longest:
            yield f"{self.file.size - longest} bytes behind the last possible block"

    def _damage(self, place: str, text: str, *, mended: bool) -> Finding:
        self.damaged |= not mended
        return Finding(Severity.DAMAGE, place, text, repaired=mended)

    def _place(self, index: int) -> str:
        return f"map entry {index} at {self.header.map_offset + index * ENTRY}"

    def _host(self, block: int) -> int:
        return self.header.first + block * self.header.stride

    def _header(self) -> Write:
        put(self.sector, {"blocks_allocated": self.counted})
        return Write(0, bytes(self.sector))
