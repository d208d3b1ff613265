"""Checking and mending a QED image.

Everything hangs on the two levels of tables: a cluster or table that lies outside of the file, or
has two owners, is damage; clusters that nothing names are leaks.  A table that cannot be right is
forgotten, a cluster that is not there becomes one of zeros, and a second owner gets a copy.  Leaks
at the end of the file are cut off; those in the middle are used by the next session that writes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

from virtmount.errors import Unsupported
from virtmount.formats.qed_header import (
    AUTOCLEAR_AT,
    DATA,
    ENTRY,
    FEATURES_AT,
    FREE,
    MAX_CLUSTERS,
    MAX_TABLES,
    NEED_CHECK,
    SCAN,
    SECTOR,
    TABLE,
    ZERO,
    read,
    sector_writes,
    unpacked,
    wrong_table,
)
from virtmount.hostfile import HostFile
from virtmount.plan import Barrier, Extend, Plan, Truncate, Write
from virtmount.upkeep import Finding, Progress, Repair, Severity

MAX_FINDINGS = 1000
MAX_COPIES = 1000  # clusters: more second owners than that are no accident
STEP = 1 << 20


class Wrong(NamedTuple):
    """An entry that cannot be right: entry `number` of the table at byte `table`."""

    table: int
    number: int
    value: int
    text: str
    shared: bool = False  # another entry names the same cluster

    @property
    def place(self) -> str:
        return f"entry {self.number} at {self.table + self.number * ENTRY}"


class Survey:
    """What every cluster of the file is used for."""

    def __init__(self, file: HostFile, header: Any, l1: array[int]) -> None:
        self._file, self._header, self._l1 = file, header, l1
        self._cluster: int = header.cluster_size
        self.size = file.size
        self.use = bytearray(-(-self.size // self._cluster))
        self._table_clusters: int = header.table_size
        self.good: list[int] = []  # tables
        self._mark(0, header.header_size)
        self._mark(header.l1_offset // self._cluster, self._table_clusters)

    @property
    def bytes(self) -> int:
        """Of the tables that entries() looks at."""
        return len(self.good) * self._table_clusters * self._cluster

    def _mark(self, first: int, count: int) -> None:
        self.use[first : first + count] = bytes([TABLE]) * count

    def tables(self) -> Iterator[Wrong]:
        """The first level.  A table that is wrong is left out of all that follows."""
        count = self._table_clusters
        for index, table in enumerate(self._l1):
            if not table:
                continue
            text = wrong_table(self._header, table, self.size)
            first = table // self._cluster
            if not text and self.use.count(FREE, first, first + count) != count:
                text = f"table at {table} lies over another table or the header"
            if text:
                yield Wrong(self._header.l1_offset, index, table, text)
                continue
            self._mark(first, count)
            self.good.append(table)

    def entries(self) -> Iterator[Wrong | Progress]:
        """The second level."""
        total = self.bytes
        size = self._table_clusters * self._cluster
        for number, table in enumerate(self.good):
            for at in range(0, size, SCAN):
                yield Progress(number * size + at, total)
                raw = self._file.pread(table + at, min(SCAN, size - at))
                if raw.count(0) != len(raw):
                    yield from self._piece(table, at // ENTRY, unpacked(raw))

    def _piece(self, table: int, first: int, entries: array[int]) -> Iterator[Wrong]:
        use, cluster, end = self.use, self._cluster, len(self.use) * self._cluster
        step = range(entries[0], entries[0] + len(entries) * cluster, cluster)
        if entries[0] > ZERO and step.stop <= end and not entries[0] % cluster:
            start = entries[0] // cluster
            count = len(entries)
            if entries == array("Q", step) and use.count(FREE, start, start + count) == count:
                use[start : start + count] = bytes([DATA]) * count
                return
        for index, entry in enumerate(entries, first):
            if entry <= ZERO:
                continue
            number, within = divmod(entry, cluster)
            if within:
                text = f"cluster at {entry}, not a multiple of {cluster}"
                yield Wrong(table, index, entry, text)
            elif number >= len(use):
                text = f"cluster at {entry} lies past the end of the file at {self.size}"
                yield Wrong(table, index, entry, text)
            elif use[number] == TABLE:
                yield Wrong(table, index, entry, f"cluster at {entry} lies over a table")
            elif use[number]:
                text = f"cluster at {entry} has another owner as well"
                yield Wrong(table, index, entry, text, shared=True)
            else:
                use[number] = DATA


def check(file: HostFile, repair: Repair) -> Iterator[Finding | Plan | Progress]:
    """See Image.check().  What is wrong with the header itself is raised."""
    header = read(file)
    table = header.table_size * header.cluster_size
    count = -(-header.image_size // (table // ENTRY * header.cluster_size))
    if count > MAX_TABLES or -(-file.size // header.cluster_size) > MAX_CLUSTERS:
        raise Unsupported(file, "", "too many tables or clusters to be checked")
    yield from _Check(file, header, count, repair).run(repair)


class _Check:
    def __init__(self, file: HostFile, header: Any, tables: int, repair: Repair) -> None:
        self.file, self.header = file, header
        self.l1 = unpacked(file.pread(header.l1_offset, tables * ENTRY))
        self.survey = Survey(file, header, self.l1)
        self.mend = file.writable and repair is Repair.ALL
        self.found = self.copies = 0
        self.damaged = False  # and not mended

    def run(self, repair: Repair) -> Iterator[Finding | Plan | Progress]:
        for wrong in [*self.survey.tables()]:
            yield from self._report(wrong, "forgotten", self.mend)
            if self.mend:
                yield self._entry(wrong, 0)
        later: list[Wrong] = []
        for item in self.survey.entries():
            if isinstance(item, Progress):
                yield item
            elif item.shared:  # gets a cluster once all that are free are known
                if len(later) < MAX_COPIES:
                    later.append(item)
                else:
                    yield from self._report(item, "left", mended=False)
            else:
                yield from self._report(item, "reads as zeros", self.mend)
                if self.mend:
                    yield self._entry(item, ZERO)
        for item in later:
            yield from self._report(item, "gets a copy", self.mend)
            if self.mend:
                yield from self._copy(item)
        if self.found > MAX_FINDINGS:
            text = f"{self.found - MAX_FINDINGS} more entries that cannot be right"
            yield Finding(Severity.DAMAGE, "", text, repaired=not self.damaged)
        may = self.file.writable and repair is not Repair.NOTHING and not self.damaged
        yield from self._leaks(may)
        yield from self._need_check(may)

    def _report(self, wrong: Wrong, remedy: str, mended: bool) -> Iterator[Finding]:
        self.found += 1
        self.damaged |= not mended
        if self.found <= MAX_FINDINGS:
            text = f"{wrong.text}: {remedy} when mended"
            yield Finding(Severity.DAMAGE, wrong.place, text, repaired=mended)

    def _entry(self, wrong: Wrong, value: int) -> Plan:
        return Plan(*sector_writes(self.file, wrong.table, {wrong.number: value}), Barrier)

    def _copy(self, wrong: Wrong) -> Iterator[Plan]:
        cluster, use = self.header.cluster_size, self.survey.use
        free = use.find(FREE)
        if free < 0:
            free = len(use)
            use.append(DATA)
        use[free] = DATA
        target = free * cluster
        yield Plan(Extend(target + cluster), Barrier)
        for within in range(0, cluster, STEP):
            data = self.file.pread_padded(wrong.value + within, min(STEP, cluster - within))
            yield Plan(Write(target + within, data))
        yield Plan(Barrier) + self._entry(wrong, target)

    def _leaks(self, may: bool) -> Iterator[Finding | Plan]:
        use, cluster = self.survey.use, self.header.cluster_size
        top = max(use.rfind(DATA), use.rfind(TABLE)) + 1
        inside = use.count(FREE, 0, top)
        if inside:
            text = f"{inside} clusters that nothing names: the next session that writes takes them"
            yield Finding(Severity.LEAK, "", text)
        if top * cluster < self.file.size:
            text = f"the file ends at {self.file.size}, its last cluster at {top * cluster}"
            yield Finding(Severity.LEAK, f"byte {top * cluster}", text, repaired=may)
            if may:
                yield Plan(Truncate(top * cluster), Barrier)

    def _need_check(self, may: bool) -> Iterator[Finding | Plan]:
        if not self.header.features & NEED_CHECK:
            return
        text = "the image was not closed: it wants to be checked"
        yield Finding(Severity.NOTE, f"header+{FEATURES_AT}", text, repaired=may)
        if may:
            sector = bytearray(self.file.pread(0, SECTOR))
            features = self.header.features & ~NEED_CHECK
            sector[FEATURES_AT : FEATURES_AT + 8] = features.to_bytes(8, "little")
            sector[AUTOCLEAR_AT : AUTOCLEAR_AT + 8] = bytes(8)
            yield Plan(Write(0, bytes(sector)), Barrier)
