"""What a VHDX file says of itself: headers, region tables, metadata items.

Source: [MS-VHDX] 20240423, sections 2.2 and 2.6.  Everything is validated here, so that the driver
in vhdx.py calculates with numbers that can be trusted.  The parent locator is an item too, but what
is in it says vhdx_locator.py.

Departures, all for files that exist: two headers with one sequence number are accepted if they are
equal (Disk2vhd), and a known region that is not marked as required is known all the same (qemu).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple
from uuid import UUID

from construct import Bytes, Const, Int16ul, Int32ul, Int64ul, Padded, Padding, Struct
from crc32c import crc32c

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.hostfile import HostFile

KIB = 1 << 10
MIB = 1 << 20
TIB = 1 << 40

SIGNATURE = b"vhdxfile"
HEADER_OFFSETS = (64 * KIB, 128 * KIB)
REGION_TABLE_OFFSETS = (192 * KIB, 256 * KIB)
TABLE_SIZE = 64 * KIB
HEADER_SECTION = MIB
MAX_ENTRIES = 2047  # of a region table and of the metadata table
MAX_LOCATOR = 256 * KIB  # bytes of a parent locator; three paths of 64 KiB, and keys
MAX_DISK = 64 * TIB
MIN_BLOCK, MAX_BLOCK = MIB, 256 * MIB
MAX_SEQUENCE = 1 << 62  # of a header that is to be written; leaves room for every later update
NIL = UUID(int=0)

BAT = UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA = UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")

FILE_PARAMETERS = UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
VIRTUAL_DISK_SIZE = UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
VIRTUAL_DISK_ID = UUID("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR_SIZE = UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR_SIZE = UUID("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
ITEM_LENGTHS = {  # bytes
    FILE_PARAMETERS: 8,
    VIRTUAL_DISK_SIZE: 8,
    VIRTUAL_DISK_ID: 16,
    LOGICAL_SECTOR_SIZE: 4,
    PHYSICAL_SECTOR_SIZE: 4,
}
ITEM_NAMES = {
    FILE_PARAMETERS: "file parameters",
    VIRTUAL_DISK_SIZE: "virtual disk size",
    VIRTUAL_DISK_ID: "virtual disk id",
    LOGICAL_SECTOR_SIZE: "logical sector size",
    PHYSICAL_SECTOR_SIZE: "physical sector size",
}

FileIdentifier = Struct(
    "signature" / Const(SIGNATURE),
    "creator" / Bytes(512),  # UTF-16, for people
)
assert FileIdentifier.sizeof() == 520

HeaderRecord = Padded(
    4096,
    Struct(
        "signature" / Const(b"head"),
        "checksum" / Int32ul,  # CRC-32C of the 4096 bytes, this field as zero
        "sequence" / Int64ul,
        "file_write_guid" / Bytes(16),
        "data_write_guid" / Bytes(16),
        "log_guid" / Bytes(16),  # zero: nothing to replay
        "log_version" / Int16ul,
        "version" / Int16ul,
        "log_length" / Int32ul,
        "log_offset" / Int64ul,
    ),
)
assert HeaderRecord.sizeof() == 4096

RegionTableHeader = Struct(
    "signature" / Const(b"regi"),
    "checksum" / Int32ul,  # CRC-32C of the 64 KiB, this field as zero
    "entry_count" / Int32ul,
    Padding(4),
)
assert RegionTableHeader.sizeof() == 16
REGION = struct.Struct("<16sQII")  # GUID, byte offset in the file, length, required

MetadataTableHeader = Struct(
    "signature" / Const(b"metadata"),
    Padding(2),
    "entry_count" / Int16ul,
    Padding(20),
)
assert MetadataTableHeader.sizeof() == 32
ITEM = struct.Struct("<16sIIII")  # GUID, byte offset in the region, length, flags, reserved
assert (REGION.size, ITEM.size) == (32, 32)
IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4

FileParameters = Struct("block_size" / Int32ul, "flags" / Int32ul)
LEAVE_BLOCKS_ALLOCATED, HAS_PARENT = 1, 2


@dataclass(frozen=True, slots=True)
class Header:
    """One of the two headers; only these fields mean anything."""

    sequence: int
    file_write_guid: UUID
    data_write_guid: UUID
    log_guid: UUID
    log_offset: int
    log_length: int
    log_version: int = 0
    version: int = 1

    def pack(self) -> bytes:
        raw: bytes = HeaderRecord.build(
            {
                "checksum": 0,
                "sequence": self.sequence,
                "file_write_guid": self.file_write_guid.bytes_le,
                "data_write_guid": self.data_write_guid.bytes_le,
                "log_guid": self.log_guid.bytes_le,
                "log_version": self.log_version,
                "version": self.version,
                "log_length": self.log_length,
                "log_offset": self.log_offset,
            }
        )
        return sealed(raw)


def pack_regions(regions: Sequence[tuple[UUID, int, int]]) -> bytes:
    """A region table of required regions: (GUID, byte offset in the file, length)."""
    raw: bytes = RegionTableHeader.build({"checksum": 0, "entry_count": len(regions)})
    for guid, offset, length in regions:
        raw += REGION.pack(guid.bytes_le, offset, length, 1)
    return sealed(raw.ljust(TABLE_SIZE, b"\0"))


def all_required(table: bytes) -> bytes:
    """A region table that marks the BAT and the metadata region as required."""
    raw = bytearray(table)
    count = RegionTableHeader.parse(table).entry_count
    for at in range(RegionTableHeader.sizeof(), len(raw), REGION.size)[:count]:
        if raw[at : at + 16] in (BAT.bytes_le, METADATA.bytes_le):
            raw[at + 28] |= 1
    return sealed(bytes(raw))


def pack_items(items: Sequence[tuple[UUID, bytes, int]]) -> bytes:
    """The used part of a metadata region: (GUID, bytes, flags)."""
    table: bytes = MetadataTableHeader.build({"entry_count": len(items)})
    rest = b""
    for guid, data, flags in items:
        table += ITEM.pack(guid.bytes_le, TABLE_SIZE + len(rest), len(data), flags, 0)
        rest += data.ljust(-(-len(data) // 8) * 8, b"\0")
    return table.ljust(TABLE_SIZE, b"\0") + rest


class Region(NamedTuple):
    """A range of the file with one purpose; the log counts as one here."""

    name: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Item(NamedTuple):
    """A metadata item: where its table entry and its bytes lie in the file."""

    entry: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Disk:
    """The metadata items."""

    size: int
    block_size: int
    fixed: bool
    sector_size: int
    physical_sector_size: int
    disk_id: UUID
    has_parent: bool
    items: Mapping[UUID, Item]  # the known ones; the parent locator only where it means something

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)

    @property
    def chunk(self) -> int:
        """Blocks that share a sector bitmap block."""
        return (self.sector_size << 23) // self.block_size


def checksum(structure: bytes) -> int:
    """CRC-32C of a structure whose bytes 4 to 8 are the checksum, which counts as zero."""
    return int(crc32c(structure[8:], crc32c(bytes(4), crc32c(structure[:4]))))


def sealed(structure: bytes) -> bytes:
    """The structure with its checksum in bytes 4 to 8."""
    return structure[:4] + checksum(structure).to_bytes(4, "little") + structure[8:]


def read_creator(file: HostFile) -> str:
    """The program that made the file, as it calls itself; may be empty."""
    raw = file.pread_padded(0, FileIdentifier.sizeof())
    if raw[:8] != SIGNATURE:
        raise NotAnImage(file, "byte 0", f"signature {raw[:8]!r}, a VHDX file has {SIGNATURE!r}")
    text = FileIdentifier.parse(raw).creator.decode("utf-16-le", "replace").partition("\0")[0]
    return "".join(c for c in text if c.isprintable())


def parse_headers(file: HostFile) -> tuple[list[Header | None], list[str]]:
    """Both headers, None for one that does not count, and what is wrong with those."""
    found: list[Header | None] = []
    complaints = []
    for number, offset in enumerate(HEADER_OFFSETS, 1):
        raw = file.pread_padded(offset, HeaderRecord.sizeof())
        complaint = _complaint(raw, b"head")
        if complaint:
            complaints.append(f"header {number} at {offset}: {complaint}")
        found.append(None if complaint else _header(raw))
    return found, complaints


def _complaint(raw: bytes, signature: bytes) -> str:
    """What is wrong with a structure that has a signature and a checksum, if anything is."""
    stored, computed = int.from_bytes(raw[4:8], "little"), checksum(raw)
    if raw[:4] != signature:
        return f"signature {raw[:4]!r}"
    return "" if stored == computed else f"checksum {stored:08x}, computed {computed:08x}"


def read_headers(file: HostFile) -> tuple[Header, int]:
    """The current header and whether it is the first (0) or the second (1)."""
    (first, second), complaints = parse_headers(file)
    if first and second and first.sequence == second.sequence and first != second:
        text = f"both have sequence number {first.sequence}, but they differ"
        raise Corrupt(file, "headers at 65536 and 131072", text)
    if first and not (second and second.sequence > first.sequence):
        header, slot = first, 0
    elif second:
        header, slot = second, 1
    else:
        raise Corrupt(file, "", "; ".join(complaints))
    _check_header(file, header, slot)
    return header, slot


def _header(raw: bytes) -> Header:
    record = HeaderRecord.parse(raw)
    return Header(
        sequence=record.sequence,
        file_write_guid=UUID(bytes_le=record.file_write_guid),
        data_write_guid=UUID(bytes_le=record.data_write_guid),
        log_guid=UUID(bytes_le=record.log_guid),
        log_offset=record.log_offset,
        log_length=record.log_length,
        log_version=record.log_version,
        version=record.version,
    )


def _check_header(file: HostFile, header: Header, slot: int) -> None:
    place = f"header {slot + 1} at {HEADER_OFFSETS[slot]}"
    if header.version != 1:
        raise Unsupported(file, place, f"version {header.version}, know 1")
    if header.log_guid != NIL and header.log_version != 0:
        raise Unsupported(file, place, f"log version {header.log_version}, know 0")
    if header.log_length == 0:
        if header.log_guid != NIL:
            raise Corrupt(file, place, "a log GUID, but a log of 0 bytes")
        return
    check_region(file, Region("log", header.log_offset, header.log_length), place)


def check_region(file: HostFile, region: Region, place: str) -> None:
    name, offset, length = region
    if offset % MIB or length % MIB or length == 0:
        text = f"{name} at {offset} with {length} bytes: not multiples of 1 MiB"
        raise Corrupt(file, place, text)
    if offset < HEADER_SECTION:
        raise Corrupt(file, place, f"{name} at {offset}: inside the header section")
    if region.end > file.size:
        raise Corrupt(file, place, f"{name} ends at {region.end}, the file at {file.size}")


def read_region_tables(file: HostFile) -> tuple[list[bytes | None], list[str]]:
    """Both region tables, None for one that does not count, and what is wrong with those."""
    found: list[bytes | None] = []
    complaints = []
    for number, offset in enumerate(REGION_TABLE_OFFSETS, 1):
        raw = file.pread_padded(offset, TABLE_SIZE)
        complaint = _complaint(raw, b"regi")
        if complaint:
            complaints.append(f"region table {number} at {offset}: {complaint}")
        found.append(None if complaint else raw)
    return found, complaints


def read_regions(file: HostFile) -> tuple[dict[UUID, Region], int]:
    """All regions, and which of the two tables they were read from (1 or 2)."""
    tables, complaints = read_region_tables(file)
    for number, raw in enumerate(tables, 1):
        if raw is not None:
            place = f"region table {number} at {REGION_TABLE_OFFSETS[number - 1]}"
            return _regions(file, raw, place), number
    raise Corrupt(file, "", "; ".join(complaints))


def _regions(file: HostFile, raw: bytes, place: str) -> dict[UUID, Region]:
    count = RegionTableHeader.parse(raw).entry_count
    if count > MAX_ENTRIES:
        raise Corrupt(file, place, f"{count} entries, at most {MAX_ENTRIES}")
    names = {BAT: "BAT", METADATA: "metadata region"}
    regions: dict[UUID, Region] = {}
    table = raw[RegionTableHeader.sizeof() :][: count * REGION.size]
    for i, (guid_le, offset, length, required) in enumerate(REGION.iter_unpack(table)):
        guid = UUID(bytes_le=guid_le)
        if guid in regions:
            raise Corrupt(file, f"{place}, entry {i}", f"region {guid} a second time")
        if guid not in names and required:
            raise Unsupported(file, f"{place}, entry {i}", f"required region {guid}")
        regions[guid] = Region(names.get(guid, f"region {guid}"), offset, length)
        check_region(file, regions[guid], f"{place}, entry {i}")
    for guid, name in names.items():
        if guid not in regions:
            raise Corrupt(file, place, f"no {name}")
    return regions


def taken_regions(header: Header, regions: Mapping[UUID, Region]) -> list[Region]:
    """Where no block can lie, the header section first."""
    taken = [Region("header section", 0, HEADER_SECTION), *regions.values()]
    if header.log_length:
        taken.append(Region("log", header.log_offset, header.log_length))
    return taken


def check_overlaps(file: HostFile, regions: Sequence[Region]) -> None:
    ordered = sorted(regions, key=lambda region: region.offset)
    for low, high in pairwise(ordered):
        if high.offset < low.end:
            raise Corrupt(file, f"byte {high.offset}", f"{high.name} overlaps {low.name}")


def read_disk(file: HostFile, region: Region) -> Disk:
    """The metadata items, all checked against the specification's bounds."""
    items, locator = _items(file, region)
    for guid, name in ITEM_NAMES.items():
        if guid not in items:
            raise Corrupt(file, f"metadata table at {region.offset}", f"no {name} ({guid})")

    def number(guid: UUID) -> tuple[int, str]:
        item = items[guid]
        return int.from_bytes(item.data, "little"), f"{ITEM_NAMES[guid]} at {item.offset}"

    place = f"file parameters at {items[FILE_PARAMETERS].offset}"
    parameters = FileParameters.parse(items[FILE_PARAMETERS].data)
    block_size, flags = parameters.block_size, parameters.flags
    if flags & ~(LEAVE_BLOCKS_ALLOCATED | HAS_PARENT):
        raise Unsupported(file, place, f"flags {flags:#x}, know 1 and 2")
    if flags & HAS_PARENT:
        if locator is None:
            raise Corrupt(file, place, "HasParent is set, but there is no parent locator")
        items[PARENT_LOCATOR] = _located(file, region, locator)
    if not MIN_BLOCK <= block_size <= MAX_BLOCK or block_size & (block_size - 1):
        text = f"block size {block_size}, must be a power of two from 1 to 256 MiB"
        raise Corrupt(file, place, text)
    sectors = []
    for guid in (LOGICAL_SECTOR_SIZE, PHYSICAL_SECTOR_SIZE):
        sector, place = number(guid)
        if sector not in (512, 4096):
            raise Corrupt(file, place, f"{sector}, must be 512 or 4096")
        sectors.append(sector)
    size, place = number(VIRTUAL_DISK_SIZE)
    if not 0 < size <= MAX_DISK:
        raise Corrupt(file, place, f"{size} bytes, must be 1 to {MAX_DISK}")
    if size % sectors[0]:
        raise Corrupt(file, place, f"{size} bytes, not a multiple of the sector, {sectors[0]}")
    return Disk(
        size=size,
        block_size=block_size,
        fixed=flags == LEAVE_BLOCKS_ALLOCATED,  # ignored where there is a parent
        sector_size=sectors[0],
        physical_sector_size=sectors[1],
        disk_id=UUID(bytes_le=items[VIRTUAL_DISK_ID].data),
        has_parent=bool(flags & HAS_PARENT),
        items=items,
    )


