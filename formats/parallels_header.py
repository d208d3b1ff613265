"""The header and the table of a Parallels image; making one.

Source: qemu, docs/interop/parallels.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from construct import Bytes, ConstructError, Int32ul, Int64ul, Struct

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.hostfile import HostFile
from virtmount.plan import Barrier, Extend, Plan, Write
from virtmount.upkeep import Choice, New

OLD, EXTENDED = b"WithoutFreeSpace", b"WithouFreSpacExt"
MAGICS = (OLD, EXTENDED)
VERSION = 2
BUNDLE = b"<Parallels_disk_image"
BUNDLE_HEAD = 4096
IN_USE = 0x746F6E59
EMPTY_IMAGE = 1  # of flags
SECTOR = 512
ENTRY = 4
TABLE_AT = 64
SCAN = 1 << 16  # bytes
MAX_CLUSTER = 256 << 20
MAX_ENTRIES = 1 << 24  # 16 TiB of 1 MiB clusters
MAX_ENTRY = 0xFFFFFFFF
MAX_MOVED = 64 << 20  # bytes of data at the end of a session
HEADS, TRACK = 16, 32  # of a disk that has none: what Parallels and qemu write

# What a place for a cluster is used for.
FREE, DATA, RESERVED = 0, 1, 2

Record = Struct(
    "magic" / Bytes(16),
    "version" / Int32ul,
    "heads" / Int32ul,
    "cylinders" / Int32ul,
    "cluster" / Int32ul,  # sectors
    "entries" / Int32ul,
    "sectors" / Int64ul,  # of the disk; 32 bits of it in the old version
    "in_use" / Int32ul,
    "data_offset" / Int32ul,  # sectors; 0: behind the table
    "flags" / Int32ul,
    "extension" / Int64ul,  # sectors
)
assert Record.sizeof() == TABLE_AT
AT = {"entries": (32, 4), "sectors": (36, 8), "in_use": (44, 4), "extension": (56, 8)}
FLAGS_AT = 52

CHOICES: Mapping[str, Choice] = {
    "cluster_size": Choice("1M", "what grows at a time: a power of two from 64K to 64M"),
}
MIN_NEW_CLUSTER, MAX_NEW_CLUSTER = 64 << 10, 64 << 20
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True, slots=True)
class Header:
    """Offsets and sizes in bytes."""

    magic: bytes
    cluster: int
    entries: int
    size: int
    data_offset: int  # no cluster begins before
    in_use: bool
    extension: bool  # there is one, valid or not: qemu does not ask

    @property
    def is_extended(self) -> bool:
        return self.magic == EXTENDED

    @property
    def scale(self) -> int:
        """What a table entry counts."""
        return self.cluster if self.is_extended else SECTOR

    @property
    def grid(self) -> int:
        """Where the first cluster lies."""
        if self.is_extended:
            return -(-self.data_offset // self.cluster) * self.cluster
        return self.data_offset


def is_bundle(head: bytes) -> bool:
    text = head[:BUNDLE_HEAD]
    return text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") and BUNDLE in text


def read(file: HostFile) -> Header:
    """The header, checked."""
    head = file.pread_padded(0, BUNDLE_HEAD)
    if is_bundle(head) and head[:16] not in MAGICS:
        text = "the description of a bundle: its snapshots and parts are not put together"
        raise Unsupported(file, "", text, hint="open the .hds file beside it")
    if head[:16] not in MAGICS:
        raise NotAnImage(file, "byte 0", "no Parallels magic")
    try:
        record = Record.parse(file.pread(0, Record.sizeof()))
    except ConstructError as error:
        raise NotAnImage(file, "header", str(error)) from error
    if record.version != VERSION:
        raise Unsupported(file, "header+16", f"version {record.version}, know {VERSION}")
    if not 0 < record.cluster * SECTOR <= MAX_CLUSTER:
        text = f"clusters of {record.cluster} sectors, know 1 to {MAX_CLUSTER // SECTOR}"
        raise Corrupt(file, "header+28", text)
    if record.entries > MAX_ENTRIES:
        text = f"{record.entries} entries, at most {MAX_ENTRIES} are supported"
        raise Unsupported(file, "header+32", text)
    table_end = TABLE_AT + record.entries * ENTRY
    if table_end > file.size:
        text = f"table ends at {table_end}, the file at {file.size}"
        raise Corrupt(file, "header+32", text)
    sectors = record.sectors & 0xFFFFFFFF if record.magic == OLD else record.sectors
    if not 0 < sectors <= record.entries * record.cluster:
        text = f"{sectors} sectors in {record.entries} clusters of {record.cluster}"
        raise Corrupt(file, "header+36", text)
    data_offset = record.data_offset * SECTOR or -(-table_end // SECTOR) * SECTOR
    if data_offset < table_end:
        text = f"data at {data_offset} begins before the table's end at {table_end}"
        raise Corrupt(file, "header+48", text)
    return Header(
        magic=record.magic,
        cluster=record.cluster * SECTOR,
        entries=record.entries,
        size=sectors * SECTOR,
        data_offset=data_offset,
        in_use=record.in_use == IN_USE,
        extension=record.extension != 0,
    )


def put(sector: bytearray, **fields: int) -> None:
    for name, value in fields.items():
        at, width = AT[name]
        sector[at : at + width] = value.to_bytes(width, "little")


def put_entries(sector: bytearray, changes: Mapping[int, int]) -> None:
    """Those entries that lie in the header's sector."""
    for number, value in changes.items():
        at = TABLE_AT + number * ENTRY
        if at < SECTOR:
            sector[at : at + ENTRY] = value.to_bytes(ENTRY, "little")


