"""Making a QED image, and naming another parent."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from virtmount.errors import Unsupported
from virtmount.formats.qed_header import (
    BACKING_FILE,
    ENTRY,
    FEATURES_AT,
    MAGIC,
    MAX_CLUSTER,
    MAX_NAME,
    MAX_TABLES,
    MIN_CLUSTER,
    NAME_AT,
    NO_PROBE,
    SECTOR,
    TABLE_SIZES,
    Header,
)
from virtmount.hostfile import HostFile
from virtmount.image import Image
from virtmount.plan import Barrier, Extend, Plan, Write
from virtmount.upkeep import Choice, New

CHOICES: Mapping[str, Choice] = {
    "cluster_size": Choice("64K", "what grows at a time: a power of two from 4K to 64M"),
    "table_size": Choice("4", "clusters in a table: 2, 4, 8 or 16"),
}
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


def create(new: New) -> Plan:
    cluster, table_size = _sizes(new)
    if new.sector_size != SECTOR:
        text = f"sectors of {new.sector_size} bytes: QED has {SECTOR} only"
        raise Unsupported(new.name, "sector_size", text)
    size = -(-new.size // SECTOR) * SECTOR
    per_table = table_size * cluster // ENTRY
    limit = min(per_table, MAX_TABLES) * per_table * cluster
    if not 0 < size <= limit:
        raise Unsupported(new.name, "size", f"{new.size} bytes, the tables reach {limit}")
    features, name = 0, b""
    if new.parent is not None:
        features, name = _parent(new.name, new.parent, new.parent_name)
    header = Header.build(
        {
            "magic": MAGIC,
            "cluster_size": cluster,
            "table_size": table_size,
            "header_size": 1,
            "features": features,
            "compat_features": 0,
            "autoclear_features": 0,
            "l1_offset": cluster,
            "image_size": size,
            "name_offset": Header.sizeof() if name else 0,
            "name_size": len(name),
        }
    )
    return Plan(Extend((1 + table_size) * cluster), Barrier, Write(0, header + name), Barrier)


def _sizes(new: New) -> tuple[int, int]:
    text = new.options.get("cluster_size", CHOICES["cluster_size"].default)
    match = re.fullmatch(r"(\d{1,12})([KM]?)(?:i?B)?", text, re.IGNORECASE | re.ASCII)
    cluster = int(match[1]) * UNITS[match[2].upper()] if match else 0
    if cluster & (cluster - 1) or not MIN_CLUSTER <= cluster <= MAX_CLUSTER:
        say = f"{text!r}, know powers of two from 4K to 64M"
        raise Unsupported(new.name, "cluster_size", say)
    tables = new.options.get("table_size", CHOICES["table_size"].default)
    # qemu takes tables of one cluster for an overflow.
    if tables not in map(str, TABLE_SIZES[1:]):
        raise Unsupported(new.name, "table_size", f"{tables!r}, know 2, 4, 8 and 16")
    return cluster, int(tables)


def _parent(file: object, parent: Image, name: str) -> tuple[int, bytes]:
    """Feature bits and name.  The format is not recorded, but for raw."""
    encoded = os.fsencode(name)
    if len(encoded) > MAX_NAME:
        text = f"a name of {len(encoded)} bytes, at most {MAX_NAME} are stored"
        raise Unsupported(file, "parent", text)
    return BACKING_FILE | (NO_PROBE if parent.name == "raw" else 0), encoded


def rebase(file: HostFile, header: Any, parent: Image | None, name: str) -> Plan:
    """The new name is written where the old one is not; the header's sector switches."""
    features, encoded = (0, b"") if parent is None else _parent(file, parent, name)
    at = 0
    before: tuple[Write, ...] = ()
    if encoded:
        at = SECTOR
        end = header.name_offset + header.name_size
        if header.name_size and header.name_offset < at + len(encoded) and end > at:
            at = -(-end // SECTOR) * SECTOR
        if at + len(encoded) > header.header_size * header.cluster_size:
            raise Unsupported(file, "parent", "no room in the header for another name")
        before = (Write(at, encoded),)
    sector = bytearray(file.pread(0, SECTOR))
    features |= header.features & ~(BACKING_FILE | NO_PROBE)
    sector[FEATURES_AT : FEATURES_AT + 8] = features.to_bytes(8, "little")
    sector[NAME_AT : NAME_AT + 4] = at.to_bytes(4, "little")
    sector[NAME_AT + 4 : NAME_AT + 8] = len(encoded).to_bytes(4, "little")
    return Plan(*before, Barrier, Write(0, bytes(sector)), Barrier)