class _Entry(NamedTuple):
    """An entry of the metadata table that has not been looked at yet."""

    place: str
    at: int
    offset: int  # in the region
    length: int


def _items(file: HostFile, region: Region) -> tuple[dict[UUID, Item], _Entry | None]:
    """The known items, and the table entry of a parent locator."""
    place = f"metadata table at {region.offset}"
    raw = file.pread(region.offset, TABLE_SIZE)
    if raw[:8] != b"metadata":
        raise Corrupt(file, place, f"signature {raw[:8]!r}")
    count = MetadataTableHeader.parse(raw).entry_count
    if count > MAX_ENTRIES:
        raise Corrupt(file, place, f"{count} entries, at most {MAX_ENTRIES}")
    items: dict[UUID, Item] = {}
    locator: _Entry | None = None
    table = raw[MetadataTableHeader.sizeof() :][: count * ITEM.size]
    for i, (guid_le, offset, length, flags, _) in enumerate(ITEM.iter_unpack(table)):
        guid = UUID(bytes_le=guid_le)
        known = not flags & IS_USER and (guid in ITEM_LENGTHS or guid == PARENT_LOCATOR)
        if not known:
            if flags & IS_REQUIRED:
                kind = "user" if flags & IS_USER else "system"
                text = f"required {kind} metadata item {guid}"
                raise Unsupported(file, f"{place}, entry {i}", text)
            continue
        at = region.offset + MetadataTableHeader.sizeof() + i * ITEM.size
        if guid == PARENT_LOCATOR:
            # Means nothing without HasParent, whatever it is.
            locator = locator or _Entry(f"{place}, entry {i}", at, offset, length)
            continue
        name = ITEM_NAMES[guid]
        if guid in items:
            raise Corrupt(file, f"{place}, entry {i}", f"{name} a second time")
        if offset < TABLE_SIZE or offset + length > region.length:
            text = f"{name} at {offset} with {length} bytes: outside the metadata region"
            raise Corrupt(file, f"{place}, entry {i}", text)
        if length != ITEM_LENGTHS[guid]:
            text = f"{name} has {length} bytes, must have {ITEM_LENGTHS[guid]}"
            raise Corrupt(file, f"{place}, entry {i}", text)
        where = region.offset + offset
        items[guid] = Item(at, where, file.pread(where, length))
    return items, locator


def _located(file: HostFile, region: Region, entry: _Entry) -> Item:
    if entry.offset < TABLE_SIZE or entry.offset + entry.length > region.length:
        text = f"parent locator at {entry.offset} with {entry.length} bytes: outside the metadata"
        raise Corrupt(file, entry.place, text)
    if entry.length > MAX_LOCATOR:
        text = f"parent locator has {entry.length} bytes, at most {MAX_LOCATOR}"
        raise Corrupt(file, entry.place, text)
    where = region.offset + entry.offset
    return Item(entry.at, where, file.pread(where, entry.length))
