"""VHD: checking and mending.

What can be mended: copies of the footer, checksums, table entries that lead nowhere (their block
is lost: it reads as zeros, or as the parent, from then on), blocks that two entries name (the later
entry gets a copy), a last block that the file cuts short, space behind the last block.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

from virtmount.errors import Corrupt, Unsupported, VirtmountError
from virtmount.formats import vhd_footer
from virtmount.formats.vhd_footer import (
    CHECKSUM_AT,
    DIFFERENCING,
    ENTRY,
    EPOCH,
    FIXED,
    FREE,
    HEADER,
    HEADER_CHECKSUM_AT,
    NO_UUID,
    SECTOR,
    Copies,
    Copy,
)
from virtmount.formats.vhd_table import Geometry, Scan, Wrong, aligned, table_writes
from virtmount.hostfile import HostFile
from virtmount.image import Options, Span
from virtmount.plan import Barrier, Plan, Truncate, Write
from virtmount.siblings import open_sibling
from virtmount.upkeep import Finding, Progress, Repair, Severity

CHUNK = 1 << 20  # bytes of a block that are copied at a time

Item = Finding | Plan | Progress


def check(file: HostFile, options: Options, repair: Repair) -> Iterator[Item]:
    """See Image.check()."""
    copies = vhd_footer.find(file)
    if copies == Copies(None, None):
        raise vhd_footer.no_footer(file, copies)
    yield from _Check(file, options, repair if file.writable else Repair.NOTHING, copies).run()


class _Check:
    def __init__(self, file: HostFile, options: Options, repair: Repair, copies: Copies) -> None:
        self._file, self._options, self._copies = file, options, copies
        self._mends = repair is Repair.ALL
        self._trims = repair is not Repair.NOTHING

    def run(self) -> Iterator[Item]:
        copy = self._copies.choose()
        if copy is None:
            copy = self._likely_copy()
            if copy is None:
                error = vhd_footer.no_footer(self._file, self._copies)
                yield Finding(Severity.DAMAGE, error.place, error.text)
                return
        try:
            footer = vhd_footer.parse_footer(self._file, copy)
            if footer.type == FIXED:
                yield from self._fixed(copy, footer)
            else:
                yield from self._sparse(copy, footer)
        except (Corrupt, Unsupported) as error:
            yield Finding(Severity.DAMAGE, error.place, error.text)

    def _likely_copy(self) -> Copy | None:
        """With no whole one: a copy that says nothing impossible, but for its checksum."""
        for copy in self._copies:
            if copy is None or copy.whole:
                continue
            try:
                footer = vhd_footer.parse_footer(self._file, copy)
                if footer.type == FIXED:
                    if copy.offset == 0 or footer.current_size != copy.offset:
                        continue
                else:
                    size = footer.current_size // SECTOR * SECTOR
                    header, _ = vhd_footer.parse_header(self._file, footer.data_offset)
                    vhd_footer.check_header(self._file, header, footer.data_offset, size)
            except VirtmountError:
                continue
            return copy
        return None

    def _fixed(self, copy: Copy, footer: Any) -> Iterator[Item]:
        place = f"footer at {copy.offset}"
        if not copy.whole:
            yield Finding(Severity.DAMAGE, place, copy.state, self._mends)
            if self._mends:
                yield Plan(Write(copy.offset, vhd_footer.summed(copy.raw, CHECKSUM_AT)), Barrier)
        if footer.current_size > copy.offset:
            text = f"current_size {footer.current_size}, the data ends at {copy.offset}"
            yield Finding(Severity.DAMAGE, place, text)
        elif footer.current_size < copy.offset:
            text = f"{copy.offset - footer.current_size} bytes between the disk and its footer"
            yield Finding(Severity.NOTE, place, text)
        yield from self._sizes(copy, footer)

    def _sizes(self, copy: Copy, footer: Any) -> Iterator[Item]:
        shaped = vhd_footer.size_by_geometry(footer)
        if vhd_footer.goes_by_geometry(footer) and shaped != footer.current_size:
            text = f"current_size {footer.current_size}, by its geometry {shaped}"
            place = f"footer+48 at {copy.offset}"
            yield Finding(Severity.NOTE, place, f"{text}: programs differ in which they show")
        if footer.saved_state:
            text = "a virtual machine was suspended with this disk"
            yield Finding(Severity.NOTE, f"footer+84 at {copy.offset}", text)

    def _sparse(self, copy: Copy, footer: Any) -> Iterator[Item]:
        file, at = self._file, footer.data_offset
        size = footer.current_size // SECTOR * SECTOR
        header, raw = vhd_footer.parse_header(file, at)
        vhd_footer.check_header(file, header, at, size)
        if not vhd_footer.is_whole(raw, HEADER_CHECKSUM_AT):
            found = int.from_bytes(raw[36:40], "big")
            expected = vhd_footer.checksum(raw, HEADER_CHECKSUM_AT)
            text = f"checksum {found:08x}, computed {expected:08x}"
            yield Finding(Severity.DAMAGE, f"header+36 at {at}", text, self._mends)
            if self._mends:
                mended = vhd_footer.summed(raw, HEADER_CHECKSUM_AT)
                yield Plan(Write(at, mended[:SECTOR]), Barrier)
        good = copy.raw if copy.whole else vhd_footer.summed(copy.raw, CHECKSUM_AT)
        yield from self._head(good)
        yield from self._sizes(copy, footer)
        geometry = self._geometry(header, at, size)
        if footer.type == DIFFERENCING:
            yield from self._parent(header, at)
        # The footer at the end goes last: until then what is mended may need room there.
        tail = self._copies.tail
        limit = tail.offset if tail is not None else file.size
        yield from self._table(geometry, limit, good)

    def _geometry(self, header: Any, at: int, size: int) -> Geometry:
        blocks = -(-size // header.block_size)
        table = -(-blocks * ENTRY // SECTOR) * SECTOR
        spans = [Span(0, SECTOR), Span(at, HEADER), Span(header.table_offset, table)]
        try:
            found = list(vhd_footer.locators(self._file, header, at))
        except (Corrupt, Unsupported):
            found = []
        spans += (Span(item.offset, item.room) for item in found)
        return Geometry(header.table_offset, blocks, header.block_size, tuple(spans))

    def _head(self, good: bytes) -> Iterator[Item]:
        """The copy at the beginning."""
        head = self._copies.head
        if head is None or head.raw != good:
            text = "missing" if head is None else head.state
            if head is not None and head.whole:
                text = "differs from the one at the end"
            yield Finding(Severity.DAMAGE, "footer at 0", text, self._mends)
            if self._mends:
                yield Plan(Write(0, good), Barrier)

    def _parent(self, header: Any, at: int) -> Iterator[Item]:
        """Whether the locators lie in the file, and what lies where they lead."""
        try:
            found = list(vhd_footer.locators(self._file, header, at))
        except (Corrupt, Unsupported) as error:
            yield Finding(Severity.DAMAGE, error.place, error.text)
            return
        names = vhd_footer.parent_names(header, found)
        if not names:
            yield Finding(Severity.DAMAGE, f"header+576 at {at}", "no name of a parent")
            return
        place = f"header+40 at {at}"
        for name in names:
            try:
                parent = open_sibling(self._file, place, name, self._options)
            except (VirtmountError, OSError):
                continue  # finding it is the business of who attaches the chain
            with parent:
                yield from self._compare(header, place, parent)
            return

    def _compare(self, header: Any, place: str, parent: HostFile) -> Iterator[Item]:
        copy = vhd_footer.find(parent).choose()
        if copy is None:
            yield Finding(Severity.NOTE, place, f"{parent} is no VHD")
            return
        if header.parent_uuid != NO_UUID and copy.raw[68:84] != header.parent_uuid:
            wanted = uuid.UUID(bytes=header.parent_uuid)
            text = f"{parent} is {uuid.UUID(bytes=copy.raw[68:84])}, expected {wanted}"
            yield Finding(Severity.NOTE, place, text)
        changed = int(os.fstat(parent.fd).st_mtime) - EPOCH
        if header.parent_timestamp and changed > header.parent_timestamp:
            text = f"{parent} was changed, or copied, since this image was made"
            yield Finding(Severity.NOTE, place.replace("+40", "+56"), text)

    # The table

    def _table(self, geometry: Geometry, limit: int, footer: bytes) -> Iterator[Item]:
        file = self._file
        scan = Scan(file, geometry, limit)
        end = limit  # where mended blocks go: behind everything
        copied: list[Wrong] = []
        longest = 0
        for done, wrong in enumerate(scan.run()):
            place = f"table entry {wrong.index} at {geometry.entry_at(wrong.index)}"
            yield Finding(Severity.DAMAGE, place, wrong.text, self._mends)
            if not self._mends:
                continue
            if wrong.cut:
                longest = max(longest, wrong.start + geometry.stride)
            elif wrong.shared:
                copied.append(wrong)
                if len(copied) >= 1 << 16:
                    break  # the next check finds the rest
            else:
                yield Plan(*table_writes(file, geometry, {wrong.index: FREE}), Barrier)
            if done % 1024 == 0:
                yield Progress(wrong.index, geometry.blocks)
        if longest > limit:
            end = longest
            yield Plan(Write(max(end, file.size), footer), Barrier)
            yield Plan(Write(limit, bytes(min(SECTOR, end - limit))), Barrier)
        for wrong in copied:
            start = aligned(max(end, scan.end), geometry)
            yield from self._copy(geometry, wrong, start, footer)
            end = start + geometry.stride
        if not (copied or longest):
            end = scan.end
        yield Progress(geometry.blocks, geometry.blocks)
        yield from self._tail(end, footer)

    def _copy(self, geometry: Geometry, wrong: Wrong, start: int, footer: bytes) -> Iterator[Item]:
        """A block of its own for an entry that shares one: what it reads as stays."""
        file = self._file
        end = start + geometry.stride
        yield Plan(Write(max(end, file.size), footer), Barrier)
        for at in range(0, geometry.stride, CHUNK):
            length = min(CHUNK, geometry.stride - at)
            yield Plan(Write(start + at, file.pread_padded(wrong.start + at, length)))
        changes = {wrong.index: start // SECTOR}
        yield Plan(Barrier, *table_writes(file, geometry, changes), Barrier)

    def _tail(self, end: int, footer: bytes) -> Iterator[Item]:
        """The copy at the end, and what lies between it and the last block."""
        file = self._file
        size, tail = file.size, self._copies.tail
        place = "footer at the end"
        if self._mends:
            tail = vhd_footer.find(file).tail
        if tail is None or tail.raw != footer or tail.offset + SECTOR != size:
            text = "missing" if tail is None else tail.state
            if tail is not None and tail.raw == footer and tail.length == SECTOR:
                text = f"not at the end of the file but at {tail.offset}"
            elif tail is not None and tail.whole and tail.raw != footer:
                text = "differs from the one at the beginning"
            yield Finding(Severity.DAMAGE, place, text, self._mends)
            if self._mends:
                at = max(end, -(-size // SECTOR) * SECTOR - SECTOR)
                yield Plan(Write(at, footer), Barrier)
                size = file.size
        leaked = size - SECTOR - end
        if leaked > 0 and not file.is_device and (tail is not None or self._mends):
            text = f"{leaked} bytes between the last block and the footer"
            yield Finding(Severity.LEAK, place, text, self._trims)
            if self._trims:
                steps = (Write(end, footer), Barrier, Truncate(end + SECTOR), Barrier)
                yield Plan(*steps)
