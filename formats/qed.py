"""QED, the enhanced disk format that qemu had before QCOW2 version 3: read and written.

Source: qemu, docs/interop/qed_spec; tried with images made by qemu-img 7.2 and 11.1.  Two levels of
tables of 64-bit offsets; 0 is what the parent has, 1 reads as zeros.  There are no reference
counts: new clusters are taken from the end of the file, so everything depends on no entry pointing
past it.  Refused by name: unknown feature bits.

What the file says while it is written, and why:

1. NEED_CHECK is set, durably, before the session's first change, and cleared after its last: then
   qemu looks through all tables before it writes.  So do we before every writing session, so the
   bit does not keep us out of an image that a power cut has left (_survey).
2. The file is longer, durably, before an entry points behind its old end.
3. A new table of the second level is durable before the first level names it.
4. Freed clusters would be lost, as nothing says that they are free.  So discard() keeps a cluster
   and punches it; only what held nothing over a parent becomes 1.
5. Tables are taken from a few that reserve() puts before the data that it gives out, so that what
   is not used at the end of a session mostly lies at the end of the file, and is cut off.  Tables
   left over in the middle become empty tables, which nobody can tell from absent ones; into other
   gaps the last clusters of data move.  (After a commit that needed more than SPARES tables a gap
   may stay: it is used first the next time.)
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import qed_check, qed_create
from virtmount.formats.qed_header import (
    AUTOCLEAR_AT,
    BACKING_FILE,
    DATA,
    ENTRY,
    FEATURES_AT,
    FREE,
    MAGIC,
    MAX_CLUSTERS,
    MAX_SURVEYED,
    MAX_TABLES,
    NEED_CHECK,
    NO_PROBE,
    RESERVED,
    SCAN,
    SECTOR,
    SIZE_AT,
    SPARE,
    TABLE,
    ZERO,
    read,
    sector_writes,
    unpacked,
    wrong_table,
)
from virtmount.hostfile import HostFile
from virtmount.image import (
    DEFAULTS,
    Caps,
    Dirty,
    Image,
    Kind,
    Layout,
    Leaf,
    Match,
    Options,
    ParentRef,
    Reservation,
    Rule,
    Run,
    Span,
)
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write
from virtmount.upkeep import Choice, Finding, New, Progress, Repair

LEAF = 4096  # entries
SPARES = 32
MAX_MOVED = 64 << 20  # bytes of data at the end of a session


class QED(Image):
    name: ClassVar[str] = "qed"
    suffixes: ClassVar[tuple[str, ...]] = ("qed",)
    creates: ClassVar[bool] = True
    checks: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, Choice]] = qed_create.CHOICES

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if head[:4] == MAGIC else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._file = file
        self.files = [file]
        self._header = header = read(file)
        self.size = header.image_size
        self.cluster_size = header.cluster_size
        self._table_bytes: int = header.table_size * header.cluster_size
        self._per_table = self._table_bytes // ENTRY
        self.entries_per_leaf = min(LEAF, self._per_table)
        self._data_from: int = header.header_size * header.cluster_size
        count = -(-self.size // (self._per_table * self.cluster_size))
        if count > MAX_TABLES:
            text = f"{count} tables, at most {MAX_TABLES} are supported"
            raise Unsupported(file, f"header+{SIZE_AT}", text)
        self._l1 = unpacked(file.pread(header.l1_offset, count * ENTRY))
        self.memory = count * ENTRY
        self.layout = Layout(
            width=ENTRY,
            byteorder="little",
            mask=(1 << 64) - 1,
            rules=(
                Rule((1 << 64) - 1, 0, Kind.ABSENT),
                Rule((1 << 64) - 1, ZERO, Kind.ZERO),
            ),
            low=self._data_from,
            align=self.cluster_size,
        )
        if header.features & BACKING_FILE:
            self.parent = self._parent(file, header)
        self.caps = Caps(write=file.writable, discard=file.writable, zero_hides_parent=True)
        self._use = bytearray()
        self._spares: list[int] = []  # first clusters of tables
        if file.writable:
            self._survey()
        self._begun = False

    def _parent(self, file: HostFile, header: Any) -> ParentRef:
        raw = file.pread(header.name_offset, header.name_size)
        name = raw.decode("utf-8", "surrogateescape")
        return ParentRef((name,), "raw" if header.features & NO_PROBE else None)

    def _survey(self) -> None:
        """Before writing: every cluster has one owner and lies in the file, or Corrupt (1)."""
        if -(-self._file.size // self.cluster_size) > MAX_CLUSTERS:
            text = f"more than {MAX_CLUSTERS} clusters are only read"
            raise Unsupported(self._file, "", text, hint="open it read-only")
        survey = qed_check.Survey(self._file, self._header, self._l1)
        for found in survey.tables():
            raise Corrupt(
                self._file, found.place, f"{found.text}: not written", hint="virtmount check"
            )
        if survey.bytes > MAX_SURVEYED:
            text = f"{survey.bytes} bytes of tables are only read"
            raise Unsupported(self._file, "", text, hint="open it read-only")
        for wrong in survey.entries():
            if isinstance(wrong, qed_check.Wrong):
                text = f"{wrong.text}: not written"
                raise Corrupt(self._file, wrong.place, text, hint="virtmount check --repair")
        self._use = survey.use
        self.memory += len(self._use)

    def leaf(self, index: int) -> Leaf:
        number, within = divmod(index * self.entries_per_leaf, self._per_table)
        table = self._l1[number]
        if not table:
            return Leaf()
        wrong = wrong_table(self._header, table, self._file.size)
        if wrong:
            raise Corrupt(self._file, self._l1_place(number), wrong)
        return Leaf(table=table + within * ENTRY)

    def _l1_place(self, number: int) -> str:
        return f"L1 entry {number} at {self._header.l1_offset + number * ENTRY}"

    def details(self) -> dict[str, Any]:
        header = self._header
        return {
            "cluster_size": self.cluster_size,
            "table_size": header.table_size,
            "tables": sum(1 for table in self._l1 if table),
            "need_check": bool(header.features & NEED_CHECK),
        }

    def metadata(self) -> Iterable[Span]:
        yield Span(0, self._data_from)
        yield Span(self._header.l1_offset, self._table_bytes)
        for table in self._l1:
            if 0 < table < 1 << 60:
                yield Span(table, self._table_bytes)

    # Writing

    def begin(self) -> Plan:
        """The bit for others to check; unknown bits that say what is not true any more go."""
        self._begun = True
        return Plan(self._write_header(NEED_CHECK), Barrier)

    def _write_header(self, check: int) -> Write:
        sector = bytearray(self._file.pread(0, SECTOR))
        features = self._header.features & ~NEED_CHECK | check
        sector[FEATURES_AT : FEATURES_AT + 8] = features.to_bytes(8, "little")
        sector[AUTOCLEAR_AT : AUTOCLEAR_AT + 8] = bytes(8)
        return Write(0, bytes(sector))

    def reserve(self, count: int) -> Reservation:
        free = self._use.find(FREE)
        if free >= 0:  # what a power cut has left
            last = free + 1
            while last - free < count and self._use[last : last + 1] == bytes([FREE]):
                last += 1
            self._use[free:last] = bytes([RESERVED]) * (last - free)
            run = Run(free * self.cluster_size, last - free)
            length = (last - free) * self.cluster_size
            extend = Extend(last * self.cluster_size)
            return Reservation(
                (run,), Plan(extend, Punch(run.host_offset, length), Barrier), reused=True
            )
        self._add_spares()
        first = len(self._use)
        count = max(1, min(count, MAX_CLUSTERS - first))
        if first + count > MAX_CLUSTERS:
            raise OSError(errno.EFBIG, f"{self._file}: more than {MAX_CLUSTERS} clusters")
        self._use += bytes([RESERVED]) * count
        run = Run(first * self.cluster_size, count)
        return Reservation((run,), Plan(Extend(len(self._use) * self.cluster_size), Barrier))

    def _add_spares(self) -> None:
        """A few tables where none are left, but no more than there are places for (5)."""
        if self._spares:
            return
        for _ in range(min(SPARES, sum(1 for table in self._l1 if not table))):
            self._spares.append(len(self._use))
            self._use += bytes([SPARE]) * self._header.table_size

    def _take_table(self) -> int:
        """Byte offset of an empty table."""
        count = self._header.table_size
        if self._spares:
            first = self._spares.pop(0)
        else:
            first = len(self._use)
            self._use += bytes(count)
        self._take(first)
        return first * self.cluster_size

    def _take(self, first: int) -> None:
        count = self._header.table_size
        self._use[first : first + count] = bytes([TABLE]) * count

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        if not dirty:
            return Plan()
        changes: dict[int, int] = {}
        for item in dirty:
            cluster = item.host_offset // self.cluster_size
            assert self._use[cluster] == RESERVED
            self._use[cluster] = DATA
            changes[item.cluster] = item.host_offset
            # What was discarded keeps its cluster, and the engine does not look for it there.
            if (old := self._entry(item.cluster)) > ZERO:
                self._use[old // self.cluster_size] = FREE
        return self._change(changes, barrier=any(item.barrier for item in dirty))

    def _entry(self, cluster: int) -> int:
        number, within = divmod(cluster, self._per_table)
        if not self._l1[number]:
            return 0
        return int.from_bytes(self._file.pread(self._l1[number] + within * ENTRY, ENTRY), "little")

    def _change(self, changes: Mapping[int, int], *, barrier: bool) -> Plan:
        """Entries of guest clusters, with the tables that they need."""
        fresh: list[Step] = []
        steps: list[Step] = []
        first_level: dict[int, int] = {}
        by_table: dict[int, dict[int, int]] = {}
        for cluster, value in sorted(changes.items()):
            number, within = divmod(cluster, self._per_table)
            by_table.setdefault(number, {})[within] = value
        for number, entries in by_table.items():
            table = self._l1[number]
            if table:
                steps += sector_writes(self._file, table, entries)
                continue
            table = self._l1[number] = first_level[number] = self._take_table()
            fresh.append(Extend(table + self._table_bytes))
            fresh += sector_writes(self._file, table, entries)
        steps += sector_writes(self._file, self._header.l1_offset, first_level)
        if barrier or fresh:
            fresh.append(Barrier)
        return Plan(*fresh, *steps, Barrier)

    def discard(self, first: int, count: int) -> Plan:
        """See (4)."""
        clusters = -(-self.size // self.cluster_size)
        end = min(first + count, clusters)
        punches: list[Step] = []
        changes: dict[int, int] = {}
        at = first
        while at < end:
            number, within = divmod(at, self._per_table)
            length = min(end - at, self._per_table - within, SCAN // ENTRY)
            table = self._l1[number]
            if table:
                entries = unpacked(self._file.pread(table + within * ENTRY, length * ENTRY))
            elif self.parent is not None:
                entries = array("Q", bytes(length * ENTRY))
            else:
                at += length
                continue
            for index, entry in enumerate(entries, at):
                if entry > ZERO:
                    punches.append(Punch(entry, self.cluster_size))
                elif not entry and self.parent is not None:
                    changes[index] = ZERO
            at += length
        plan = self._change(changes, barrier=False) if changes else Plan()
        return plan + Plan(*punches)

    def release(self, runs: Sequence[Run]) -> None:
        for run in runs:
            first = run.host_offset // self.cluster_size
            assert self._use.count(RESERVED, first, first + run.count) == run.count
            self._use[first : first + run.count] = bytes(run.count)

    def end(self) -> Plan:
        if not self._begun:
            return Plan()
        steps: list[Step] = []
        top = self._top()
        places = (number for number, table in enumerate(self._l1) if not table)
        linked = {
            number: first * self.cluster_size
            for number, first in zip(places, (s for s in self._spares if s < top), strict=False)
        }
        for number, table in linked.items():
            self._take(table // self.cluster_size)
            self._l1[number] = table
        if linked:
            steps += sector_writes(self._file, self._header.l1_offset, linked)
        steps += self._moves()
        top = self._top()
        if top * self.cluster_size < self._file.size:
            steps.append(Truncate(top * self.cluster_size))
        return Plan(*steps, Barrier, self._write_header(0), Barrier)

    def _top(self) -> int:
        """One past the last cluster in use."""
        return max(self._use.rfind(DATA), self._use.rfind(TABLE)) + 1

    def _moves(self) -> Iterator[Step]:
        """Move the last clusters of data to where nothing is (5)."""
        use, size = self._use, self.cluster_size
        top = self._top()
        used = use.count(DATA, 0, top) + use.count(TABLE, 0, top)
        moved: dict[int, int] = {}  # host offsets
        target = -1
        for source in range(top - 1, used - 1, -1):
            if use[source] != DATA:
                continue
            target = next((i for i in range(target + 1, used) if use[i] not in (DATA, TABLE)), used)
            if target >= used or len(moved) * size >= MAX_MOVED:
                break
            moved[source * size] = target * size
            use[source], use[target] = FREE, DATA
        if not moved:
            return
        changes = [*self._owners(moved)]
        for source, place in moved.items():
            yield Write(place, self._file.pread_padded(source, size))
        yield Barrier
        yield from changes
        yield Barrier

    def _owners(self, moved: Mapping[int, int]) -> Iterator[Write]:
        """The entries that name the clusters in `moved`, naming their new places."""
        lowest = min(moved)
        for table in filter(None, self._l1):
            for at in range(0, self._table_bytes, SCAN):
                length = min(SCAN, self._table_bytes - at)
                raw = self._file.pread_padded(table + at, length)
                if raw.count(0) == length:
                    continue
                entries = unpacked(raw)
                if max(entries) >= lowest:
                    changes = {i: moved[entry] for i, entry in enumerate(entries) if entry in moved}
                    yield from sector_writes(self._file, table + at, changes)

    # Whole images

    @classmethod
    def create(cls, new: New) -> Plan:
        return qed_create.create(new)

    @classmethod
    def check(
        cls, file: HostFile, options: Options, repair: Repair
    ) -> Iterator[Finding | Plan | Progress]:
        return qed_check.check(file, repair)

    def resize(self, size: int) -> Plan:
        """Larger only, and not over a parent, which may be longer than this image was."""
        size = -(-size // SECTOR) * SECTOR
        if size < self.size:
            text = f"{size} bytes, the disk has {self.size}: it can only grow"
            raise Unsupported(self._file, "size", text)
        if size == self.size:
            return Plan()
        if self.parent is not None:
            raise Unsupported(self._file, "size", "an image with a parent is not resized")
        limit = self._per_table * self._per_table * self.cluster_size
        if size > min(limit, MAX_TABLES * self._per_table * self.cluster_size):
            raise Unsupported(self._file, "size", f"{size} bytes, the tables reach {limit}")
        steps: list[Step] = []
        cluster, within = divmod(self.size, self.cluster_size)
        if within and (host := self._entry(cluster)) > ZERO:
            # What lies behind the end becomes visible.
            steps.append(Punch(host + within, self.cluster_size - within))
        used = -(-self.size // (self._per_table * self.cluster_size))
        stale = -(-size // (self._per_table * self.cluster_size))
        if any(self._file.pread(self._header.l1_offset + used * ENTRY, (stale - used) * ENTRY)):
            raise Corrupt(self._file, "L1 table", "names tables behind the disk's end")
        if entries := self._behind(cluster + bool(within)):
            raise Corrupt(self._file, "L2 table", f"{entries} entries behind the disk's end")
        sector = bytearray(self._file.pread(0, SECTOR))
        sector[SIZE_AT : SIZE_AT + 8] = size.to_bytes(8, "little")
        return Plan(*steps, Barrier, Write(0, bytes(sector)), Barrier)

    def _behind(self, cluster: int) -> int:
        """Entries that are not 0 in the rest of the table of a guest cluster."""
        number, within = divmod(cluster, self._per_table)
        if not within or not self._l1[number]:
            return 0
        at, length = self._l1[number] + within * ENTRY, (self._per_table - within) * ENTRY
        found = 0
        for start in range(0, length, SCAN):
            raw = self._file.pread(at + start, min(SCAN, length - start))
            found += sum(1 for entry in unpacked(raw) if entry)
        return found

    def rebase(self, parent: Image | None, name: str) -> Plan:
        return qed_create.rebase(self._file, self._header, parent, name)
