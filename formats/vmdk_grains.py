"""The two-level tables of a VMDK extent: a grain directory that names grain tables.

Hosted sparse (vmdk_sparse.py) and COWD (vmdk_cowd.py) extents have the same tables: numbers of 512
bytes, 0 for nothing, hosted ones as a rule in two copies.  What the file says while it is written:

1. A grain is in the file, whole, before a table names it; a table is, before a directory does.
2. Both copies of a table are written between the same two barriers.  A crash may leave one without
   the other; the extent then has its unclean flag set, and whoever opens it takes an entry from
   either copy, the first one where they differ.  That is right because an entry is never cleared,
   and what it named before is used for something else only when both copies are durable.
3. A discarded grain keeps its place, punched.  If its cluster is written again it gets a new place,
   as all do, and the old one becomes a spare one.
4. Spare grains are used first; other new grains and tables lie behind everything else, so nothing
   has to be known to be free.  At the end spare grains are given to clusters that hold nothing,
   and read as before, or to the last grains of the file; what lies behind the last one then is cut
   off, and tables there move forward.
5. Nothing is written to an extent in which an entry names a place behind the file's end (it would
   begin to exist when the file grows) or in which two grains overlap.
"""

from __future__ import annotations

import errno
import heapq
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence

from virtmount.errors import Corrupt, NeedsRecovery, Unsupported
from virtmount.formats.vmdk_entries import (
    ENTRY,
    SECTOR,
    Claims,
    Overlap,
    joined,
    merge,
    packed,
    runs,
    unpacked,
)
from virtmount.hostfile import HostFile
from virtmount.image import Run
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write

ZERO_GRAIN = 1  # where the header says that it means that
LIMIT = 1 << 32  # sectors that an entry can name
MIN_GRAIN, MAX_GRAIN = 512, 64 << 20
MAX_TABLES = 1 << 20  # 4 MiB of directory
MAX_READ = 1 << 17  # of those that are there
READ = 1 << 20  # bytes of tables read at once
MAX_HOLES = 1 << 16  # that one session fills
MAX_MOVED = 64 << 20  # bytes of grains that one end moves
MAX_DIFFERENT = 8192  # tables whose copies differ and that are merged in memory
MAX_SLOTS = 1 << 25  # grains in the file that are looked at for overlaps when it is opened


