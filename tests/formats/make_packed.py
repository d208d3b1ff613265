"""cloop and Bochs images, written from the descriptions of the formats."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

SECTOR = 512
SCRIPT = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
ABSENT = 0xFFFFFFFF


def make_cloop(
    path: Path, content: bytes, block: int, pack: Callable[[bytes], bytes] = zlib.compress
) -> None:
    """The last block is filled up with zeros."""
    content = content.ljust(-(-len(content) // block) * block, b"\0")
    packed = [pack(content[at : at + block]) for at in range(0, len(content), block)]
    at = 136 + 8 * (len(packed) + 1)
    offsets = [at]
    for part in packed:
        at += len(part)
        offsets.append(at)
    head = SCRIPT.ljust(128, b"\0") + struct.pack(">II", block, len(packed))
    path.write_bytes(head + struct.pack(f">{len(offsets)}Q", *offsets) + b"".join(packed))


def make_bochs(
    path: Path,
    content: bytes,
    extent: int,
    sectors: Collection[int],
    *,
    version: int = 2,
    subtype: bytes = b"Growing",
    bitmap: int = 0,
    catalog: int = 0,
) -> bytes:
    """An image that holds these sectors of `content`; answers with what the disk reads as.

    The extents lie in the file in the order in which the sectors are given.
    """
    bitmap = bitmap or max(1, extent // SECTOR // 8)
    count = catalog or -(-len(content) // extent // 128) * 128 or 128
    size = len(content)
    head = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0")
    head += subtype.ljust(16, b"\0")
    head += struct.pack("<IIIII", version << 16, 512, count, bitmap, extent)
    head += struct.pack("<Q", size) if version == 1 else struct.pack("<IQ", 0, size)
    step = -(-bitmap // SECTOR) * SECTOR
    entries = [ABSENT] * count
    extents: list[bytearray] = []
    guest = bytearray(size)
    for sector in sectors:
        index, within = divmod(sector * SECTOR, extent)
        if entries[index] == ABSENT:
            entries[index] = len(extents)
            extents.append(bytearray(step + extent))
        made = extents[entries[index]]
        bit = within // SECTOR
        made[bit // 8] |= 1 << bit % 8
        data = content[sector * SECTOR : (sector + 1) * SECTOR]
        made[step + within : step + within + len(data)] = data
        guest[sector * SECTOR : sector * SECTOR + len(data)] = data
    table = struct.pack(f"<{count}I", *entries)
    path.write_bytes(head.ljust(512, b"\0") + table + b"".join(extents))
    return bytes(guest)
