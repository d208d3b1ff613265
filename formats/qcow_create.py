"""Making a QCOW image, version 1, laid out as qemu does it: header, parent's name, L1 table."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from virtmount.errors import Unsupported
from virtmount.formats.qcow_header import (
    ENTRY,
    MAX_CLUSTER_BITS,
    MAX_L1,
    MAX_NAME,
    MIN_CLUSTER_BITS,
    SECTOR,
    VERSION,
    Fields,
)
from virtmount.plan import Barrier, Extend, Plan, Write
from virtmount.upkeep import Choice, New

CHOICES: Mapping[str, Choice] = {
    "cluster_size": Choice("", "a power of two from 512 to 64K; 4K, and 512 with a parent"),
}
ALONE, CHILD = 4096, 512  # cluster sizes
TABLE_SIZE = 4096  # bytes of an L2 table, or a cluster if that is more
CHILD_TABLE = 32768


def create(new: New) -> Plan:
    cluster = _cluster_size(new)
    if new.sector_size != SECTOR:
        text = f"sectors of {new.sector_size} bytes: QCOW has {SECTOR} only"
        raise Unsupported(new.name, "sector_size", text)
    name = os.fsencode(new.parent_name) if new.parent else b""
    if len(name) > MAX_NAME:
        raise Unsupported(new.name, "parent", f"a name of {len(name)} bytes, at most {MAX_NAME}")
    # With the smallest clusters a table of the usual size would map too little.
    table = max(cluster, CHILD_TABLE if cluster == CHILD else TABLE_SIZE)
    entries = -(-new.size // (cluster * (table // ENTRY)))
    if not new.size or entries * ENTRY > MAX_L1:
        text = f"{new.size} bytes in clusters of {cluster}"
        raise Unsupported(new.name, "size", f"{text}: the L1 table has at most {MAX_L1} bytes")
    l1_offset = -(-(Fields.sizeof() + len(name)) // ENTRY) * ENTRY
    header = Fields.build(
        {
            "version": VERSION,
            "backing_offset": Fields.sizeof() if name else 0,
            "backing_length": len(name),
            "mtime": 0,
            "size": new.size,
            "cluster_bits": cluster.bit_length() - 1,
            "l2_bits": (table // ENTRY).bit_length() - 1,
            "crypt_method": 0,
            "l1_offset": l1_offset,
        }
    )
    # All of the L1 table is there, though it is empty: VirtualBox does not read past the end.
    end = -(-(l1_offset + entries * ENTRY) // cluster) * cluster
    return Plan(Extend(end), Write(0, header + name), Barrier)


def _cluster_size(new: New) -> int:
    text = new.options.get("cluster_size", "")
    if not text:
        return CHILD if new.parent else ALONE
    match = re.fullmatch(r"(\d{1,9})(K?)(?:i?B)?", text, re.IGNORECASE | re.ASCII)
    size = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if size & (size - 1) or not 1 << MIN_CLUSTER_BITS <= size <= 1 << MAX_CLUSTER_BITS:
        say = f"{text!r}, know powers of two from 512 to 64K"
        raise Unsupported(new.name, "cluster_size", say)
    return size
