"""The header of a VDI: fields, what must hold of them, and where they lie.

Source: VirtualBox, VDICore.h.  Version 1.1 is what every VirtualBox since 1.0 writes, VDIHEADER1
(384 bytes) or VDIHEADER1PLUS (400).  Version 0.x, VDIHEADER0, has no field for where map and data
begin: they follow one another directly, so no block lies at a whole sector; no modification UUID
of the parent either.  Images of that age could not be found any more: those of the tests are made
by the tests, and vbox-img 7.2 reads them as we do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from construct import Bytes, Const, ConstructError, Int32ul, Int64ul, Padding, Struct

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.hostfile import HostFile

SIGNATURE = (0xBEDA107F).to_bytes(4, "little")
VERSION = 0x00010001
DYNAMIC, FIXED, UNDO, DIFFERENCING = 1, 2, 3, 4
TYPES = {DYNAMIC: "dynamic", FIXED: "fixed", UNDO: "undo", DIFFERENCING: "differencing"}
BASES = (DYNAMIC, FIXED)  # the types without a parent

ENTRY = 4  # bytes of a map entry
SECTOR = 512
MIN_BLOCK = 512
MAX_BLOCK = 256 << 20
MAX_BLOCKS = 1 << 26  # 64 TiB of 1 MiB blocks; a 256 MiB map
MAX_COPIED_BLOCK = 16 << 20  # of an image whose blocks lie between sectors: read as a whole
NO_UUID = UUID(int=0)

Record1 = Struct(
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
    "linkage_uuid" / Bytes(16),  # the parent's uuid
    "parent_modification_uuid" / Bytes(16),
)
Record0 = Struct(
    "banner" / Bytes(64),
    "signature" / Const(SIGNATURE),
    "version" / Int32ul,
    "type" / Int32ul,
    "flags" / Int32ul,
    "comment" / Bytes(256),
    Padding(4 * 4),  # CHS geometry, sector size
    "disk_size" / Int64ul,
    "block_size" / Int32ul,
    "blocks" / Int32ul,
    "blocks_allocated" / Int32ul,
    "uuid" / Bytes(16),
    "modification_uuid" / Bytes(16),
    "linkage_uuid" / Bytes(16),
)
assert Record1.sizeof() == 456
assert Record0.sizeof() == 420
HEADER_SIZE_FROM = 72
HEADER_SIZE_MIN = 384

# Where the fields of version 1.1 lie that are written, or named in messages.
AT = {
    "version": 68,
    "header_size": 72,
    "type": 76,
    "map_offset": 340,
    "data_offset": 344,
    "disk_size": 368,
    "block_size": 376,
    "block_extra": 380,
    "blocks": 384,
    "blocks_allocated": 388,
    "uuid": 392,
    "modification_uuid": 408,
    "linkage_uuid": 424,
    "parent_modification_uuid": 440,
}
AT_0 = {
    "type": 72,
    "disk_size": 352,
    "block_size": 360,
    "blocks": 364,
    "blocks_allocated": 368,
    "uuid": 372,
    "modification_uuid": 388,
    "linkage_uuid": 404,
}


@dataclass(frozen=True, slots=True)
class Header:
    """What both versions say; offsets and sizes in bytes."""

    version: int
    type: int
    comment: str
    map_offset: int
    data_offset: int
    disk_size: int
    block_size: int
    block_extra: int
    blocks: int
    blocks_allocated: int
    uuid: UUID
    modification_uuid: UUID
    linkage_uuid: UUID
    parent_modification_uuid: UUID

    @property
    def old(self) -> bool:
        """Version 0.x."""
        return self.version >> 16 == 0

    @property
    def stride(self) -> int:
        """From one block to the next."""
        return self.block_size + self.block_extra

    @property
    def first(self) -> int:
        """Where the data of block 0 begins."""
        return self.data_offset + self.block_extra

    @property
    def in_sectors(self) -> bool:
        """Whether the blocks begin at whole sectors."""
        return not (self.first % SECTOR or self.stride % SECTOR)

    def place(self, field: str) -> str:
        """The field's name in a message."""
        return f"header+{(AT_0 if self.old else AT)[field]}"


def is_vdi(head: bytes) -> bool:
    return head[64:68] == SIGNATURE


def read(file: HostFile) -> tuple[bytearray, Header]:
    """The header's sector and its fields, which are checked for nothing but the version."""
    head = file.pread_padded(0, SECTOR)
    if not is_vdi(head):
        raise NotAnImage(file, "header+64", "no VDI signature")
    version = int.from_bytes(head[68:72], "little")
    old = version >> 16 == 0
    if version != VERSION and not old:
        text = f"version {version >> 16}.{version & 0xFFFF}, know 0.x and 1.1"
        raise Unsupported(file, "header+68", text)
    file.pread(0, Record0.sizeof() if old else SECTOR)
    return bytearray(head), parse(head)


