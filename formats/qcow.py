"""QCOW, version 1: read and written, made, checked.

Source: "The QCOW Image Format" (Mark McLoughlin), version 1; qemu's sources for what its images
look like; the order of writes is our own, because qemu names a table before it is there.  Tried
with images made by qemu-img 7.2.  Refused by name: writing to encrypted images, and to those in
which two entries name one place.

What the file says while it is written, and why:

1. The format has no counts, so all tables are looked at before an image is written.  New clusters
   are taken from what nothing uses, then from the end of the file, which is durably as long as it
   has to be before a mapping names them.
2. An L2 table is durable, with what is in it, before the L1 table names it.
3. Everything is written in whole sectors of 512 bytes, in which entries lie whole.
4. A crash leaves space that nothing names, no more, and so does a detach where a table lies behind
   what was reserved and not used: the next session takes it, or check() punches it.
5. qemu cannot copy on write: with a parent and clusters of more than 512 bytes it loses what is
   beside the sectors it writes.  The images that are made here have 512 then, as qemu's do.
"""

from __future__ import annotations

import bisect
import errno
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import luks, qcow_create
from virtmount.formats.qcow2_refcount import coalesce, read_table, runs_of
from virtmount.formats.qcow_check import check, refuse_damage
from virtmount.formats.qcow_header import (
    BACKING_AT,
    COMPRESSED,
    ENCRYPTION,
    ENTRY,
    L1_AT,
    MAGIC,
    MAX_L1,
    MAX_NAME,
    SECTOR,
    SIZE_AT,
    Fields,
    read_header,
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
    Reservation,
    Rule,
    Run,
    Span,
)
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write
from virtmount.upkeep import Choice, Finding, New, Progress, Repair

MAX_HOST = 1 << 62  # where the file must end
LEAF = 4096  # entries
MAX_HOLES = 1 << 16  # clusters in them that a session uses
HEADER = Fields.sizeof()
WINDOW = -12  # raw deflate with the window that the format prescribes
_ENTRY = struct.Struct(">Q")


