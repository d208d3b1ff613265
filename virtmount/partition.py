"""Partition tables: GPT and MBR, as the kernel and sfdisk read them.

Sources: UEFI 2.10, section 5 (GPT, protective MBR); for MBR the kernel's msdos.c and util-linux,
whose choices are the standard where none exists.  Types, uuids and ids are spelt as sfdisk --json
spells them.  Tables are in units of the disk's logical sector: a table made for 4096-byte sectors
is not found on a disk of 512-byte sectors, and the kernel does not find it either.

Reads only; never raises for what is on the disk.  A table that contradicts itself is reported in
`problems` and as far as it is sound.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

Read = Callable[[int, int], bytes]  # offset, length -> exactly that many bytes

MAX_TABLE = 1 << 20  # bytes of GPT entries; 128 entries of 128 bytes are usual
MAX_NUMBER = 255  # the kernel gives a disk at most so many partitions
MAX_LINKS = 256  # extended boot records followed

_SIGNATURE = b"\x55\xaa"
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
# Signature, revision, header size, its CRC, reserved, own LBA, the other's LBA, first and last
# usable LBA, disk id, LBA of the entries, their number, size of one, CRC of all.
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
# Type, unique id, first LBA, last LBA, attributes, name.
_ENTRY = struct.Struct("<16s16sQQQ72s")
assert _HEADER.size == 92
assert _ENTRY.size == 128


@dataclass(frozen=True, slots=True)
class Partition:
    """One entry; `start` and `size` are bytes.  The kernel's node has the same number."""

    number: int
    start: int
    size: int
    type: str
    uuid: str
    name: str = ""
    bootable: bool = False
    is_extended: bool = False  # MBR: a box that the logical partitions are in


@dataclass(frozen=True, slots=True)
class Table:
    """`label` is gpt or dos, `id` the disk's own identifier."""

    label: str
    id: str
    sector_size: int
    partitions: tuple[Partition, ...]
    problems: tuple[str, ...] = ()
    from_backup: bool = False  # the kernel does not look at the backup and shows no partition

    def kernel_numbers(self, disk_size: int) -> frozenset[int]:
        """The partitions that a scan by the kernel is going to show."""
        if self.from_backup:
            return frozenset()
        return frozenset(
            p.number for p in self.partitions if p.start < disk_size and p.number <= MAX_NUMBER
        )


def read_table(read: Read, disk_size: int, sector_size: int) -> Table | None:
    """The partition table of a disk, or None where there is none."""
    if disk_size < 2 * sector_size:
        return None
    record = read(0, sector_size)
    if record[510:512] != _SIGNATURE:
        return None
    slots = _slots(record)
    if any(slot.type == _PROTECTIVE and slot.start == 1 for slot in slots):
        return _read_gpt(read, disk_size, sector_size)
    return _read_mbr(read, record, disk_size, sector_size)


# MBR


class _Slot(NamedTuple):
    status: int
    type: int
    start: int  # sectors
    length: int  # sectors


def _slots(record: bytes) -> list[_Slot]:
    return [
        _Slot(status, kind, start, count)
        for status, kind, start, count in struct.iter_unpack("<B3xB3xII", record[446:510])
    ]


