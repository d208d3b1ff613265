"""Making VMDKs: every subformat that can be written, laid out as VMware does it.

Hosted sparse extents get all their grain tables at once, in two copies, because qemu never makes
one and writes over the header of an extent in which one is missing.
"""

from __future__ import annotations

import os
import secrets
import uuid
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from virtmount.errors import Unsupported
from virtmount.formats import vmdk_cowd, vmdk_parent, vmdk_sparse
from virtmount.formats.vmdk_descriptor import NO_PARENT
from virtmount.formats.vmdk_entries import ENTRY, SECTOR, packed
from virtmount.formats.vmdk_grains import LIMIT
from virtmount.plan import Barrier, Extend, Plan, Step, Write
from virtmount.upkeep import Choice, New

GRAIN = 128  # sectors
PER_TABLE = 512
DESCRIPTOR_SECTORS = 20
# 2 GB files of whole tables: an extent in the middle of a table would make each leaf a small one.
SPLIT = 2016 << 20
MAX_FILES = 255
COWD_FLAGS = 3
SPARSE, FLAT, COWD = "SPARSE", "FLAT", "VMFSSPARSE"
HARDWARE = {"legacyESX": "3"}

CHOICES: Mapping[str, Choice] = {
    "subformat": Choice(
        "monolithicSparse",
        "monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, vmfs, "
        "vmfsSparse; streamOptimized by convert --compress",
    ),
    "adapter_type": Choice("lsilogic", "ide, lsilogic, buslogic, pvscsi, legacyESX"),
    "zeroed_grain": Choice("off", "on: grains of zeros are marked (header version 2) or off"),
}
ADAPTERS = ("ide", "lsilogic", "buslogic", "pvscsi", "legacyESX")


@dataclass(frozen=True, slots=True)
class Subformat:
    """What kind of extents, in how many files, called how."""

    type: str
    split: bool = False
    ending: str = ""  # of the extent's name; none: one file


SUBFORMATS = {
    "monolithicSparse": Subformat(SPARSE),
    "monolithicFlat": Subformat(FLAT, ending="-flat"),
    "twoGbMaxExtentSparse": Subformat(SPARSE, split=True, ending="-s{:03d}"),
    "twoGbMaxExtentFlat": Subformat(FLAT, split=True, ending="-f{:03d}"),
    "vmfs": Subformat("VMFS", ending="-flat"),
    "vmfsSparse": Subformat(COWD, ending="-delta"),
}


def create(new: New) -> Plan:
    name = new.options.get("subformat", CHOICES["subformat"].default)
    subformat = SUBFORMATS.get(name)
    if subformat is None:
        hint = "virtmount convert --compress" if name == "streamOptimized" else None
        text = f"{name!r}, know {', '.join(SUBFORMATS)}"
        raise Unsupported(new.name, "subformat", text, hint=hint)
    zeroed = _is_on(new, "zeroed_grain")
    if zeroed and subformat.type != SPARSE:
        raise Unsupported(new.name, "zeroed_grain", f"{name} images have no such mark")
    if new.parent is not None and subformat.type not in (SPARSE, COWD):
        raise Unsupported(new.name, "subformat", f"a {name} image has no parent")
    size = sectors_of(new)
    pieces = list(_pieces(new, subformat, size))
    steps: list[Step] = []
    lines = []
    for index, sectors in enumerate(pieces, 1):
        number, extent_name = 0, new.name
        if subformat.ending:
            stem, suffix = os.path.splitext(new.name)
            extent_name = stem + subformat.ending.format(index) + suffix
            number = new.add(extent_name)
        steps += _extent(subformat, number, sectors, zeroed)
        base = " 0" if subformat.type == FLAT else ""
        lines.append(f'RW {sectors} {subformat.type} "{extent_name}"{base}')
    raw = descriptor(new, name, lines)
    if subformat.ending:
        return Plan(*steps, Barrier, Write(0, raw), Barrier)
    if len(raw) > DESCRIPTOR_SECTORS * SECTOR:
        raise Unsupported(new.name, "parent", f"{len(raw)} bytes of descriptor are too many")
    # The header comes last: until then this is no image.
    *rest, header = steps
    return Plan(*rest, Write(SECTOR, raw), Barrier, header, Barrier)


