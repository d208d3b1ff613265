"""QCOW2, versions 2 and 3: read and written.

Source: qemu's docs/interop/qcow2.rst for the format; the order of writes is our own.  Tried with
images made by qemu-img 7.2.  Refused by name: encryption, external data files, extended L2
entries and unknown incompatible features; for writing also internal snapshots and images that are
marked dirty or corrupt.  Bitmaps become inconsistent with the first write, and are marked so.

What the file says while it is written, and why:

1. A plan of commit() or discard() has up to four epochs, with barriers between them: counts and
   new L2 tables; new refcount blocks in the refcount table; L2 and L1 entries; the counts of what
   those entries no longer name, and holes there.  A crash between any two leaks, no more.
2. Everything is written in sectors of 512 bytes, in which entries and counts lie whole.
3. An L1 entry names a table only once the table is durable.  A table that may be shared (its L1
   entry is not COPIED) is copied before it is changed.
4. Counts are right after every barrier, so lazy_refcounts needs no dirty bit: it is never set.
5. Tables are not cached, except for L1: between two plans the file holds the truth.
"""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from virtmount.errors import Corrupt, NeedsRecovery, Unsupported
from virtmount.formats.qcow2_header import AUTOCLEAR_AT, LAZY_REFCOUNTS, MAGIC, REPAIR, read_header
from virtmount.formats.qcow2_refcount import (
    BLOCK,
    SECTOR,
    Draft,
    Refcounts,
    read_table,
    table_bytes,
)
from virtmount.formats.zstd import Decompressor, ZstdError
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
from virtmount.plan import Barrier, Extend, Plan, Step, Truncate, Write

# L1 and L2 entries.
ENTRY = 8
OFFSET = 0x00FFFFFFFFFFFE00  # bits 9-55
COPIED = 1 << 63  # the count is exactly 1
COMPRESSED = 1 << 62
ZERO = 1  # version 3; the offset may still hold a preallocated cluster
PER_SECTOR = SECTOR // ENTRY
_ENTRY = struct.Struct(">Q")

LEAF = 4096  # entries
MAX_LOOK = (1 << 18, 1 << 30)  # L2 tables, bytes of them, that are looked through after a crash
SAMPLE = 64  # L2 tables whose counts are looked at before an image is written
WINDOW = -12  # raw deflate with the window that the format prescribes


