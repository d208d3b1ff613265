"""VHD: new images, more room in old ones, other parents.

Programs differ in which copy of the footer they go by, so a change of the footer is written to the
one at the end first and then to the one at the beginning, with what either needs in place before.
A dynamic header is 1024 bytes: its first sector, where all numbers are, can be written as one; a
change of names and locators goes by way of a second header, and the footers lead to it meanwhile.
"""

from __future__ import annotations

import dataclasses
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from virtmount.errors import Unsupported
from virtmount.formats import vhd_footer
from virtmount.formats.vhd_footer import (
    DIFFERENCING,
    DYNAMIC,
    ENTRY,
    EPOCH,
    FIXED,
    FREE,
    HEADER,
    MAX_BLOCK,
    MAX_BLOCKS,
    MAX_SIZE,
    MIN_BLOCK,
    NO_OFFSET,
    NO_UUID,
    SECTOR,
    Copy,
)
from virtmount.formats.vhd_table import ALIGN, ONES, Geometry, pieces, touched, without
from virtmount.formats.vhd_write import Writer
from virtmount.hostfile import HostFile
from virtmount.image import Image, Span
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write
from virtmount.upkeep import Choice, New

CHOICES: Mapping[str, Choice] = {
    "subformat": Choice("dynamic", "dynamic or fixed; with a parent always differencing"),
    "block_size": Choice("2M", "of a dynamic image: a power of two from 4K to 32M"),
}
TABLE_AT = 4096  # in new images without a parent
_SIZE = re.compile(r"(\d{1,12})([KMG]?)", re.IGNORECASE)


