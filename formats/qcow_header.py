"""The header of a QCOW image, version 1: parsed, and checked against the file.

Source: "The QCOW Image Format" (Mark McLoughlin), versions 1; libqcow's documentation of the format
for the compressed entries.  Used by qcow.py and qcow_check.py.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from construct import Const, ConstructError, Int8ub, Int32ub, Int64ub, Padding, Struct

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import ParentRef

MAGIC = b"QFI\xfb"
VERSION = 1

Fields = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,
    "backing_offset" / Int64ub,  # 0: no parent
    "backing_length" / Int32ub,  # bytes, no terminator
    "mtime" / Int32ub,  # of the parent; nobody looks
    "size" / Int64ub,  # bytes
    "cluster_bits" / Int8ub,
    "l2_bits" / Int8ub,  # an L2 table has 1 << l2_bits entries
    Padding(2),
    "crypt_method" / Int32ub,
    "l1_offset" / Int64ub,
)
assert Fields.sizeof() == 48
BACKING_AT, SIZE_AT, L1_AT = 8, 24, 40

ENTRY = 8
SECTOR = 512
COMPRESSED = 1 << 63
ENCRYPTION = {0: None, 1: "aes"}

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 16
MIN_L2_BITS, MAX_L2_BITS = 6, 13
MAX_L1 = 8 << 20  # bytes
MAX_NAME = 1023
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


@dataclass(frozen=True, slots=True)
class Header:
    """Offsets are those of the file; all checked."""

    size: int
    cluster_size: int
    per_table: int  # entries of an L2 table
    l1_offset: int
    l1_size: int  # entries
    encryption: int
    name: tuple[int, int]  # offset, length of the parent's name
    parent: ParentRef | None

    @property
    def table_size(self) -> int:
        return self.per_table * ENTRY

    @property
    def l1_end(self) -> int:
        return self.l1_offset + self.l1_size * ENTRY

    def compressed(self, entry: int) -> tuple[int, int]:
        """Byte offset and length of the data of a compressed cluster."""
        shift = 63 - (self.cluster_size.bit_length() - 1)
        return entry & ((1 << shift) - 1), entry >> shift & (self.cluster_size - 1)


def read_header(file: HostFile) -> Header:
    try:
        fields = Fields.parse(file.pread_padded(0, Fields.sizeof()))
    except ConstructError as error:
        raise NotAnImage(file, "header+0", "no QCOW signature") from error
    if fields.version != VERSION:
        raise Unsupported(file, "header+4", f"version {fields.version}, know 1")
    for name, at, low, high in (
        ("cluster_bits", 32, MIN_CLUSTER_BITS, MAX_CLUSTER_BITS),
        ("l2_bits", 33, MIN_L2_BITS, MAX_L2_BITS),
    ):
        if not low <= fields[name] <= high:
            text = f"{name} {fields[name]}, expected {low} to {high}"
            raise Corrupt(file, f"header+{at}", text)
    if fields.size < 1 or fields.size >= 1 << 63:
        raise Corrupt(file, "header+24", f"a disk of {fields.size} bytes")
    if fields.crypt_method not in ENCRYPTION:
        raise Unsupported(file, "header+36", f"encryption method {fields.crypt_method}")
    mapped = 1 << fields.cluster_bits + fields.l2_bits
    entries = -(-fields.size // mapped)
    if entries * ENTRY > MAX_L1:
        text = (
            f"an L1 table of {entries} entries for {fields.size} bytes, at most {MAX_L1 // ENTRY}"
        )
        raise Unsupported(file, "header+24", text)
    # The table of a new image may not be there yet: it is all zeros then.
    if not Fields.sizeof() <= fields.l1_offset <= -(-file.size // SECTOR) * SECTOR:
        text = f"L1 table at {fields.l1_offset}, the file ends at {file.size}"
        raise Corrupt(file, "header+40", text)
    return Header(
        size=fields.size,
        cluster_size=1 << fields.cluster_bits,
        per_table=1 << fields.l2_bits,
        l1_offset=fields.l1_offset,
        l1_size=entries,
        encryption=fields.crypt_method,
        **_parent(file, fields),
    )


def _parent(file: HostFile, fields: Any) -> dict[str, Any]:
    offset, length = fields.backing_offset, fields.backing_length
    if not offset or not length:
        return {"name": (0, 0), "parent": None}
    if length > MAX_NAME:
        text = f"parent's name of {length} bytes, the most is {MAX_NAME}"
        raise Corrupt(file, "header+16", text)
    if offset < Fields.sizeof() or offset + length > file.size:
        text = f"parent's name at {offset}, the file ends at {file.size}"
        raise Corrupt(file, "header+8", text)
    name = os.fsdecode(file.pread(offset, length))
    match = _PROTOCOL.match(name)
    if match and match[0] != "file:":
        text = f"parent {name[:64]!a} is not a local file"
        raise Unsupported(file, f"byte {offset}", text)
    # The format of the parent is not recorded.
    return {"name": (offset, length), "parent": ParentRef((name,))}
