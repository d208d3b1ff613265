"""Checking and mending a VMDK.

For every sparse extent: tables that are not in the file or have two owners, copies of tables that
differ, entries that name what is not in the file or is metadata, grains that overlap, space that
nothing uses, the flag of a file that was not closed.  For flat ones the length, for the descriptor
the CID; compressed grains are told by their markers, which is all that is looked at of them.

What is mended: a table that cannot be right is made again from its copy, or empty; copies become
the same (an entry from either, the first one where both have one); an entry that cannot be right is
cleared, so that the parent shows, or zeros; the second owner of a grain gets a copy of its own.
Grains that nothing uses are given to clusters that hold nothing, where there is no parent, and what
lies behind the last one is cut off.  Nothing is repaired in compressed and seSparse extents.
"""

from __future__ import annotations

import dataclasses
import secrets
from array import array
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats.vmdk_descriptor import parse, rewrite
from virtmount.formats.vmdk_entries import ENTRY, SECTOR, Claims, Overlap, merge, packed, unpacked
from virtmount.formats.vmdk_grains import LIMIT, MAX_SLOTS, Tables
from virtmount.formats.vmdk_parts import Opened, Part, close_siblings, open_parts
from virtmount.formats.vmdk_sesparse import PER_TABLE, SeSparseExtent
from virtmount.formats.vmdk_sparse import SparseExtent
from virtmount.hostfile import HostFile
from virtmount.image import Kind, Options
from virtmount.plan import Barrier, Extend, Plan, Step, Write
from virtmount.upkeep import Elsewhere, Finding, Progress, Repair, Severity

if TYPE_CHECKING:
    from virtmount.formats.vmdk import VMDK

MAX_FINDINGS = 1000  # of one extent; the rest is counted
STEP = 1 << 20

Item = Finding | Plan | Progress


def check(driver: type[VMDK], file: HostFile, options: Options, repair: Repair) -> Iterator[Item]:
    """See Image.check().  What the headers say is raised where it cannot be right."""
    opened = open_parts(file, options, lenient=True)
    try:
        look = _Look(opened, file.writable and repair is Repair.ALL)
        yield from look.descriptor()
        for part in opened.parts:
            yield from look.part(part)
        may = file.writable and repair is not Repair.NOTHING and not look.damaged
        yield from look.leaks(may)
    finally:
        close_siblings(opened.files)
    if may and (look.leaking or look.unclean):
        yield from _tidy(driver, file, options, look)


def _tidy(driver: type[VMDK], file: HostFile, options: Options, look: _Look) -> Iterator[Item]:
    """What an orderly end of a session does.  All that the driver refuses is mended by now."""
    try:
        image = driver(file, dataclasses.replace(options, changing_parent=True))
    except Unsupported:
        return  # an image that is never written
    try:
        for plan in image.tidy(look.holes):
            yield Elsewhere(plan, image.files)
    finally:
        close_siblings(image.files)


