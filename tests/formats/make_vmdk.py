"""VMDKs that no program here makes: every field by hand, grains out of order in the file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

SECTOR = 512
CID = "1234abcd"

Content = Mapping[int, bytes | int]  # grain -> its bytes, or an entry as it is


def descriptor(
    *extents: str,
    cid: str = CID,
    parent: str = "ffffffff",
    create_type: str = "custom",
    more: Sequence[str] = (),
) -> bytes:
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        f"CID={cid}",
        f"parentCID={parent}",
        f'createType="{create_type}"',
        *more,
        "",
        "# Extent description",
        *extents,
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        'ddb.virtualHWVersion = "4"',
        'ddb.adapterType = "ide"',
        "",
    ]
    return "\n".join(lines).encode()


def shuffled(content: Content) -> list[int]:
    """The grains that hold data, in the order in which they are put into the file."""
    grains = sorted(grain for grain, data in content.items() if isinstance(data, bytes))
    return grains[1::2] + grains[::2][::-1]


def header(
    sectors: int,
    *,
    version: int = 1,
    flags: int = 3,
    grain: int = 128,
    text: tuple[int, int] = (1, 20),
    per_table: int = 512,
    redundant: int = 0,
    directory: int = 0,
    overhead: int = 128,
    unclean: int = 0,
    compression: int = 0,
) -> bytes:
    fields = struct.pack(
        "<4sIIQQQQIQQQB4sH",
        *(b"KDMV", version, flags, sectors, grain, *text, per_table),
        *(redundant, directory, overhead, unclean, b"\n \r\n", compression),
    )
    return fields.ljust(SECTOR, b"\0")


def sparse(
    sectors: int,
    content: Content,
    text: bytes = b"",
    *,
    version: int = 1,
    flags: int = 3,
    grain: int = 128,
    per_table: int = 512,
    lazy: bool = False,
    unclean: int = 0,
) -> bytes:
    """A hosted sparse extent.  `lazy`: no tables where nothing is."""
    tables = -(-sectors // (grain * per_table))
    room, size = -(-tables * 4 // SECTOR), -(-per_table * 4 // SECTOR)
    at = 21
    starts: list[tuple[int, int]] = []  # directory, first table
    for _ in range(2 if flags & 2 else 1):
        starts.append((at, at + room))
        at += room + tables * size
    next_sector = -(-at // grain) * grain
    overhead = next_sector
    out = bytearray(next_sector * SECTOR)
    entries = [0] * (tables * per_table)
    for number, data in content.items():
        if isinstance(data, int):
            entries[number] = data
    for number in shuffled(content):
        data = content[number]
        assert isinstance(data, bytes)
        out += data.ljust(grain * SECTOR, b"\0")
        entries[number] = next_sector
        next_sector += grain
    for at, first in starts:
        for i in range(tables):
            part = entries[i * per_table : (i + 1) * per_table]
            place = first + i * size
            if lazy and not any(part):
                continue
            struct.pack_into("<I", out, at * SECTOR + i * 4, place)
            struct.pack_into(f"<{per_table}I", out, place * SECTOR, *part)
    out[:SECTOR] = header(
        sectors,
        version=version,
        flags=flags,
        grain=grain,
        text=(1, 20) if text else (0, 0),
        per_table=per_table,
        redundant=starts[0][0] if flags & 2 else 0,
        directory=starts[-1][0],
        overhead=overhead,
        unclean=unclean,
    )
    out[SECTOR : SECTOR + len(text)] = text
    return bytes(out)


def stream(sectors: int, content: Content, text: bytes, *, footer: bool, version: int = 3) -> bytes:
    """A streamOptimized image, its directory at the end, with or without a footer that says so."""
    grain, per_table = 128, 512
    tables = -(-sectors // (grain * per_table))
    out = bytearray(grain * SECTOR)
    entries = [0] * (tables * per_table)

    def put(data: bytes) -> int:
        at = len(out) // SECTOR
        out.extend(data.ljust(-(-len(data) // SECTOR) * SECTOR, b"\0"))
        return at

    for number in shuffled(content):
        data = content[number]
        assert isinstance(data, bytes)
        packed = zlib.compress(data.ljust(grain * SECTOR, b"\0"))
        entries[number] = put(struct.pack("<QI", number * grain, len(packed)) + packed)
    directory = []
    for i in range(tables):
        part = entries[i * per_table : (i + 1) * per_table]
        put(struct.pack("<QII", 4, 0, 1))
        directory.append(put(struct.pack(f"<{per_table}I", *part)) if any(part) else 0)
    put(struct.pack("<QII", -(-tables * 4 // SECTOR), 0, 2))
    place = put(struct.pack(f"<{tables}I", *directory))

    def made(at: int) -> bytes:
        return header(sectors, version=version, flags=0x30001, directory=at, compression=1)

    if footer:
        put(struct.pack("<QII", 1, 0, 3))
        put(made(place))
        put(bytes(SECTOR))
    out[:SECTOR] = made((1 << 64) - 1 if footer else place)
    out[SECTOR : SECTOR + len(text)] = text
    return bytes(out)


def cowd(sectors: int, content: Content, *, grain: int = 1, free: int | None = None) -> bytes:
    """A vmfsSparse extent; tables only where something is."""
    per_table = 4096
    tables = -(-sectors // (grain * per_table))
    next_sector = 4 + -(-tables * 4 // SECTOR)
    out = bytearray(next_sector * SECTOR)
    entries = [0] * (tables * per_table)
    for number, data in content.items():
        if isinstance(data, int):
            entries[number] = data
    next_sector = -(-next_sector // grain) * grain
    for number in shuffled(content):
        data = content[number]
        assert isinstance(data, bytes)
        out.extend(bytes(next_sector * SECTOR - len(out)))
        out += data.ljust(grain * SECTOR, b"\0")
        entries[number] = next_sector
        next_sector += grain
    for i in range(tables):
        part = entries[i * per_table : (i + 1) * per_table]
        if not any(part):
            continue
        struct.pack_into("<I", out, 4 * SECTOR + i * 4, len(out) // SECTOR)
        out += struct.pack(f"<{per_table}I", *part)
    struct.pack_into(
        "<4s7I",
        out,
        0,
        *(b"COWD", 1, 3, sectors, grain, 4, tables, len(out) // SECTOR if free is None else free),
    )
    return bytes(out)


def se_sparse(sectors: int, content: Content, *, replay: int = 0) -> bytes:
    """A seSparse extent, its areas as ESX lays them out, as far as that is known."""
    per_table, grain = 4096, 8
    tables = -(-sectors // (grain * per_table))
    volatile, directory = 1, 2
    room = -(-tables * 8 // SECTOR)
    first = directory + room
    grains = first + tables * 64
    entries = [0] * (tables * per_table)
    data_area = bytearray()
    for number, data in content.items():
        if isinstance(data, int):
            entries[number] = data
    for place, number in enumerate(shuffled(content)):
        data = content[number]
        assert isinstance(data, bytes)
        data_area += data.ljust(grain * SECTOR, b"\0")
        entries[number] = 3 << 60 | (place & 0xFFF) << 48 | place >> 12
    out = bytearray(grains * SECTOR) + data_area
    struct.pack_into(
        "<26Q",
        out,
        0,
        *(0xCAFEBABE, 0x200000001, sectors, grain, 64, 0, 0, 0, 0, 0, volatile, 1, 0, 0, 0, 0),
        *(directory, room, first, tables * 64, 0, 0, 0, 0, grains, len(data_area) // SECTOR),
    )
    struct.pack_into("<4Q", out, volatile * SECTOR, 0xCAFECAFE, 0, 0, replay)
    # Tables in reverse order: a directory entry is a number, not a place.
    for i in range(tables):
        part = entries[i * per_table : (i + 1) * per_table]
        if any(part):
            at = tables - 1 - i
            struct.pack_into("<Q", out, directory * SECTOR + i * 8, 0x10000000 << 32 | at)
            struct.pack_into(f"<{per_table}Q", out, (first + at * 64) * SECTOR, *part)
    return bytes(out)


def guest(sectors: int, content: Content, grain: int) -> bytes:
    """What a disk with these grains holds, without a parent."""
    out = bytearray(sectors * SECTOR)
    for number, data in content.items():
        if isinstance(data, bytes):
            at = number * grain * SECTOR
            out[at : at + len(data)] = data
    return bytes(out[: sectors * SECTOR])


def pattern(number: int, length: int) -> bytes:
    """Bytes that say which grain and which sector of it they are."""
    return b"".join(
        struct.pack("<IIQ", 0x564D444B, number, at) * 32 for at in range(length // SECTOR)
    )


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