def entries(file: HostFile, first: int, count: int) -> Iterator[tuple[int, array[int]]]:
    """(number, entries) of the table in pieces; pieces that hold nothing are left out."""
    step = SCAN // ENTRY
    for at in range(first, first + count, step):
        length = min(step, first + count - at)
        raw = file.pread(TABLE_AT + at * ENTRY, length * ENTRY)
        if raw.count(0) == len(raw):
            continue
        piece = array("I")
        assert piece.itemsize == ENTRY
        piece.frombytes(raw)
        if sys.byteorder == "big":
            piece.byteswap()
        yield at, piece


def sector_writes(file: HostFile, changes: Mapping[int, int]) -> Iterator[Write]:
    """Sectors of the table with the entries in `changes` replaced; a disk tears at sectors."""
    sectors: dict[int, bytearray] = {}
    for number, value in changes.items():
        sector, within = divmod(TABLE_AT + number * ENTRY, SECTOR)
        if sector not in sectors:
            sectors[sector] = bytearray(file.pread_padded(sector * SECTOR, SECTOR))
        sectors[sector][within : within + ENTRY] = value.to_bytes(ENTRY, "little")
    start, data = 0, bytearray()
    for sector in sorted(sectors):
        if data and start + len(data) != sector * SECTOR:
            yield Write(start, bytes(data))
            data = bytearray()
        if not data:
            start = sector * SECTOR
        data += sectors[sector]
    if data:
        yield Write(start, bytes(data))


def empty_entries(file: HostFile, first: int, end: int) -> Iterator[Write]:
    """Entries of 0 from number `first` up to `end`, whatever is there."""
    per_sector = SECTOR // ENTRY
    # Up to the next sector what is there stays.
    head = min(end, -(-(TABLE_AT // ENTRY + first) // per_sector) * per_sector - TABLE_AT // ENTRY)
    yield from sector_writes(file, dict.fromkeys(range(first, head), 0))
    zeros = bytes(SCAN)
    for at in range(head, end, SCAN // ENTRY):
        count = min(SCAN // ENTRY, end - at)
        yield Write(TABLE_AT + at * ENTRY, zeros[: count * ENTRY])


def create(new: New) -> Plan:
    """An empty image in the newer version, as qemu lays it out."""
    text = new.options.get("cluster_size", CHOICES["cluster_size"].default)
    match = re.fullmatch(r"(\d{1,12})([KM]?)(?:i?B)?", text, re.IGNORECASE | re.ASCII)
    cluster = int(match[1]) * UNITS[match[2].upper()] if match else 0
    if cluster & (cluster - 1) or not MIN_NEW_CLUSTER <= cluster <= MAX_NEW_CLUSTER:
        say = f"{text!r}, know powers of two from 64K to 64M"
        raise Unsupported(new.name, "cluster_size", say)
    if new.sector_size != SECTOR:
        say = f"sectors of {new.sector_size} bytes: Parallels images have {SECTOR} only"
        raise Unsupported(new.name, "sector_size", say)
    if new.parent is not None:
        raise Unsupported(new.name, "parent", "an image of this format names no parent")
    sectors = -(-new.size // SECTOR)
    count = -(-sectors * SECTOR // cluster)
    if not 0 < count <= MAX_ENTRIES:
        say = f"{new.size} bytes in clusters of {cluster}: know 1 to {MAX_ENTRIES} clusters"
        raise Unsupported(new.name, "size", say)
    data_offset = -(-(TABLE_AT + count * ENTRY) // cluster) * cluster
    header = Record.build(
        {
            "magic": EXTENDED,
            "version": VERSION,
            "heads": HEADS,
            "cylinders": min(sectors // (HEADS * TRACK), 0xFFFFFFFF),
            "cluster": cluster // SECTOR,
            "entries": count,
            "sectors": sectors,
            "in_use": 0,
            "data_offset": data_offset // SECTOR,
            "flags": 0,
            "extension": 0,
        }
    )
    return Plan(Extend(data_offset), Barrier, Write(0, header), Barrier)
