"""What in a QCOW image, version 1, uses which place; checking it.

Source: as qcow_header.py.  The format counts nothing: a place that two entries name is found only
by looking at all of them.  No other program checks such images.

Nothing that is wrong is mended: of two owners nobody knows which is right.  What nothing uses is
cut off at the end of the file, and punched inside of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats.qcow2_refcount import read_table
from virtmount.formats.qcow2_tally import Tally
from virtmount.formats.qcow_header import COMPRESSED, ENTRY, Header, read_header
from virtmount.hostfile import HostFile
from virtmount.plan import Barrier, Plan, Punch, Truncate
from virtmount.upkeep import Finding, Progress, Repair, Severity

MAX_CLUSTERS = 1 << 27  # in the file; a byte of memory each
MAX_TABLES = 1 << 19
MAX_ENTRIES = 1 << 24  # that may be looked at before an image is written
CHUNK = 64  # entries looked at in one go
STEP = 64  # tables between two signs of life
BATCH = 4096  # holes punched in one plan
MAX_SAID = 200  # findings


class Wrong(NamedTuple):
    place: str
    text: str
    followed: bool = True  # False: what it stands for may lie anywhere


class Survey:
    """All tables of an image, once: what every place in the file is used for.

    Clusters of data count, everything else (header, tables, compressed data) is marked.
    """

    def __init__(self, file: HostFile, header: Header) -> None:
        size = header.cluster_size
        self.file, self.header = file, header
        self.limit = -(-file.size // size)  # clusters in the file; the last one may be cut short
        if self.limit > MAX_CLUSTERS:
            text = f"{self.limit} clusters of {size} bytes, the most is {MAX_CLUSTERS}"
            raise Unsupported(file, "", text)
        self.tally = Tally(self.limit)
        self.l1 = read_table(file, header.l1_offset, header.l1_size)
        if self.l1_tables > MAX_TABLES:
            text = f"a check of {self.l1_tables} L2 tables, the most is {MAX_TABLES}"
            raise Unsupported(file, "L1 table", text)
        self.tables = [(offset, index) for index, offset in enumerate(self.l1) if offset]
        self.tables.sort()

    @property
    def l1_tables(self) -> int:
        return len(self.l1) - self.l1.count(0)

    def run(self) -> Iterator[Wrong | Progress]:
        header = self.header
        # The L1 table of a fresh image may end past the file's end: it reads as zeros there.
        self._mark(0, 48)
        self._mark(*header.name)
        self._mark(header.l1_offset, header.l1_end - header.l1_offset)
        fixed = [(0, 48), header.name, (header.l1_offset, header.l1_end - header.l1_offset)]
        last = 0
        good = []
        for offset, index in self.tables:
            place = f"L1 entry {index} at {header.l1_offset + index * ENTRY}"
            end = offset + header.table_size
            if end > self.file.size or offset % ENTRY:
                text = f"L2 table at {offset}, the file ends at {self.file.size}"
                yield Wrong(place, text, followed=False)
            elif offset < last or any(offset < at + n and at < end for at, n in fixed):
                # Whether or not it is one, what is read through it must not be punched.
                text = f"the L2 table at {offset} overlaps another table"
                yield Wrong(place, text, followed=False)
            else:
                self._mark(offset, header.table_size)
                last = end
                good.append(offset)
        for done, offset in enumerate(good):
            if done % STEP == 0:
                yield Progress(done, len(good))
            yield from self._table(offset)

    def _mark(self, offset: int, length: int) -> None:
        size = self.header.cluster_size
        for cluster in range(offset // size, min(-(-(offset + length) // size), self.limit)):
            self.tally.mark(cluster)

    def _table(self, offset: int) -> Iterator[Wrong]:
        entries = read_table(self.file, offset, self.header.per_table)
        for at in range(0, len(entries), CHUNK):
            part = entries[at : at + CHUNK]
            if not any(part) or self._in_a_row(part):
                continue
            for index, entry in enumerate(part, at):
                if entry:
                    place = f"L2 entry at {offset + index * ENTRY}"
                    for text, followed in self._entry(entry):
                        yield Wrong(place, text, followed)

    def _in_a_row(self, part: array[int]) -> bool:
        """Clusters one after the other, all of them free until now: counted at once."""
        size, first, count = self.header.cluster_size, part[0], len(part)
        return (
            first % size == 0
            and first > 0
            and first + count * size <= self.limit * size
            and part == array("Q", range(first, first + count * size, size))
            and self.tally.free(first // size, count)
            and self.tally.add_run(first // size, count, 1)
        )

    def _entry(self, entry: int) -> Iterator[tuple[str, bool]]:
        size, end = self.header.cluster_size, self.file.size
        if entry & COMPRESSED:
            start, length = self.header.compressed(entry)
            if not length or start + length > end:
                yield f"{length} bytes of compressed data at {start}, the file ends at {end}", False
                return
            for cluster in range(start // size, (start + length - 1) // size + 1):
                if self.tally[cluster]:
                    yield f"compressed data at {start}, where another cluster lies", True
                self.tally.mark(cluster)
            return
        cluster, within = divmod(entry, size)
        if within or cluster >= self.limit:
            yield (
                f"a cluster at {entry}, clusters have {size} bytes and the file ends at {end}",
                False,
            )
            return
        if self.tally.is_table(cluster):
            yield f"a cluster at {entry}, where a table or compressed data lies", True
        elif self.tally[cluster]:
            yield f"a cluster at {entry}, where another one lies", True
        self.tally.add(cluster)


def refuse_damage(file: HostFile, header: Header) -> Survey:
    """Before an image is written: no place has two owners, and nothing lies past the end."""
    survey = Survey(file, header)
    if survey.l1_tables * header.per_table > MAX_ENTRIES:
        text = f"writing to an image with {survey.l1_tables} L2 tables"
        raise Unsupported(file, "L1 table", text, hint="attach it with --read-only")
    for item in survey.run():
        if isinstance(item, Wrong):
            raise Corrupt(file, item.place, item.text, hint=f"virtmount check {file}")
    return survey


def check(file: HostFile, repair: Repair) -> Iterator[Finding | Plan | Progress]:
    """See Image.check."""
    try:
        header = read_header(file)
    except Corrupt as error:
        yield Finding(Severity.DAMAGE, error.place, error.text)
        return
    survey = Survey(file, header)
    said, followed = 0, True
    for item in survey.run():
        if isinstance(item, Progress):
            yield item
            continue
        followed &= item.followed
        said += 1
        if said <= MAX_SAID:
            yield Finding(Severity.DAMAGE, item.place, item.text)
    if said > MAX_SAID:
        yield Finding(Severity.DAMAGE, "", f"{said - MAX_SAID} more like these")
    if followed:
        yield from _unused(survey, file.writable and repair is not Repair.NOTHING)


def _unused(survey: Survey, writes: bool) -> Iterator[Finding | Plan]:
    size, tally = survey.header.cluster_size, survey.tally
    end = tally.last_used() + 1
    if end < survey.limit and not survey.file.is_device:
        text = f"{(survey.limit - end) * size} bytes at the end that nothing uses"
        yield Finding(Severity.LEAK, f"byte {end * size}", text, writes)
        if writes:
            yield Plan(Truncate(end * size), Barrier)
    # They may be holes already, which nobody sees from here: not a leak.
    total = sum(count for _, count in tally.unused(end)) * size
    if not total:
        return
    first, _ = next(tally.unused(end))
    text = f"{total} bytes inside of the file that nothing uses"
    yield Finding(Severity.NOTE, f"byte {first * size}", text)
    holes = tally.unused(end)
    while writes and (part := list(islice(holes, BATCH))):
        yield Plan(*(Punch(at * size, count * size) for at, count in part), Barrier)
