"""QCOW2, versions 2 and 3: read and written.

Source: qemu's docs/interop/qcow2.rst for the format; the order of writes is our own.  Tried with
images made by qemu-img 7.2.  Refused by name: unknown incompatible features and ciphers; for
writing also images that are marked dirty or corrupt.  Bitmaps that must follow all changes are
marked as not to be trusted before the first write (qcow2_bitmaps.py).

What the file says while it is written, and why:

1. A plan of commit() or discard() has up to four epochs, with barriers between them: counts and
   new L2 tables; new refcount blocks in the refcount table; L2 and L1 entries; the counts of what
   those entries no longer name, and holes there.  A crash between any two leaks, no more.
2. Everything is written in sectors of 512 bytes, in which entries and counts lie whole.
3. An L1 entry names a table only once the table is durable.  A table that may be shared (its L1
   entry is not COPIED, or its count is not 1) is copied before it is changed, and so is data: what
   snapshots hold is never written.
4. Counts are right after every barrier, so lazy_refcounts needs no dirty bit: it is never set.
5. Tables are not cached, except for L1 and, between leaf() and slow(), one piece of an L2 table:
   between two plans the file holds the truth.
6. Data in an external data file lies at its guest offset, and is not counted.
"""

from __future__ import annotations

import errno
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from virtmount.errors import Corrupt, NeedsRecovery, NotAnImage, Unsupported
from virtmount.formats import (
    qcow2_bitmaps,
    qcow2_change,
    qcow2_create,
    qcow2_crypt,
    qcow2_data_file,
)
from virtmount.formats.qcow2_check import check
from virtmount.formats.qcow2_entries import COMPRESSED, COPIED, OFFSET, ZERO, Entries
from virtmount.formats.qcow2_header import (
    AUTOCLEAR_AT,
    BITMAPS,
    BITMAPS_VALID,
    DATA_FILE_RAW,
    LAZY_REFCOUNTS,
    MAGIC,
    REPAIR,
    check_l1,
    read_header,
)
from virtmount.formats.qcow2_refcount import (
    BLOCK,
    SECTOR,
    Draft,
    Refcounts,
    read_table,
)
from virtmount.formats.qcow2_snapshots import Record, records
from virtmount.formats.qcow2_tables import ENTRY, Tables, round_up
from virtmount.formats.zstd import Decompressor, ZstdError
from virtmount.hostfile import HostFile
from virtmount.image import (
    DEFAULTS,
    Caps,
    Dirty,
    Extent,
    Image,
    Kind,
    Leaf,
    Match,
    Options,
    Reservation,
    Run,
    Span,
)
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Truncate, Write
from virtmount.siblings import open_sibling
from virtmount.upkeep import Choice, Finding, New, Packer, Progress, Repair, Snapshot

_ENTRY = struct.Struct(">Q")

LEAF = 4096  # entries
EXTENDED_LEAF = 512  # ... of 32 pieces each
NUMBER = 40  # bytes that one takes in a list
MAX_KEPT = 1 << 19  # L1 entries of all states, in images with snapshots that are written
MAX_LOOK = (1 << 18, 1 << 30)  # L2 tables, bytes of them, that are looked through after a crash
SAMPLE = 64  # L2 tables whose counts are looked at before an image is written
WINDOW = -12  # raw deflate with the window that the format prescribes