class QCOW2(Image):
    name: ClassVar[str] = "qcow2"

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        # Version 1 is another format, QCOW.
        return Match.SURE if head[:4] == MAGIC and head[4:8] != b"\0\0\0\1" else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._file = file
        self.files = [file]
        header = self._header = read_header(file)
        self.variant = f"version {header.version}"
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.parent = header.parent
        self._l2_entries = header.cluster_size // ENTRY
        self._clusters = -(-header.size // header.cluster_size)
        self.entries_per_leaf = min(self._l2_entries, LEAF)
        self.layout = _layout(header.version, header.cluster_size)
        # Where a compressed cluster's entry changes from byte offset to sector count.
        self._sectors_shift = 62 - (header.cluster_size.bit_length() - 1 - 8)
        self._l1 = read_table(file, header.l1_offset, header.l1_size)
        self.memory = header.l1_size * ENTRY
        self._zstd = self._load_zstd() if header.compression == "zstd" else None
        self._own_cut_table()
        self._begun = self._failed = False
        if file.writable:
            self._open_for_writing()

    def _load_zstd(self) -> Decompressor:
        try:
            return Decompressor()
        except OSError as error:
            raise Unsupported(
                self._file, "header+104", f"zstd compression: {error}", hint="apt install libzstd1"
            ) from error

    def _own_cut_table(self) -> None:
        """A file may end inside its last cluster; where that is an L2 table, the rest is zeros."""
        size, missing = self._file.size, -self._file.size % self.cluster_size
        last = size + missing - self.cluster_size
        if not missing or not any(entry & OFFSET == last for entry in self._l1):
            return
        if self._file.writable:
            raise Corrupt(
                self._file,
                f"byte {size}",
                f"the file ends inside an L2 table at {last}",
                hint=f"{REPAIR} {self._file}",
            )
        self._file.patch(size, bytes(missing))

    # Reading

    def leaf(self, index: int) -> Leaf:
        table, within = divmod(index * self.entries_per_leaf, self._l2_entries)
        offset = self._l2_table(table)
        return Leaf(table=offset + within * ENTRY) if offset else Leaf()

    def _l2_table(self, index: int) -> int:
        """The offset of an L2 table, 0 where there is none."""
        offset = self._l1[index] & OFFSET if index < len(self._l1) else 0
        if offset % self.cluster_size or offset + self.cluster_size > self._file.size:
            if not offset:
                return 0
            raise Corrupt(
                self._file,
                f"L1 entry {index}",
                f"L2 table at {offset}, clusters have {self.cluster_size} bytes and the file "
                f"ends at {self._file.size}",
            )
        return offset

    def inflate(self, cluster: int) -> bytes:
        table, within = divmod(cluster, self._l2_entries)
        offset = self._l2_table(table)
        at = offset + within * ENTRY
        entry = _ENTRY.unpack(self._file.pread(at, ENTRY))[0] if offset else 0
        if not entry & COMPRESSED:
            raise Corrupt(self._file, f"byte {at}", f"guest cluster {cluster} is not compressed")
        start, length = self._compressed(entry)
        if start >= self._file.size:
            raise Corrupt(
                self._file,
                f"byte {at}",
                f"compressed cluster at {start}, the file ends at {self._file.size}",
            )
        # The sectors named last need not all be there, nor belong to this cluster.
        raw = self._file.pread_padded(start, length)
        try:
            if self._zstd:
                data = self._zstd.decompress(raw, self.cluster_size)
            else:
                data = zlib.decompressobj(WINDOW).decompress(raw, self.cluster_size)
        except (zlib.error, ZstdError) as error:
            raise Corrupt(
                self._file, f"byte {start}", f"guest cluster {cluster} does not inflate: {error}"
            ) from error
        if len(data) != self.cluster_size:
            raise Corrupt(
                self._file,
                f"byte {start}",
                f"guest cluster {cluster} inflates to {len(data)} bytes, "
                f"expected {self.cluster_size}",
            )
        return data

    def _compressed(self, entry: int) -> tuple[int, int]:
        """Byte offset and longest length of the data of a compressed cluster."""
        start = entry & ((1 << self._sectors_shift) - 1)
        more = (entry & (COMPRESSED - 1)) >> self._sectors_shift
        return start, (more + 1) * SECTOR - start % SECTOR

    def details(self) -> dict[str, Any]:
        header = self._header
        return {
            "version": header.version,
            "cluster_size": header.cluster_size,
            "refcount_bits": 1 << header.refcount_order,
            "compression": header.compression,
            "compatible_features": header.compatible,
            "autoclear_features": header.autoclear,
            "lazy_refcounts": bool(header.compatible & LAZY_REFCOUNTS),
            "dirty": header.dirty,
            "corrupt": header.corrupt,
            "snapshots": header.snapshots,
            "backing_file": header.parent.names[0] if header.parent else None,
            "backing_format": header.parent.format if header.parent else None,
        }

    def metadata(self) -> Iterator[Span]:
        """Sorted, adjacent clusters joined.  Entries that name no possible table are left out."""
        size = self.cluster_size
        limit = _round_up(self._file.size, size)
        start = end = 0
        for offset in self._tables():
            if offset == end:
                end += size
            elif offset > end and not offset % size and offset < limit:
                yield Span(start, end - start)
                start, end = offset, offset + size
        yield Span(start, end - start)

    def _tables(self) -> list[int]:
        """Offsets of all clusters that hold the header or tables, sorted, as the entries say."""
        header, size = self._header, self.cluster_size
        blocks = read_table(
            self._file, header.refcount_offset, header.refcount_clusters * size // ENTRY
        )
        offsets = [entry & OFFSET for entry in self._l1 if entry & OFFSET]
        offsets += [entry & BLOCK for entry in blocks if entry & BLOCK]
        for offset, length in (
            (0, size),
            (header.l1_offset, header.l1_size * ENTRY),
            (header.refcount_offset, header.refcount_clusters * size),
            header.snapshot_table,
        ):
            offsets += range(offset, offset + length, size)
        offsets.sort()
        return offsets

    # Writing

    def _open_for_writing(self) -> None:
        header, file = self._header, self._file
        self._refuse_overlaps()
        self._head = bytearray(file.pread(0, SECTOR))
        self._counts = Refcounts(
            file,
            self._head,
            read_table(
                file,
                header.refcount_offset,
                header.refcount_clusters * header.cluster_size // ENTRY,
            ),
            (span[:2] for span in self.metadata()),
            cluster_size=header.cluster_size,
            order=header.refcount_order,
            table_offset=header.refcount_offset,
        )
        self._refuse_uncounted()
        self._refuse_missing()
        self.caps = Caps(write=True, discard=True, zero_hides_parent=header.version > 2)

    def _refuse_overlaps(self) -> None:
        """Writing to a table that is two things at once would damage one of them."""
        size, last = self._file.size, -1
        for offset in self._tables():
            if offset % self.cluster_size or offset >= size:
                text = f"a table, not a cluster of a file with {size} bytes"
            elif offset == last:
                text = "two tables overlap"
            else:
                last = offset
                continue
            raise Corrupt(self._file, f"byte {offset}", text, hint=f"{REPAIR} {self._file}")

    def _refuse_uncounted(self) -> None:
        """Some writers leave counts alone; free clusters would then be somebody's data."""
        header = self._header
        tables = [entry & OFFSET for entry in self._l1 if entry & OFFSET]
        sample = tables[:: max(1, len(tables) // SAMPLE)]
        for offset in (0, header.refcount_offset, header.l1_offset, *sample[:SAMPLE]):
            if not self._counts.count(offset // self.cluster_size):
                raise NeedsRecovery(
                    self._file,
                    f"byte {offset}",
                    "in use, but its reference count is 0",
                    hint=f"{REPAIR} {self._file}",
                )

    def _refuse_missing(self) -> None:
        """Growing the file would turn what was cut off from it into zeros.

        A crash too may leave counts for what is past the end, but no mapping.  To look at all
        mappings takes so long that very large images are not looked at.
        """
        size = self.cluster_size
        end = _round_up(self._file.size, size)
        tables = [entry & OFFSET for entry in self._l1 if entry & OFFSET]
        if self._counts.end * size <= end or len(tables) > min(MAX_LOOK[0], MAX_LOOK[1] // size):
            return
        for offset in tables:
            for index, entry in enumerate(read_table(self._file, offset, self._l2_entries)):
                host = 0 if entry & ZERO else entry & OFFSET
                if entry & COMPRESSED:
                    host, _ = self._compressed(entry)
                if host >= end:
                    raise Corrupt(
                        self._file,
                        f"byte {offset + index * ENTRY}",
                        f"a cluster at {host}, the file ends at {self._file.size}: not written",
                        hint="open it read-only",
                    )

    @contextmanager
    def _drafting(self) -> Iterator[Draft]:
        """A draft that fails half-way leaves memory and file different: nothing is written then."""
        if not self.caps.write:
            raise Unsupported(self._file, "", "writing: it was opened read-only")
        if self._failed:
            raise OSError(errno.EIO, "an earlier change of the metadata failed")
        self._failed = True
        yield Draft()
        self._failed = False

    def begin(self) -> Plan:
        self._begun = True
        steps: list[Step] = []
        if self._header.autoclear:
            # Whoever set these bits relies on them only while every writer knows them.
            self._head[AUTOCLEAR_AT : AUTOCLEAR_AT + 8] = bytes(8)
            steps.append(Write(0, bytes(self._head)))
        whole = _round_up(self._file.size, self.cluster_size)
        if whole > self._file.size and not self._file.is_device:
            steps.append(Extend(whole))
        return Plan(*steps, Barrier) if steps else Plan()

    def reserve(self, count: int) -> Reservation:
        with self._drafting() as draft:
            try:
                runs, reused = self._counts.reserve(draft, max(1, count), self._l1.count(0))
            except OSError:
                self._failed = False  # nothing has changed
                raise
            plan = self._counts.settle(draft)
        size = self.cluster_size
        return Reservation(tuple(Run(first * size, length) for first, length in runs), plan, reused)

    def release(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self._counts.release(run.host_offset // self.cluster_size, run.count)

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        if not dirty:
            return Plan()
        with self._drafting() as draft:
            self._own_tables(draft, {new.cluster // self._l2_entries for new in dirty})
            hosts = [new.host_offset // self.cluster_size for new in dirty]
            if not self._counts.reserved.issuperset(hosts):
                raise ValueError("a cluster that was not reserved")
            self._counts.use(draft, hosts)
            for new in dirty:
                self._set(draft, new.cluster, (new.host_offset | COPIED,))
            return self._settle(draft)

    def discard(self, first: int, count: int) -> Plan:
        target = ZERO if self.parent else 0
        if target and self._header.version < 3:
            raise Unsupported(self._file, "", "version 2 cannot hide a parent's data")
        last = min(first + count, self._clusters)
        with self._drafting() as draft:
            tables: Iterable[int] = range(
                first // self._l2_entries, -(-last // self._l2_entries) if first < last else 0
            )
            if not target:
                tables = [index for index in tables if self._l1[index] & OFFSET]
            self._own_tables(draft, tables)
            for index in tables:
                low = max(first, index * self._l2_entries)
                self._clear(draft, low, min(last, (index + 1) * self._l2_entries), target)
            return self._settle(draft)

    def end(self) -> Plan:
        if not self._begun or self._failed:
            return Plan()
        if self._file.is_device:
            return Plan(Barrier)
        return Plan(Truncate(self._counts.used_end()), Barrier)

    def _own_tables(self, draft: Draft, indexes: Iterable[int]) -> None:
        """Give each of these L1 entries an L2 table that nothing else uses."""
        l1, size = self._l1, self.cluster_size
        # An entry of 0 is not COPIED either.
        wanted = sorted(i for i in indexes if not (l1[i] & COPIED and l1[i] & OFFSET))
        for i, cluster in zip(wanted, self._counts.allocate(draft, len(wanted)), strict=True):
            new, old = cluster * size, l1[i] & OFFSET
            draft.tables.add(new)
            if old:
                content = self._file.pread(old, size)
                for at in range(0, size, SECTOR):
                    draft.fresh[new + at] = bytearray(content[at : at + SECTOR])
                draft.retired.append(old // size)
            l1[i] = new | COPIED
            draft.roots.add(i // PER_SECTOR)

    def _clear(self, draft: Draft, first: int, last: int, target: int) -> None:
        """Set the L2 entries of guest clusters first … last-1, of one table, to `target`."""
        index, within = divmod(first, self._l2_entries)
        table = self._l1[index] & OFFSET
        old = b""
        if table not in draft.tables:
            # Most of a large discard meets what is empty already: compare before taking apart.
            old = self._file.pread(table + within * ENTRY, (last - first) * ENTRY)
        start = first
        while first < last:
            count = min(last, _round_up(first + 1, PER_SECTOR)) - first
            at = (first - start) * ENTRY
            if old[at : at + count * ENTRY] != _ENTRY.pack(target) * count:
                self._set(draft, first, (target,) * count)
            first += count

    def _set(self, draft: Draft, first: int, entries: tuple[int, ...]) -> None:
        """Replace the L2 entries of guest clusters from `first` on, which lie in one sector."""
        index, within = divmod(first, self._l2_entries)
        table = self._l1[index] & OFFSET
        at = within * ENTRY % SECTOR
        offset = table + within * ENTRY - at
        fresh = table in draft.tables
        sectors = draft.fresh if fresh else draft.mapping
        sector = sectors.get(offset)
        if sector is None:
            sector = bytearray(SECTOR if fresh else self._file.pread(offset, SECTOR))
        code = f">{len(entries)}Q"
        old = struct.unpack_from(code, sector, at)
        if old == entries:
            return
        struct.pack_into(code, sector, at, *entries)
        sectors[offset] = sector
        for entry in old:
            if entry:
                draft.freed += self._named(entry)

    def _named(self, entry: int) -> Iterable[int]:
        """The host clusters to which an L2 entry refers."""
        size = self.cluster_size
        if entry & COMPRESSED:
            start, length = self._compressed(entry)
            return range(start // size, (start + length - 1) // size + 1)
        offset = entry & OFFSET
        return (offset // size,) if offset and not offset % size else ()

    def _settle(self, draft: Draft) -> Plan:
        for sector in draft.roots:
            entries = self._l1[sector * PER_SECTOR : (sector + 1) * PER_SECTOR]
            offset = self._header.l1_offset + sector * SECTOR
            draft.mapping[offset] = bytearray(table_bytes(entries))
        return self._counts.settle(draft)


def _layout(version: int, cluster_size: int) -> Layout:
    # Version 2 has no zero flag: a set bit 0 is damage there.
    flag = Kind.ZERO if version > 2 else Kind.INVALID
    return Layout(
        width=ENTRY,
        byteorder="big",
        mask=OFFSET,
        rules=(
            Rule(COMPRESSED, COMPRESSED, Kind.COMPRESSED),
            Rule(ZERO, ZERO, flag),
            Rule(OFFSET, 0, Kind.ABSENT),
            Rule(COPIED, 0, Kind.SHARED),
        ),
        low=cluster_size,
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