def parse(head: bytes) -> Header:
    """The fields of a header whose signature is right.  NotAnImage if it ends too early."""
    old = int.from_bytes(head[70:72], "little") == 0
    try:
        record = (Record0 if old else Record1).parse(head)
    except ConstructError as error:
        raise NotAnImage("VDI header", "", str(error)) from error
    return _normal(record, old)


def _normal(record: Any, old: bool) -> Header:
    map_offset = Record0.sizeof() if old else record.map_offset
    none = bytes(16)
    return Header(
        version=record.version,
        type=record.type,
        comment=record.comment.split(b"\0")[0].decode("utf-8", "replace"),
        map_offset=map_offset,
        data_offset=map_offset + record.blocks * ENTRY if old else record.data_offset,
        disk_size=record.disk_size,
        block_size=record.block_size,
        block_extra=0 if old else record.block_extra,
        blocks=record.blocks,
        blocks_allocated=record.blocks_allocated,
        uuid=UUID(bytes_le=record.uuid),
        modification_uuid=UUID(bytes_le=record.modification_uuid),
        linkage_uuid=UUID(bytes_le=record.linkage_uuid),
        parent_modification_uuid=UUID(bytes_le=none if old else record.parent_modification_uuid),
    )


def validate(
    file: HostFile, sector: bytes | bytearray, header: Header, *, any_parent: bool
) -> None:
    """Refuse what cannot be read.  `any_parent`: with or without one."""
    header_size = int.from_bytes(sector[HEADER_SIZE_FROM : HEADER_SIZE_FROM + 4], "little")
    if not header.old and header_size < HEADER_SIZE_MIN:
        text = f"header of {header_size} bytes, at least {HEADER_SIZE_MIN} expected"
        raise Corrupt(file, "header+72", text)
    if header.type not in TYPES:
        text = f"image type {header.type}, know 1 (dynamic), 2 (fixed), 3 (undo), 4 (differencing)"
        raise Unsupported(file, header.place("type"), text)
    _validate_parent(file, header, any_parent)
    _validate_sizes(file, header)
    if not header.old:
        for field in ("map_offset", "data_offset"):
            if getattr(header, field) % SECTOR:
                text = f"{field} {getattr(header, field)}, not a multiple of {SECTOR}"
                raise Unsupported(file, header.place(field), text)
        if header.map_offset < HEADER_SIZE_FROM + header_size:
            text = f"map_offset {header.map_offset} lies inside the header"
            raise Corrupt(file, header.place("map_offset"), text)
    map_end = header.map_offset + header.blocks * ENTRY
    if map_end > file.size:
        text = f"map ends at {map_end}, the file at {file.size}"
        raise Corrupt(file, header.place("blocks" if header.old else "map_offset"), text)
    if header.data_offset < map_end:
        text = f"data_offset {header.data_offset} lies before the map's end at {map_end}"
        raise Corrupt(file, header.place("data_offset"), text)
    if not header.in_sectors and header.block_size > MAX_COPIED_BLOCK:
        text = f"blocks of {header.block_size} bytes that do not begin at whole sectors"
        raise Unsupported(file, header.place("block_size"), text)


def _validate_parent(file: HostFile, header: Header, any_parent: bool) -> None:
    if header.type in BASES:
        named = ["linkage_uuid"] if header.old else ["linkage_uuid", "parent_modification_uuid"]
        for field in named:
            if getattr(header, field) != NO_UUID and not any_parent:
                text = f"{field} names a parent, but a {TYPES[header.type]} image has none"
                raise Unsupported(file, header.place(field), text)
    elif header.linkage_uuid == NO_UUID and not any_parent:
        text = f"no parent is named, but {TYPES[header.type]} images have one"
        raise Corrupt(file, header.place("linkage_uuid"), text)


def _validate_sizes(file: HostFile, header: Header) -> None:
    size = header.block_size
    if size & (size - 1) or not MIN_BLOCK <= size <= MAX_BLOCK:
        text = f"block size {size}, know powers of two from {MIN_BLOCK} to {MAX_BLOCK}"
        raise Unsupported(file, header.place("block_size"), text)
    if header.block_extra > MAX_BLOCK:
        text = f"{header.block_extra} bytes of extra data a block, at most {MAX_BLOCK} are known"
        raise Unsupported(file, header.place("block_extra"), text)
    if not header.disk_size:
        raise Corrupt(file, header.place("disk_size"), "disk size 0")
    if header.blocks > MAX_BLOCKS:
        text = f"{header.blocks} blocks, at most {MAX_BLOCKS} are supported"
        raise Unsupported(file, header.place("blocks"), text)
    if header.disk_size > header.blocks * size:
        text = f"{header.blocks} blocks of {size} bytes for a disk of {header.disk_size}"
        raise Corrupt(file, header.place("blocks"), text)


def put(sector: bytearray, fields: Mapping[str, int | UUID]) -> bytearray:
    """Set fields of a header of version 1.1, in place."""
    for field, value in fields.items():
        at = AT[field]
        if isinstance(value, UUID):
            sector[at : at + 16] = value.bytes_le
        else:
            width = 8 if field == "disk_size" else 4
            sector[at : at + width] = value.to_bytes(width, "little")
    return sector
