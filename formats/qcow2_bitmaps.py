"""The dirty bitmaps that a QCOW2 image keeps for its backups.

Source: qemu's docs/interop/qcow2.rst, "Bitmaps extension", "Bitmaps".  Used by qcow2*.py only.

We keep no bitmap up to date.  One that has to reflect all changes ("auto") is marked as in use
before the first write and stays so: whoever makes backups then sees that this one cannot be
trusted, and the directory with all others stays valid.  What of it we do not understand makes the
autoclear bit fall, as for any writer that knows no bitmaps.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from virtmount.errors import Corrupt
from virtmount.hostfile import HostFile
from virtmount.plan import Write

EXTENSION = struct.Struct(">IIQQ")  # number, reserved, directory's length and offset
# Table offset, table entries, flags, type, granularity, lengths of name and extra data; the extra
# data and the name follow, padded to 8.
ENTRY = struct.Struct(">QIIBBHI")
assert ENTRY.size == 24
IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4
FLAGS_AT = 12
DIRTY_TRACKING = 1
MAX_BITMAPS = 65535
MAX_DIRECTORY = 64 << 20  # bytes
MAX_EXTRA = 1024


class Bitmap(NamedTuple):
    at: int  # byte offset of the entry
    name: str
    flags: int
    granularity: int  # bytes
    known: bool  # nothing in it that we do not know


def directory(data: bytes) -> tuple[int, int]:
    """Offset and length of the directory, from the header extension's `data`; 0, 0 without."""
    if len(data) < EXTENSION.size:
        return 0, 0
    number, _, length, offset = EXTENSION.unpack_from(data)
    return (offset, length) if number else (0, 0)


def bitmaps(file: HostFile, data: bytes, cluster_size: int) -> Iterator[Bitmap]:
    """The bitmaps of the extension `data`; Corrupt where the directory cannot be followed."""
    if len(data) < EXTENSION.size:
        raise Corrupt(file, "header extension", f"bitmaps extension of {len(data)} bytes")
    number, _, length, offset = EXTENSION.unpack_from(data)
    if number > MAX_BITMAPS or length > MAX_DIRECTORY:
        raise Corrupt(
            file, "header extension", f"{number} bitmaps in a directory of {length} bytes"
        )
    if offset % cluster_size or not offset or offset + length > file.size:
        raise Corrupt(
            file,
            "header extension",
            f"bitmap directory at {offset}: {length} bytes, the file ends at {file.size}",
        )
    raw = file.pread(offset, length)
    at = 0
    for index in range(number):
        if at + ENTRY.size > length:
            raise Corrupt(file, f"byte {offset + at}", f"bitmap {index} is not in the directory")
        _, _, flags, kind, granularity, name_length, extra = ENTRY.unpack_from(raw, at)
        start = at + ENTRY.size + extra
        end = start + name_length
        if extra > MAX_EXTRA or end > length or granularity > 63:
            raise Corrupt(file, f"byte {offset + at}", f"bitmap {index} is not as it has to be")
        yield Bitmap(
            at=offset + at,
            name=raw[start:end].decode("utf-8", "replace"),
            flags=flags,
            granularity=1 << granularity,
            known=kind == DIRTY_TRACKING and not extra and flags < EXTRA_COMPATIBLE * 2,
        )
        at += -(-(end - at) // 8) * 8


def invalidate(
    file: HostFile, data: bytes, cluster_size: int, *, every: bool = False
) -> list[Write] | None:
    """What marks the bitmaps that must follow all changes (or `every` one) as not to be trusted.

    None where the directory is not understood.
    """
    writes = []
    try:
        for bitmap in bitmaps(file, data, cluster_size):
            if not bitmap.known:
                return None
            if bitmap.flags & IN_USE or not (every or bitmap.flags & AUTO):
                continue
            # Four bytes, aligned: never torn.
            flags = bitmap.flags | IN_USE
            writes.append(Write(bitmap.at + FLAGS_AT, flags.to_bytes(4, "big")))
    except Corrupt:
        return None
    return writes
