"""Another size or another parent for a VHDX: plans for an image that is open and idle.

Source: [MS-VHDX] 20240423, sections 2.2.3, 2.5 and 2.6.  Metadata items and region tables have no
second version that is switched to, so what belongs together goes into one entry of the log, which
is applied wholly or not at all.

Resize: the tail of the last block is zeroed, then the table's new entries are made what they must
be (nobody looks at them yet), then the disk's size changes.  A table that has no room for them is
copied behind everything else first; the entry that changes the size also names it in both region
tables, and the place of the old one is free from then on.

Rebase: the new locator is written where no item lies; an entry of the log makes its item the
parent locator, and sets HasParent where that was not set.  Without a parent, sectors that are not
in the file become zeros, then blocks that were partially present whole, then the item and HasParent
go in one entry.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from virtmount.errors import NeedsRecovery, Unsupported
from virtmount.formats import vhdx_header as headers
from virtmount.formats import vhdx_locator
from virtmount.formats.vhdx_bat import BITMAP, ENTRY, PARTIAL, PRESENT, SECTOR, STATE, Table, little
from virtmount.formats.vhdx_header import MIB, TABLE_SIZE
from virtmount.formats.vhdx_journal import Journal
from virtmount.hostfile import HostFile
from virtmount.image import Image, Kind
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write

if TYPE_CHECKING:
    from virtmount.formats.vhdx import VHDX

MAX_TABLE = 32 * MIB  # of entries that are written: more has no place in a plan
MAX_HOST = 1 << 60  # the map's limit
MAX_PIECES = 1 << 20  # of blocks that are partially present, that are zeroed
PIECE = MIB

_ZEROS = bytes(PIECE)
_NONE: Mapping[int, bytes] = {}


def resize(image: VHDX, size: int) -> Plan:
    file, disk, old = image.file, image.disk, image.table
    if size < disk.size:
        text = f"{size} bytes: a VHDX cannot be made smaller than it is, {disk.size}"
        raise Unsupported(file, "virtual disk size", text)
    if size % disk.sector_size or size > headers.MAX_DISK:
        text = f"{size} bytes: must be a multiple of {disk.sector_size}, at most {headers.MAX_DISK}"
        raise Unsupported(file, "virtual disk size", text)
    if size == disk.size:
        return Plan()
    if file.is_device:
        raise Unsupported(file, "", "resize on a block device")
    journal = Journal(file, image.header, image.slot)
    region = image.regions[headers.BAT]
    blocks = -(-size // disk.block_size)
    table = Table(file, old.offset, blocks, old.chunk, old.block_size, old.has_parent)
    used = end = image.used_end()
    prepared: list[Step] = [*_tail(image)]
    if disk.fixed:  # all of it is there, and in order where it was
        new = _Entries(table, old, end)
        end += (blocks - old.blocks) * disk.block_size
    else:
        new = _Entries(table, old)
    final = {disk.items[headers.VIRTUAL_DISK_SIZE].offset: size.to_bytes(8, "little")}
    freed: list[Step] = []
    sectors: dict[int, bytes] = {}
    if table.length <= region.length:
        sectors = dict(_limited(file, new.changes()))
    else:
        start, length = end, -(-table.length // MIB) * MIB
        end += length
        final |= _moved(file, start, length)
        prepared += (Write(start + at, raw) for at, raw in _limited(file, new.pieces()))
        freed = [Punch(region.offset, region.length)]
    changes = _sectors(file, final)
    # What was read up to here is as the log, if there is one, will leave it.
    steps = journal.begin(image.replay)
    if end > used:
        if end > MAX_HOST:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        steps.append(Extend(end))
        journal.durable_size = end
    steps += [*prepared, Barrier]
    steps += journal.change(sectors)
    steps += journal.change(changes)
    image.forget_patches()
    return Plan(*steps, *journal.end(), *freed)


def _tail(image: VHDX) -> Iterator[Step]:
    """What lies in the last block behind the disk's end becomes zeros."""
    disk = image.disk
    within = disk.size % disk.block_size
    kind, host = image.locate(image.table.blocks - 1)
    if within and kind in (Kind.DATA, Kind.PARTIAL):
        yield Punch(host + within, disk.block_size - within)