class QCOW(Image):
    name: ClassVar[str] = "qcow"
    variant = "version 1"
    creates: ClassVar[bool] = True
    checks: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, Choice]] = qcow_create.CHOICES
    suffixes: ClassVar[tuple[str, ...]] = ("qcow",)

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if head[:8] == MAGIC + b"\0\0\0\1" else Match.NO

    @classmethod
    def create(cls, new: New) -> Plan:
        return qcow_create.create(new)

    @classmethod
    def check(
        cls, file: HostFile, options: Options, repair: Repair
    ) -> Iterator[Finding | Plan | Progress]:
        return check(file, repair)

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._file = file
        self.files = [file]
        header = self._header = read_header(file)
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.parent = header.parent
        self.entries_per_leaf = min(header.per_table, LEAF)
        self.layout = Layout(
            width=ENTRY,
            byteorder="big",
            mask=COMPRESSED - 1,
            rules=(
                Rule(COMPRESSED, COMPRESSED, Kind.COMPRESSED),
                Rule(COMPRESSED - 1, 0, Kind.ABSENT),
            ),
        )
        # What of it lies past the file's end is zeros: qemu makes such files.
        self._l1 = read_table(file, header.l1_offset, header.l1_size)
        self.memory = header.l1_size * ENTRY
        if header.encryption:
            if file.writable:
                text = "writing to an encrypted image"
                raise Unsupported(file, "header+36", text, hint="attach it with --read-only")
            if not options.described:
                self.cipher = luks.legacy_aes(luks.ask(file, "header+36", options))
        if file.writable:
            self._open_for_writing()

    # Reading

    def leaf(self, index: int) -> Leaf:
        table, within = divmod(index * self.entries_per_leaf, self._header.per_table)
        offset = self._table(table)
        return Leaf(table=offset + within * ENTRY) if offset else Leaf()

    def _table(self, index: int) -> int:
        """The offset of an L2 table, 0 where there is none."""
        offset = self._l1[index] if index < len(self._l1) else 0
        end = offset + self._header.table_size
        if offset and end > self._file.size:
            text = f"L2 table at {offset}, the file ends at {self._file.size}"
            raise Corrupt(self._file, f"L1 entry {index}", text)
        return offset

    def inflate(self, cluster: int) -> bytes:
        table, within = divmod(cluster, self._header.per_table)
        offset = self._table(table)
        at = offset + within * ENTRY
        entry = _ENTRY.unpack(self._file.pread(at, ENTRY))[0] if offset else 0
        if not entry & COMPRESSED:
            raise Corrupt(self._file, f"byte {at}", f"guest cluster {cluster} is not compressed")
        start, length = self._header.compressed(entry)
        if start + length > self._file.size:
            text = f"compressed cluster at {start}, the file ends at {self._file.size}"
            raise Corrupt(self._file, f"byte {at}", text)
        raw = self._file.pread(start, length)
        place = f"byte {start}"
        try:
            data = zlib.decompressobj(WINDOW).decompress(raw, self.cluster_size)
        except zlib.error as error:
            text = f"guest cluster {cluster} does not inflate: {error}"
            raise Corrupt(self._file, place, text) from error
        if len(data) != self.cluster_size:
            text = f"guest cluster {cluster} inflates to {len(data)} bytes"
            raise Corrupt(self._file, place, f"{text}, expected {self.cluster_size}")
        return data

    def details(self) -> dict[str, Any]:
        header = self._header
        return {
            "version": 1,
            "cluster_size": header.cluster_size,
            "l2_entries": header.per_table,
            "encryption": ENCRYPTION[header.encryption],
            "backing_file": header.parent.names[0] if header.parent else None,
        }

    def metadata(self) -> Iterator[Span]:
        """Sorted, those that touch joined."""
        header = self._header
        places = [(0, HEADER), header.name, (header.l1_offset, header.l1_size * ENTRY)]
        places += [(at, header.table_size) for at in self._l1 if 0 < at < MAX_HOST]
        start = end = 0
        for at, length in sorted(places):
            if at > end:
                yield Span(start, end - start)
                start = at
            end = max(end, at + length)
        yield Span(start, end - start)

    # Writing

    def _open_for_writing(self) -> None:
        header, size = self._header, self.cluster_size
        if header.l1_offset % ENTRY:
            text = f"L1 table at {header.l1_offset}, not a multiple of {ENTRY}: not written"
            raise Unsupported(self._file, "header+40", text, hint="attach it with --read-only")
        survey = refuse_damage(self._file, header)
        # The next cluster that nothing uses; the L1 table may end past the file's end.
        self._end = -(-max(self._file.size, header.l1_end) // size) * size
        if self._file.is_device:
            self._end = self._file.size // size * size
        # Sorted offsets of clusters that nothing uses, and nobody knows what is in them.
        self._free: list[int] = []
        for first, count in survey.tally.unused(self._end // size):
            self._free += range(first * size, (first + min(count, MAX_HOLES)) * size, size)
            if len(self._free) > MAX_HOLES:
                break
        self._begun = False
        self._unpacked = False  # compressed clusters are not there any more
        self.caps = Caps(write=True, discard=True)

    def begin(self) -> Plan:
        self._begun = True
        return Plan()

    def reserve(self, count: int) -> Reservation:
        size, count = self.cluster_size, max(1, count)
        if self._free:
            taken, self._free = self._free[:count], self._free[count:]
            runs = [(first * size, n) for first, n in runs_of(at // size for at in taken)]
            steps: list[Step] = [Punch(at, n * size) for at, n in runs]
            end = taken[-1] + size
            if self._file.size < end:
                steps += [Extend(end), Barrier]  # left by a reservation whose plan has failed
            return Reservation(tuple(Run(at, n) for at, n in runs), Plan(*steps), reused=True)
        first = self._append(count)
        # What is there already was left by such a one, or by a writer that was cut.
        stale = self._file.size > first
        wipe = (Punch(first, count * size),) if stale else ()
        plan = Plan(*wipe, Extend(self._end), Barrier)
        return Reservation((Run(first, count),), plan, reused=stale)

    def _append(self, count: int) -> int:
        """The offset of the first of `count` adjacent clusters behind all others."""
        first, end = self._end, self._end + count * self.cluster_size
        if self._file.is_device or end > MAX_HOST:
            code = errno.ENOSPC if self._file.is_device else errno.EFBIG
            raise OSError(code, os.strerror(code))
        self._end = end
        return first

    def release(self, runs: Sequence[Run]) -> None:
        for run in runs:
            for i in range(run.count):
                bisect.insort(self._free, run.host_offset + i * self.cluster_size)
        self._shrink()

    def _shrink(self) -> None:
        while self._free and self._free[-1] == self._end - self.cluster_size:
            self._end = self._free.pop()

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        if not dirty:
            return Plan()
        changes = {item.cluster: item.host_offset for item in dirty}
        barrier = any(item.barrier for item in dirty)
        return self._map(changes, barrier=barrier)

    def _map(self, changes: Mapping[int, int], *, barrier: bool) -> Plan:
        """Guest cluster -> entry.  Tables that are missing are made."""
        header = self._header
        wanted = {cluster // header.per_table for cluster in changes}
        fresh: dict[int, bytearray] = {}
        roots: dict[int, bytearray] = {}
        clusters = -(-header.table_size // self.cluster_size)
        for index in sorted(index for index in wanted if not self._l1[index]):
            offset = self._append(clusters)
            fresh[offset] = bytearray(clusters * self.cluster_size)
            self._l1[index] = offset
            self._put(roots, header.l1_offset + index * ENTRY, offset)
        entries: dict[int, bytearray] = {}
        for cluster, host in changes.items():
            index, within = divmod(cluster, header.per_table)
            table = self._l1[index]
            if table in fresh:
                fresh[table][within * ENTRY : (within + 1) * ENTRY] = host.to_bytes(ENTRY, "big")
            elif self._put(entries, table + within * ENTRY, host) & COMPRESSED:
                self._unpacked = True
        steps: list[Step] = []
        if fresh:
            steps.append(Extend(self._end))
            steps += coalesce(fresh)
        if fresh or barrier:
            steps.append(Barrier)
        return Plan(*steps, *coalesce(entries), *coalesce(roots), Barrier)

    def _put(self, sectors: dict[int, bytearray], at: int, entry: int) -> int:
        """Change an entry in its sector, which it does not cross; what it was."""
        within = at % SECTOR
        sector = sectors.get(at - within)
        if sector is None:
            sector = bytearray(self._file.pread_padded(at - within, SECTOR))
            sectors[at - within] = sector
        old = int.from_bytes(sector[within : within + ENTRY], "big")
        sector[within : within + ENTRY] = entry.to_bytes(ENTRY, "big")
        return old

    def discard(self, first: int, count: int) -> Plan:
        if self.parent:
            raise Unsupported(self._file, "", "no entry hides a parent's data")
        per = self._header.per_table
        last = min(first + count, -(-self.size // self.cluster_size))
        sectors: dict[int, bytearray] = {}
        freed: list[int] = []
        while first < last:
            index, within = divmod(first, per)
            stop = min(last, (index + 1) * per)
            table = self._l1[index]
            if table:
                old = read_table(self._file, table + within * ENTRY, stop - first)
                for i, entry in enumerate(old, within):
                    if not entry:
                        continue
                    self._put(sectors, table + i * ENTRY, 0)
                    if entry & COMPRESSED:
                        self._unpacked = True
                    else:
                        freed.append(entry)
            first = stop
        if not sectors:
            return Plan()
        size = self.cluster_size
        freed.sort()
        holes = [(at * size, n * size) for at, n in runs_of(host // size for host in freed)]
        self._free = sorted(self._free + freed)
        return Plan(*coalesce(sectors), Barrier, *(Punch(at, n) for at, n in holes))

    def end(self) -> Plan:
        if not self._begun:
            return Plan()
        if self._file.is_device:
            return Plan(Barrier)
        if self._unpacked:
            return self._sweep()
        self._shrink()
        return Plan(Truncate(self._end), Barrier)

    def _sweep(self) -> Plan:
        """Who else has data in the places of compressed clusters, only all tables can tell."""
        size, survey = self.cluster_size, refuse_damage(self._file, self._header)
        end = survey.tally.last_used() + 1
        holes = islice(survey.tally.unused(end), MAX_HOLES)
        steps: list[Step] = [Punch(first * size, count * size) for first, count in holes]
        return Plan(*steps, Truncate(end * size), Barrier)

    # The whole image

    def resize(self, size: int) -> Plan:
        header, file = self._header, self._file
        if size < self.size:
            raise Unsupported(file, "", "QCOW images do not become smaller")
        if self.parent:
            raise Unsupported(file, "", "the parent's data would show in the new space")
        entries = -(-size // (self.cluster_size * header.per_table))
        if entries * ENTRY > MAX_L1 or size >= 1 << 63:
            text = f"an L1 table of {entries} entries, at most {MAX_L1 // ENTRY}"
            raise Unsupported(file, "size", text)
        head = bytearray(file.pread_padded(0, SECTOR))
        head[SIZE_AT : SIZE_AT + 8] = size.to_bytes(8, "big")
        if entries == header.l1_size:
            return Plan(Write(0, bytes(head)), Barrier)
        # A larger L1 table, whole before the header names it.
        length = -(-entries * ENTRY // self.cluster_size)
        offset = self._append(length)
        table = file.pread_padded(header.l1_offset, header.l1_size * ENTRY)
        head[L1_AT : L1_AT + 8] = offset.to_bytes(8, "big")
        return Plan(
            Extend(self._end),
            Write(offset, table.ljust(length * self.cluster_size, b"\0")),
            Barrier,
            Write(0, bytes(head)),
            Barrier,
        )

    def rebase(self, parent: Image | None, name: str) -> Plan:
        file, text = self._file, os.fsencode(name) if parent else b""
        if len(text) > MAX_NAME:
            raise Unsupported(file, "parent", f"a name of {len(text)} bytes, at most {MAX_NAME}")
        steps: list[Step] = []
        offset = 0
        if text:
            # A place of its own: behind the header there is room for the old name only.
            clusters = -(-len(text) // self.cluster_size)
            offset = self._append(clusters)
            padded = text.ljust(clusters * self.cluster_size, b"\0")
            steps = [Extend(self._end), Write(offset, padded), Barrier]
        head = bytearray(file.pread_padded(0, SECTOR))
        place = offset.to_bytes(8, "big") + len(text).to_bytes(4, "big")
        head[BACKING_AT : BACKING_AT + len(place)] = place
        return Plan(*steps, Write(0, bytes(head)), Barrier)
