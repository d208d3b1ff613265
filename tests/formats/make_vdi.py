"""VDI images of every kind, byte by byte, for what no other program makes."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from pathlib import Path

MIB = 1 << 20
FREE, DISCARDED = 0xFFFFFFFF, 0xFFFFFFFE
FIELDS = {  # name: (offset, struct code)
    "signature": (64, "I"),
    "version": (68, "I"),
    "header_size": (72, "I"),
    "type": (76, "I"),
    "map_offset": (340, "I"),
    "data_offset": (344, "I"),
    "disk_size": (368, "Q"),
    "block_size": (376, "I"),
    "block_extra": (380, "I"),
    "blocks": (384, "I"),
    "blocks_allocated": (388, "I"),
    "linkage_uuid": (424, "Q"),
    "parent_modification_uuid": (440, "Q"),
}
UUIDS = {"uuid": 392, "modification": 408, "linkage": 424, "parent_modification": 440}


def make(
    path: Path,
    blocks: Sequence[int],
    *,
    block_size: int = MIB,
    map_offset: int = 512,
    data_offset: int = 1024,
    kind: int = 1,
    count: int | None = None,
    tail: int = 0,
    **fields: int,
) -> None:
    """A VDI whose file block b is filled with the byte b + 1; `tail` more blocks of 0xEE follow."""
    used = used_blocks(blocks)
    header = bytearray(512)
    header[:64] = b"<<< test >>>\n".ljust(64, b"\0")
    values = {
        "signature": 0xBEDA107F,
        "version": 0x00010001,
        "header_size": 400,
        "type": kind,
        "map_offset": map_offset,
        "data_offset": data_offset,
        "disk_size": len(blocks) * block_size,
        "block_size": block_size,
        "blocks": len(blocks),
        "blocks_allocated": used if count is None else count,
        **fields,
    }
    header[360:364] = header[468:472] = (512).to_bytes(4, "little")
    header[392:408] = uuid.UUID(int=1).bytes_le
    header[408:424] = uuid.UUID(int=2).bytes_le
    for name, value in values.items():
        offset, code = FIELDS[name]
        struct.pack_into("<" + code, header, offset, value)
    with path.open("wb") as file:
        file.write(header)
        file.seek(map_offset)
        file.write(struct.pack(f"<{len(blocks)}I", *blocks))
        file.seek(data_offset)
        for block in range(used):
            file.write(bytes([(block + 1) % 256]) * block_size)
        file.write(b"\xee" * block_size * tail)


def used_blocks(blocks: Sequence[int]) -> int:
    return max((block for block in blocks if block < DISCARDED), default=-1) + 1


def make_old(path: Path, blocks: Sequence[int], *, kind: int = 1, version: int = 2) -> None:
    """An image with a header of version 0.2: the data begins right behind the map."""
    header = bytearray(420)
    header[:39] = b"<<< innotek VirtualBox Disk Image >>>\n\0"
    struct.pack_into("<IIII", header, 64, 0xBEDA107F, version, kind, 0)
    header[80:85] = b"of 06"
    used = used_blocks(blocks)
    struct.pack_into("<IQIII", header, 348, 512, len(blocks) * MIB, MIB, len(blocks), used)
    header[372:388], header[388:404] = uuid.UUID(int=1).bytes_le, uuid.UUID(int=2).bytes_le
    with path.open("wb") as file:
        file.write(header + struct.pack(f"<{len(blocks)}I", *blocks))
        for block in range(used):
            file.write(bytes([block + 1]) * MIB)


def make_extra(path: Path, blocks: Sequence[int], extra: int, block_size: int = MIB) -> None:
    """One with `extra` bytes of 0xEE in front of every block."""
    make(path, blocks, block_extra=extra, block_size=block_size)
    with path.open("r+b") as file:
        file.truncate(1024)
        file.seek(1024)
        for block in range(used_blocks(blocks)):
            file.write(b"\xee" * extra + bytes([block + 1]) * block_size)


def name(path: Path, **uuids: int) -> None:
    """Give an image UUIDs: uuid, modification, linkage, parent_modification."""
    with path.open("r+b") as file:
        for field, value in uuids.items():
            file.seek(UUIDS[field])
            file.write(uuid.UUID(int=value).bytes_le)


def make_base(path: Path, blocks: Sequence[int] = (0, 1, FREE, 2), number: int = 1) -> None:
    path.parent.mkdir(exist_ok=True)
    make(path, blocks)
    name(path, uuid=number, modification=number + 100)


def make_child(
    path: Path, blocks: Sequence[int] = (FREE, 0, FREE, DISCARDED), number: int = 2, kind: int = 4
) -> None:
    """Over the image `number` - 1."""
    path.parent.mkdir(exist_ok=True)
    make(path, blocks, kind=kind)
    name(path, uuid=number, modification=number + 100)
    name(path, linkage=number - 1, parent_modification=number + 99)
