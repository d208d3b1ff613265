"""The QCOW2 header: parsed, checked against the file, and refused where it asks for more.

Source: qemu's docs/interop/qcow2.rst, "Header", "Header extensions", "Snapshots".  The caps are
those of qemu.  Used by qcow2.py only.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from typing import Any

from construct import (
    Const,
    ConstructError,
    Int8ub,
    Int32ub,
    Int64ub,
    Padding,
    Struct,
)

from virtmount.errors import Corrupt, NeedsRecovery, NotAnImage, Unsupported
from virtmount.formats import qcow2_crypt
from virtmount.formats.qcow2_snapshots import MAX_EXTRA, MAX_SNAPSHOTS, Record, records
from virtmount.hostfile import HostFile
from virtmount.image import ParentRef

MAGIC = b"QFI\xfb"

Fields = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,
    "backing_offset" / Int64ub,  # 0: no parent
    "backing_length" / Int32ub,  # bytes, no terminator
    "cluster_bits" / Int32ub,
    "size" / Int64ub,  # bytes
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,  # entries
    "l1_offset" / Int64ub,
    "refcount_offset" / Int64ub,
    "refcount_clusters" / Int32ub,
    "snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
assert Fields.sizeof() == 72

FieldsV3 = Struct(
    "incompatible" / Int64ub,
    "compatible" / Int64ub,
    "autoclear" / Int64ub,
    "refcount_order" / Int32ub,  # a count has 1 << order bits
    "header_length" / Int32ub,
    "compression" / Int8ub,  # 0 where header_length is 104
    Padding(7),
)
assert FieldsV3.sizeof() == 40
AUTOCLEAR_AT = 88
LENGTHS = (104, 112)  # without and with the compression type

EXTENSION = struct.Struct(">II")  # type, length; data follows, padded to 8 bytes
END_OF_EXTENSIONS = 0
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
DATA_FILE_NAME = 0x44415441
BITMAPS = 0x23852875
NAME_ENTRY = 48  # feature type, bit, 46 bytes of text

# Incompatible feature bits.
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = range(5)
KNOWN_BITS = (DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2)
LAZY_REFCOUNTS = 1  # compatible bit 0
# Autoclear feature bits.
BITMAPS_VALID, DATA_FILE_RAW = 1, 2
COMPRESSIONS = {0: "zlib", 1: "zstd"}

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MIN_EXTENDED_BITS = 14  # a subcluster, 1/32 of the cluster, has 512 bytes then
MAX_REFCOUNT_ORDER = 6
MAX_L1 = 32 << 20  # bytes
MAX_REFCOUNT_TABLE = 8 << 20  # bytes
MAX_NAME = 1023
MAX_FORMAT_NAME = 15
MAX_SNAPSHOT_EXTRA = MAX_EXTRA

REPAIR = "virtmount check --repair"
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of both versions; offsets and lengths are those of the file, all checked."""

    version: int
    cluster_size: int
    size: int
    l1_offset: int
    l1_size: int  # entries
    refcount_offset: int
    refcount_clusters: int
    refcount_order: int
    incompatible: int
    compatible: int
    autoclear: int
    compression: str
    parent: ParentRef | None
    snapshots: int
    snapshot_table: tuple[int, int]  # offset, length
    length: int  # where the extensions begin
    extensions: dict[int, bytes]  # type -> data, in the order of the file
    data_file: str | None  # the name of the file that guest data lies in, if not this one
    encryption: int  # qcow2_crypt.METHODS
    luks: tuple[int, int]  # offset, length of the LUKS header, if there is one

    @property
    def extended(self) -> bool:
        return bool(self.incompatible >> EXTENDED_L2 & 1)

    @property
    def raw_data_file(self) -> bool:
        """Whether the data file is, by itself, a raw image of the disk."""
        return self.data_file is not None and bool(self.autoclear & DATA_FILE_RAW)

    @property
    def dirty(self) -> bool:
        return bool(self.incompatible >> DIRTY & 1)

    @property
    def corrupt(self) -> bool:
        return bool(self.incompatible >> CORRUPT & 1)


