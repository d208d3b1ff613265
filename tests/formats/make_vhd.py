"""VHD images made byte by byte, in any shape: written from the specification, not by the driver."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KIB, MIB = 1 << 10, 1 << 20
FREE = 0xFFFFFFFF
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
UUID = bytes(range(0x10, 0x20))
PARENT_UUID = bytes(range(0x50, 0x60))


def summed(raw: bytes, at: int) -> bytes:
    total = sum(raw) - sum(raw[at : at + 4])
    return raw[:at] + struct.pack(">I", ~total & 0xFFFFFFFF) + raw[at + 4 :]


def footer(
    kind: int,
    size: int,
    *,
    data_offset: int = 512,
    creator: bytes = b"win ",
    shape: tuple[int, int, int] = (0xFFFF, 16, 255),
    uuid: bytes = UUID,
    version: int = 0x10000,
    saved: int = 0,
) -> bytes:
    raw = struct.pack(
        ">8sIIQI4sI4sQQHBBII16sB",
        b"conectix",
        2,
        version,
        0xFFFFFFFFFFFFFFFF if kind == FIXED else data_offset,
        600_000_000,
        creator,
        0x00060001,
        b"Wi2k",
        size,
        size,
        *shape,
        kind,
        0,
        uuid,
        saved,
    )
    return summed(raw.ljust(512, b"\0"), 64)


def header(
    table: int,
    entries: int,
    block: int,
    *,
    parent_uuid: bytes = bytes(16),
    timestamp: int = 0,
    name: str = "",
    locators: Sequence[tuple[bytes, int, int, int]] = (),  # code, space, length, offset
    version: int = 0x10000,
) -> bytes:
    raw = struct.pack(
        ">8sQQIIII16sI4x512s",
        b"cxsparse",
        0xFFFFFFFFFFFFFFFF,
        table,
        version,
        entries,
        block,
        0,
        parent_uuid,
        timestamp,
        name.encode("utf-16-be"),
    )
    raw += b"".join(struct.pack(">4sII4xQ", *item) for item in locators)
    return summed(raw.ljust(1024, b"\0"), 36)


def bits(block: int, present: Sequence[range] | None) -> bytes:
    """A bitmap; `present` are ranges of sectors, None stands for all."""
    count = block // 512
    flags = ["0"] * count
    for run in [range(count)] if present is None else present:
        for sector in run:
            flags[sector] = "1"
    raw = int("".join(flags), 2).to_bytes(count // 8, "big")
    return raw.ljust(-(-len(raw) // 512) * 512, b"\0")


@dataclass
class Block:
    data: bytes
    present: Sequence[range] | None = None  # sectors; None: all


@dataclass
class Spec:
    """A dynamic or differencing image; `blocks` by guest block, laid down in this order."""

    size: int
    blocks: Mapping[int, Block] = field(default_factory=dict)
    block: int = 64 * KIB
    kind: int = DYNAMIC
    entries: int | None = None
    table: int = 1536
    gap: int = 0  # bytes in front of every block
    uuid: bytes = UUID
    creator: bytes = b"win "
    shape: tuple[int, int, int] = (0xFFFF, 16, 255)
    parent_uuid: bytes = bytes(16)
    timestamp: int = 0
    name: str = ""
    paths: Sequence[tuple[bytes, bytes]] = ()  # locators: code, path; they lie behind the table
    in_sectors: bool = False  # how the locators' space is given

    def build(self) -> bytes:
        count = -(-self.size // self.block)
        entries = count if self.entries is None else self.entries
        at = self.table + -(-entries * 4 // 512) * 512
        locators = []
        places: list[tuple[int, bytes]] = []
        for code, path in self.paths:
            room = -(-len(path) // 512) * 512
            locators.append((code, room // 512 if self.in_sectors else room, len(path), at))
            places.append((at, path))
            at += room
        table = [FREE] * entries
        for index, block in self.blocks.items():
            at += self.gap
            table[index] = at // 512
            bitmap = bits(self.block, block.present)
            places.append((at, bitmap + block.data.ljust(self.block, b"\0")))
            at += len(bitmap) + self.block
        end = footer(self.kind, self.size, uuid=self.uuid, creator=self.creator, shape=self.shape)
        head = header(
            self.table,
            entries,
            self.block,
            parent_uuid=self.parent_uuid,
            timestamp=self.timestamp,
            name=self.name,
            locators=locators,
        )
        content = bytearray(at + 512)
        for offset, data in [
            (0, end),
            (512, head),
            (self.table, b"\xff" * (-(-entries * 4 // 512) * 512)),
            (self.table, struct.pack(f">{entries}I", *table)),
            *places,
            (at, end),
        ]:
            content[offset : offset + len(data)] = data
        return bytes(content)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


def fixed(path: Path, data: bytes, **fields: int) -> Path:
    path.write_bytes(data + footer(FIXED, len(data), **fields))  # type: ignore[arg-type]
    return path


def pattern(index: int, length: int) -> bytes:
    """Bytes that say which sector of which block they are."""
    return b"".join(
        struct.pack(">II", 0xB10C0000 + index, sector) * 64 for sector in range(length // 512)
    )


def child_of(
    parent: Path, size: int, blocks: Mapping[int, Block], *, uuid: bytes = PARENT_UUID, block: int
) -> Spec:
    """A differencing image beside its parent, as Windows would make it."""
    return Spec(
        size,
        blocks,
        block=block,
        kind=DIFFERENCING,
        parent_uuid=uuid,
        name=parent.name,
        paths=[
            (b"W2ku", f"C:\\disks\\{parent.name}".encode("utf-16-le")),
            (b"W2ru", f".\\{parent.name}".encode("utf-16-le")),
        ],
    )
