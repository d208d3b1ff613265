"""Makes VHDX files that qemu-img cannot, from [MS-VHDX] alone: shares no code with the driver.

The file is laid out as header section, log at 1 MiB, metadata region, BAT, blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

MIB = 1 << 20
NIL = UUID(int=0)
BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
VIRTUAL_DISK_ID = UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE = UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
VHDX_LOCATOR = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
FILE_WRITE, DATA_WRITE = UUID(int=1), UUID(int=2)
DISK_ID = UUID("11111111-2222-3333-4444-555555555555")
STRANGER = UUID("99999999-8888-7777-6666-555555555555")
LOG_GUID = UUID("abcdef01-2345-6789-abcd-ef0123456789")
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, PRESENT, PARTIAL = 0, 1, 2, 3, 6, 7

_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = (_byte >> 1) ^ (0x82F63B78 if _byte & 1 else 0)
    _TABLE.append(_byte)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def sealed(structure: bytes) -> bytes:
    """The structure with its checksum, which counts as zero, in bytes 4 to 8."""
    structure = structure[:4] + bytes(4) + structure[8:]
    return structure[:4] + struct.pack("<I", crc32c(structure)) + structure[8:]


def header(
    sequence: int = 1,
    *,
    log_guid: UUID = NIL,
    log_version: int = 0,
    version: int = 1,
    log_length: int = MIB,
    log_offset: int = MIB,
    data_write: UUID = DATA_WRITE,
    file_write: UUID = FILE_WRITE,
) -> bytes:
    raw = struct.pack(
        "<4sIQ16s16s16sHHIQ",
        b"head",
        0,
        sequence,
        file_write.bytes_le,
        data_write.bytes_le,
        log_guid.bytes_le,
        log_version,
        version,
        log_length,
        log_offset,
    )
    return sealed(raw.ljust(4096, b"\0"))


def region_table(regions: Iterable[tuple[UUID, int, int, int]], count: int | None = None) -> bytes:
    """(GUID, offset, length, required)"""
    entries = [
        struct.pack("<16sQII", guid.bytes_le, offset, length, required)
        for guid, offset, length, required in regions
    ]
    raw = struct.pack("<4sIII", b"regi", 0, len(entries) if count is None else count, 0)
    return sealed((raw + b"".join(entries)).ljust(65536, b"\0"))


@dataclass
class Item:
    guid: UUID
    data: bytes
    flags: int = 4  # 1 user, 2 of the virtual disk, 4 required
    offset: int | None = None
    length: int | None = None


def items(
    size: int, block_size: int, sector_size: int, physical: int, flags: int
) -> dict[str, Item]:
    return {
        "parameters": Item(FILE_PARAMETERS, struct.pack("<II", block_size, flags), 4),
        "size": Item(VIRTUAL_DISK_SIZE, struct.pack("<Q", size), 6),
        "id": Item(VIRTUAL_DISK_ID, DISK_ID.bytes_le, 6),
        "sector": Item(LOGICAL_SECTOR_SIZE, struct.pack("<I", sector_size), 6),
        "physical": Item(PHYSICAL_SECTOR_SIZE, struct.pack("<I", physical), 6),
    }


def metadata_region(entries: Iterable[Item], count: int | None = None) -> bytes:
    table = b""
    data = b""
    entries = list(entries)
    for item in entries:
        # Unaligned on purpose: the specification says that items may be.
        offset = 65536 + 3 + len(data) if item.offset is None else item.offset
        length = len(item.data) if item.length is None else item.length
        table += struct.pack("<16sIIII", item.guid.bytes_le, offset, length, item.flags, 0)
        data += item.data
    head = struct.pack("<8sHH20x", b"metadata", 0, len(entries) if count is None else count)
    return ((head + table).ljust(65536, b"\0") + b"\xaa\xbb\xcc" + data).ljust(MIB, b"\0")


def locator(
    pairs: Iterable[tuple[str, str]], *, kind: UUID = VHDX_LOCATOR, count: int | None = None
) -> bytes:
    """A parent locator's bytes.  The values lie in front of the keys, which is allowed too."""
    pairs = list(pairs)
    table, rest = b"", b""
    first = 20 + 12 * len(pairs)
    for key, value in pairs:
        key_raw, value_raw = (t.encode("utf-16-le", "surrogatepass") for t in (key, value))
        at = first + len(rest)
        table += struct.pack("<IIHH", at + len(value_raw), at, len(key_raw), len(value_raw))
        rest += value_raw + key_raw
    return struct.pack("<16sHH", kind.bytes_le, 0, len(pairs) if count is None else count) + (
        table + rest
    )