def read_header(file: HostFile) -> Header:
    """Everything that can be told from the header, its extensions and the snapshot table."""
    raw = file.pread_padded(0, Fields.sizeof() + FieldsV3.sizeof())
    try:
        fields = Fields.parse(raw)
    except ConstructError as error:
        raise NotAnImage(file, "header+0", "no QCOW2 signature") from error
    if fields.version not in (2, 3):
        raise Unsupported(file, "header+4", f"version {fields.version}, know 2 and 3")
    bits = fields.cluster_bits
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise Corrupt(
            file,
            "header+20",
            f"{bits} cluster bits, expected {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}",
        )
    cluster = 1 << bits
    extra: dict[str, Any] = {
        "incompatible": 0,
        "compatible": 0,
        "autoclear": 0,
        "refcount_order": 4,
        "header_length": Fields.sizeof(),
        "compression": 0,
    }
    if fields.version > 2:
        parsed = FieldsV3.parse(raw[Fields.sizeof() :])
        extra = {name: int(parsed[name]) for name in extra}
        if not LENGTHS[0] <= extra["header_length"] <= cluster:
            raise Corrupt(
                file,
                "header+100",
                f"header length {extra['header_length']}, expected {LENGTHS[0]} to {cluster}",
            )
        if extra["header_length"] < LENGTHS[1]:
            extra["compression"] = 0
    extensions = _extensions(file, fields, extra["header_length"], cluster)
    _refuse_features(file, fields, extra, extensions)
    extended = bool(extra["incompatible"] >> EXTENDED_L2 & 1)
    if extended and bits < MIN_EXTENDED_BITS:
        raise Corrupt(
            file,
            "header+20",
            f"{bits} cluster bits, extended L2 entries need {MIN_EXTENDED_BITS}",
        )
    _check_tables(file, fields, extra["refcount_order"], cluster, 16 if extended else 8)
    _check_state(file, fields, extra["incompatible"])
    return Header(
        version=fields.version,
        cluster_size=cluster,
        size=fields.size,
        l1_offset=fields.l1_offset,
        l1_size=fields.l1_size,
        refcount_offset=fields.refcount_offset,
        refcount_clusters=fields.refcount_clusters,
        refcount_order=extra["refcount_order"],
        incompatible=extra["incompatible"],
        compatible=extra["compatible"],
        autoclear=extra["autoclear"],
        compression=COMPRESSIONS[extra["compression"]],
        parent=_parent(file, fields, extensions, cluster),
        snapshots=fields.snapshots,
        snapshot_table=_snapshot_table(file, fields, cluster),
        length=extra["header_length"],
        extensions=extensions,
        data_file=_data_file(file, fields, extra["incompatible"], extensions),
        encryption=fields.crypt_method,
        luks=qcow2_crypt.place(file, fields.crypt_method, extensions, cluster),
    )