def sectors_of(new: New) -> int:
    if new.sector_size != SECTOR:
        text = f"sectors of {new.sector_size} bytes: VMDK has {SECTOR} only"
        raise Unsupported(new.name, "sector_size", text)
    if new.size <= 0:
        raise Unsupported(new.name, "size", f"{new.size} bytes")
    return -(-new.size // SECTOR)


def _pieces(new: New, subformat: Subformat, size: int) -> Iterator[int]:
    """Sectors of each extent."""
    step = SPLIT // SECTOR if subformat.split else size
    if -(-size // step) >= MAX_FILES:
        text = f"{-(-size // step)} extents, at most {MAX_FILES - 1} are supported"
        raise Unsupported(new.name, "subformat", text)
    if subformat.type in (SPARSE, COWD):
        most = LIMIT - overhead(min(step, LIMIT)) if subformat.type == SPARSE else LIMIT - 1
        if step > most:
            text = f"{size * SECTOR} bytes in one sparse extent, at most {most * SECTOR}"
            raise Unsupported(new.name, "size", text, hint="-o subformat=twoGbMaxExtentSparse")
    for start in range(0, size, step):
        yield min(step, size - start)


def _extent(subformat: Subformat, number: int, sectors: int, zeroed: bool) -> Iterator[Step]:
    if subformat.type == SPARSE:
        embedded = not subformat.ending
        yield from sparse_extent(number, sectors, zeroed=zeroed, embedded=embedded)
    elif subformat.type == COWD:
        yield from cowd_extent(number, sectors)
    else:
        yield Extend(sectors * SECTOR, number)


def tables_of(sectors: int) -> int:
    return -(-sectors // (GRAIN * PER_TABLE))


def overhead(sectors: int) -> int:
    """Sectors in front of the first grain."""
    tables = tables_of(sectors)
    both = 2 * (-(-tables * ENTRY // SECTOR) + tables * PER_TABLE * ENTRY // SECTOR)
    return -(-(1 + DESCRIPTOR_SECTORS + both) // GRAIN) * GRAIN


def sparse_extent(number: int, sectors: int, *, zeroed: bool, embedded: bool) -> Iterator[Step]:
    """An empty hosted sparse extent, the header last."""
    tables = tables_of(sectors)
    directory = -(-tables * ENTRY // SECTOR)
    table = PER_TABLE * ENTRY // SECTOR
    redundant_at = 1 + DESCRIPTOR_SECTORS
    directory_at = redundant_at + directory + tables * table
    yield Extend(overhead(sectors) * SECTOR, number)
    for at in (redundant_at, directory_at):
        first = at + directory
        entries = array("I", range(first, first + tables * table, table))
        yield Write(at * SECTOR, packed(entries), number)
    flags = vmdk_sparse.NEWLINE_TEST | vmdk_sparse.REDUNDANT | (vmdk_sparse.ZEROED if zeroed else 0)
    header = header_bytes(
        version=2 if zeroed else 1,
        flags=flags,
        capacity=sectors,
        descriptor_offset=1 if embedded else 0,
        descriptor_size=DESCRIPTOR_SECTORS if embedded else 0,
        redundant_offset=redundant_at,
        directory_offset=directory_at,
        overhead=overhead(sectors),
    )
    yield Write(0, header, number)


def header_bytes(**fields: int) -> bytes:
    """A header sector of a hosted sparse extent."""
    raw: bytes = vmdk_sparse.Header.build(
        {
            "magic": vmdk_sparse.MAGIC,
            "grain_size": GRAIN,
            "entries_per_table": PER_TABLE,
            "unclean_shutdown": 0,
            "newlines": vmdk_sparse.NEWLINES,
            "compression": 0,
            "redundant_offset": 0,
            **fields,
        }
    )
    return raw.ljust(SECTOR, b"\0")


def cowd_extent(number: int, sectors: int) -> Iterator[Step]:
    """An empty vmfsSparse extent, the header last; grains of one sector, as ESX makes them."""
    tables = -(-sectors // vmdk_cowd.PER_TABLE)
    directory_at = vmdk_cowd.HEADER_SIZE // SECTOR
    free = directory_at + -(-tables * ENTRY // SECTOR)
    yield Extend(free * SECTOR, number)
    raw: bytes = vmdk_cowd.Header.build(
        {
            "magic": vmdk_cowd.MAGIC,
            "version": vmdk_cowd.VERSION,
            "flags": COWD_FLAGS,
            "capacity": sectors,
            "grain_size": 1,
            "directory_offset": directory_at,
            "directory_entries": tables,
            "free_sector": free,
        }
    )
    yield Write(0, raw.ljust(vmdk_cowd.HEADER_SIZE, b"\0"), number)


def descriptor(new: New, create_type: str, extents: list[str], version: int = 1) -> bytes:
    """The text.  A name that it cannot hold is Unsupported."""
    if any(char in new.name for char in '"\r\n'):
        raise Unsupported(new.name, "name", "a descriptor cannot name such a file")
    parent = {"parentCID": f"{NO_PARENT:08x}"}
    if new.parent is not None:
        parent = vmdk_parent.linkage(new.name, new.parent, new.parent_name)
    adapter = new.options.get("adapter_type", CHOICES["adapter_type"].default)
    if adapter not in ADAPTERS:
        text = f"{adapter!r}, know {', '.join(ADAPTERS)}"
        raise Unsupported(new.name, "adapter_type", text)
    sectors = sectors_of(new)
    heads, per_track = (16, 63) if adapter == "ide" else (255, 63)
    cylinders = max(1, min(sectors // (heads * per_track), 16383 if adapter == "ide" else 65535))
    lines = [
        "# Disk DescriptorFile",
        f"version={version}",
        'encoding="UTF-8"',
        f"CID={secrets.randbelow(0xFFFFFFFE):08x}",
        f"parentCID={parent['parentCID']}",
        f'createType="{create_type}"',
    ]
    if hint := parent.get("parentFileNameHint"):
        lines.append(f'parentFileNameHint="{hint}"')
    lines += ["", "# Extent description", *extents, "", "# The Disk Data Base", "#DDB", ""]
    ddb = {
        "virtualHWVersion": HARDWARE.get(adapter, "4"),
        "geometry.cylinders": str(cylinders),
        "geometry.heads": str(heads),
        "geometry.sectors": str(per_track),
        "adapterType": adapter,
    }
    if "ddb.uuid.parent" in parent:
        ddb["uuid.image"] = str(uuid.uuid4())
        ddb["uuid.parent"] = parent["ddb.uuid.parent"]
    lines += [f'ddb.{key} = "{value}"' for key, value in ddb.items()]
    return os.fsencode("\n".join(lines) + "\n")


def _is_on(new: New, option: str) -> bool:
    value = new.options.get(option, CHOICES[option].default)
    if value not in ("on", "off"):
        raise Unsupported(new.name, option, f"{value!r}, know on and off")
    return value == "on"
