"""Growing a VMDK: its last extent becomes longer, flat or sparse.

New tables and, where the directories have no room, new directories are written behind everything
else; the extent's header, one sector, is what switches to them.  The descriptor's number of sectors
follows: until then the extent is longer than the disk.  What lies in the file behind the disk's old
end is emptied first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from virtmount.errors import NeedsRecovery, Unsupported
from virtmount.formats.vmdk_cowd import CowdExtent
from virtmount.formats.vmdk_descriptor import Descriptor, rewrite
from virtmount.formats.vmdk_entries import ENTRY, SECTOR, packed
from virtmount.formats.vmdk_grains import LIMIT, Tables
from virtmount.formats.vmdk_parts import Part
from virtmount.formats.vmdk_sparse import SparseExtent
from virtmount.hostfile import HostFile
from virtmount.image import Kind
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Write

STEP = 1 << 20
CAPACITY_AT, REDUNDANT_AT, DIRECTORY_AT = 12, 48, 56
COWD_CAPACITY_AT, COWD_ENTRIES_AT = 12, 24


def grow(
    files: Sequence[HostFile],
    parts: Sequence[Part],
    descriptor: Descriptor,
    text_at: int,
    size: int,
    monolithic: bool,
) -> Plan:
    """The plan that makes the disk `size` bytes long."""
    file, last = files[0], parts[-1]
    old = last.end
    size = -(-size // SECTOR) * SECTOR
    if size == old:
        return Plan()
    if size < old:
        raise Unsupported(file, "size", f"{size} bytes, the disk has {old}: it can only grow")
    length = size - last.start
    steps: list[Step] = []
    if last.tables is not None:
        steps += _sparse(last.tables, length)
    elif last.kind is Kind.DATA:
        target = files[last.number]
        if any(part is not last and part.number == last.number for part in parts):
            text = "the last extent's file is another extent too"
            raise Unsupported(file, "size", text)
        if target.is_device:
            raise Unsupported(target, "size", "a device does not grow")
        end = last.base + old - last.start
        if target.size > end:
            steps.append(Punch(end, target.size - end, last.number))
        steps.append(Extend(last.base + length, last.number))
    else:
        raise Unsupported(file, "size", "the last extent cannot grow")
    new = descriptor.with_extent_size(len(descriptor.extents) - 1, length)
    if descriptor.room is not None and len(new) > descriptor.room:
        raise Unsupported(file, "descriptor", f"no room for {len(new)} bytes")
    return Plan(*steps, Barrier, *rewrite(descriptor.text, new, text_at, descriptor.room), Barrier)


def _sparse(tables: Tables, length: int) -> Iterator[Step]:
    sectors = length // SECTOR
    if sectors >= LIMIT:
        text = f"{length} bytes in one sparse extent, at most {(LIMIT - 1) * SECTOR}"
        raise Unsupported(tables.file, "size", text)
    if tables.unclean:
        text = "the file was not closed"
        raise NeedsRecovery(tables.file, "header", text, hint="virtmount check --repair")
    old, old_tables = tables.capacity, tables.tables
    header = bytearray(tables.file.pread(0, SECTOR))
    yield from _empty_tail(tables, old)
    new_tables = -(-length // (tables.grain * tables.per_table))
    room = -(-old_tables * ENTRY // SECTOR) * SECTOR // ENTRY
    if isinstance(tables, CowdExtent):
        if new_tables > room:
            text = f"{new_tables} grain tables, the directory has room for {room}"
            raise Unsupported(tables.file, "size", text, hint="virtmount convert")
        yield from _directory_tail(tables.directory_at, old_tables, new_tables, tables.number)
        header[COWD_CAPACITY_AT : COWD_CAPACITY_AT + 4] = sectors.to_bytes(4, "little")
        header[COWD_ENTRIES_AT : COWD_ENTRIES_AT + 4] = new_tables.to_bytes(4, "little")
    else:
        assert isinstance(tables, SparseExtent)
        yield from _hosted(tables, header, old_tables, new_tables, room)
        header[CAPACITY_AT : CAPACITY_AT + 8] = sectors.to_bytes(8, "little")
    yield Barrier
    yield Write(0, bytes(header), tables.number)
    yield Barrier


def _directory_tail(at: int, old: int, new: int, number: int) -> Iterator[Step]:
    """Nothing is named by entries that the disk did not have before."""
    if new > old:
        yield Write(at + old * ENTRY, bytes((new - old) * ENTRY), number)


def _hosted(
    tables: SparseExtent, header: bytearray, old: int, new: int, room: int
) -> Iterator[Step]:
    """Tables for the new space, empty, and their entries in the directories."""
    size = tables.table_size // SECTOR
    next_sector = -(-max(tables.file.size, tables.fixed_end()) // SECTOR)
    for at, directory, field in (
        (tables.directory_at, tables.directory, DIRECTORY_AT),
        (tables.redundant_at, tables.redundant, REDUNDANT_AT),
    ):
        if at is None or directory is None:
            continue
        first = next_sector
        next_sector += (new - old) * size
        added = range(first, next_sector, size) if new > old else range(0)
        entries = packed(added)
        if new <= room:
            if entries:
                yield Write(at + old * ENTRY, entries, tables.number)
            continue
        entries = packed([*directory, *added])
        header[field : field + 8] = next_sector.to_bytes(8, "little")
        yield Write(next_sector * SECTOR, entries, tables.number)
        next_sector += -(-len(entries) // SECTOR)
    if next_sector > LIMIT:
        raise Unsupported(tables.file, "size", "no place for the tables below 2 TiB of file")
    yield Extend(next_sector * SECTOR, tables.number)


def _empty_tail(tables: Tables, old: int) -> Iterator[Step]:
    """What the last grain, and the last table, have behind the disk's old end."""
    grain, within = divmod(old, tables.grain)
    if within:
        entry = tables.entry(grain)
        if tables.is_grain(entry):
            yield Punch(entry * SECTOR + within, tables.grain - within, tables.number)
    grains = -(-old // tables.grain)
    index, entries = divmod(grains, tables.per_table)
    if not entries:
        return
    for directory in (tables.directory, tables.redundant):
        if directory is None or not directory[index]:
            continue
        at = directory[index] * SECTOR + entries * ENTRY
        yield Write(at, bytes(tables.table_size - entries * ENTRY), tables.number)
