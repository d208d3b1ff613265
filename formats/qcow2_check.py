"""Checking and mending QCOW2 images.

Source: qemu's docs/interop/qcow2.rst; the order of writes is our own.  Compared with the verdicts
of qemu-img check 7.2 on images made by qemu-img, whole and damaged, in tests/formats.

What is counted against what: every cluster that the header, the tables of the present state and of
all snapshots, the bitmaps and a LUKS header refer to, against its reference count.  A count that is
too high is a leak; one that is too low lets the next writer take somebody's data.

Repairs, in this order, each durable before the next:

1. Counts.  Where the refcount structure is sound they are changed in place, sector by sector: each
   sector is right by itself.  Else a new table and new blocks are written behind everything, and
   one write of the header switches to them; what it named before is free then.
2. COPIED flags, against the counts that the file has by now.
3. The dirty and corrupt marks, where no damage is left.

What is never done: clearing entries that cannot be right.  They may be somebody's data.  While
there are such entries, what seems to be unused may be theirs, and leaks are left alone.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from virtmount.errors import Corrupt
from virtmount.formats.qcow2_head import BITMAPS_BIT, CORRUPT, DIRTY, RAW_BIT, read_head
from virtmount.formats.qcow2_header import AUTOCLEAR_AT, MAX_REFCOUNT_TABLE
from virtmount.formats.qcow2_refcount import coalesce, table_bytes
from virtmount.formats.qcow2_tally import decode, encode
from virtmount.formats.qcow2_walk import (
    CHUNK,
    COMPRESSED,
    COPIED,
    ENTRY,
    FLAG,
    MAX_WRONG,
    OFFSET,
    REBUILD,
    SECTOR,
    STEP,
    Walk,
    Wrong,
)
from virtmount.hostfile import HostFile
from virtmount.image import Options
from virtmount.plan import Barrier, Extend, Plan, Step, Write
from virtmount.upkeep import Finding, Progress, Repair, Severity

INCOMPATIBLE_AT = 72
TABLE_AT = 48  # offset and clusters of the refcount table

PAGE = 4096  # bytes of counts compared at once
BATCH = 1 << 20  # bytes in one plan
MAX_SAID = 200  # findings of a kind
MAX_MISCOUNTS = 100_000  # runs of them, after which a check that repairs nothing gives up
MAX_DIFFERENT = 1 << 18  # clusters whose wrong counts are remembered
MAX_PAST_END = 64 << 20  # bytes of blocks for what lies past the file's end

Item = Finding | Plan | Progress


def check(file: HostFile, options: Options, repair: Repair) -> Iterator[Item]:
    """See Image.check."""
    try:
        head = read_head(file)
    except Corrupt as error:
        yield Finding(Severity.DAMAGE, error.place, error.text)
        return
    yield from _Check(Walk(file, head), repair).run()


class _Miscount(NamedTuple):
    """Adjacent clusters with the same wrong count."""

    first: int
    length: int
    counted: int
    references: int


class _Check:
    def __init__(self, walk: Walk, repair: Repair) -> None:
        self._walk = walk
        self._file = walk.file
        self._head = walk.head
        self._writes = walk.file.writable and repair is not Repair.NOTHING
        self._mends = walk.file.writable and repair is Repair.ALL
        self._per_block = walk.head.cluster * 8 // walk.head.width
        self._said: Counter[tuple[Severity, bool]] = Counter()
        self._miscounts = self._misflags = 0
        self._damaged = False  # and not repaired
        # Cluster -> count in the file, where that is not what it should be (not for all of many).
        self._different: dict[int, int] = {}
        self._lowered: set[int] = set()
        # Even if the new table and blocks are as large as they can be.
        most, per = MAX_REFCOUNT_TABLE // ENTRY, self._per_block
        clusters = walk.limit + walk.limit // per + MAX_REFCOUNT_TABLE // walk.head.cluster
        self._can_rebuild = not walk.file.is_device and clusters // per + 4 < most
        self._sector = bytearray(walk.file.pread_padded(0, SECTOR))

    def run(self) -> Iterator[Item]:
        walk = self._walk
        wrong = 0
        for item in walk.run():
            if isinstance(item, Progress):
                yield item
                continue
            yield from self._wrong(item)
            wrong += 1
            if wrong > MAX_WRONG:
                yield Finding(
                    Severity.DAMAGE,
                    "",
                    f"more than {MAX_WRONG} entries are wrong: the rest is not looked at, and "
                    "nothing repaired",
                )
                return
        yield from self._cut()
        rebuild = walk.unsound or self._missing_blocks()
        mended = self._mends and (self._can_rebuild or not rebuild)
        yield from self._all_counts(rebuild=rebuild, mended=mended)
        if rebuild and mended:
            yield from self._rebuild()
        yield from self._flags()
        yield from self._marks()
        for (severity, repaired), number in self._said.items():
            if number > MAX_SAID:
                yield Finding(severity, "", f"{number - MAX_SAID} more like these", repaired)

    # Findings

    def _say(
        self, severity: Severity, place: str, text: str, repaired: bool = False
    ) -> Iterator[Finding]:
        if severity is Severity.DAMAGE and not repaired:
            self._damaged = True
        self._said[severity, repaired] += 1
        if self._said[severity, repaired] <= MAX_SAID:
            yield Finding(severity, place, text, repaired)

    def _wrong(self, wrong: Wrong) -> Iterator[Finding]:
        mended = wrong.mended == FLAG or (wrong.mended == REBUILD and self._can_rebuild)
        yield from self._say(
            Severity.DAMAGE, wrong.place, wrong.text, repaired=mended and self._mends
        )

    def _plan(self, *steps: Step) -> Iterator[Plan]:
        """The first one clears what only programs may keep that know it."""
        known = BITMAPS_BIT | RAW_BIT
        if self._head.autoclear & ~known:
            self._head.autoclear &= known
            self._sector[AUTOCLEAR_AT : AUTOCLEAR_AT + 8] = self._head.autoclear.to_bytes(8, "big")
            yield Plan(Write(0, bytes(self._sector)), Barrier)
        yield Plan(*steps, Barrier)

    def _cut(self) -> Iterator[Item]:
        """A file may end inside a table: what is missing of it reads as zeros."""
        if not self._walk.cut_table:
            return
        yield from self._say(
            Severity.NOTE,
            f"byte {self._file.size}",
            "the file ends inside an L2 table",
            repaired=self._mends,
        )
        if self._mends:
            yield from self._plan(Extend(self._walk.limit * self._head.cluster))

    # Counts

    def _blocks(self) -> range:
        """Numbers of the blocks for all clusters in the file."""
        return range(-(-self._walk.limit // self._per_block))

    def _missing_blocks(self) -> bool:
        return any(self._missing(block) for block in self._blocks())

    def _missing(self, block: int) -> bool:
        blocks = self._walk.blocks
        if block < len(blocks) and blocks[block]:
            return False
        return self._walk.tally.used(block * self._per_block, self._per_block)

    def _all_counts(self, *, rebuild: bool, mended: bool) -> Iterator[Item]:
        """Compare, and change in place unless a rebuild will do it."""
        walk, size = self._walk, self._head.cluster
        past = len(self._blocks())
        budget = MAX_PAST_END // size
        last = max(past, len(walk.blocks))
        for block in range(last):
            offset = walk.blocks[block] if block < len(walk.blocks) else 0
            if not offset:
                if block < past and self._missing(block):
                    yield from self._say(
                        Severity.DAMAGE,
                        f"refcount table entry {block}",
                        f"no refcount block for clusters from {block * self._per_block} on, "
                        "which are in use",
                        repaired=mended,
                    )
                continue
            if block >= past:
                if not budget:
                    text = "more blocks for clusters past the end of the file than are looked at"
                    yield from self._say(Severity.NOTE, f"refcount table entry {block}", text)
                    break
                budget -= 1
            if block % STEP == 0:
                yield Progress(walk.tables + walk.tables * block // last, 3 * walk.tables)
            yield from self._block(block, offset, rebuild=rebuild, mended=mended)
            if not self._writes and self._miscounts > MAX_MISCOUNTS:
                text = f"more than {MAX_MISCOUNTS} counts are wrong: the rest is not looked at"
                yield from self._say(Severity.DAMAGE, f"refcount table entry {block}", text)
                break

    def _block(self, block: int, offset: int, *, rebuild: bool, mended: bool) -> Iterator[Item]:
        width, size = self._head.width, self._head.cluster
        page = min(PAGE, size)
        sectors: dict[int, bytes] = {}
        findings: list[Finding] = []
        for at in range(0, size, page):
            found = self._file.pread_padded(offset + at, page)
            first = block * self._per_block + at * 8 // width
            numbers = self._walk.tally.numbers(first, page * 8 // width)
            wanted = self._encoded(numbers)
            if found == wanted:
                continue
            goal = list(decode(found, width))
            for run in _runs(first, goal[:], numbers):
                self._miscounts += 1
                low, high = run.first - first, run.first - first + run.length
                leak = run.counted > run.references
                left = run.references - (rebuild and run.first in self._walk.structure)
                fits = left >> width == 0
                repaired = fits and (mended or (leak and self._writes and not rebuild))
                if leak and self._walk.hidden:
                    repaired = False
                if repaired:
                    goal[low:high] = [run.references] * run.length
                    self._remember_lowered(run, leak)
                else:
                    self._remember(run)
                findings += self._miscounted(run, leak, repaired)
            if not rebuild:
                code = encode(goal, width)
                for sector in range(0, page, SECTOR):
                    if code[sector : sector + SECTOR] != found[sector : sector + SECTOR]:
                        sectors[offset + at + sector] = code[sector : sector + SECTOR]
        yield from findings
        if sectors:
            yield from self._plan(*coalesce(sectors))

    def _encoded(self, numbers: Sequence[int]) -> bytes | None:
        try:
            return encode(numbers, self._head.width)
        except OverflowError:
            return None

    def _remember(self, run: _Miscount) -> None:
        for cluster in range(run.first, run.first + run.length):
            if len(self._different) >= MAX_DIFFERENT:
                return
            self._different[cluster] = run.counted

    def _remember_lowered(self, run: _Miscount, leak: bool) -> None:
        if leak and run.references == 1 and len(self._lowered) < MAX_DIFFERENT:
            self._lowered.update(range(run.first, run.first + run.length))

    def _miscounted(self, run: _Miscount, leak: bool, repaired: bool) -> Iterator[Finding]:
        first, count = run.first, run.length
        place = f"cluster {first}" if count == 1 else f"clusters {first} to {first + count - 1}"
        plural = "" if run.references == 1 else "s"
        text = f"{run.references} reference{plural}, counted as {run.counted}"
        if leak and self._walk.hidden:
            text += "; left alone, because there are entries that cannot be followed"
        severity = Severity.LEAK if leak else Severity.DAMAGE
        yield from self._say(severity, place, text, repaired)

    # A new refcount structure

    def _room(self) -> tuple[list[int], int]:
        """The blocks that a new table needs, and its length in clusters."""
        walk, size, per = self._walk, self._head.cluster, self._per_block
        wanted = {block for block in self._blocks() if walk.tally.used(block * per, per)}
        if walk.hidden:
            wanted |= {block for block in self._blocks() if self._old(block)}
        length = 0
        while True:
            last = (walk.limit + length + len(wanted)) // per
            more = set(range(walk.limit // per, last + 1)) - wanted
            needed = -(-(max(wanted | more) + 1) * ENTRY // size)
            if not more and needed == length:
                return sorted(wanted), length
            wanted |= more
            length = needed

    def _old(self, block: int) -> int:
        blocks = self._walk.blocks
        return blocks[block] if block < len(blocks) else 0

    def _rebuild(self) -> Iterator[Plan]:
        walk, size = self._walk, self._head.cluster
        for cluster in walk.structure:
            walk.tally.add(cluster, -1)
        wanted, length = self._room()
        first = walk.limit + length  # the first block
        end = first + len(wanted)
        table = array("Q", bytes(length * size))
        steps: list[Step] = [Extend(end * size)]
        pending = 0
        for i, block in enumerate(wanted):
            offset = (first + i) * size
            table[block] = offset
            steps.append(Write(offset, self._new_block(block, end)))
            pending += size
            if pending >= BATCH:
                yield from self._plan(*steps)
                steps, pending = [], 0
        steps.append(Write(walk.limit * size, table_bytes(table)))
        yield from self._plan(*steps)
        place = (walk.limit * size).to_bytes(8, "big") + length.to_bytes(4, "big")
        self._sector[TABLE_AT : TABLE_AT + 12] = place
        yield from self._plan(Write(0, bytes(self._sector)))
        if not walk.hidden:
            most = (1 << self._head.width) - 1
            self._different = {c: most for c in self._different if walk.tally[c] > most}

    def _new_block(self, block: int, end: int) -> bytes:
        """Counts of all that is in use, of the new structure, which ends at cluster `end`, too."""
        walk, per, most = self._walk, self._per_block, (1 << self._head.width) - 1
        first = block * per
        parts = []
        old = self._old(block) if walk.hidden else 0
        page = min(PAGE, self._head.cluster)
        step = page * 8 // self._head.width
        for at in range(first, first + per, step):
            numbers: Sequence[int] = walk.tally.numbers(at, step)
            if at + step > walk.limit and at < end:
                numbers = list(numbers)
                for cluster in range(max(at, walk.limit), min(at + step, end)):
                    numbers[cluster - at] = 1
            if old:
                raw = self._file.pread_padded(old + (at - first) // step * page, page)
                numbers = [
                    max(pair) for pair in zip(numbers, decode(raw, self._head.width), strict=True)
                ]
            if max(numbers) > most:
                numbers = [min(number, most) for number in numbers]
            parts.append(encode(numbers, self._head.width))
        return b"".join(parts)

    # COPIED flags

    def _count(self, cluster: int) -> int:
        """What the file says by now."""
        return self._different.get(cluster, self._walk.tally[cluster])

    def _flags(self) -> Iterator[Item]:
        walk = self._walk
        changes: dict[int, int] = {}  # entry's offset -> entry
        tables = walk.active_tables()
        yield from self._root_flags(changes)
        yield from self._change(changes)
        if walk.data_file:
            return
        for done, (offset, words, _) in enumerate(walk.read_l2(tables)):
            if done % STEP == 0:
                yield Progress(min(2 * walk.tables + done, 3 * walk.tables), 3 * walk.tables)
            yield from self._table_flags(offset, words, changes)
            if self._given_up():
                return
            if len(changes) * SECTOR >= BATCH:
                yield from self._change(changes)
        yield from self._change(changes)

    def _given_up(self) -> bool:
        """Enough of them were found, and none is mended: no more need be looked for."""
        return not self._writes and self._misflags > MAX_WRONG

    def _root_flags(self, changes: dict[int, int]) -> Iterator[Finding]:
        walk, size = self._walk, self._head.cluster
        most = walk.limit * size - size
        count = self._count
        for index, entry in enumerate(walk.l1):
            if not entry:
                continue
            table = entry & OFFSET
            if not table or table % size or table > most:
                continue
            if (entry >= COPIED) != (count(table // size) == 1):
                at = self._head.l1_offset + index * ENTRY
                place = f"L1 entry {index} at {at}"
                yield from self._flag(place, at, entry, table // size, changes)
                if self._given_up():
                    return

    def _table_flags(
        self, table: int, words: array[int], changes: dict[int, int]
    ) -> Iterator[Finding]:
        walk, size = self._walk, self._head.cluster
        step = 2 if walk.extended else 1
        for start in range(0, len(words), CHUNK * step):
            part = words[start : start + CHUNK * step : step]
            if not any(part) or self._all_right(part):
                continue
            for index, entry in enumerate(part):
                at = table + (start + index * step) * ENTRY
                if entry & COMPRESSED:
                    if entry & COPIED and self._mends:
                        changes[at] = entry & ~COPIED
                    continue
                host = entry & OFFSET
                if host and not host % size and host // size < walk.limit:
                    yield from self._flag(f"L2 entry at {at}", at, entry, host // size, changes)

    def _all_right(self, part: array[int]) -> bool:
        """Clusters in a row, each marked and referred to once."""
        size, first = self._head.cluster, part[0]
        host, count = (first & OFFSET) // size, len(part)
        return (
            not self._different
            and bool(first & COPIED)
            and part == array("Q", range(first, first + count * size, size))
            and host + count <= self._walk.limit
            and self._walk.tally.numbers(host, count) == b"\1" * count
        )

    def _flag(
        self, place: str, at: int, entry: int, cluster: int, changes: dict[int, int]
    ) -> Iterator[Finding]:
        count = self._count(cluster)
        if bool(entry & COPIED) == (count == 1):
            return
        references = self._walk.tally[cluster]
        if count < references and bool(entry & COPIED) == (references == 1):
            return  # it is the count that is wrong, and that was said
        # Where a count was just lowered, the flag follows: that is no finding of its own.
        follows = count == 1 and cluster in self._lowered
        if self._mends or follows:
            changes[at] = entry ^ COPIED
        if not follows:
            self._misflags += 1
            word = "marked" if entry & COPIED else "not marked"
            yield from self._say(
                Severity.DAMAGE,
                place,
                f"{word} as the only reference to its cluster, counted as {count}",
                repaired=self._mends,
            )

    def _change(self, changes: dict[int, int]) -> Iterator[Plan]:
        """Write these table entries, sector by sector."""
        sectors: dict[int, bytearray] = {}
        for at, entry in changes.items():
            within = at % SECTOR
            sector = sectors.get(at - within)
            if sector is None:
                sector = bytearray(self._file.pread_padded(at - within, SECTOR))
                sectors[at - within] = sector
            sector[within : within + ENTRY] = entry.to_bytes(ENTRY, "big")
        changes.clear()
        if sectors:
            yield from self._plan(*coalesce(sectors))

    # Marks

    def _marks(self) -> Iterator[Item]:
        marks = self._head.incompatible & (DIRTY | CORRUPT)
        if not marks:
            return
        repaired = self._writes and not self._damaged
        for bit, text in ((DIRTY, "marked as not closed"), (CORRUPT, "marked as corrupt")):
            if marks & bit:
                yield from self._say(Severity.NOTE, f"header+{INCOMPATIBLE_AT}", text, repaired)
        if repaired:
            at = INCOMPATIBLE_AT
            left = self._head.incompatible & ~marks
            self._sector[at : at + 8] = left.to_bytes(8, "big")
            yield from self._plan(Write(0, bytes(self._sector)))


def _runs(first: int, counted: Sequence[int], references: Sequence[int]) -> Iterator[_Miscount]:
    """Where the two differ; `first` is the number of the first cluster."""
    run: _Miscount | None = None
    for cluster, (count, number) in enumerate(zip(counted, references, strict=True), first):
        if count == number:
            continue
        if run and run == (run.first, cluster - run.first, count, number):
            run = run._replace(length=run.length + 1)
            continue
        if run:
            yield run
        run = _Miscount(cluster, 1, count, number)
    if run:
        yield run