def below(identity: UUID, path: str) -> bytes:
    """The locator of a child beside its parent, as Windows writes one."""
    return locator(
        [
            ("parent_linkage", f"{{{identity}}}"),
            ("parent_linkage2", f"{{{NIL}}}"),
            ("relative_path", path),
            ("volume_path", "\\\\?\\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\\x\\" + path),
            ("absolute_win32_path", "C:\\x\\" + path),
        ]
    )


@dataclass
class Made:
    """Where things lie in a file that make() wrote."""

    path: Path
    block_size: int
    chunk: int  # blocks before each sector bitmap entry
    bat: int
    log: int
    log_length: int
    end: int  # of the file
    hosts: dict[int, int] = field(default_factory=dict)  # block -> offset
    bitmaps: dict[int, int] = field(default_factory=dict)  # chunk -> offset

    def entry_offset(self, block: int) -> int:
        return self.bat + (block + block // self.chunk) * 8

    def bitmap_entry(self, chunk: int) -> int:
        return self.bat + (chunk * (self.chunk + 1) + self.chunk) * 8

    def bat_sector(self, changes: Mapping[int, int]) -> tuple[int, bytes]:
        """(offset, 4096 bytes) of the BAT sector that holds these blocks, with new entries."""
        places = {self.entry_offset(block) // 4096 for block in changes}
        (place,) = places
        with open(self.path, "rb") as file:
            file.seek(place * 4096)
            sector = bytearray(file.read(4096))
        for block, entry in changes.items():
            struct.pack_into("<Q", sector, self.entry_offset(block) % 4096, entry)
        return place * 4096, bytes(sector)

    def write(self, offset: int, data: bytes) -> None:
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def read(self, offset: int, length: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    def put_entry(self, position: int, entry: bytes) -> int:
        """Put an entry into the ring, around its end if need be; returns the next position."""
        for at in range(0, len(entry), 4096):
            self.write(self.log + (position + at) % self.log_length, entry[at : at + 4096])
        return (position + len(entry)) % self.log_length

    def put_headers(self, first: bytes, second: bytes) -> None:
        self.write(65536, first)
        self.write(131072, second)


def make(
    path: Path,
    size: int,
    blocks: Mapping[int, bytes] | None = None,
    *,
    block_size: int = MIB,
    sector_size: int = 512,
    physical: int = 4096,
    fixed: bool = False,
    flags: int = 0,
    entries: Mapping[int, int] | None = None,
    log_length: int = MIB,
    bat_length: int | None = None,
    changed: Mapping[str, Item | None] | None = None,
    regions: Iterable[tuple[UUID, int, int, int]] = (),
    file_length: int | None = None,
    parent: bytes | None = None,
    partial: Mapping[int, bytes] | None = None,
    data_write: UUID = DATA_WRITE,
    file_write: UUID = FILE_WRITE,
) -> Made:
    """A VHDX file whose blocks lie in the order of `blocks`.

    `parent` is a locator.  `partial` has the bitmaps of blocks that are partially present.

    `entries` are BAT entries as they are, without data.  `changed` replaces metadata items by name,
    adds ones under new names, and leaves out those that are None.  `regions` are added.
    """
    chunk = (sector_size << 23) // block_size
    count = -(-size // block_size)
    total = count + (count - 1) // chunk
    if parent is not None:
        total = -(-count // chunk) * (chunk + 1)
    log, metadata, bat = MIB, MIB + log_length, 2 * MIB + log_length
    needed = max(1, -(-total * 8 // MIB)) * MIB
    data = bat + needed
    made = Made(path, block_size, chunk, bat, log, log_length, data)
    flags |= 1 if fixed else 0
    flags |= 2 if parent is not None else 0
    described = items(size, block_size, sector_size, physical, flags)
    if parent is not None:
        described["locator"] = Item(PARENT_LOCATOR, parent)
    for name, item in (changed or {}).items():
        if item is None:
            del described[name]
        else:
            described[name] = item
    table = region_table(
        [
            (BAT, bat, needed if bat_length is None else bat_length, 1),
            (METADATA, metadata, MIB, 1),
            *regions,
        ]
    )
    named: Any = {"log_length": log_length, "data_write": data_write, "file_write": file_write}
    with open(path, "wb") as file:
        file.write(b"vhdxfile" + "make_vhdx".encode("utf-16-le"))
        for offset, structure in (
            (65536, header(1, **named)),
            (131072, header(2, **named)),
            (192 << 10, table),
            (256 << 10, table),
            (metadata, metadata_region(described.values())),
        ):
            file.seek(offset)
            file.write(structure)
        for block, content in (blocks or {}).items():
            made.hosts[block] = data
            file.seek(made.entry_offset(block))
            file.write(struct.pack("<Q", data | (PARTIAL if block in (partial or {}) else PRESENT)))
            file.seek(data)
            file.write(content)
            data += block_size
        for block, bits in (partial or {}).items():
            number, within = divmod(block, chunk)
            if number not in made.bitmaps:
                made.bitmaps[number] = data
                file.seek(made.bitmap_entry(number))
                file.write(struct.pack("<Q", data | PRESENT))
                data += MIB
            assert len(bits) == block_size // sector_size // 8
            file.seek(made.bitmaps[number] + within * len(bits))
            file.write(bits)
        for block, entry in (entries or {}).items():
            file.seek(made.entry_offset(block))
            file.write(struct.pack("<Q", entry))
        made.end = data
        file.truncate(data if file_length is None else file_length)
    return made


def log_entry(
    sequence: int,
    changes: Iterable[tuple[int, bytes | int]],
    *,
    tail: int = 0,
    guid: UUID = LOG_GUID,
    flushed: int,
    last: int | None = None,
    padding: int = 0,
    descriptor_sequence: int | None = None,
    data_sequence: int | None = None,
    bad_checksum: bool = False,
) -> bytes:
    """A log entry; each change is (offset, 4096 bytes), or (offset, length to be zeroed)."""
    descriptors = b""
    sectors = b""
    number = sequence if data_sequence is None else data_sequence
    changes = list(changes)
    for offset, change in changes:
        rest = struct.pack("<QQ", offset, descriptor_sequence or sequence)
        if isinstance(change, int):
            descriptors += struct.pack("<4sIQ", b"zero", 0, change) + rest
            continue
        assert len(change) == 4096
        descriptors += b"desc" + change[4092:] + change[:8] + rest
        sectors += struct.pack("<4sI", b"data", number >> 32) + change[8:4092]
        sectors += struct.pack("<I", number & 0xFFFFFFFF)
    length = -(-(64 + len(descriptors)) // 4096) * 4096
    table_and_data = descriptors.ljust(length - 64, b"\0") + sectors + bytes(padding)
    raw = struct.pack(
        "<4sIIIQII16sQQ",
        b"loge",
        0,
        64 + len(table_and_data),
        tail,
        sequence,
        len(changes),
        0,
        guid.bytes_le,
        flushed,
        flushed if last is None else last,
    )
    entry = sealed(raw + table_and_data)
    if bad_checksum:
        entry = entry[:4] + bytes([entry[4] ^ 1]) + entry[5:]
    return entry