class QCOW2(Image):
    name: ClassVar[str] = "qcow2"

    checks: ClassVar[bool] = True
    creates: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, Choice]] = qcow2_create.CHOICES
    suffixes: ClassVar[tuple[str, ...]] = ("qcow2", "qcow")

    @classmethod
    def create(cls, new: New) -> Plan:
        return qcow2_create.create(new)

    @classmethod
    def packer(cls, new: New) -> Packer:
        return qcow2_create.QCOW2Packer(new)

    @classmethod
    def check(
        cls, file: HostFile, options: Options, repair: Repair
    ) -> Iterator[Finding | Plan | Progress]:
        return check(file, options, repair)

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
        self._entries = Entries(
            header.version,
            header.cluster_size,
            extended=header.extended,
            data_file=header.data_file is not None,
        )
        self.layout = self._entries.layout()
        self._l2_entries = self._entries.per_table
        self.entries_per_leaf = min(self._l2_entries, EXTENDED_LEAF if header.extended else LEAF)
        l1_offset, l1_size = header.l1_offset, header.l1_size
        if options.snapshot is not None:
            l1_offset, l1_size = self._choose(options.snapshot)
        self._clusters = -(-self.size // header.cluster_size)
        self._l1 = read_table(file, l1_offset, l1_size)
        self._l1_place = l1_offset, l1_size * ENTRY
        self._words: tuple[int, array[int]] | None = None  # leaf, the words of its L2 entries
        # What begin() has to do to a data file: wipe (offset, length), or map (first, count).
        self._unready: list[tuple[int, int]] = []
        self._kept: list[int] = []  # clusters of tables that belong to snapshots only
        self.memory = l1_size * ENTRY
        self._zstd = self._load_zstd() if header.compression == "zstd" else None
        self._own_cut_table()
        self.cipher = qcow2_crypt.cipher(file, header.encryption, header.luks, options)
        # Encrypted, a data file is no raw image: zeros in it are not the guest's.
        self._raw = header.raw_data_file and self.cipher is None
        self._begun = self._failed = False
        if header.data_file is not None:
            self._open_data_file(header.data_file, options)
        try:
            if file.writable:
                self._open_for_writing()
        except BaseException:
            for other in self.files[1:]:
                other.close()
            raise

    def _choose(self, wanted: str) -> tuple[int, int]:
        """Show an internal snapshot instead of the present state: offset and entries of its L1."""
        file, header = self._file, self._header
        if file.writable:
            raise Unsupported(file, "--snapshot", "snapshots are only read", hint="--read-only")
        found: Record | None = None
        known = []
        for record in records(file, header.snapshot_table[0], header.snapshots):
            if record.id == wanted:
                found = record  # an id goes before a name
                break
            if record.name == wanted and found is None:
                found = record
            known.append(record.name)
        if found is None:
            names = ", ".join(map(repr, known[:16])) or "none"
            raise NotAnImage(file, "--snapshot", f"no snapshot {wanted!r}, there are: {names}")
        self.size = header.size if found.size is None else found.size
        check_l1(file, found, self.size, header.cluster_size, self._entries.width)
        self.variant += f", snapshot {found.name or found.id}"
        return found.l1_offset, found.l1_size

    def _open_data_file(self, name: str, options: Options) -> None:
        data = open_sibling(self._file, "header extension 0x44415441", name, options)
        self.files.append(data)
        self.identity_file = 1
        if data.size >= self.size:
            if self._raw:
                self.flat, self.flat_file = 0, 1
        elif self.size:
            # What is not there yet reads as zeros; the first write makes it longer.
            data.patch(self.size - 1, b"\0")

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
        entries, count = self._entries, self.entries_per_leaf
        if self._raw:
            return Leaf(base=index * count * self.cluster_size, data_file=1)
        table, within = divmod(index * count, self._l2_entries)
        offset = self._l2_table(table)
        if not offset:
            return Leaf()
        at = offset + within * entries.width
        if not (entries.extended or entries.data_file or self._header.snapshots):
            return Leaf(table=at)
        words = read_table(self._file, at, count * entries.words)
        self._words = index, words
        if entries.extended or self._misleading(index * count, words):
            return Leaf(kind=Kind.PARTIAL)
        return Leaf(table=at, data_file=int(entries.data_file))

    def _misleading(self, first: int, words: array[int]) -> bool:
        """Whether plain entries say what the rules of the layout must not be trusted with."""
        if self._entries.data_file:
            size = self.cluster_size
            return any(
                entry & (OFFSET | COPIED)
                and not entry & ZERO
                and entry & OFFSET != (first + i) * size
                for i, entry in enumerate(words)
            )
        if not self._file.writable:
            return False
        return not self._counts.all_alone(
            (entry & OFFSET) // self.cluster_size
            for entry in words
            if entry & COPIED and entry & OFFSET and not entry & (COMPRESSED | ZERO)
        )

    def slow(self, cluster: int) -> Sequence[Extent]:
        index, within = divmod(cluster, self.entries_per_leaf)
        if self._words is None or self._words[0] != index:
            self.leaf(index)
        if self._words is None or self._words[0] != index:
            return (Extent(cluster * self.cluster_size, self.cluster_size, Kind.ABSENT),)
        entries, words = self._entries, self._words[1]
        file = self.files[int(entries.data_file)]
        limit = round_up(file.size, self.cluster_size)
        own = words[within * entries.words : (within + 1) * entries.words]
        alone = True
        if self._header.snapshots and file.writable:
            alone = self._counts.count((own[0] & OFFSET) // self.cluster_size) == 1
        return entries.pieces(cluster, own, alone=alone, limit=limit)

    @property
    def grain(self) -> int:
        return self._entries.grain

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
        at = offset + within * self._entries.width
        entry = _ENTRY.unpack(self._file.pread(at, ENTRY))[0] if offset else 0
        if not entry & COMPRESSED:
            raise Corrupt(self._file, f"byte {at}", f"guest cluster {cluster} is not compressed")
        start, length = self._entries.compressed(entry)
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
            "bitmaps": self._bitmap_names(),
            "extended_l2": header.extended,
            "data_file": header.data_file,
            "data_file_raw": header.raw_data_file,
            "encryption": qcow2_crypt.METHODS[header.encryption],
            "backing_file": header.parent.names[0] if header.parent else None,
            "backing_format": header.parent.format if header.parent else None,
        }

    def _bitmap_names(self) -> list[str]:
        header = self._header
        if not header.autoclear & BITMAPS_VALID or BITMAPS not in header.extensions:
            return []
        try:
            found = qcow2_bitmaps.bitmaps(
                self._file, header.extensions[BITMAPS], header.cluster_size
            )
            return [bitmap.name for bitmap in found]
        except Corrupt:
            return []

    def snapshots(self) -> Sequence[Snapshot]:
        header = self._header
        found = records(self._file, header.snapshot_table[0], header.snapshots)
        return [record.shown(header.size) for record in found]

    def metadata(self) -> Iterator[Span]:
        """Sorted, adjacent clusters joined.  Entries that name no possible table are left out."""
        size = self.cluster_size
        limit = round_up(self._file.size, size)
        start = end = 0
        for offset in self._table_clusters():
            if offset == end:
                end += size
            elif offset > end and not offset % size and offset < limit:
                yield Span(start, end - start)
                start, end = offset, offset + size
        yield Span(start, end - start)

    def _table_clusters(self) -> list[int]:
        """Offsets of all clusters that hold the header or tables, sorted, as the entries say."""
        header, size = self._header, self.cluster_size
        blocks = read_table(
            self._file, header.refcount_offset, header.refcount_clusters * size // ENTRY
        )
        offsets = [entry & OFFSET for entry in self._l1 if entry & OFFSET]
        offsets += [entry & BLOCK for entry in blocks if entry & BLOCK]
        offsets += self._kept
        bitmaps = (0, 0)
        if header.autoclear & BITMAPS_VALID:
            bitmaps = qcow2_bitmaps.directory(header.extensions.get(BITMAPS, b""))
            if sum(bitmaps) > self._file.size or bitmaps[0] % size or not bitmaps[0]:
                bitmaps = (0, 0)
        places = {
            (0, size),
            (header.l1_offset, header.l1_size * ENTRY),
            self._l1_place,
            (header.refcount_offset, header.refcount_clusters * size),
            header.snapshot_table,
            header.luks,
            bitmaps,
        }
        for offset, length in places:
            offsets += range(offset, offset + length, size)
        offsets.sort()
        return offsets

    # Writing

    def _open_for_writing(self) -> None:
        header, file = self._header, self._file
        self._keep_snapshots()
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
        self._tables = Tables(
            file,
            self._entries,
            self._counts,
            self._l1,
            header.l1_offset,
            snapshots=bool(header.snapshots),
        )
        self._refuse_uncounted()
        self._refuse_missing()
        if header.data_file is not None:
            look = qcow2_data_file.incomplete if self._raw else qcow2_data_file.wipe
            self._unready = look(file, self._l1, self._entries, self._clusters)
            self.memory += len(self._unready) * 4 * NUMBER
        self.caps = Caps(write=True, discard=True, zero_hides_parent=header.version > 2)

    def _keep_snapshots(self) -> None:
        """Learn where the tables lie that snapshots do not share with the present state."""
        file, header, size = self._file, self._header, self.cluster_size
        if not header.snapshots:
            return
        number = len(self._l1)
        active = {entry & OFFSET for entry in self._l1} if number <= MAX_KEPT else set()
        kept: set[int] = set()
        for record in records(file, header.snapshot_table[0], header.snapshots):
            number += record.l1_size
            if number > MAX_KEPT:
                raise Unsupported(
                    file,
                    "header+60",
                    f"writing to an image with snapshots whose L1 tables have more than {MAX_KEPT} "
                    "entries",
                    hint="attach it with --read-only",
                )
            check_l1(file, record, record.size or 0, size, self._entries.width)
            kept.update(range(record.l1_offset, record.l1_offset + record.l1_size * ENTRY, size))
            for entry in read_table(file, record.l1_offset, record.l1_size):
                if entry & OFFSET and entry & OFFSET not in active:
                    kept.add(entry & OFFSET)
        self._kept = list(kept)
        self.memory += len(kept) * NUMBER

    def _refuse_overlaps(self) -> None:
        """Writing to a table that is two things at once would damage one of them."""
        size, last = self._file.size, -1
        for offset in self._table_clusters():
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
        places = [0, header.refcount_offset, header.l1_offset, *sample[:SAMPLE]]
        places += self._kept[:SAMPLE]
        if header.snapshots:
            places.append(header.snapshot_table[0])
        for offset in places:
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
        end = round_up(self._file.size, size)
        tables = [entry & OFFSET for entry in self._l1 if entry & OFFSET]
        if self._counts.end * size <= end or len(tables) > min(MAX_LOOK[0], MAX_LOOK[1] // size):
            return
        entries = self._entries
        if entries.data_file:
            return
        for offset in tables:
            words = read_table(self._file, offset, size // ENTRY)[:: entries.words]
            for index, entry in enumerate(words):
                host = 0 if entry & ZERO and not entries.extended else entry & OFFSET
                if entry & COMPRESSED:
                    host, _ = entries.compressed(entry)
                if host >= end:
                    raise Corrupt(
                        self._file,
                        f"byte {offset + index * entries.width}",
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
        self._words = None
        yield Draft()
        self._failed = False

    def begin(self) -> Plan:
        self._begun = True
        header = self._header
        steps = self._first_steps()
        plan = Plan()
        if header.data_file is not None:
            data = self.files[1]
            data.unpatch()
            if data.size < self.size and not data.is_device:
                steps.append(Extend(self.size, 1))
            if self._raw:
                plan = self._map_all()
            else:
                steps += [Punch(offset, length, 1) for offset, length in self._unready]
            self._unready = []
        return Plan(*steps, Barrier) + plan if steps else plan

    def _first_steps(self, *, resized: bool = False) -> list[Step]:
        """What every change of the image begins with: marks, and a file of whole clusters."""
        header = self._header
        steps = self._mark_bitmaps(every=resized)
        keep = header.autoclear & (BITMAPS_VALID if steps is not None else 0)
        steps = steps or []
        if header.data_file is not None:
            keep |= header.autoclear & DATA_FILE_RAW
        if header.autoclear != keep:
            # Whoever set the others relies on them only while every writer knows them.
            self._head[AUTOCLEAR_AT : AUTOCLEAR_AT + 8] = keep.to_bytes(8, "big")
            steps.append(Write(0, bytes(self._head)))
        whole = round_up(self._file.size, self.cluster_size)
        if whole > self._file.size and not self._file.is_device:
            steps.append(Extend(whole))
        return steps

    def _mark_bitmaps(self, *, every: bool = False) -> list[Step] | None:
        """None: the bitmaps must be declared inconsistent as a whole."""
        header = self._header
        if not header.autoclear & BITMAPS_VALID:
            return []
        data = header.extensions.get(BITMAPS, b"")
        writes = qcow2_bitmaps.invalidate(self._file, data, header.cluster_size, every=every)
        return None if writes is None else list(writes)

    def _map_all(self) -> Plan:
        """A raw data file holds every cluster: make the tables say so."""
        parts = self._unready
        if not parts:
            return Plan()
        with self._drafting() as draft:
            self._tables.own(draft, {first // self._l2_entries for first, _ in parts})
            for first, count in parts:
                self._tables.map_all(draft, first, first + count)
            return self._tables.settle(draft)

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
            self._tables.own(draft, {new.cluster // self._l2_entries for new in dirty})
            if self._entries.data_file:
                if any(new.host_offset != new.cluster * self.cluster_size for new in dirty):
                    raise ValueError("a cluster that does not lie at its guest offset")
            else:
                hosts = [new.host_offset // self.cluster_size for new in dirty]
                if not self._counts.reserved.issuperset(hosts):
                    raise ValueError("a cluster that was not reserved")
                self._counts.use(draft, hosts)
            for new in dirty:
                self._tables.set(draft, new.cluster, self._entries.mapped(new.host_offset))
            plan = self._tables.settle(draft)
        # Counts need a barrier before the mapping anyway; a data file has none.
        # What is lost of an encrypted cluster would read as noise, not as zeros.
        noise = self.cipher is not None
        wait = self._entries.data_file and (noise or any(new.barrier for new in dirty))
        return Plan(Barrier) + plan if wait else plan

    def discard(self, first: int, count: int) -> Plan:
        hides = self.parent is not None
        if hides and self._header.version < 3:
            raise Unsupported(self._file, "", "version 2 cannot hide a parent's data")
        last = min(first + count, self._clusters)
        size = self.cluster_size
        place = Punch(first * size, min(last * size, self.size) - first * size, 1)
        if self._raw:
            return Plan(place)  # all clusters stay mapped
        with self._drafting() as draft:
            parts = [
                (max(first, index * self._l2_entries), min(last, (index + 1) * self._l2_entries))
                for index in range(
                    first // self._l2_entries, -(-last // self._l2_entries) if first < last else 0
                )
            ]
            parts = [part for part in parts if not self._tables.is_empty(*part, hides)]
            self._tables.own(draft, [low // self._l2_entries for low, _ in parts])
            for low, high in parts:
                self._tables.clear(draft, low, high, self._entries.empty(hides))
            plan = self._tables.settle(draft)
        return plan + Plan(place) if self._entries.data_file and len(plan) else plan

    def end(self) -> Plan:
        if not self._begun or self._failed:
            return Plan()
        if self._file.is_device:
            return Plan(Barrier)
        return Plan(Truncate(self._counts.used_end()), Barrier)

    # Whole images

    def resize(self, size: int) -> Plan:
        old, header, entries = self.size, self._header, self._entries
        for record in records(self._file, header.snapshot_table[0], header.snapshots):
            if record.size is None:
                raise Unsupported(
                    self._file,
                    f"byte {record.at}",
                    f"snapshot {record.name or record.id!r} does not say how large its disk is, "
                    "so this size is the snapshot's as well",
                )
        if size == old:
            return Plan()
        data_file, raw = header.data_file is not None, self._raw
        steps = self._first_steps(resized=True)
        after: list[Step] = []
        if data_file:
            self.files[1].unpatch()
        with self._drafting() as draft:
            if size > old:
                if data_file:
                    steps += [Punch(old, size - old, 1), Extend(size, 1)]
                steps += qcow2_change.grow(
                    self._file,
                    self._tables,
                    draft,
                    old,
                    size,
                    inflate=self.inflate,
                    encrypted=self.cipher is not None,
                    all_mapped=raw,
                )
            else:
                hides = self.parent is not None and header.version > 2
                qcow2_change.shrink(self._tables, draft, old, size, hides=hides)
                if data_file:
                    after = [Truncate(size, 1) if raw else Punch(size, old - size, 1), Barrier]
            plan = self._tables.settle(draft)
        self.size, self._clusters = size, -(-size // entries.cluster_size)
        self._l1_place = self._tables.l1_offset, len(self._l1) * ENTRY
        return Plan(*steps, Barrier) + plan + Plan(*after)

    def rebase(self, parent: Image | None, name: str) -> Plan:
        if not self.caps.write:
            raise Unsupported(self._file, "", "another parent: it was opened read-only")
        if parent is not None and self._header.raw_data_file:
            raise Unsupported(self._file, "header+88", "a raw data file has no parent")
        steps = self._first_steps()
        head = bytes(self._head)
        plan = qcow2_change.rebase(self._file, head, self._header, parent, name)
        return Plan(*steps, Barrier) + plan
