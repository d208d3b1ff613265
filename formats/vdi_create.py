"""Making a VDI, laid out as VirtualBox 7 does it: the map at 1 MiB, the data at a whole MiB.

qemu-img puts both right behind the header, so that no block begins at a whole page.
"""

from __future__ import annotations

import re
import uuid
from array import array
from collections.abc import Iterator, Mapping

from virtmount.errors import Unsupported
from virtmount.formats import vdi_parent
from virtmount.formats.vdi_header import (
    DIFFERENCING,
    DYNAMIC,
    ENTRY,
    FIXED,
    MAX_BLOCKS,
    NO_UUID,
    SECTOR,
    SIGNATURE,
    VERSION,
    put,
)
from virtmount.formats.vdi_map import packed
from virtmount.image import Image
from virtmount.plan import Barrier, Extend, Plan, Step, Write
from virtmount.upkeep import Choice, New

CHOICES: Mapping[str, Choice] = {
    "subformat": Choice("dynamic", "dynamic (grows as it is written) or fixed"),
    "block_size": Choice("1M", "what grows at a time: a power of two from 128K to 128M"),
}
ALIGNMENT = 1 << 20  # VDI_DATA_ALIGN of VirtualBox 7
BANNER = b"<<< virtmount disk image >>>\n"
HEADER_SIZE = 400  # VDIHEADER1PLUS
HEADER_SIZE_AT = 72
SECTOR_SIZES_AT = (360, 468)  # of two geometries; VirtualBox refuses 0
MIN_NEW_BLOCK, MAX_NEW_BLOCK = 128 << 10, 128 << 20  # VirtualBox 7.2 refuses all others
STEP = 1 << 20  # bytes in one write of the map
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
EMPTY = b"\xff" * STEP


def create(new: New) -> Plan:
    fixed = _is_fixed(new)
    block_size = _block_size(new)
    if new.sector_size != SECTOR:
        text = f"sectors of {new.sector_size} bytes: VDI has {SECTOR} only"
        raise Unsupported(new.name, "sector_size", text)
    size = -(-new.size // SECTOR) * SECTOR
    blocks = max(1, -(-size // block_size))
    if not size or blocks > MAX_BLOCKS:
        text = f"{new.size} bytes in blocks of {block_size}: know 1 to {MAX_BLOCKS} blocks"
        raise Unsupported(new.name, "size", text)
    map_offset = ALIGNMENT
    data_offset = -(-(map_offset + blocks * ENTRY) // ALIGNMENT) * ALIGNMENT
    sector = bytearray(SECTOR)
    sector[: len(BANNER)] = BANNER
    sector[64:68] = SIGNATURE
    sector[HEADER_SIZE_AT : HEADER_SIZE_AT + 4] = HEADER_SIZE.to_bytes(4, "little")
    for at in SECTOR_SIZES_AT:
        sector[at : at + 4] = SECTOR.to_bytes(4, "little")
    put(
        sector,
        {
            "version": VERSION,
            "type": FIXED if fixed else DYNAMIC if new.parent is None else DIFFERENCING,
            "map_offset": map_offset,
            "data_offset": data_offset,
            "disk_size": size,
            "block_size": block_size,
            "blocks": blocks,
            "blocks_allocated": blocks if fixed else 0,
            "uuid": uuid.uuid4(),
            "modification_uuid": uuid.uuid4(),
        },
    )
    if new.parent is not None:
        put(sector, linkage(new.name, new.parent, new.parent_name))
    end = data_offset + (blocks * block_size if fixed else 0)
    steps: list[Step] = [Extend(end), *_map(map_offset, blocks, in_order=fixed), Barrier]
    return Plan(*steps, Write(0, bytes(sector)), Barrier)


def _map(map_offset: int, blocks: int, *, in_order: bool) -> Iterator[Write]:
    step = STEP // ENTRY
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        raw = EMPTY[: count * ENTRY]
        if in_order:
            raw = packed(array("I", range(first, first + count)))
        yield Write(map_offset + first * ENTRY, raw)


def _is_fixed(new: New) -> bool:
    subformat = new.options.get("subformat", CHOICES["subformat"].default)
    if subformat not in ("dynamic", "fixed"):
        raise Unsupported(new.name, "subformat", f"{subformat!r}, know dynamic and fixed")
    if subformat == "fixed" and new.parent is not None:
        raise Unsupported(new.name, "subformat", "a fixed image has no parent")
    return subformat == "fixed"


def _block_size(new: New) -> int:
    text = new.options.get("block_size", CHOICES["block_size"].default)
    match = re.fullmatch(r"(\d{1,12})([KM]?)(?:i?B)?", text, re.IGNORECASE | re.ASCII)
    size = int(match[1]) * UNITS[match[2].upper()] if match else 0
    if size & (size - 1) or not MIN_NEW_BLOCK <= size <= MAX_NEW_BLOCK:
        say = f"{text!r}, know powers of two from 128K to 128M"
        raise Unsupported(new.name, "block_size", say)
    return size


def linkage(file: object, parent: Image | None, name: str) -> dict[str, uuid.UUID]:
    """The fields that name a parent.  Only another VDI can be one, and only one that is found."""
    if parent is None:
        return {"linkage_uuid": NO_UUID, "parent_modification_uuid": NO_UUID}
    if parent.name != "vdi":
        text = f"{name} is {parent.name}: the parent of a VDI is a VDI"
        raise Unsupported(file, "parent", text)
    if not name.lower().endswith(vdi_parent.SUFFIX):
        text = f"{name}: only files called *{vdi_parent.SUFFIX} are looked for"
        raise Unsupported(file, "parent", text)
    if parent.identity is None or parent.stamp is None:
        raise Unsupported(file, "parent", f"{name} has no UUID", hint="virtmount check --repair")
    return {
        "linkage_uuid": uuid.UUID(parent.identity),
        "parent_modification_uuid": uuid.UUID(parent.stamp),
    }