class _Look:
    def __init__(self, opened: Opened, mend: bool) -> None:
        self.opened, self.mend = opened, mend
        self.damaged = False  # and not mended
        self.leaking = False
        self.unclean = False
        self.holes: dict[int, list[int]] = {}  # file number -> offsets of grains nothing uses
        self._leaks: list[tuple[Severity, str, str]] = []
        self._counted = 0
        self._tables = sum(p.tables.tables for p in opened.parts if p.tables is not None)
        self._done = 0

    # The descriptor

    def descriptor(self) -> Iterator[Item]:
        descriptor = self.opened.descriptor
        file = self.opened.files[0]
        if descriptor.cid is None:
            found = descriptor.values.get("cid")
            text = "no CID" if found is None else f"CID {found[:32]!r} is no number"
            yield self._damage("descriptor", f"{text}: other programs refuse it", mended=self.mend)
            if self.mend:
                new = descriptor.with_values(CID=f"{secrets.randbelow(0xFFFFFFFE):08x}")
                if descriptor.room is not None and len(new) > descriptor.room:
                    raise Unsupported(file, "descriptor", "no room for a CID")
                at = self.opened.text_at
                yield Plan(*rewrite(descriptor.text, new, at, descriptor.room), Barrier)
                self.opened.descriptor = parse(file, "descriptor ", new, descriptor.room)
        if not descriptor.create_type:
            yield Finding(Severity.NOTE, "descriptor", "no createType")
        if self.opened.monolithic:
            part, line = self.opened.parts[0], descriptor.extents[0]
            if line.size != part.end:
                text = f"{line.size} bytes, the header says {part.end}"
                yield Finding(Severity.NOTE, line.place, text)

    # Extents

    def part(self, part: Part) -> Iterator[Item]:
        self._counted = 0
        if part.se_sparse is not None:
            yield from self._se_sparse(part.se_sparse)
        elif part.tables is not None and part.tables.compressed:
            assert isinstance(part.tables, SparseExtent)
            yield from self._compressed(part.tables)
        elif part.tables is not None:
            yield from _Mender(self, part.tables).look()
        elif part.kind in (Kind.DATA, Kind.SHARED):
            yield from self._flat(part)
        if self._counted > MAX_FINDINGS:
            text = f"{self._counted - MAX_FINDINGS} more entries that cannot be right"
            yield Finding(Severity.DAMAGE, "", text, repaired=self.mend)

    def _flat(self, part: Part) -> Iterator[Item]:
        file = self.opened.files[part.number]
        end = part.base + part.end - part.start
        if file.size < end:
            text = f"the file ends at {file.size}, its extent at {end}: reads as zeros when mended"
            mended = self.mend and not file.is_device
            yield self._damage(str(file.path.name), text, mended=mended)
            if mended:
                yield self.plan(Extend(end, part.number), Barrier)

    def _compressed(self, tables: SparseExtent) -> Iterator[Item]:
        for index, sector in enumerate(tables.directory):
            yield self._progress()
            if not sector:
                continue
            try:
                at = tables.table(index)
                assert at is not None
                entries = unpacked(tables.read_table(at, index))
            except Corrupt as error:
                yield self._damage(error.place, error.text, mended=False)
                continue
            for within, entry in enumerate(entries):
                if not tables.is_grain(entry):
                    continue
                grain = index * tables.per_table + within
                try:
                    tables.marker(grain, entry)
                except Corrupt as error:
                    yield from self.count(error.place, error.text, mended=False)

    def _se_sparse(self, extent: SeSparseExtent) -> Iterator[Item]:
        grains = extent.capacity // extent.grain
        for index, entry in enumerate(extent.directory):
            if not entry:
                continue
            for grain in range(index * PER_TABLE, min((index + 1) * PER_TABLE, grains)):
                try:
                    kind, _ = extent.lookup(grain)
                except Corrupt as error:
                    yield self._damage(error.place, error.text, mended=False)
                    break
                if kind is Kind.INVALID:
                    yield from self.count(f"grain {grain}", "names no grain", mended=False)

    # Leaks

    def leak(self, severity: Severity, place: str, text: str) -> None:
        self._leaks.append((severity, place, text))

    def leaks(self, may: bool) -> Iterator[Item]:
        """Last: only what has no damage left can be tidied."""
        for severity, place, text in self._leaks:
            yield Finding(severity, place, text, repaired=may)

    # For all

    def plan(self, *steps: Step) -> Plan:
        return Elsewhere(Plan(*steps), self.opened.files)

    def count(self, place: str, text: str, *, mended: bool) -> Iterator[Item]:
        self._counted += 1
        finding = self._damage(place, text, mended=mended)
        if self._counted <= MAX_FINDINGS:
            yield finding

    def _progress(self) -> Progress:
        self._done += 1
        return Progress(self._done - 1, self._tables)

    progress = _progress

    def _damage(self, place: str, text: str, *, mended: bool) -> Finding:
        self.damaged |= not mended
        return Finding(Severity.DAMAGE, place, text, repaired=mended)

    damage = _damage


