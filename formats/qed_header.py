"""The header of a QED image, what must hold of it, and its tables.

Source: qemu, docs/interop/qed_spec.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from construct import Const, ConstructError, Int32ul, Int64ul, Struct

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.hostfile import HostFile
from virtmount.plan import Write

MAGIC = b"QED\0"
BACKING_FILE, NEED_CHECK, NO_PROBE = 1, 2, 4
KNOWN = BACKING_FILE | NEED_CHECK | NO_PROBE
ZERO = 1  # an entry; 0: not allocated
ENTRY = 8
SECTOR = 512
MIN_CLUSTER, MAX_CLUSTER = 4 << 10, 64 << 20
TABLE_SIZES = (1, 2, 4, 8, 16)  # clusters
MAX_NAME = 1023  # bytes
MAX_TABLES = 1 << 16  # of the second level: 128 TiB with the usual clusters
MAX_SURVEYED = 64 << 20  # bytes of entries before writing: 512 GiB of the usual clusters
MAX_CLUSTERS = 1 << 26  # in a file that is written
SCAN = 1 << 20

Header = Struct(
    "magic" / Const(MAGIC),
    "cluster_size" / Int32ul,
    "table_size" / Int32ul,  # clusters
    "header_size" / Int32ul,  # clusters
    "features" / Int64ul,
    "compat_features" / Int64ul,
    "autoclear_features" / Int64ul,
    "l1_offset" / Int64ul,
    "image_size" / Int64ul,
    "name_offset" / Int32ul,
    "name_size" / Int32ul,
)
assert Header.sizeof() == 64
FEATURES_AT, AUTOCLEAR_AT, SIZE_AT, NAME_AT = 16, 32, 48, 56

# What a file cluster is used for.
FREE, DATA, TABLE, RESERVED, SPARE = 0, 1, 2, 3, 4


def read(file: HostFile) -> Any:
    """The header, checked."""
    try:
        header = Header.parse(file.pread(0, Header.sizeof()))
    except ConstructError as error:
        raise NotAnImage(file, "byte 0", "no QED magic") from error
    validate(file, header)
    return header


def validate(file: HostFile, header: Any) -> None:
    """Refuse a header that cannot be right or that we do not know."""
    unknown = header.features & ~KNOWN
    if unknown:
        raise Unsupported(file, "header+16", f"unknown feature bits {unknown:#x}")
    cluster = header.cluster_size
    if cluster & (cluster - 1) or not MIN_CLUSTER <= cluster <= MAX_CLUSTER:
        text = f"cluster size {cluster}, know powers of two from {MIN_CLUSTER} to {MAX_CLUSTER}"
        raise Corrupt(file, "header+4", text)
    if header.table_size not in TABLE_SIZES:
        known = ", ".join(map(str, TABLE_SIZES))
        raise Corrupt(file, "header+8", f"tables of {header.table_size} clusters, know {known}")
    table = header.table_size * cluster
    if not header.header_size or header.header_size * cluster > file.size:
        text = f"header of {header.header_size} clusters in a file of {file.size} bytes"
        raise Corrupt(file, "header+12", text)
    wrong = wrong_table(header, header.l1_offset, file.size)
    if wrong:
        raise Corrupt(file, "header+40", wrong)
    limit = (table // ENTRY) ** 2 * cluster
    if header.image_size % SECTOR or not 0 < header.image_size <= limit:
        text = f"image size {header.image_size}, know multiples of {SECTOR} up to {limit}"
        raise Corrupt(file, f"header+{SIZE_AT}", text)
    if header.features & BACKING_FILE:
        end = header.name_offset + header.name_size
        inside = Header.sizeof() <= header.name_offset and end <= header.header_size * cluster
        if not inside or not 0 < header.name_size <= MAX_NAME:
            text = f"parent's name of {header.name_size} bytes at {header.name_offset}"
            raise Corrupt(file, f"header+{NAME_AT}", text)


def unpacked(raw: bytes) -> array[int]:
    entries = array("Q")
    assert entries.itemsize == ENTRY
    entries.frombytes(raw)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def sector_writes(file: HostFile, table: int, changes: Mapping[int, int]) -> Iterator[Write]:
    """Sectors of a table with the entries in `changes` replaced; a disk tears at sectors."""
    sectors: dict[int, bytearray] = {}
    for index, value in changes.items():
        sector, within = divmod(table + index * ENTRY, SECTOR)
        if sector not in sectors:
            sectors[sector] = bytearray(file.pread_padded(sector * SECTOR, SECTOR))
        sectors[sector][within : within + ENTRY] = value.to_bytes(ENTRY, "little")
    start, data = -1, bytearray()
    for sector in sorted(sectors):
        if data and start + len(data) != sector * SECTOR:
            yield Write(start, bytes(data))
            data = bytearray()
        if not data:
            start = sector * SECTOR
        data += sectors[sector]
    if data:
        yield Write(start, bytes(data))


def wrong_table(header: Any, table: int, size: int) -> str:
    """Why no table can lie at byte `table` of a file of `size` bytes; empty if one can."""
    if table % header.cluster_size:
        return f"table at {table}, not a multiple of {header.cluster_size}"
    if table < header.header_size * header.cluster_size:
        return f"table at {table}, inside the header"
    end = table + header.table_size * header.cluster_size
    return f"table ends at {end}, the file at {size}" if end > size else ""
