"""Parallels .hdd and .hds: expanding images, read and written.

Source: qemu, docs/interop/parallels; tried with images made by qemu-img 7.2 and 11.1 (magic
WithouFreSpacExt, table entries in clusters) and by VirtualBox 7 (WithoutFreeSpace, entries in
sectors, clusters of 63 sectors).  A plain image has no header: it is a raw one.  Refused by name:
the XML file of a bundle with its snapshots and parts; writing where the cluster is no power of two,
where clusters lie on no grid, or where a format extension (dirty bitmaps) would have to be kept.

What the file says while it is written, and why:

1. The header says "in use", durably, before the session's first change, until after its last:
   then Parallels and qemu look through the table first.  So do we before every session that writes.
2. The file is longer, durably, before an entry points behind its old end.
3. A discarded cluster keeps its place and is punched: nothing in the file says what is free.
   At the end of a session the last clusters move to where nothing is, and the rest is cut off.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import parallels_check, parallels_header
from virtmount.formats.parallels_header import (
    DATA,
    ENTRY,
    FREE,
    IN_USE,
    MAGICS,
    MAX_ENTRY,
    MAX_MOVED,
    RESERVED,
    SECTOR,
    entries,
    is_bundle,
    sector_writes,
)
from virtmount.hostfile import HostFile
from virtmount.image import (
    DEFAULTS,
    Caps,
    Dirty,
    Extent,
    Image,
    Kind,
    Layout,
    Leaf,
    Match,
    Options,
    Reservation,
    Rule,
    Run,
    Span,
)
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write
from virtmount.upkeep import Choice, Finding, New, Progress, Repair

LEAF = 1024  # entries
PIECES = 64 << 10  # bytes: the cluster of an image whose own is no power of two


class Parallels(Image):
    name: ClassVar[str] = "parallels"
    suffixes: ClassVar[tuple[str, ...]] = ("hdd", "hds")
    creates: ClassVar[bool] = True
    checks: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, Choice]] = parallels_header.CHOICES

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if head[:16] in MAGICS or is_bundle(head) else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._file = file
        self.files = [file]
        self._header = header = parallels_header.read(file)
        self.size = header.size
        self.variant = "expanding"
        self.entries_per_leaf = LEAF
        self._odd = bool(header.cluster & (header.cluster - 1))
        self.cluster_size = PIECES if self._odd else header.cluster
        if not self._odd:
            self.layout = Layout(
                width=ENTRY,
                byteorder="little",
                mask=0xFFFFFFFF,
                scale=header.scale,
                rules=(Rule(0xFFFFFFFF, 0, Kind.ABSENT),),
                low=header.data_offset,
            )
        self._use = bytearray()
        if file.writable:
            self._survey()
        self.caps = Caps(write=file.writable, discard=file.writable)
        self._begun = False

    def _survey(self) -> None:
        """Before writing: every cluster has one owner and lies in the file, or Corrupt (1)."""
        header, file = self._header, self._file
        if self._odd:
            text = f"clusters of {header.cluster} bytes are only read"
            raise Unsupported(file, "header+28", text, hint="open it read-only")
        if header.extension:
            text = "a format extension (dirty bitmaps) is not kept: only read"
            raise Unsupported(file, "header+56", text, hint="open it read-only")
        survey = parallels_check.Survey(file, header)
        for wrong in survey.entries():
            if isinstance(wrong, parallels_check.Wrong):
                text = f"{wrong.text}: not written"
                raise Corrupt(file, wrong.place, text, hint="virtmount check --repair")
        self._use = survey.use
        self.memory = len(self._use)

    def leaf(self, index: int) -> Leaf:
        if self._odd:
            return Leaf(kind=Kind.PARTIAL)
        return Leaf(table=parallels_header.TABLE_AT + index * LEAF * ENTRY)

    @property
    def grain(self) -> int:
        return SECTOR if self._odd else self.cluster_size

    def slow(self, cluster: int) -> Sequence[Extent]:
        """Pieces of clusters that are no power of two."""
        at, end = cluster * PIECES, (cluster + 1) * PIECES
        found: list[Extent] = []
        while at < end:
            number, within = divmod(at, self._header.cluster)
            length = min(end - at, self._header.cluster - within)
            entry = self._entry(number) if number < self._header.entries else 0
            host = entry * self._header.scale + within
            kind = Kind.DATA if entry else Kind.ABSENT
            if entry and (host - within < self._header.data_offset or host >= self._file.size):
                kind = Kind.INVALID
            found.append(Extent(at, length, kind, host if kind is Kind.DATA else 0))
            at += length
        return found

    def _entry(self, number: int) -> int:
        raw = self._file.pread(parallels_header.TABLE_AT + number * ENTRY, ENTRY)
        return int.from_bytes(raw, "little")

    def details(self) -> dict[str, Any]:
        header = self._header
        return {
            "magic": header.magic.decode("ascii"),
            "cluster_size": header.cluster,
            "table_entries": header.entries,
            "data_offset": header.data_offset,
            "in_use": header.in_use,
            "format_extension": header.extension,
        }

    def metadata(self) -> Iterable[Span]:
        # slow() looks for itself: its pieces belong to no host cluster of PIECES bytes.
        return () if self._odd else (Span(0, self._header.data_offset),)

    # Writing

    def begin(self) -> Plan:
        """The mark for others; the one that says "empty" goes."""
        self._begun = True
        return Plan(self._write_header(IN_USE), Barrier)

    def _write_header(
        self, in_use: int, changes: Mapping[int, int] | None = None, **fields: int
    ) -> Write:
        """`changes` of the table are earlier in the same plan: it begins in the header's sector."""
        sector = bytearray(self._file.pread(0, SECTOR))
        parallels_header.put_entries(sector, changes or {})
        parallels_header.put(sector, in_use=in_use, **fields)
        sector[parallels_header.FLAGS_AT] &= ~parallels_header.EMPTY_IMAGE
        return Write(0, bytes(sector))

    def _host(self, slot: int) -> int:
        return self._header.grid + slot * self.cluster_size

    def _slot(self, host_offset: int) -> int:
        return (host_offset - self._header.grid) // self.cluster_size

    def reserve(self, count: int) -> Reservation:
        free = self._use.find(FREE)
        if free >= 0:
            last = free + 1
            while last - free < count and self._use[last : last + 1] == bytes([FREE]):
                last += 1
            self._use[free:last] = bytes([RESERVED]) * (last - free)
            run = Run(self._host(free), last - free)
            punch = Punch(run.host_offset, run.count * self.cluster_size)
            return Reservation((run,), Plan(Extend(self._host(last)), punch, Barrier), reused=True)
        first = len(self._use)
        most = min(parallels_header.MAX_ENTRIES, self._slot(MAX_ENTRY * self._header.scale))
        last = min(first + max(1, count), most)
        if first >= last:
            raise OSError(errno.EFBIG, f"{self._file}: the table reaches no further")
        self._use += bytes([RESERVED]) * (last - first)
        plan = Plan(Extend(self._host(last)), Barrier)
        return Reservation((Run(self._host(first), last - first),), plan)

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        if not dirty:
            return Plan()
        changes: dict[int, int] = {}
        for item in dirty:
            slot = self._slot(item.host_offset)
            assert self._use[slot] == RESERVED
            self._use[slot] = DATA
            changes[item.cluster] = item.host_offset // self._header.scale
            # What was discarded keeps its cluster, and the engine does not look for it there.
            if old := self._entry(item.cluster):
                self._use[self._slot(old * self._header.scale)] = FREE
        first = [Barrier] if any(item.barrier for item in dirty) else []
        return Plan(*first, *sector_writes(self._file, changes), Barrier)

    def discard(self, first: int, count: int) -> Plan:
        """See (3)."""
        punches = [
            Punch(entry * self._header.scale, self.cluster_size)
            for _, piece in entries(self._file, first, min(count, self._header.entries - first))
            for entry in piece
            if entry
        ]
        return Plan(*punches)

    def release(self, runs: Sequence[Run]) -> None:
        for run in runs:
            first = self._slot(run.host_offset)
            assert self._use.count(RESERVED, first, first + run.count) == run.count
            self._use[first : first + run.count] = bytes(run.count)

    def end(self) -> Plan:
        if not self._begun:
            return Plan()
        changes: dict[int, int] = {}
        steps = [*self._moves(changes)]
        end = self._host(self._use.rfind(DATA) + 1)
        if end < self._file.size:
            steps.append(Truncate(end))
        return Plan(*steps, Barrier, self._write_header(0, changes), Barrier)

    def _moves(self, changes: dict[int, int]) -> Iterator[Step]:
        """Move the last clusters to where nothing is; what changes in the table."""
        use = self._use
        used = use.count(DATA)
        moved: dict[int, int] = {}  # slots
        target = -1
        for source in range(use.rfind(DATA), used - 1, -1):
            if use[source] != DATA:
                continue
            if (len(moved) + 1) * self.cluster_size > MAX_MOVED:
                break
            target = next(slot for slot in range(target + 1, used) if use[slot] != DATA)
            moved[source] = target
            use[source], use[target] = FREE, DATA
        if not moved:
            return
        scale = self._header.scale
        places = {
            self._host(source) // scale: self._host(target) // scale
            for source, target in moved.items()
        }
        changes |= {
            first + i: places[entry]
            for first, piece in entries(self._file, 0, self._header.entries)
            for i, entry in enumerate(piece)
            if entry in places
        }
        for source, target in moved.items():
            data = self._file.pread_padded(self._host(source), self.cluster_size)
            yield Write(self._host(target), data)
        yield Barrier
        yield from sector_writes(self._file, changes)
        yield Barrier

    # Whole images

    @classmethod
    def create(cls, new: New) -> Plan:
        return parallels_header.create(new)

    @classmethod
    def check(
        cls, file: HostFile, options: Options, repair: Repair
    ) -> Iterator[Finding | Plan | Progress]:
        return parallels_check.check(file, repair)

    def resize(self, size: int) -> Plan:
        """Only larger, and only as far as the table can grow in place."""
        header, file = self._header, self._file
        size = -(-size // SECTOR) * SECTOR
        if size < self.size:
            text = f"{size} bytes, the disk has {self.size}: it can only grow"
            raise Unsupported(file, "size", text)
        if size == self.size:
            return Plan()
        count = max(header.entries, -(-size // header.cluster))
        end = parallels_header.TABLE_AT + count * ENTRY
        if end > header.data_offset or count > parallels_header.MAX_ENTRIES:
            text = f"a table of {count} entries would end at {end}, the data begins at "
            text += f"{header.data_offset}"
            raise Unsupported(file, "size", text, hint="virtmount convert")
        if not header.is_extended and size >> 32 >= SECTOR:
            raise Unsupported(file, "size", f"{size} bytes, this version reaches 2 TiB")
        steps: list[Step] = []
        old, within = divmod(self.size, header.cluster)
        if within and (entry := self._entry(old)):
            # What lies behind the end becomes visible.
            host = entry * header.scale
            steps.append(Punch(host + within, header.cluster - within))
        first = old + bool(within)
        steps += parallels_header.empty_entries(file, first, count)
        emptied = dict.fromkeys(range(first, min(count, SECTOR // ENTRY)), 0)
        header_write = self._write_header(0, emptied, entries=count, sectors=size // SECTOR)
        return Plan(*steps, Barrier, header_write, Barrier)