def create(new: New) -> Plan:
    """The disk has exactly the size that was asked for, in every program that reads it."""
    file, size = new.files[0], new.size
    if new.sector_size != SECTOR:
        raise Unsupported(file, "sector_size", f"{new.sector_size}, a VHD's sectors have {SECTOR}")
    if size % SECTOR or not 0 < size <= MAX_SIZE:
        text = f"{size} bytes, know multiples of {SECTOR} up to {MAX_SIZE}"
        raise Unsupported(file, "size", text)
    subformat = new.options["subformat"].lower()
    if subformat not in ("dynamic", "fixed", "differencing"):
        raise Unsupported(file, "subformat", f"{subformat!r}, know dynamic and fixed")
    if (subformat == "differencing") > (new.parent is not None):
        raise Unsupported(file, "subformat", "differencing, but no parent was named")
    block = _block_size(file, new.options["block_size"])
    identity = uuid.uuid4().bytes
    if subformat == "fixed":
        if new.parent is not None:
            raise Unsupported(file, "subformat", "fixed: such an image has no parent")
        footer = vhd_footer.new_footer(FIXED, size, NO_OFFSET, identity)
        return Plan(Extend(size), Write(size, footer), Barrier)
    blocks = -(-size // block)
    if blocks > MAX_BLOCKS:
        text = f"{blocks} blocks of {block} bytes, at most {MAX_BLOCKS} are supported"
        raise Unsupported(file, "block_size", text)
    table, steps = TABLE_AT, []
    parent: tuple[bytes, int, str] | None = None
    paths: list[tuple[bytes, int, bytes, int]] = []
    if new.parent is not None:
        parent = _identity(file, new.parent, new.parent_name)
        paths, end = _placed(new.parent, new.parent_name, SECTOR + HEADER)
        table = -(-end // ALIGN) * ALIGN
        steps = [Write(at, path) for _, at, path, _ in paths]
    kind = DIFFERENCING if parent else DYNAMIC
    footer = vhd_footer.new_footer(kind, size, SECTOR, identity)
    header = vhd_footer.new_header(table, blocks, block, parent, paths)
    length = -(-blocks * ENTRY // SECTOR) * SECTOR
    return Plan(
        Write(0, footer + header),
        *steps,
        Write(table, ONES * length),
        Write(table + length, footer),
        Barrier,
    )


def _block_size(file: HostFile, text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    size = int(match[1]) << 10 * " KMG".index(match[2].upper() or " ") if match else 0
    if size & (size - 1) or not MIN_BLOCK <= size <= MAX_BLOCK:
        known = f"know powers of two from {MIN_BLOCK} to {MAX_BLOCK}"
        raise Unsupported(file, "block_size", f"{text!r}, {known}")
    return size


def _identity(file: HostFile, parent: Image, name: str) -> tuple[bytes, int, str]:
    """Unique id, time of last change and bare name of a parent."""
    if parent.name != "vhd":
        text = f"{parent.name}: the parent of a VHD is a VHD"
        raise Unsupported(file, "parent", text)
    if "\\" in name or any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        raise Unsupported(file, "parent", f"{name!r}: no name that Windows can write")
    changed = int(os.fstat(parent.files[0].fd).st_mtime) - EPOCH
    identity = uuid.UUID(parent.identity).bytes if parent.identity else NO_UUID
    return identity, max(0, changed) & 0xFFFFFFFF, os.path.basename(name)


def _placed(
    parent: Image, name: str, start: int
) -> tuple[list[tuple[bytes, int, bytes, int]], int]:
    """Locators (code, offset, path, room) from byte `start` on, and where they end."""
    paths = []
    # The new image may still be in another folder; the parent is where it is.
    absolute = os.path.realpath(parent.files[0].path)
    for code, path in vhd_footer.parent_paths(name, absolute):
        room = -(-len(path) // SECTOR) * SECTOR
        paths.append((code, start, path, room))
        start += room
    return paths, start


# Size


def resize_fixed(file: HostFile, copy: Copy, size: int) -> Plan:
    """The new footer makes the file longer; the old one lies in the disk then, and is emptied."""
    shape = _shape(copy.raw, size)
    footer = vhd_footer.changed_footer(copy.raw, current_size=size, geometry=shape)
    old = copy.current_size
    if size > copy.offset:
        emptied = Punch(old, min(file.size, size) - old)
        return Plan(Write(size, footer), Barrier, emptied, Barrier)
    # There was more room in front of the footer than the disk took.
    return Plan(Punch(old, size - old), Barrier, Write(copy.offset, footer), Barrier)


def _shape(footer: bytes, size: int) -> tuple[int, int, int]:
    """The geometry for a footer whose disk is to have `size` bytes, in every program's eyes."""
    old = (int.from_bytes(footer[56:58], "big"), footer[58], footer[59])
    by_shape = footer[28:32] in vhd_footer.BY_GEOMETRY
    if by_shape or old == vhd_footer.LARGEST_GEOMETRY:
        return vhd_footer.LARGEST_GEOMETRY
    return vhd_footer.geometry(size)


class Growth:
    """More table entries, and a larger disk: `plan`, and what is true once it is done.

    The table grows where it is if nothing lies behind it, else it moves to the end of the file.
    """

    def __init__(
        self, file: HostFile, writer: Writer, header: tuple[int, bytes], size: int
    ) -> None:
        self._file, self._writer = file, writer
        self._old = geometry = writer.geometry
        header_at, self.header = header
        blocks = -(-size // geometry.block)
        if blocks > MAX_BLOCKS:
            text = f"{blocks} blocks of {geometry.block} bytes, at most {MAX_BLOCKS} are supported"
            raise Unsupported(file, "size", text)
        steps: list[Step] = []
        if blocks > geometry.blocks:
            length = -(-blocks * ENTRY // SECTOR) * SECTOR
            table = geometry.table
            if not self._has_room(length):
                table = -(-writer.free_from // ALIGN) * ALIGN
            end = max(writer.free_from, table + length)
            steps += writer.footer_at(end)
            data = bytearray(ONES * length)
            data[: geometry.blocks * ENTRY] = file.pread(geometry.table, geometry.blocks * ENTRY)
            # In place only what is new is written: the first part of it is in use.
            first = 0 if table != geometry.table else geometry.blocks * ENTRY // SECTOR * SECTOR
            steps += [Write(table + first, bytes(data[first:])), Barrier]
            entries = max(blocks, int.from_bytes(self.header[28:32], "big"))
            if table != geometry.table:
                entries = blocks
            self.header = vhd_footer.changed_header(
                self.header, table_offset=table, entries=entries
            )
            steps += [Write(header_at, self.header[:SECTOR]), Barrier]
            spans = (*(s for s in geometry.spans if s.offset != geometry.table),)
            spans = (*spans, Span(table, length))
            writer.adopt(dataclasses.replace(geometry, table=table, blocks=blocks, spans=spans))
            writer.free_from = end
        shape = _shape(writer.footer, size)
        footer = vhd_footer.changed_footer(writer.footer, current_size=size, geometry=shape)
        steps += writer.exchange_footer(footer)
        self.plan = Plan(*steps)

    def _has_room(self, length: int) -> bool:
        """Whether the table can have `length` bytes where it is."""
        geometry, table = self._old, self._old.table
        others = [span for span in geometry.spans if span.offset != table]
        if touched(others, table, length):
            return False
        for _, entries in pieces(self._file, geometry, 0, geometry.blocks):
            for entry in entries:
                start = entry * SECTOR
                if entry != FREE and start < table + length and table < start + geometry.stride:
                    return False
        # Something else may lie there that we do not know, as XenServer's second map does.
        used = -(-geometry.blocks * ENTRY // SECTOR) * SECTOR
        end = min(table + length, self._writer.free_from)
        behind = self._file.pread_padded(table + used, max(0, end - table - used))
        return not behind.strip(b"\0\xff")


# Parents


def rebase(
    file: HostFile,
    writer: Writer,
    header: tuple[Any, Sequence[Span]],
    parent: Image | None,
    name: str,
) -> tuple[Plan, bytes, list[Span]]:
    """Another parent, or none: then what is absent reads as zeros.

    The new header is first written elsewhere, and the footers lead to it; then to its old place,
    where every program looks for it, and the footers lead there again.  `header`: the old one's
    fields, its place, and those of its locators.  Answers also with the new one and the places of
    its locators.
    """
    geometry = writer.geometry
    fields, (home, *old) = header
    known = _identity(file, parent, name) if parent else None
    measured, length = _placed(parent, name, 0) if parent else ([], 0)
    steps: list[Step] = []
    start = _room(file, geometry, writer.free_from, length + HEADER)
    if at_end := start is None:
        start = writer.free_from
        steps += writer.footer_at(start + length + HEADER)
        writer.free_from = start + length + HEADER
    paths = [(code, start + at, path, room) for code, at, path, room in measured]
    entries, block = fields.entries, fields.block_size
    raw = vhd_footer.new_header(geometry.table, entries, block, known, paths)
    elsewhere = start + length
    steps += (Write(at, path.ljust(room, b"\0")) for _, at, path, room in paths)
    steps += [Write(elsewhere, raw), Barrier]
    kind = DIFFERENCING if parent else DYNAMIC
    for place in (elsewhere, home.offset):
        if place == home.offset:
            steps += [Write(home.offset, raw), Barrier]
        footer = vhd_footer.changed_footer(writer.footer, data_offset=place, type=kind)
        steps += writer.exchange_footer(footer)
    kept = [span for span in geometry.spans if span not in old]
    if length:
        kept.append(Span(start, length))
    for span in (Span(elsewhere, HEADER), *old):
        if not touched(kept, *span[:2]):
            steps.append(Write(span.offset, bytes(span.length)))
    writer.adopt(dataclasses.replace(geometry, spans=tuple(kept)))
    if at_end:
        writer.free_from = elsewhere
        if not file.is_device:
            steps += [Write(elsewhere, writer.footer), Barrier, Truncate(elsewhere + SECTOR)]
    return Plan(*steps, Barrier), raw, [Span(start, length)] if length else []


def _room(file: HostFile, geometry: Geometry, end: int, length: int) -> int | None:
    """A place for `length` bytes of metadata before the first block, which holds nothing."""
    first = min(
        (
            entry * SECTOR
            for _, entries in pieces(file, geometry, 0, geometry.blocks)
            for entry in entries
            if entry != FREE
        ),
        default=end,
    )
    spans = [(span.offset, span.offset + span.length) for span in geometry.spans]
    for low, high in without(SECTOR, min(first, end), spans):
        start = -(-low // SECTOR) * SECTOR
        if start + length <= high and not any(file.pread_padded(start, length)):
            return start
    return None