def _extensions(file: HostFile, fields: Any, start: int, cluster: int) -> dict[int, bytes]:
    """Type -> data of the header extensions; the last one of a type counts, unknown ones too."""
    end = cluster
    if fields.backing_offset:
        if not start <= fields.backing_offset <= cluster:
            raise Corrupt(
                file,
                "header+8",
                f"parent's name at {fields.backing_offset}, expected {start} to {cluster}",
            )
        end = fields.backing_offset
    raw = file.pread_padded(0, end)
    found: dict[int, bytes] = {}
    at = start
    while at + EXTENSION.size <= end:
        kind, length = EXTENSION.unpack_from(raw, at)
        at += EXTENSION.size
        if kind == END_OF_EXTENSIONS:
            break
        if length > end - at:
            raise Corrupt(
                file,
                f"header+{at - 4}",
                f"extension {kind:#010x} of {length} bytes, {end - at} are left",
            )
        found[kind] = raw[at : at + length]
        at += -(-length // 8) * 8
    return found


def _refuse_features(
    file: HostFile, fields: Any, extra: dict[str, Any], extensions: dict[int, bytes]
) -> None:
    if fields.crypt_method not in qcow2_crypt.METHODS:
        raise Unsupported(file, "header+32", f"encryption method {fields.crypt_method}")
    for bit in range(64):
        if extra["incompatible"] >> bit & 1 and bit not in KNOWN_BITS:
            name = _feature_name(extensions, bit)
            raise Unsupported(file, "header+72", f"incompatible feature bit {bit}: {name}")
    compression = extra["compression"]
    if bool(compression) != bool(extra["incompatible"] >> COMPRESSION & 1):
        raise Corrupt(
            file,
            "header+104",
            f"compression type {compression} against incompatible feature bit {COMPRESSION}",
        )
    if compression not in COMPRESSIONS:
        raise Unsupported(file, "header+104", f"compression type {compression}, know zlib and zstd")


def _feature_name(extensions: dict[int, bytes], bit: int) -> str:
    """The image's own word for an incompatible feature; a stranger wrote it."""
    table = extensions.get(FEATURE_NAMES, b"")
    for at in range(0, len(table) - NAME_ENTRY + 1, NAME_ENTRY):
        if table[at : at + 2] == bytes((0, bit)):
            text = table[at + 2 : at + NAME_ENTRY].split(b"\0")[0]
            return f"the image calls it {text.decode('ascii', 'replace')!a}"
    return "unknown"


def _data_file(
    file: HostFile, fields: Any, incompatible: int, extensions: dict[int, bytes]
) -> str | None:
    if not incompatible >> DATA_FILE & 1:
        return None
    if fields.snapshots:
        raise Corrupt(file, "header+60", "internal snapshots of an external data file")
    name = extensions.get(DATA_FILE_NAME, b"")
    if not name:
        raise Corrupt(file, "header+72", "an external data file, without its name")
    if len(name) > MAX_NAME:
        raise Corrupt(file, "header extension", f"data file's name of {len(name)} bytes")
    return os.fsdecode(name)


def _check_tables(file: HostFile, fields: Any, order: int, cluster: int, entry_width: int) -> None:
    limit = -(-file.size // cluster) * cluster  # the last cluster may be cut short
    needed = -(-fields.size // (cluster * (cluster // entry_width)))
    if fields.l1_size * 8 > MAX_L1:
        raise Corrupt(file, "header+36", f"L1 table of {fields.l1_size} entries, the most is 4 Mi")
    if fields.l1_size < needed:
        raise Corrupt(
            file,
            "header+36",
            f"L1 table of {fields.l1_size} entries, {fields.size} bytes need {needed}",
        )
    if fields.l1_size:
        _check_table(
            file, "header+40", "L1 table", fields.l1_offset, fields.l1_size * 8, cluster, limit
        )
    if order > MAX_REFCOUNT_ORDER:
        raise Corrupt(file, "header+96", f"refcount order {order}, the most is 6")
    length = fields.refcount_clusters * cluster
    if not 0 < length <= MAX_REFCOUNT_TABLE:
        raise Corrupt(
            file,
            "header+56",
            f"refcount table of {fields.refcount_clusters} clusters, "
            f"expected 1 to {MAX_REFCOUNT_TABLE // cluster}",
        )
    _check_table(
        file, "header+48", "refcount table", fields.refcount_offset, length, cluster, limit
    )
    if (
        fields.l1_size
        and fields.l1_offset < fields.refcount_offset + length
        and fields.refcount_offset < fields.l1_offset + fields.l1_size * 8
    ):
        raise Corrupt(
            file, "header+40", f"L1 table at {fields.l1_offset} overlaps the refcount table"
        )


def _check_table(
    file: HostFile, place: str, what: str, offset: int, length: int, cluster: int, limit: int
) -> None:
    if offset % cluster or not offset:
        raise Corrupt(file, place, f"{what} at {offset}, not at a cluster of its own")
    if offset + length > limit:
        raise Corrupt(
            file, place, f"{what} at {offset}: {length} bytes, the file ends at {file.size}"
        )


def _check_state(file: HostFile, fields: Any, incompatible: int) -> None:
    """What an image may be read with, but not written."""
    if not file.writable:
        return
    if incompatible >> CORRUPT & 1:
        raise NeedsRecovery(file, "header+72", "marked as corrupt", hint=f"{REPAIR} {file}")
    if incompatible >> DIRTY & 1:
        raise NeedsRecovery(
            file,
            "header+72",
            "was not closed: its reference counts must be rebuilt before writing",
            hint=f"{REPAIR} {file}, or attach it with --read-only",
        )


def _parent(
    file: HostFile, fields: Any, extensions: dict[int, bytes], cluster: int
) -> ParentRef | None:
    offset, length = fields.backing_offset, fields.backing_length
    if not offset or not length:
        return None
    if length > MAX_NAME or offset + length > cluster:
        raise Corrupt(
            file,
            "header+16",
            f"parent's name of {length} bytes at {offset}, the most is "
            f"{min(MAX_NAME, cluster - offset)}",
        )
    name = os.fsdecode(file.pread_padded(offset, length))
    match = _PROTOCOL.match(name)
    if match and match[0] != "file:":
        raise Unsupported(
            file,
            f"byte {offset}",
            f"parent {name[:64]!a} is not a local file",
            hint=f"qemu-img rebase -u -b ./FILE {file}, if one is meant",
        )
    recorded = extensions.get(BACKING_FORMAT, b"")
    if len(recorded) > MAX_FORMAT_NAME:
        raise Corrupt(file, "header extension", f"parent's format of {len(recorded)} bytes")
    return ParentRef((name,), recorded.decode("ascii", "replace") or None)


def check_l1(file: HostFile, record: Record, size: int, cluster: int, entry_width: int) -> None:
    """The L1 table of a snapshot, of a disk of `size` bytes."""
    needed = -(-size // (cluster * (cluster // entry_width)))
    if record.l1_size * 8 > MAX_L1 or record.l1_size < needed:
        raise Corrupt(
            file,
            f"byte {record.at + 8}",
            f"snapshot's L1 table of {record.l1_size} entries, {size} bytes need {needed}, the "
            "most is 4 Mi",
        )
    if record.l1_size:
        limit = -(-file.size // cluster) * cluster
        _check_table(
            file,
            f"byte {record.at}",
            "snapshot's L1 table",
            record.l1_offset,
            record.l1_size * 8,
            cluster,
            limit,
        )


def _snapshot_table(file: HostFile, fields: Any, cluster: int) -> tuple[int, int]:
    """Where the table lies: its length follows only from its entries."""
    offset = fields.snapshots_offset
    if not fields.snapshots:
        return 0, 0
    if fields.snapshots > MAX_SNAPSHOTS:
        raise Corrupt(
            file, "header+60", f"{fields.snapshots} snapshots, the most is {MAX_SNAPSHOTS}"
        )
    if offset % cluster or not offset:
        raise Corrupt(file, "header+64", f"snapshot table at {offset}, not at a cluster of its own")
    length = 0
    for record in records(file, offset, fields.snapshots):
        length += record.length
    return offset, length
