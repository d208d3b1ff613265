"""Growing a VDI: more map entries, in the gap behind the map, or in place of the first blocks.

The header is one sector, so it is what switches from the old map to the new one.  Where the map
cannot grow in place, the blocks behind it move to the end of the file, the new map is written where
they were, and the data begins later by whole blocks: so all block numbers are smaller in the new
map.  Until the header is written the old map is whole, and afterwards the new one is.
"""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Iterator

from virtmount.errors import Unsupported
from virtmount.formats import vdi_map
from virtmount.formats.vdi_header import (
    BASES,
    ENTRY,
    FIXED,
    MAX_BLOCKS,
    SECTOR,
    Header,
    put,
)
from virtmount.formats.vdi_map import DISCARDED, NEVER_WRITTEN
from virtmount.hostfile import HostFile
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Write

MAX_MAP = 64 << 20  # bytes of a map that is written anew
MAX_MOVED = 64 << 20  # bytes of blocks that move
STEP = 1 << 20
MAX_OFFSET = 0xFFFFFFFF


def grow(file: HostFile, sector: bytearray, header: Header, use: bytearray, size: int) -> Plan:
    """The plan that makes the disk `size` bytes long.

    `use` is 1 for every file block that is mapped.  `sector` is changed, the rest is not.
    """
    old = -(-header.disk_size // SECTOR) * SECTOR
    size = -(-size // SECTOR) * SECTOR
    if size == old:
        return Plan()
    if size < old:
        raise Unsupported(file, "size", f"{size} bytes, the disk has {old}: it can only grow")
    blocks = max(header.blocks, -(-size // header.block_size))
    if blocks > MAX_BLOCKS:
        text = f"{blocks} blocks of {header.block_size} bytes, at most {MAX_BLOCKS} are supported"
        raise Unsupported(file, "size", text)
    return _Growth(file, sector, header, use, size, blocks).plan(old)


class _Growth:
    def __init__(
        self,
        file: HostFile,
        sector: bytearray,
        header: Header,
        use: bytearray,
        size: int,
        blocks: int,
    ) -> None:
        self.file, self.sector, self.header, self.use = file, sector, header, use
        self.size, self.blocks = size, blocks
        # The parent may be longer than the disk was.
        self.fill = NEVER_WRITTEN if header.type in BASES else DISCARDED

    def plan(self, old: int) -> Plan:
        header = self.header
        first_new = -(-old // header.block_size)
        steps: list[Step] = list(self._empty_tail(old))
        fields: dict[str, int | uuid.UUID] = {
            "disk_size": self.size,
            "blocks": self.blocks,
            "blocks_allocated": max(header.blocks_allocated, self.use.rfind(1) + 1),
            "modification_uuid": uuid.uuid4(),
        }
        if header.map_offset + self.blocks * ENTRY <= header.data_offset:
            if header.type == FIXED:
                steps += self._fixed(first_new)
                fields["blocks_allocated"] = self.blocks
            else:
                steps += self._entries(header.map_offset, first_new)
        else:
            steps += self._move(first_new, fields)
        put(self.sector, fields)
        return Plan(*steps, Barrier, Write(0, bytes(self.sector)), Barrier)

    def _start(self, block: int) -> int:
        return self.header.data_offset + block * self.header.stride

    def _entry(self, index: int) -> int:
        at = self.header.map_offset + index * ENTRY
        return int.from_bytes(self.file.pread(at, ENTRY), "little")

    def _empty_tail(self, old: int) -> Iterator[Step]:
        """What lies in the last block behind the disk's end becomes visible."""
        index, within = divmod(old, self.header.block_size)
        if not within:
            return
        block = self._entry(index)
        if block < DISCARDED:
            host = self.header.first + block * self.header.stride
            yield Punch(host + within, self.header.block_size - within)
        elif block == NEVER_WRITTEN and self.header.type not in BASES:
            text = f"the parent has the disk's last block, {within} bytes of which are used"
            raise Unsupported(self.file, f"map entry {index}", text)

    def _entries(self, map_offset: int, first: int) -> Iterator[Write]:
        """Entries that hold nothing, from number `first` to the end of a map at `map_offset`."""
        start, end = map_offset + first * ENTRY, map_offset + self.blocks * ENTRY
        # Up to the next sector what is there stays.
        head = min(end, -(-start // SECTOR) * SECTOR)
        changes = dict.fromkeys(range(first, first + (head - start) // ENTRY), self.fill)
        yield from vdi_map.writes(self.file, map_offset, changes)
        piece = self.fill.to_bytes(ENTRY, "little") * (STEP // ENTRY)
        for at in range(head, end, STEP):
            yield Write(at, piece[: min(STEP, end - at)])

    def _fixed(self, first: int) -> Iterator[Step]:
        """Blocks for the new space, empty, with their own numbers."""
        header = self.header
        for index in range(first, header.blocks):
            if (block := self._entry(index)) < DISCARDED:
                host = header.first + block * header.stride
                yield Punch(host, header.block_size)
        start, end = self._start(header.blocks), self._start(self.blocks)
        if self.file.size > start:
            yield Punch(start, self.file.size - start)
        yield Extend(end)
        step = STEP // ENTRY
        for at in range(header.blocks, self.blocks, step):
            numbers = array("I", range(at, min(at + step, self.blocks)))
            yield Write(header.map_offset + at * ENTRY, vdi_map.packed(numbers))

    def _move(self, first_new: int, fields: dict[str, int | uuid.UUID]) -> Iterator[Step]:
        header = self.header
        if header.type == FIXED:
            text = "the map of this fixed image cannot grow in place"
            raise Unsupported(self.file, header.place("type"), text, hint="virtmount convert")
        if self.blocks * ENTRY > MAX_MAP:
            text = f"a new map of {self.blocks * ENTRY} bytes, at most {MAX_MAP} are supported"
            raise Unsupported(self.file, "size", text)
        shift = -(-self.blocks * ENTRY // header.stride)
        data_offset = self._start(shift)
        if data_offset > MAX_OFFSET:
            raise Unsupported(self.file, "size", f"the data would begin at {data_offset}")
        moved = self._targets(shift)
        highest = max(self.use.rfind(1), *moved.values(), 0)
        if moved:
            yield Extend(self._start(highest + 1))
            put(self.sector, {"blocks_allocated": max(header.blocks_allocated, highest + 1)})
            yield Write(0, bytes(self.sector))
            yield Barrier
            for block, target in moved.items():
                yield from self._copy(block, target)
            yield Barrier
            yield from vdi_map.writes(self.file, header.map_offset, self._owners(moved))
            yield Barrier
        yield Extend(data_offset)
        yield from self._renumbered(first_new, shift, moved)
        fields["map_offset"] = header.data_offset
        fields["data_offset"] = data_offset
        fields["blocks_allocated"] = max(0, highest + 1 - shift)

    def _targets(self, shift: int) -> dict[int, int]:
        """Where the mapped ones of the first `shift` blocks go."""
        moving = [block for block in range(min(shift, len(self.use))) if self.use[block] == 1]
        if len(moving) * self.header.stride > MAX_MOVED:
            text = f"{len(moving)} blocks of {self.header.stride} bytes would have to move"
            raise Unsupported(self.file, "size", text, hint="virtmount convert")
        targets: list[int] = []
        # Behind the last block first: what lies there is the file's end anyway.
        free = self.use.rfind(1) + 1
        targets += range(max(free, shift), min(len(self.use), max(free, shift) + len(moving)))
        at = shift
        while len(targets) < len(moving):
            at = self.use.find(0, at, free)
            if at < 0:
                text = "all blocks are in use, and the map cannot grow in place"
                raise Unsupported(self.file, "size", text, hint="virtmount convert")
            targets.append(at)
            at += 1
        return dict(zip(moving, targets, strict=True))

    def _copy(self, block: int, target: int) -> Iterator[Write]:
        stride = self.header.stride
        for within in range(0, stride, STEP):
            length = min(STEP, stride - within)
            data = self.file.pread_padded(self._start(block) + within, length)
            yield Write(self._start(target) + within, data)

    def _owners(self, moved: dict[int, int]) -> dict[int, int]:
        changes: dict[int, int] = {}
        for at, raw in vdi_map.pieces(self.file, self.header, 0, self.header.blocks):
            if vdi_map.is_empty(raw):
                continue
            for index, block in enumerate(vdi_map.unpacked(raw), at):
                if block in moved:
                    changes[index] = moved[block]
        return changes

    def _renumbered(self, first_new: int, shift: int, moved: dict[int, int]) -> Iterator[Write]:
        """The new map, where the first blocks were."""
        offset = self.header.data_offset
        for at, raw in vdi_map.pieces(self.file, self.header, 0, first_new):
            if not vdi_map.is_empty(raw):
                entries = vdi_map.unpacked(raw)
                for i, block in enumerate(entries):
                    if block < DISCARDED:
                        entries[i] = moved.get(block, block) - shift
                raw = vdi_map.packed(entries)
            yield Write(offset + at * ENTRY, raw)
        start, end = offset + first_new * ENTRY, offset + self.blocks * ENTRY
        piece = self.fill.to_bytes(ENTRY, "little") * (STEP // ENTRY)
        for at in range(start, end, STEP):
            yield Write(at, piece[: min(STEP, end - at)])
