"""Making a VHDX: dynamic, fixed, or differencing where there is a parent.

Source: [MS-VHDX] 20240423.  Laid out as Windows does it: header section, log at 1 MiB, metadata
region, BAT, blocks.  The regions are marked as required: qemu-img leaves that out, and VirtualBox
refuses what it makes.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from uuid import UUID, uuid4

from virtmount.errors import Unsupported
from virtmount.formats import vhdx_header as headers
from virtmount.formats import vhdx_locator
from virtmount.formats.vhdx_bat import ENTRY, PRESENT, count_entries, little
from virtmount.formats.vhdx_header import MIB, NIL, Header
from virtmount.plan import Extend, Plan, Step, Write
from virtmount.upkeep import Choice, New

CHOICES: Mapping[str, Choice] = {
    "subformat": Choice("dynamic", "dynamic (grows as it is written) or fixed"),
    "block_size": Choice(
        "auto", "what grows at a time: 1M to 256M, a power of two; auto is 32M, over a parent 2M"
    ),
    "log_size": Choice("1M", "of the log that changes of the tables go through: 1M to 64M"),
    "physical_sector_size": Choice("4096", "that the guest is told: 512 or 4096"),
}
CREATOR = "virtmount"
AUTO, AUTO_CHILD = 32 * MIB, 2 * MIB  # as Windows has them
MAX_LOG = 64 * MIB
MAX_FIXED_TABLE = 64 * MIB  # of a fixed disk's entries
PIECE = MIB  # bytes in one write of the table
UNITS = {"": 1, "K": 1 << 10, "M": MIB, "G": 1 << 30}


def create(new: New) -> Plan:
    fixed = _is_fixed(new)
    block_size = _block_size(new)
    log_length = _size(new, "log_size")
    if log_length % MIB or not MIB <= log_length <= MAX_LOG:
        text = f"{new.options['log_size']!r}: must be a multiple of 1M, at most 64M"
        raise Unsupported(new.name, "log_size", text)
    physical = _size(new, "physical_sector_size")
    if physical not in (512, 4096):
        raise Unsupported(new.name, "physical_sector_size", f"{physical}: must be 512 or 4096")
    if new.sector_size not in (512, 4096):
        text = f"sectors of {new.sector_size} bytes: must be 512 or 4096"
        raise Unsupported(new.name, "sector_size", text)
    size = -(-new.size // new.sector_size) * new.sector_size
    if not 0 < size <= headers.MAX_DISK:
        raise Unsupported(new.name, "size", f"{size} bytes: must be 1 to {headers.MAX_DISK}")
    blocks, chunk = -(-size // block_size), (new.sector_size << 23) // block_size
    table = count_entries(blocks, chunk, new.parent is not None) * ENTRY
    if fixed and table > MAX_FIXED_TABLE:
        text = f"{blocks} blocks of a fixed disk: too many, take larger ones"
        raise Unsupported(new.name, "block_size", text)
    metadata = MIB + log_length
    bat = metadata + MIB
    data = bat + -(-table // MIB) * MIB
    flags = headers.LEAVE_BLOCKS_ALLOCATED if fixed else headers.HAS_PARENT if new.parent else 0
    parameters = headers.FileParameters.build({"block_size": block_size, "flags": flags})
    items = [
        (headers.FILE_PARAMETERS, parameters, headers.IS_REQUIRED),
        *(
            (guid, value, headers.IS_VIRTUAL_DISK | headers.IS_REQUIRED)
            for guid, value in (
                (headers.VIRTUAL_DISK_SIZE, size.to_bytes(8, "little")),
                (headers.VIRTUAL_DISK_ID, _disk_id(new).bytes_le),
                (headers.LOGICAL_SECTOR_SIZE, new.sector_size.to_bytes(4, "little")),
                (headers.PHYSICAL_SECTOR_SIZE, physical.to_bytes(4, "little")),
            )
        ),
    ]
    if new.parent:
        items.append((headers.PARENT_LOCATOR, _locator(new), headers.IS_REQUIRED))
    regions = headers.pack_regions(
        [(headers.BAT, bat, data - bat), (headers.METADATA, metadata, MIB)]
    )
    first = Header(
        sequence=1,
        file_write_guid=uuid4(),
        data_write_guid=uuid4(),
        log_guid=NIL,
        log_offset=MIB,
        log_length=log_length,
    )
    second = replace(first, sequence=2)
    steps: list[Step] = [
        Write(0, _identifier()),
        Write(headers.HEADER_OFFSETS[0], first.pack()),
        Write(headers.HEADER_OFFSETS[1], second.pack()),
        *(Write(at, regions) for at in headers.REGION_TABLE_OFFSETS),
        Write(metadata, headers.pack_items(items)),
    ]
    end = data
    if fixed:
        steps += (Write(bat + at, raw) for at, raw in _in_order(blocks, chunk, data, block_size))
        end += blocks * block_size
    return Plan(*steps, Extend(end))


def _is_fixed(new: New) -> bool:
    subformat = new.options["subformat"]
    if subformat not in ("dynamic", "fixed"):
        raise Unsupported(new.name, "subformat", f"{subformat!r}: must be dynamic or fixed")
    if subformat == "fixed" and new.parent:
        raise Unsupported(new.name, "subformat", "a disk over a parent cannot be fixed")
    return subformat == "fixed"


def _block_size(new: New) -> int:
    if new.options["block_size"] == "auto":
        return AUTO_CHILD if new.parent else AUTO
    size = _size(new, "block_size")
    if not headers.MIN_BLOCK <= size <= headers.MAX_BLOCK or size & (size - 1):
        text = f"{new.options['block_size']!r}: must be a power of two from 1M to 256M"
        raise Unsupported(new.name, "block_size", text)
    return size


def _size(new: New, name: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)", new.options[name].upper())
    if not match:
        raise Unsupported(new.name, name, f"{new.options[name]!r}: must be a size such as 1M")
    return int(match[1]) * UNITS[match[2]]


def _disk_id(new: New) -> UUID:
    """The same in all images of a chain."""
    if new.parent and new.parent.name == "vhdx":
        return UUID(str(new.parent.details()["disk_id"]))
    return uuid4()


def _locator(new: New) -> bytes:
    assert new.parent
    identity = vhdx_locator.identity_of(new.files[0], new.parent)
    if new.parent.sector_size != new.sector_size:
        text = f"{new.sector_size} bytes over a parent with {new.parent.sector_size}"
        raise Unsupported(new.name, "sector_size", text)
    return vhdx_locator.pack(new.files[0], identity, new.parent_name)


def _identifier() -> bytes:
    creator = CREATOR.encode("utf-16-le").ljust(512, b"\0")
    raw: bytes = headers.FileIdentifier.build({"signature": headers.SIGNATURE, "creator": creator})
    return raw


def _in_order(blocks: int, chunk: int, data: int, block_size: int) -> Iterator[tuple[int, bytes]]:
    """The table of a disk that lies in order from byte `data` on: offset in it, bytes."""
    step = PIECE // ENTRY
    for first in range(0, count_entries(blocks, chunk, False), step):
        entries = array("Q")
        for number in range(first, min(first + step, count_entries(blocks, chunk, False))):
            index, within = divmod(number, chunk + 1)
            block = number - index
            entries.append(0 if within == chunk else data + block * block_size | PRESENT)
        yield first * ENTRY, little(entries.tobytes()).tobytes()