class Tables(ABC):
    """One extent's tables.  `start` is where it begins on the guest disk, in bytes."""

    kind: str
    compressed = False
    markers = False
    header_size = SECTOR  # bytes

    def __init__(self, file: HostFile, number: int, start: int) -> None:
        self.file, self.number, self.start = file, number, start
        self.capacity: int  # bytes
        self.grain: int  # bytes
        self.per_table: int  # entries
        self.zeroed: bool  # an entry of 1 is a grain of zeros
        self.unclean: bool
        self.directory_at: int
        self.redundant_at: int | None = None
        self.directory: array[int]
        self.redundant: array[int] | None = None
        self._header = bytearray()
        self._next = 0  # where the next new thing goes, bytes
        self._room: tuple[int, int] = (0, 0)  # for new tables: next place and end
        self._spare: list[tuple[int, int]] = []  # given back: offset, bytes
        self._moved: dict[int, int] = {}  # table index -> copies, of those made in this session
        self._mapped_end = 0  # of grains and of what was there at the beginning
        self._begun = False
        self._different: dict[int, bytes] = {}  # merged tables by index
        self._second = array("I")  # what only the copies named, and nobody uses
        self._single: list[tuple[array[int], int, int]] = []  # directory, index, the copy's sector

    # Reading

    def read_directory(self, at: int, what: str, place: str) -> array[int]:
        """A whole directory; Corrupt if it does not lie in the file."""
        count = self.tables
        if count > MAX_TABLES:
            text = f"{count} grain tables, at most {MAX_TABLES} are supported"
            raise Corrupt(self.file, place, text)
        end = at + count * ENTRY
        if at < self.header_size or end > self.file.size:
            text = f"{what} at {at} to {end}, the file ends at {self.file.size}"
            raise Corrupt(self.file, place, text)
        directory = unpacked(self.file.pread(at, count * ENTRY))
        if count - directory.count(0) > MAX_READ:
            text = f"{count - directory.count(0)} grain tables, at most {MAX_READ} are supported"
            raise Unsupported(self.file, place, text)
        return directory

    @property
    def tables(self) -> int:
        return -(-self.capacity // (self.grain * self.per_table))

    @property
    def table_size(self) -> int:
        return self.per_table * ENTRY

    def entries_in(self, index: int) -> int:
        """Entries of table `index` that the disk has."""
        grains = -(-self.capacity // self.grain)
        return min(self.per_table, grains - index * self.per_table)

    def table(self, index: int) -> int | None:
        """Byte offset of a table; None where there is none.  Corrupt if it cannot be right."""
        sector = self.directory[index]
        if not sector:
            return None
        self.check_table(self.directory_at, index, sector, "grain directory")
        return sector * SECTOR

    def check_table(self, at: int, index: int, sector: int, what: str) -> None:
        offset = sector * SECTOR
        end = offset + self.entries_in(index) * ENTRY
        if offset < self.header_size or end > self.file.size:
            text = f"table at {offset}, the file ends at {self.file.size}"
            raise Corrupt(self.file, f"{what} entry {index} at {at + index * ENTRY}", text)

    def read_table(self, offset: int, index: int) -> bytes:
        """A table as it lies there, as far as the disk goes."""
        return self.file.pread(offset, self.entries_in(index) * ENTRY)

    def entry(self, grain: int) -> int:
        index, within = divmod(grain, self.per_table)
        at = self.table(index)
        if at is None:
            return 0
        return int.from_bytes(self.file.pread(at + within * ENTRY, ENTRY), "little")

    def is_grain(self, entry: int) -> bool:
        return entry != 0 and not (entry == ZERO_GRAIN and self.zeroed)

    def metadata(self, *, whole: bool = False) -> Iterator[tuple[int, int]]:
        """(offset, length) of header, directories and tables, neighbours joined.

        Unless it is to be `whole`, what is only read leaves out the second copies, which may be
        nonsense and need not be kept from anything.
        """
        yield 0, self.header_size
        for at, directory in self._directories():
            if directory is self.redundant and not (whole or self.file.writable):
                return
            yield at, self.tables * ENTRY
            size = self.table_size
            first = last = 0
            for sector in sorted(set(directory)):
                offset = sector * SECTOR
                if not sector:
                    continue
                if offset != last:
                    if last:
                        yield first, last - first
                    first = offset
                last = offset + size
            if last:
                yield first, last - first

    def _directories(self) -> Iterator[tuple[int, array[int]]]:
        yield self.directory_at, self.directory
        if self.redundant is not None and self.redundant_at is not None:
            yield self.redundant_at, self.redundant

    def memory(self) -> int:
        return self.tables * ENTRY * (1 if self.redundant is None else 2)

    # Both copies

    def merge(self, *, lenient: bool = False) -> None:
        """Take what either copy of the tables has; later reads see that.  Writes nothing.

        With `lenient` a second copy that cannot be right is ignored.  NeedsRecovery where so much
        differs that it has to be mended first.
        """
        second = self.redundant
        if second is None or second == self.directory:
            return
        at = self.redundant_at or 0
        inside = self._inside(filter(None, second)) and self._inside(filter(None, self.directory))
        for index, count in self._groups(self.directory, second):
            if count and inside and self._same(index, count):
                continue
            for each in range(index, index + max(count, 1)):
                try:
                    if second[each]:
                        what = "redundant grain directory"
                        self.check_table(at, each, second[each], what)
                    self._merge_one(each, second)
                except Corrupt:
                    if not lenient:
                        raise

    def _merge_one(self, index: int, second: array[int]) -> None:
        sector = second[index]
        if not sector:
            if self.directory[index]:
                self._single.append((second, index, self.directory[index]))
        elif not self.directory[index]:
            self._single.append((self.directory, index, sector))
            self.directory[index] = sector  # until begin() has made a copy
        else:
            self._merge_table(index, sector * SECTOR)
            if len(self._different) > MAX_DIFFERENT:
                text = f"more than {MAX_DIFFERENT} grain tables differ from their copies"
                raise NeedsRecovery(
                    self.file, "redundant grain directory", text, hint="virtmount check --repair"
                )

    def _groups(self, *directories: array[int]) -> Iterator[tuple[int, int]]:
        """(index, count) of tables that follow each other in the file, in all the directories.

        A count of 0 stands for a table that not all of them have.  Without both it is left out.
        """
        size = -(-self.table_size // SECTOR)
        most = max(1, READ // self.table_size)
        index, end = 0, len(directories[0])
        while index < end:
            sectors = [directory[index] for directory in directories]
            if not all(sectors):
                if any(sectors):
                    yield index, 0
                index += 1
                continue
            stop = index + 1
            while stop < end and stop - index < most:
                far = (stop - index) * size
                if any(d[stop] != s + far for d, s in zip(directories, sectors, strict=True)):
                    break
                stop += 1
            yield index, stop - index
            index = stop

    def _group(self, directory: array[int], index: int, count: int) -> bytes:
        """So many tables, as far as the disk goes."""
        size = -(-self.table_size // SECTOR) * SECTOR
        length = (count - 1) * size + self.entries_in(index + count - 1) * ENTRY
        return self.file.pread(directory[index] * SECTOR, length)

    def _same(self, index: int, count: int) -> bool:
        assert self.redundant is not None
        first = self._group(self.directory, index, count)
        return first == self._group(self.redundant, index, count)

    def _inside(self, sectors: Iterable[int]) -> bool:
        """Whether tables that begin there can all be right."""
        found = sorted(sectors)
        size = self.file.size - self.table_size
        return not found or (found[0] * SECTOR >= self.header_size and found[-1] * SECTOR <= size)

    def _merge_table(self, index: int, other: int) -> None:
        at = self.table(index)
        assert at is not None
        first, second = self.read_table(at, index), self.read_table(other, index)
        if first == second:
            return
        merged = merge(first, second)
        self._different[index] = merged
        self._second.extend(
            other
            for taken, other in zip(unpacked(merged), unpacked(second), strict=True)
            if other != taken and self.is_grain(other)
        )
        if merged != first:
            self.file.patch(at, merged)

    # Writing

    def prepare(self) -> None:
        """Everything that has to be right before anything is written; Corrupt if it is not."""
        hint = "open it read-only, or virtmount check --repair"
        owners = [sector for _, directory in self._directories() for sector in directory if sector]
        if not self._inside(owners) or len(set(owners)) != len(owners):
            self._refuse_tables(hint)
        self.merge()
        end = self._walk(hint)
        tables_end = max(owners) * SECTOR + self.table_size if owners else 0
        ends = [at + self.tables * ENTRY for at, _ in self._directories()]
        self._mapped_end = max(end, tables_end, *ends, self.header_size, self.fixed_end())
        self._next = max(self._mapped_end, self.file.size, self.used_end())

    def _refuse_tables(self, hint: str) -> None:
        """Say which one it is; the last one may end with the file."""
        owners: set[int] = set()
        for at, directory in self._directories():
            for index, sector in enumerate(directory):
                if not sector:
                    continue
                self.check_table(at, index, sector, "grain directory")
                if sector in owners:
                    place = f"grain directory entry {index} at {at + index * ENTRY}"
                    text = f"table at {sector * SECTOR} has another owner: not written"
                    raise Corrupt(self.file, place, text, hint=hint)
                owners.add(sector)

    def _walk(self, hint: str) -> int:
        """Look at every entry; where the last grain ends."""
        sectors = self.grain // SECTOR
        claims: Claims | None = None
        if self.file.size // self.grain < MAX_SLOTS:
            claims = Claims(sectors, self.file.size)
        limit = -(-self.file.size // SECTOR)
        end = 0
        for index, count in self._groups(self.directory):
            at = self.directory[index] * SECTOR
            raw = self._group(self.directory, index, count)
            if raw.count(0) == len(raw):
                continue
            entries = unpacked(raw)
            highest = max(entries)
            if highest >= limit:
                i = entries.index(highest)
                text = f"grain at {highest * SECTOR} lies past the end of the file: not written"
                raise Corrupt(self.file, f"grain table entry at {at + i * ENTRY}", text, hint=hint)
            kept = entries if 0 not in entries else array("I", filter(None, entries))
            if self.zeroed and ZERO_GRAIN in kept:
                kept = array("I", (entry for entry in kept if entry != ZERO_GRAIN))
            if not kept:
                continue
            end = max(end, highest * SECTOR + self.grain)
            if claims is None:
                continue
            try:
                claims.take(kept)
            except Overlap as overlap:
                text = (
                    f"grain at {overlap.second * SECTOR} overlaps the one at "
                    f"{overlap.first * SECTOR}: not written"
                )
                raise Corrupt(self.file, f"grain table {index} at {at}", text, hint=hint) from None
        if claims is not None and self._second:
            self._take_second(claims, limit)
        return end

    def _take_second(self, claims: Claims, limit: int) -> None:
        """Grains of a session that was cut off, which now belong to nobody, are spare ones."""
        metadata = [*self.metadata(), (0, self.fixed_end())]
        for sector in self._second:
            start = sector * SECTOR
            end = start + self.grain
            if sector >= limit or any(o < end and start < o + n for o, n in metadata):
                continue
            try:
                claims.take(array("I", [sector]))
            except Overlap:
                continue
            self._spare.append((start, self.grain))
        del self._second[:]

    def fixed_end(self) -> int:
        """Where what is in the file for good ends at the least (a descriptor)."""
        return 0

    def used_end(self) -> int:
        """What the header says is in use, where it says that."""
        return 0

    def reserves_in_header(self) -> bool:
        """Whether the header says where free space begins."""
        return False

    @abstractmethod
    def header_writes(self, *, unclean: bool, end: int) -> list[Step]:
        """The header with its unclean flag set or not; everything below `end` is in use."""

    def begin(self) -> list[Step]:
        """The flag, and copies that are the same again."""
        self._begun = True
        steps = self.header_writes(unclean=True, end=self._next)
        for index, raw in self._different.items():
            for _, directory in self._directories():
                steps.append(Write(directory[index] * SECTOR, raw, self.number))
        added: list[int] = []
        for directory, index, sector in self._single:
            at = self._table_place()
            raw = self.read_table(sector * SECTOR, index)
            steps.append(Write(at, raw.ljust(self.table_size, b"\0"), self.number))
            directory[index] = at // SECTOR
            self._moved[index] = at
            added.append(index)
        if added:
            steps += [Barrier, *self._directory_writes(sorted(set(added)))]
        self._single.clear()
        return steps

    def _settle(self) -> None:
        """begin()'s plan has been carried out: the file itself has what was patched."""
        if self._different:
            self._different.clear()
            self.file.unpatch()

    def reserve(self, count: int) -> tuple[Run, Plan, bool]:
        self._settle()
        grain = self.grain
        if self._spare:
            self._spare = joined(self._spare)
            offset, length = self._spare.pop(0)
            taken = min(length, max(1, count) * grain)
            if length > taken:
                self._spare.insert(0, (offset + taken, length - taken))
            steps: list[Step] = [Punch(offset, taken, self.number)]
            if self.file.size < offset + taken:  # its own plan had failed
                steps += [Extend(offset + taken, self.number), *self._in_use(), Barrier]
            return Run(offset, taken // grain, self.number), Plan(*steps), True
        first = -(-self._next // grain) * grain
        most = (LIMIT * SECTOR - first) // grain
        count = min(max(1, count), most)
        if count <= 0:
            raise OSError(errno.EFBIG, f"{self.file}: no place below {LIMIT * SECTOR}")
        self._next = first + count * grain
        steps = [Extend(self._next, self.number), *self._in_use(), Barrier]
        return Run(first, count, self.number), Plan(*steps), False

    def _in_use(self) -> list[Step]:
        if self.reserves_in_header():
            return self.header_writes(unclean=True, end=self._next)
        return []

    def release(self, run: Run) -> None:
        self._spare.append((run.host_offset, run.count * self.grain))

    def commit(self, changes: dict[int, int]) -> tuple[list[Step], list[Step]]:
        """Writes of tables, and of directories after a barrier.  `changes`: grain -> offset."""
        self._settle()
        by_table: dict[int, dict[int, int]] = {}
        for grain, offset in changes.items():
            index, within = divmod(grain, self.per_table)
            by_table.setdefault(index, {})[within] = offset // SECTOR
            self._mapped_end = max(self._mapped_end, offset + self.grain)
        tables: list[Step] = []
        new: list[int] = []
        for index, entries in sorted(by_table.items()):
            if self.directory[index]:
                tables += self._changed(index, entries)
            else:
                tables += self._added(index, entries)
                new.append(index)
        if not new:
            return tables, []
        if self.reserves_in_header():
            tables += self._in_use()
        return tables, list(self._directory_writes(new))

    def _changed(self, index: int, entries: dict[int, int]) -> Iterator[Write]:
        """Sectors of a table with these entries replaced, in both copies."""
        at = self.directory[index] * SECTOR
        by_sector: dict[int, list[int]] = {}
        for within in sorted(entries):
            by_sector.setdefault(within * ENTRY // SECTOR, []).append(within)
        for run in runs(by_sector):
            start = run[0] * SECTOR
            length = min(len(run) * SECTOR, self.table_size - start)
            data = bytearray(self.file.pread_padded(at + start, length))
            for sector in run:
                for within in by_sector[sector]:
                    low = within * ENTRY - start
                    old = int.from_bytes(data[low : low + ENTRY], "little")
                    if self.is_grain(old):
                        self._spare.append((old * SECTOR, self.grain))
                    data[low : low + ENTRY] = entries[within].to_bytes(ENTRY, "little")
            for _, directory in self._directories():
                yield Write(directory[index] * SECTOR + start, bytes(data), self.number)

    def _added(self, index: int, entries: dict[int, int]) -> Iterator[Step]:
        """A new table, in as many copies as there are directories."""
        raw = bytearray(self.table_size)
        for within, value in entries.items():
            raw[within * ENTRY : (within + 1) * ENTRY] = value.to_bytes(ENTRY, "little")
        for _, directory in self._directories():
            at = self._table_place()
            directory[index] = at // SECTOR
            self._moved[index] = at
            yield Write(at, bytes(raw), self.number)

    def _table_place(self) -> int:
        at, end = self._room
        size = -(-self.table_size // SECTOR) * SECTOR
        if end - at < size:
            at = -(-self._next // SECTOR) * SECTOR
            end = self._next = -(-(at + size) // self.grain) * self.grain
            if end > LIMIT * SECTOR:
                raise OSError(errno.EFBIG, f"{self.file}: no place below {LIMIT * SECTOR}")
        self._room = at + size, end
        return at

    def _directory_writes(self, indexes: Sequence[int]) -> Iterator[Write]:
        """Sectors of the directories that have these entries."""
        for at, directory in self._directories():
            sectors = sorted({index * ENTRY // SECTOR for index in indexes})
            for run in runs(sectors):
                first, last = run[0] * SECTOR // ENTRY, (run[-1] + 1) * SECTOR // ENTRY
                raw = packed(directory[first:last])
                yield Write(at + run[0] * SECTOR, raw, self.number)

    def punches(self, first: int, count: int) -> Iterator[Punch]:
        """What makes grains read as zeros; they keep their places."""
        self._settle()
        end = min(first + count, -(-self.capacity // self.grain))
        sectors = self.grain // SECTOR
        while first < end:
            index, within = divmod(first, self.per_table)
            stop = min(end, (index + 1) * self.per_table)
            at = self.table(index)
            if at is not None:
                raw = self.file.pread(at + within * ENTRY, (stop - first) * ENTRY)
                places = sorted(filter(self.is_grain, unpacked(raw)))
                low = high = 0
                for place in places:
                    if place != high:
                        if high:
                            yield Punch(low * SECTOR, (high - low) * SECTOR, self.number)
                        low = place
                    high = place + sectors
                if high:
                    yield Punch(low * SECTOR, (high - low) * SECTOR, self.number)
            first = stop

    def mark_zero(self, first: int, count: int) -> tuple[list[Step], list[Step]]:
        """Grains that hold nothing become grains of zeros, over a parent; needs `zeroed`."""
        assert self.zeroed
        self._settle()
        by_table: dict[int, dict[int, int]] = {}
        end = min(first + count, -(-self.capacity // self.grain))
        for index in range(first // self.per_table, -(-end // self.per_table)):
            low = max(first, index * self.per_table)
            high = min(end, (index + 1) * self.per_table)
            at = self.table(index)
            entries = range(low - index * self.per_table, high - index * self.per_table)
            if at is None:
                by_table[index] = dict.fromkeys(entries, ZERO_GRAIN)
                continue
            raw = self.file.pread(at + entries.start * ENTRY, len(entries) * ENTRY)
            empty = {w: ZERO_GRAIN for w, e in zip(entries, unpacked(raw), strict=True) if not e}
            if empty:
                by_table[index] = empty
        tables: list[Step] = []
        new = []
        for index, changed in by_table.items():
            if self.directory[index]:
                tables += self._changed(index, changed)
            else:
                tables += self._added(index, changed)
                new.append(index)
        return tables, list(self._directory_writes(new)) if new else []

    def end(self, *, over_parent: bool) -> list[Step]:
        """No spare grains, tables moved forward, the file cut off, the flag cleared."""
        if not self._begun:
            return []
        self._settle()
        steps, changes = self._fill_holes(over_parent)
        if changes:
            steps.append(Barrier)
            for index, entries in changes.items():
                steps += self._changed(index, entries)
            steps.append(Barrier)
            self._spare.clear()
        if self._moved:
            steps += self._gather(-(-self._mapped_end // SECTOR) * SECTOR, changes)
        end = self._mapped_end
        steps += [Barrier, *self.header_writes(unclean=False, end=end)]
        if end < self.file.size:
            steps.append(Truncate(end, self.number))
        self._begun = False
        return steps

    def _fill_holes(self, over_parent: bool) -> tuple[list[Step], dict[int, dict[int, int]]]:
        """Nothing is left between the grains that is not used, or not much.

        Spare grains go to clusters that read as zeros, and stay empty; the last grains of the file
        move into what nobody could be given.  Returns what to do before the tables change, and
        the changes.  Sets _mapped_end.
        """
        holes = [
            at
            for offset, length in self._spare
            if offset < self._mapped_end
            for at in range(offset, min(offset + length, self._mapped_end), self.grain)
        ][:MAX_HOLES]
        self._spare.clear()
        changes: dict[int, dict[int, int]] = {}
        if not holes:
            return [], changes
        holes.sort()
        given: list[int] = []
        for (index, within), offset in zip(self._empty(over_parent), holes, strict=False):
            changes.setdefault(index, {})[within] = offset // SECTOR
            given.append(offset)
        steps: list[Step] = [
            Punch(offset, length, self.number)
            for offset, length in joined((offset, self.grain) for offset in given)
        ]
        holes = holes[len(given) :]
        ends = [at + self.tables * ENTRY for at, _ in self._directories()]
        for _, directory in self._directories():
            for index, sector in enumerate(directory):
                if sector and index not in self._moved:  # those may move yet
                    ends.append(sector * SECTOR + self.table_size)
        ends += [offset + self.grain for offset in given[-1:]]
        last = heapq.nlargest(min(len(holes), MAX_MOVED // self.grain + 1) + 1, self._owners())
        for hole in holes[: len(last) - 1 or 1]:
            if not last or last[0][0] * SECTOR < hole:
                break
            sector, index, within = last.pop(0)
            data = self.file.pread_padded(sector * SECTOR, self.grain)
            steps.append(Write(hole, data, self.number))
            changes.setdefault(index, {})[within] = hole // SECTOR
            ends.append(hole + self.grain)
        if last:
            ends.append(last[0][0] * SECTOR + self.grain)
        self._mapped_end = max(*ends, self.header_size, self.fixed_end())
        return steps, changes

    def _owners(self) -> Iterator[tuple[int, int, int]]:
        """(sector, table, entry) of every grain."""
        for index, sector in enumerate(self.directory):
            if not sector:
                continue
            raw = self.read_table(sector * SECTOR, index)
            if raw.count(0) == len(raw):
                continue
            for within, entry in enumerate(unpacked(raw)):
                if self.is_grain(entry):
                    yield entry, index, within

    def _empty(self, over_parent: bool) -> Iterator[tuple[int, int]]:
        """(table, entry) of clusters that read as zeros and have no place."""
        for index, sector in enumerate(self.directory):
            if not sector:
                continue
            for within, entry in enumerate(unpacked(self.read_table(sector * SECTOR, index))):
                if not self.is_grain(entry) and (entry or not over_parent):
                    yield index, within

    def _gather(self, end: int, changes: dict[int, dict[int, int]]) -> Iterator[Step]:
        """Tables made in this session that lie behind the last grain move down to `end`.

        `changes` are on their way into the tables where they are.
        """
        size = -(-self.table_size // SECTOR) * SECTOR
        moves: list[tuple[array[int], int]] = []
        for _, directory in self._directories():
            for index in self._moved:
                if directory[index] * SECTOR >= end:
                    moves.append((directory, index))
        moves.sort(key=lambda move: move[0][move[1]])
        changed: list[int] = []
        for directory, index in moves:
            at = directory[index] * SECTOR
            if at > end:
                # Where it goes nothing is used: not even its own old place, nor another's.
                target = end
                if target + size > at:
                    end = at + size
                    continue
                raw = bytearray(self.file.pread(at, self.table_size))
                for within, value in changes.get(index, {}).items():
                    raw[within * ENTRY : (within + 1) * ENTRY] = value.to_bytes(ENTRY, "little")
                yield Write(target, bytes(raw), self.number)
                directory[index] = target // SECTOR
                changed.append(index)
                end = target + size
            else:
                end = at + size
        self._mapped_end = end
        if changed:
            yield Barrier
            yield from self._directory_writes(changed)