class _Entries:
    """The table after a resize: the old entries, then zeros, or places in order from `data` on."""

    def __init__(self, table: Table, old: Table, data: int | None = None) -> None:
        self._table = table
        self._old = old
        self._data = data
        self._kept = old.blocks + (old.blocks - 1) // old.chunk  # entries that are as they were

    def _made(self, first: int, count: int) -> bytes:
        """Entries `first` … of the new part."""
        table, old = self._table, self._old
        if self._data is None:
            raw = bytes(count * ENTRY)
        else:
            made = array("Q")
            for number in range(first, first + count):
                is_bitmap, block = table.which(number)
                place = self._data + (block - old.blocks) * table.block_size
                made.append(0 if is_bitmap else place | PRESENT)
            raw = little(made.tobytes()).tobytes()
        if old.has_parent and first <= old.count - 1 < first + count:
            # The bitmap of the last chunk, which has had room for more blocks.
            at = (old.count - 1 - first) * ENTRY
            entry = table.file.pread(old.offset + (old.count - 1) * ENTRY, ENTRY)
            raw = raw[:at] + entry + raw[at + ENTRY :]
        return raw

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """The whole table, without what is zero: offset in it, bytes."""
        count = self._table.count
        for first in range(0, count, PIECE // ENTRY):
            stop = min(first + PIECE // ENTRY, count)
            kept = max(0, min(stop, self._kept) - first)
            at = self._old.offset + first * ENTRY
            raw = self._old.file.pread(at, kept * ENTRY) if kept else b""
            raw += self._made(first + kept, stop - first - kept)
            if raw != _ZEROS[: len(raw)]:
                yield first * ENTRY, raw

    def changes(self) -> Iterator[tuple[int, bytes]]:
        """The new entries in the old place, where it does not hold them already, by sectors."""
        table = self._table
        at = self._kept * ENTRY // SECTOR * SECTOR
        while at < table.length:
            raw = table.file.pread(
                table.offset + at, min(PIECE, -(-(table.length - at) // SECTOR) * SECTOR)
            )
            first = max(at // ENTRY, self._kept)
            made = self._made(first, min((at + len(raw)) // ENTRY, table.count) - first)
            skip = first * ENTRY - at
            new = raw[:skip] + made + raw[skip + len(made) :]
            if new != raw:
                for i in range(0, len(raw), SECTOR):
                    if new[i : i + SECTOR] != raw[i : i + SECTOR]:
                        yield table.offset + at + i, new[i : i + SECTOR]
            at += len(raw)


def _limited(file: HostFile, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    total = 0
    for at, raw in pieces:
        total += len(raw)
        if total > MAX_TABLE:
            text = f"more than {MAX_TABLE} bytes of the BAT would have to be written"
            raise Unsupported(file, "BAT", text)
        yield at, raw


def _moved(file: HostFile, offset: int, length: int) -> dict[int, bytes]:
    """What another place of the BAT changes in both region tables: file offset -> bytes."""
    first, second = (file.pread(at, TABLE_SIZE) for at in headers.REGION_TABLE_OFFSETS)
    if first != second:
        raise NeedsRecovery(
            file,
            "region tables at 196608 and 262144",
            "they differ, and must be repaired before the BAT can be moved",
            hint=f"virtmount check --repair {file}",
        )
    at = headers.RegionTableHeader.sizeof()
    while first[at : at + 16] != headers.BAT.bytes_le:  # it is there: it was read at open
        at += headers.REGION.size
    entry = headers.REGION.pack(headers.BAT.bytes_le, offset, length, 1)
    new = headers.sealed(first[:at] + entry + first[at + len(entry) :])
    return {
        start + i: new[i : i + SECTOR]
        for start in headers.REGION_TABLE_OFFSETS
        for i in range(0, TABLE_SIZE, SECTOR)
        if new[i : i + SECTOR] != first[i : i + SECTOR]
    }


def _sectors(
    file: HostFile, changes: Mapping[int, bytes], over: Mapping[int, bytes] = _NONE
) -> dict[int, bytes]:
    """Changed bytes anywhere as whole sectors: file offset -> 4096 bytes.

    `over` are sectors that will be others by then than they are in the file.
    """
    sectors: dict[int, bytearray] = {}
    for offset, data in changes.items():
        for i in range(offset // SECTOR * SECTOR, offset + len(data), SECTOR):
            if i not in sectors:
                sectors[i] = bytearray(over.get(i) or file.pread(i, SECTOR))
            low, high = max(i, offset), min(i + SECTOR, offset + len(data))
            sectors[i][low - i : high - i] = data[low - offset : high - offset]
    return {at: bytes(sector) for at, sector in sectors.items()}


def rebase(image: VHDX, parent: Image | None, name: str) -> Plan:
    if parent is None:
        return _without_parent(image) if image.disk.has_parent else Plan()
    file, disk = image.file, image.disk
    raw = vhdx_locator.pack(file, vhdx_locator.identity_of(file, parent), name)
    region = image.regions[headers.METADATA]
    place = _free_place(image, len(raw))
    item = headers.ITEM.pack(
        headers.PARENT_LOCATOR.bytes_le,
        place - region.offset,
        len(raw),
        headers.IS_REQUIRED,
        0,
    )
    unnamed: dict[int, bytes] = {}
    if disk.has_parent:
        changes = {disk.items[headers.PARENT_LOCATOR].entry: item}
    else:
        unnamed = _ready_for_bitmaps(image)
        entry, changes = _place_of_locator(image)
        changes[entry] = item
        parameters = disk.items[headers.FILE_PARAMETERS].offset
        changes[parameters + 4] = headers.HAS_PARENT.to_bytes(4, "little")
    sectors = _sectors(file, changes)
    journal = Journal(file, image.header, image.slot)
    steps = journal.begin(image.replay, same_data=True)
    steps += [Write(place, raw), *journal.change(unnamed), Barrier, *journal.change(sectors)]
    image.forget_patches()
    return Plan(*steps, *journal.end())


def _ready_for_bitmaps(image: VHDX) -> dict[int, bytes]:
    """What has to change in the table of a dynamic disk before it gets a parent.

    Without one it need not reach to the last bitmap's entry, and those of others mean nothing.
    """
    disk, region = image.disk, image.regions[headers.BAT]
    if disk.fixed:
        raise Unsupported(image.file, "file parameters", "a fixed disk has no place for a parent")
    table = replace(image.table, has_parent=True)
    if table.length > region.length:
        text = f"{region.length} bytes, {table.length} needed for a disk with a parent"
        raise Unsupported(image.file, f"BAT at {region.offset}", text)
    places = (number for number, _ in table.used() if table.which(number)[0])
    return _sectors(image.file, {table.offset + number * ENTRY: bytes(ENTRY) for number in places})


def _place_of_locator(image: VHDX) -> tuple[int, dict[int, bytes]]:
    """Where in the metadata table an entry for it goes, and what else that changes."""
    region = image.regions[headers.METADATA]
    raw = image.file.pread(region.offset, TABLE_SIZE)
    count = headers.MetadataTableHeader.parse(raw).entry_count
    first, width = headers.MetadataTableHeader.sizeof(), headers.ITEM.size
    for at in range(first, first + count * width, width):
        flags = int.from_bytes(raw[at + 24 : at + 28], "little")
        if raw[at : at + 16] == headers.PARENT_LOCATOR.bytes_le and not flags & headers.IS_USER:
            return region.offset + at, {}  # one that means nothing: HasParent is not set
    if count >= headers.MAX_ENTRIES:
        text = f"{count} items, no room for one more"
        raise Unsupported(image.file, f"metadata table at {region.offset}", text)
    return (
        region.offset + first + count * width,
        {region.offset + 10: (count + 1).to_bytes(2, "little")},
    )


def _free_place(image: VHDX, length: int) -> int:
    """Where in the metadata region no item lies, known or not, nor shares a sector with it.

    What the log changes is whole sectors, as they were before the locator was written.
    """
    region = image.regions[headers.METADATA]
    raw = image.file.pread(region.offset, TABLE_SIZE)
    count = headers.MetadataTableHeader.parse(raw).entry_count
    table = raw[headers.MetadataTableHeader.sizeof() :][: count * headers.ITEM.size]
    items = sorted(
        (offset, offset + size) for _, offset, size, *_ in headers.ITEM.iter_unpack(table) if size
    )
    at = TABLE_SIZE
    for start, end in [*items, (region.length, region.length)]:
        if start // SECTOR * SECTOR - at >= length:
            return region.offset + at
        at = max(at, -(-end // SECTOR) * SECTOR)
    raise Unsupported(
        image.file,
        f"metadata region at {region.offset}",
        f"no room for a parent locator of {length} bytes",
    )


def _without_parent(image: VHDX) -> Plan:
    file, disk, table = image.file, image.disk, image.table
    zeroed: list[Step] = []
    whole: list[tuple[int, int]] = []
    for number, entry in table.used():
        is_bitmap, block = table.which(number)
        if is_bitmap or entry & STATE != PARTIAL:
            continue
        host = entry >> 20 << 20
        for extent in image.slow(block):
            if extent.kind is Kind.INVALID:
                text = "partially present, but the block or its bitmap lies nowhere"
                raise Unsupported(file, table.describe(block), text)
            if extent.kind is Kind.ABSENT:
                at = extent.guest_offset - block * disk.block_size
                zeroed.append(Punch(host + at, extent.length))
        if len(zeroed) > MAX_PIECES:
            text = f"more than {MAX_PIECES} pieces of blocks that are partially present"
            raise Unsupported(file, table.describe(block), text)
        whole.append((block, host | PRESENT))
    sectors, _ = table.change(whole)
    journal = Journal(file, image.header, image.slot)
    steps = journal.begin(image.replay, same_data=True)
    steps += [*zeroed, Barrier] if zeroed else []
    steps += journal.change(sectors)
    # The table's last item takes the locator's place.
    region = image.regions[headers.METADATA]
    raw = file.pread(region.offset, TABLE_SIZE)
    count = headers.MetadataTableHeader.parse(raw).entry_count
    item = disk.items[headers.PARENT_LOCATOR]
    last = headers.MetadataTableHeader.sizeof() + (count - 1) * headers.ITEM.size
    changes = {
        region.offset + 10: (count - 1).to_bytes(2, "little"),
        item.entry: raw[last : last + headers.ITEM.size],
    }
    changes[region.offset + last] = bytes(headers.ITEM.size)
    changes[disk.items[headers.FILE_PARAMETERS].offset + 4] = bytes(4)
    steps += journal.change(_sectors(file, changes))
    # Entries of bitmaps mean nothing now, and their places are free.
    bitmaps = {
        table.offset + number * ENTRY: bytes(ENTRY)
        for number, _ in table.used()
        if table.which(number)[0]
    }
    steps += journal.change(_sectors(file, bitmaps, sectors))
    steps += journal.end()
    steps += (Punch(host, BITMAP) for host in image.bitmaps.values())
    end = _end_of_blocks(image)
    if end < file.size and not file.is_device:
        steps.append(Truncate(end))
    image.forget_patches()
    return Plan(*steps)


def _end_of_blocks(image: VHDX) -> int:
    """Where the file could end if there were no sector bitmaps."""
    table = image.table
    end = max(region.end for region in headers.taken_regions(image.header, image.regions))
    for number, entry in table.used():
        if entry >> 20 and not table.which(number)[0]:
            end = max(end, (entry >> 20 << 20) + table.block_size)
    return end