def _read_mbr(read: Read, record: bytes, disk_size: int, sector_size: int) -> Table | None:
    slots = _slots(record)
    # The boot sector of a bare file system has the same signature; its code or text lies here.
    if any(slot.status not in (0x00, 0x80) for slot in slots):
        return None
    if not any(slot.length for slot in slots) and record[0] in (0xEB, 0xE9):
        return None
    disk_id = int.from_bytes(record[440:444], "little")
    problems: list[str] = []
    partitions: list[Partition] = []

    def add(number: int, slot: _Slot, base: int = 0) -> None:
        start = (base + slot.start) * sector_size
        size = slot.length * sector_size
        if start + size > disk_size:
            problems.append(
                f"partition {number}: ends at {start + size}, the disk ends at {disk_size}"
            )
        partition_id = f"{disk_id:08x}-{number:02x}"
        bootable = slot.status == 0x80
        partitions.append(
            Partition(
                number,
                start,
                size,
                f"{slot.type:x}",
                partition_id,
                bootable=bootable,
                is_extended=slot.type in _EXTENDED,
            )
        )

    extended: list[_Slot] = []
    for number, slot in enumerate(slots, start=1):
        if slot.length and slot.type:
            add(number, slot)
            if slot.type in _EXTENDED:
                extended.append(slot)
    for slot in extended[1:]:
        problems.append(f"a second extended partition at sector {slot.start}: not followed")
    if extended:
        logical = _logical(read, extended[0], disk_size // sector_size, sector_size, problems)
        for number, (base, slot) in enumerate(logical, start=5):
            add(number, slot, base)
    return Table("dos", f"0x{disk_id:08x}", sector_size, tuple(partitions), tuple(problems))


def _logical(
    read: Read, extended: _Slot, sectors: int, sector_size: int, problems: list[str]
) -> Iterator[tuple[int, _Slot]]:
    """Follow the extended boot records: each names a partition and the next record."""
    at = extended.start
    seen: set[int] = set()
    while True:
        if at in seen or len(seen) == MAX_LINKS:
            problems.append(f"extended boot record at sector {at}: the chain does not end")
            return
        if at >= sectors:
            problems.append(f"extended boot record at sector {at}: the disk ends at {sectors}")
            return
        seen.add(at)
        record = read(at * sector_size, sector_size)
        if record[510:512] != _SIGNATURE:
            problems.append(f"extended boot record at sector {at}: no signature")
            return
        slots = _slots(record)
        for index, slot in enumerate(slots):
            if not slot.length or slot.type in _EXTENDED:
                continue
            # Some programs leave rubbish in the last two slots: believe only what lies inside.
            start = at + slot.start
            end = start + slot.length
            if index >= 2 and not extended.start <= start < end <= extended.start + extended.length:
                continue
            yield at, slot
        following = [slot for slot in slots if slot.type in _EXTENDED and slot.length]
        if not following:
            return
        at = extended.start + following[0].start


# GPT


class _Gpt(NamedTuple):
    id: uuid.UUID
    first_usable: int
    last_usable: int
    entry_size: int
    entries: bytes


def _read_gpt(read: Read, disk_size: int, sector_size: int) -> Table:
    problems: list[str] = []
    last = disk_size // sector_size - 1
    gpt = None
    from_backup = False
    for lba, name in ((1, "primary"), (last, "backup")):
        header = _read_header(read, lba, last, sector_size)
        if isinstance(header, str):
            problems.append(f"{name} GPT header at sector {lba}: {header}")
        elif gpt is None:
            gpt = header
            from_backup = lba != 1
    if gpt is None:
        return Table("gpt", "", sector_size, (), tuple(problems))
    partitions = []
    for number, offset in enumerate(range(0, len(gpt.entries), gpt.entry_size), start=1):
        kind, unique, first, end, flags, name_bytes = _ENTRY.unpack_from(gpt.entries, offset)
        if kind == bytes(16):
            continue
        if not first <= end <= last:
            problems.append(
                f"partition {number}: sectors {first} to {end}, the disk ends at {last}"
            )
            continue
        if first < gpt.first_usable or end > gpt.last_usable:
            problems.append(
                f"partition {number}: sectors {first} to {end},"
                f" usable are {gpt.first_usable} to {gpt.last_usable}"
            )
        partitions.append(
            Partition(
                number,
                first * sector_size,
                (end - first + 1) * sector_size,
                str(uuid.UUID(bytes_le=kind)).upper(),
                str(uuid.UUID(bytes_le=unique)).upper(),
                _name(name_bytes),
                bool(flags & 4),  # UEFI: "Legacy BIOS Bootable"
            )
        )
    return Table(
        "gpt", str(gpt.id).upper(), sector_size, tuple(partitions), tuple(problems), from_backup
    )


def _read_header(read: Read, lba: int, last: int, sector_size: int) -> _Gpt | str:
    """A header and its entries, each with its checksum right, or what is wrong with them."""
    sector = read(lba * sector_size, sector_size)
    (
        signature,
        _revision,
        header_size,
        checksum,
        _reserved,
        own,
        _other,
        first_usable,
        last_usable,
        disk_id,
        entries_lba,
        count,
        entry_size,
        entries_checksum,
    ) = _HEADER.unpack_from(sector)
    if signature != b"EFI PART":
        return "no signature"
    if not _HEADER.size <= header_size <= sector_size:
        return f"header size {header_size}"
    # The checksum is computed with its own field zero.
    found = zlib.crc32(sector[:16] + bytes(4) + sector[20:header_size])
    if found != checksum:
        return f"checksum {checksum:08x}, computed {found:08x}"
    if own != lba:
        return f"says that it is at sector {own}"
    if not first_usable <= last_usable <= last:
        return f"usable sectors {first_usable} to {last_usable}, the disk ends at {last}"
    if entry_size < _ENTRY.size or entry_size & (entry_size - 1):
        return f"entry size {entry_size}"
    length = count * entry_size
    if length > MAX_TABLE:
        return f"{count} entries of {entry_size} bytes, at most {MAX_TABLE} bytes are read"
    if entries_lba * sector_size + length > (last + 1) * sector_size:
        return f"{count} entries at sector {entries_lba}, the disk ends at {last}"
    entries = read(entries_lba * sector_size, length) if length else b""
    found = zlib.crc32(entries)
    if found != entries_checksum:
        return f"entries' checksum {entries_checksum:08x}, computed {found:08x}"
    return _Gpt(uuid.UUID(bytes_le=disk_id), first_usable, last_usable, entry_size, entries)


def _name(raw: bytes) -> str:
    """Up to 36 UTF-16 units, ended by a zero; what is not printable is shown as a question mark."""
    text = raw.decode("utf-16-le", "replace").split("\0", 1)[0]
    return "".join(c if c.isprintable() else "?" for c in text)
