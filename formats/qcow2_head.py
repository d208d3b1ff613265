"""The header of a QCOW2 image that may be damaged: as much of it as a check cannot do without.

Source: qemu's docs/interop/qcow2.rst, "Header".  Used by qcow2_check.py and qcow2_walk.py only;
qcow2_header.py says what an image must have to be opened.
"""

from __future__ import annotations

from dataclasses import dataclass

from construct import ConstructError

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats.qcow2_header import (
    MAX_CLUSTER_BITS,
    MAX_REFCOUNT_ORDER,
    MIN_CLUSTER_BITS,
    Fields,
    FieldsV3,
)
from virtmount.hostfile import HostFile

# Incompatible and autoclear features, as masks.
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
KNOWN = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
BITMAPS_BIT, RAW_BIT = 1, 2  # autoclear


@dataclass
class Head:
    """The header's fields; only those checked without which nothing can be told."""

    version: int
    cluster: int
    size: int
    l1_offset: int
    l1_size: int
    refcount_offset: int
    refcount_clusters: int
    width: int
    incompatible: int
    autoclear: int
    header_length: int
    backing_offset: int
    snapshots: int
    snapshots_offset: int


def read_head(file: HostFile) -> Head:
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
    more = FieldsV3.parse(raw[Fields.sizeof() :]) if fields.version > 2 else None
    order = more.refcount_order if more else 4
    if order > MAX_REFCOUNT_ORDER:
        raise Corrupt(file, "header+96", f"refcount order {order}, the most is 6")
    if more and more.incompatible & ~KNOWN:
        unknown = more.incompatible & ~KNOWN
        bit = (unknown & -unknown).bit_length() - 1
        raise Unsupported(file, "header+72", f"incompatible feature bit {bit}: unknown")
    return Head(
        version=fields.version,
        cluster=1 << bits,
        size=fields.size,
        l1_offset=fields.l1_offset,
        l1_size=fields.l1_size,
        refcount_offset=fields.refcount_offset,
        refcount_clusters=fields.refcount_clusters,
        width=1 << order,
        incompatible=more.incompatible if more else 0,
        autoclear=more.autoclear if more else 0,
        header_length=more.header_length if more else Fields.sizeof(),
        backing_offset=fields.backing_offset,
        snapshots=fields.snapshots,
        snapshots_offset=fields.snapshots_offset,
    )