class _Mender:
    """One sparse extent that is not compressed."""

    def __init__(self, look: _Look, tables: Tables) -> None:
        self.look_, self.tables, self.mend = look, tables, look.mend
        self.file = tables.file
        self.name = f"{self.file.path.name}: " if look.opened.files[1:] else ""
        size = self.file.size
        self.limit = -(-size // SECTOR)  # sectors in the file
        self.grain = tables.grain // SECTOR
        self.end = -(-size // tables.grain) * tables.grain  # where new things go
        self.claims = Claims(self.grain, size) if size // tables.grain < MAX_SLOTS else None
        self.owners: set[int] = set()  # sectors at which tables begin
        self.used_end = 0
        self._merged: dict[int, bytes] = {}  # tables that are not mended, by index
        self._unknown = False  # a table could not be read, so what is used is not known

    def look(self) -> Iterator[Item]:
        tables, look = self.tables, self.look_
        if tables.unclean:
            look.unclean = True
            text = "the file was not closed"
            look.leak(Severity.NOTE, f"{self.name}header", text)
        if isinstance(tables, SparseExtent) and tables.lost_redundant:
            yield look.damage(f"{self.name}header+48", tables.lost_redundant, mended=False)
        yield from self._directories()
        yield from self._entries()
        self._leaks()

    def _directories(self) -> Iterator[Item]:
        """Tables that are not there, and copies that differ."""
        copies = self._copies()
        for index in range(self.tables.tables):
            sound: list[bytes | None] = []
            present = 0
            for at, directory in copies:
                sector = directory[index]
                present += sector != 0
                problem = self._problem(at, index, sector) if sector else None
                if problem is None and sector:
                    self.owners.add(sector)
                    sound.append(self.tables.read_table(sector * SECTOR, index))
                    continue
                sound.append(None)
                if problem is not None:
                    place = f"{self.name}grain directory entry {index} at {at + index * ENTRY}"
                    made = "from its copy" if len(copies) > 1 else "empty"
                    text = f"{problem}: made {made} when mended"
                    yield from self.look_.count(place, text, mended=self.mend)
            if not present:
                continue
            if present < len(copies):
                text = f"table {index} has one copy"
                place = f"{self.name}grain directory"
                yield from self.look_.count(place, text, mended=self.mend)
            if None in sound:
                yield from self._make(index, sound)
            elif len(sound) > 1 and sound[0] != sound[1]:
                yield from self._even(index, sound)

    def _copies(self) -> list[tuple[int, array[int]]]:
        copies = [(self.tables.directory_at, self.tables.directory)]
        if self.tables.redundant is not None and self.tables.redundant_at is not None:
            copies.append((self.tables.redundant_at, self.tables.redundant))
        return copies

    def _problem(self, at: int, index: int, sector: int) -> str | None:
        try:
            self.tables.check_table(at, index, sector, "")
        except Corrupt as error:
            return error.text
        return "the table has another owner" if sector in self.owners else None

    def _make(self, index: int, sound: list[bytes | None]) -> Iterator[Item]:
        """New tables in place of those that cannot be right."""
        whole = next((raw for raw in sound if raw is not None), b"")
        raw = whole.ljust(self.tables.table_size, b"\0")
        steps: list[Step] = []
        after: list[Step] = []
        for (at, directory), found in zip(self._copies(), sound, strict=True):
            if found is not None:
                continue
            place = self._take(len(raw))
            if self.mend:
                steps.append(Write(place, raw, self.tables.number))
                entry = (place // SECTOR).to_bytes(ENTRY, "little")
                after.append(Write(at + index * ENTRY, entry, self.tables.number))
            directory[index] = place // SECTOR if self.mend else 0
            if self.mend:
                self.owners.add(place // SECTOR)
        if self.mend:
            yield self.look_.plan(*steps, Barrier, *after, Barrier)
        elif whole and len(self._merged) < MAX_FINDINGS:
            self._merged[index] = whole
            directory = self.tables.directory
            directory[index] = directory[index] or next(
                d[index] for _, d in self._copies() if d[index]
            )
        else:
            self._unknown = True

    def _take(self, length: int) -> int:
        """A place behind everything else."""
        at = self.end
        self.end = -(-(at + length) // self.tables.grain) * self.tables.grain
        if self.end > LIMIT * SECTOR:
            raise Unsupported(self.file, "", "no place below 2 TiB of file for what is mended")
        return at

    def _even(self, index: int, sound: list[bytes | None]) -> Iterator[Item]:
        first, second = sound
        assert first is not None
        assert second is not None
        merged = merge(first, second)
        sector = self.tables.directory[index]
        place = f"{self.name}grain table {index} at {sector * SECTOR}"
        yield from self.look_.count(place, "differs from its copy", mended=self.mend)
        if self.mend:
            writes = [
                Write(directory[index] * SECTOR, merged, self.tables.number)
                for _, directory in self._copies()
            ]
            yield self.look_.plan(*writes, Barrier)
        elif len(self._merged) < MAX_FINDINGS:
            self._merged[index] = merged
        else:
            self._unknown = True

    def _entries(self) -> Iterator[Item]:
        """What the tables name."""
        tables = self.tables
        metadata = sorted(tables.metadata(whole=True))
        self.used_end = max(offset + length for offset, length in metadata)
        self.used_end = max(self.used_end, tables.fixed_end())
        for index, sector in enumerate(tables.directory):
            yield self.look_.progress()
            if not sector:
                continue
            at = sector * SECTOR
            raw = self._merged.get(index) or tables.read_table(at, index)
            if raw.count(0) == len(raw):
                continue
            entries = unpacked(raw)
            if self._fine(entries, metadata):
                continue
            changes: dict[int, int] = {}
            for within, entry in enumerate(entries):
                if not tables.is_grain(entry):
                    continue
                problem = self._wrong(entry, metadata)
                if problem is None:
                    problem = yield from self._claim(within, entry, changes)
                    if problem is None:
                        continue
                else:
                    changes[within] = 0
                place = f"{self.name}grain table entry at {at + within * ENTRY}"
                yield from self.look_.count(place, problem, mended=self.mend)
            if changes and self.mend:
                yield self._changed(index, changes)

    def _fine(self, entries: array[int], metadata: list[tuple[int, int]]) -> bool:
        """Whether a whole table is right, which most are; its grains are claimed then."""
        kept = array("I", filter(self.tables.is_grain, entries))
        if not kept:
            return True
        low, high = min(kept), max(kept)
        if high >= self.limit:
            return False
        for offset, length in metadata:
            if low * SECTOR < offset + length and offset < (high + self.grain) * SECTOR:
                return False  # perhaps: looked at one by one
        if self.claims is not None:
            try:
                self.claims.take(kept)
            except Overlap:
                return False
        self.used_end = max(self.used_end, (high + self.grain) * SECTOR)
        return True

    def _wrong(self, entry: int, metadata: list[tuple[int, int]]) -> str | None:
        start, end = entry * SECTOR, (entry + self.grain) * SECTOR
        if entry >= self.limit:
            return f"grain at {start}, the file ends at {self.file.size}: cleared when mended"
        for offset, length in metadata:
            if start < offset + length and offset < end:
                return f"grain at {start} lies in metadata: cleared when mended"
        return None

    def _claim(
        self, within: int, entry: int, changes: dict[int, int]
    ) -> Generator[Item, None, str | None]:
        """The generator's value is what is wrong, if anything is."""
        self.used_end = max(self.used_end, (entry + self.grain) * SECTOR)
        if self.claims is None:
            return None
        try:
            self.claims.take(array("I", [entry]))
        except Overlap as overlap:
            if self.mend:
                place = self._take(self.tables.grain)
                changes[within] = place // SECTOR
                self.claims.take(array("I", [place // SECTOR]))
                self.used_end = max(self.used_end, self.end)
                yield self.look_.plan(*self._copy(entry * SECTOR, place), Barrier)
            return (
                f"grain at {entry * SECTOR} overlaps the one at {overlap.first * SECTOR}: "
                "gets a copy when mended"
            )
        return None

    def _copy(self, source: int, target: int) -> Iterator[Step]:
        yield Extend(target + self.tables.grain, self.tables.number)
        for within in range(0, self.tables.grain, STEP):
            length = min(STEP, self.tables.grain - within)
            data = self.file.pread_padded(source + within, length)
            yield Write(target + within, data, self.tables.number)

    def _changed(self, index: int, changes: dict[int, int]) -> Plan:
        """Sectors of a table, in both copies."""
        writes: list[Step] = []
        for _, directory in self._copies():
            at = directory[index] * SECTOR
            entries = unpacked(self.file.pread_padded(at, self.tables.table_size))
            for within, value in changes.items():
                entries[within] = value
            raw = packed(entries)
            for sector in sorted({within * ENTRY // SECTOR for within in changes}):
                part = raw[sector * SECTOR : (sector + 1) * SECTOR]
                writes.append(Write(at + sector * SECTOR, part, self.tables.number))
        return self.look_.plan(*writes, Barrier)

    def _leaks(self) -> None:
        """Grains that nothing uses, and what lies behind the last one."""
        tables, look = self.tables, self.look_
        if self.claims is None:
            text = f"more than {MAX_SLOTS} grains: not looked at for overlaps and leaks"
            look.leak(Severity.NOTE, f"{self.name}grain tables", text)
        if self.claims is None or self._unknown:
            return
        size = tables.grain
        taken = {
            slot
            for offset, length in tables.metadata(whole=True)
            for slot in range(offset // size, -(-(offset + length) // size))
        }
        first = -(-max(tables.header_size, tables.fixed_end()) // size)
        if isinstance(tables, SparseExtent):
            first = max(first, -(-tables.overhead * SECTOR // size))
        last = self.used_end // size
        free = (slot for slot in self.claims.free(first, last) if slot not in taken)
        holes = [slot * size for slot in free]
        if holes:
            look.leaking = True
            look.holes[tables.number] = holes
            text = f"{len(holes)} grains of {size} bytes that nothing uses"
            look.leak(Severity.LEAK, f"grains of {self.file.path.name}", text)
        if self.file.size > self.used_end + size:
            look.leaking = True
            text = f"the file ends at {self.file.size}, what is used at {self.used_end}"
            look.leak(Severity.LEAK, f"{self.name}byte {self.used_end}", text)
