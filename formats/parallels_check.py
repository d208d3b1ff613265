"""Checking and mending a Parallels image: one table, and what it names.

A cluster that is not in the file, or that lies on no grid, becomes one of zeros; a second owner of
a cluster gets a copy.  Clusters at the end of the file that nothing names are cut off.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from virtmount.formats.parallels_header import (
    DATA,
    ENTRY,
    FREE,
    SECTOR,
    TABLE_AT,
    Header,
    entries,
    put,
    read,
    sector_writes,
)
from virtmount.hostfile import HostFile
from virtmount.plan import Barrier, Extend, Plan, Truncate, Write
from virtmount.upkeep import Finding, Progress, Repair, Severity

MAX_FINDINGS = 1000
MAX_COPIES = 1000  # clusters: more second owners than that are no accident
MAX_SLOTS = 1 << 26
STEP = 1 << 20


class Wrong(NamedTuple):
    """Entry `number` of the table cannot be right."""

    number: int
    host: int
    text: str
    shared: bool = False  # another entry names the same cluster

    @property
    def place(self) -> str:
        return f"entry {self.number} at {TABLE_AT + self.number * ENTRY}"


class Survey:
    """What every place for a cluster is used for."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file, self._header = file, header
        self.size = file.size
        room = max(0, self.size - header.grid)
        self.use = bytearray(min(-(-room // header.cluster), MAX_SLOTS))

    def entries(self) -> Iterator[Wrong | Progress]:
        header, use, size = self._header, self.use, self.size
        scale, grid, cluster = header.scale, header.grid, header.cluster
        for first, piece in entries(self._file, 0, header.entries):
            yield Progress(first, header.entries)
            if self._in_order(piece):
                continue
            for number, entry in enumerate(piece, first):
                if not entry:
                    continue
                host = entry * scale
                slot, within = divmod(host - grid, cluster)
                if host < header.data_offset:
                    text = f"cluster at {host} lies before the data at {header.data_offset}"
                    yield Wrong(number, host, text)
                elif host >= size:
                    text = f"cluster at {host} lies past the end of the file at {size}"
                    yield Wrong(number, host, text)
                elif within or slot >= len(use):
                    text = f"cluster at {host} is not {cluster} bytes from its neighbours"
                    yield Wrong(number, host, text)
                elif use[slot]:
                    text = f"cluster at {host} has another owner as well"
                    yield Wrong(number, host, text, shared=True)
                else:
                    use[slot] = DATA

    def _in_order(self, piece: array[int]) -> bool:
        """Whether these clusters follow one another and are nobody else's; then they are marked."""
        header, use = self._header, self.use
        step = header.cluster // header.scale
        slot, within = divmod(piece[0] * header.scale - header.grid, header.cluster)
        end = slot + len(piece)
        if slot < 0 or within or end > len(use) or use.count(FREE, slot, end) != len(piece):
            return False
        if piece != array("I", range(piece[0], piece[0] + len(piece) * step, step)):
            return False
        use[slot:end] = bytes([DATA]) * len(piece)
        return True


def check(file: HostFile, repair: Repair) -> Iterator[Finding | Plan | Progress]:
    """See Image.check().  What is wrong with the header itself is raised."""
    header = read(file)
    # Clusters of 63 sectors are read, and looked at here, but never written.
    mending = file.writable and not header.cluster & (header.cluster - 1) and not header.extension
    yield from _Check(file, header, repair if mending else Repair.NOTHING).run()


class _Check:
    def __init__(self, file: HostFile, header: Header, repair: Repair) -> None:
        self.file, self.header = file, header
        self.survey = Survey(file, header)
        self.mend = repair is Repair.ALL
        self.may = repair is not Repair.NOTHING
        self.found = 0
        self.damaged = False  # and not mended

    def run(self) -> Iterator[Finding | Plan | Progress]:
        later: list[Wrong] = []
        for item in self.survey.entries():
            if isinstance(item, Progress):
                yield item
            elif not item.shared:
                yield from self._report(item, "reads as zeros", self.mend)
                if self.mend:
                    yield self._entry(item.number, 0)
            elif len(later) < MAX_COPIES:  # gets a place once all that are free are known
                later.append(item)
            else:
                yield from self._report(item, "left", mended=False)
        for item in later:
            yield from self._report(item, "gets a copy", self.mend)
            if self.mend:
                yield from self._copy(item)
        if self.found > MAX_FINDINGS:
            text = f"{self.found - MAX_FINDINGS} more entries that cannot be right"
            yield Finding(Severity.DAMAGE, "", text, repaired=not self.damaged)
        yield from self._leaks(self.may and not self.damaged)
        yield from self._in_use(self.may and not self.damaged)

    def _report(self, wrong: Wrong, remedy: str, mended: bool) -> Iterator[Finding]:
        self.found += 1
        self.damaged |= not mended
        if self.found <= MAX_FINDINGS:
            text = f"{wrong.text}: {remedy} when mended"
            yield Finding(Severity.DAMAGE, wrong.place, text, repaired=mended)

    def _entry(self, number: int, value: int) -> Plan:
        return Plan(*sector_writes(self.file, {number: value}), Barrier)

    def _copy(self, wrong: Wrong) -> Iterator[Plan]:
        cluster, use = self.header.cluster, self.survey.use
        slot = use.find(FREE)
        if slot < 0:
            slot = len(use)
            use.append(DATA)
        use[slot] = DATA
        target = self.header.grid + slot * cluster
        yield Plan(Extend(target + cluster), Barrier)
        for within in range(0, cluster, STEP):
            data = self.file.pread_padded(wrong.host + within, min(STEP, cluster - within))
            yield Plan(Write(target + within, data))
        yield Plan(Barrier) + self._entry(wrong.number, target // self.header.scale)

    def _leaks(self, may: bool) -> Iterator[Finding | Plan]:
        use = self.survey.use
        top = use.rfind(DATA) + 1
        inside = use.count(FREE, 0, top)
        if inside:
            text = f"{inside} clusters that nothing names: the next session that writes takes them"
            yield Finding(Severity.LEAK, "", text)
        end = self.header.grid + top * self.header.cluster
        if end < self.file.size:
            text = f"the file ends at {self.file.size}, its last cluster at {end}"
            yield Finding(Severity.LEAK, f"byte {end}", text, repaired=may)
            if may:
                yield Plan(Truncate(end), Barrier)

    def _in_use(self, may: bool) -> Iterator[Finding | Plan]:
        if not self.header.in_use:
            return
        text = "the image was not closed"
        yield Finding(Severity.NOTE, "header+44", text, repaired=may)
        if may:
            sector = bytearray(self.file.pread(0, SECTOR))
            put(sector, in_use=0)
            yield Plan(Write(0, bytes(sector)), Barrier)
