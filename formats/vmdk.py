"""VMDK: what VMware's programs, VirtualBox and qemu call so, in all its subformats.

A disk is a text, the descriptor (vmdk_descriptor.py), and extents: flat files, sparse files
(vmdk_sparse.py; read-only where they are compressed), ESX's sparse files (vmdk_cowd.py,
vmdk_sesparse.py), and stretches of zeros.  A monolithicSparse or streamOptimized image has its
descriptor in the one file that it consists of.

Source: VMware, Virtual Disk Format 5.0 and 1.1.  Images made by qemu-img 7.2 and VirtualBox 7.2
were tried, and hand-made ones of what neither makes; none made by ESX were at hand.

What is done otherwise than by others, and why:

- Extents of zeros and those that may not be accessed keep their place on the disk; a write to one
  fails.  Where there is nothing but such and flat extents, the flat ones are written.
- What createType says decides nothing: the lines of the extents do.
- The CID changes at the first write of a session, in place and with as many digits.
- A discarded grain keeps its place in the file, as a hole, until its cluster is written again: the
  format has no list of free grains.
- With VirtualBox's differencing images parentCID says that there is no parent; ddb.uuid.parent
  says which one.

Refused by name: raw device maps, encryption, extents that have no descriptor, and for writing also
compressed and seSparse extents, tracked changes (changeTrackPath), sparse extents of which one
may not be written or which do not fit together (grains that do not begin where extents do).
"""

from __future__ import annotations

import errno
import math
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import (
    vmdk_check,
    vmdk_create,
    vmdk_parent,
    vmdk_resize,
    vmdk_sesparse,
    vmdk_stream,
)
from virtmount.formats.vmdk_descriptor import (
    MAX_LENGTH,
    looks_like_descriptor,
    parse,
    rewrite,
)
from virtmount.formats.vmdk_entries import ENTRY, SECTOR
from virtmount.formats.vmdk_grains import ZERO_GRAIN, Tables
from virtmount.formats.vmdk_parts import MAGICS, Part, close_siblings, open_parts
from virtmount.formats.vmdk_sparse import SparseExtent
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
from virtmount.plan import Barrier, Plan, Punch, Step
from virtmount.upkeep import Choice, Finding, New, Packer, Progress, Repair

FLAT_CLUSTER = 64 << 10  # nominal
MAX_LEAF = 4096  # entries


class VMDK(Image):
    name: ClassVar[str] = "vmdk"
    suffixes: ClassVar[tuple[str, ...]] = ("vmdk",)
    creates: ClassVar[bool] = True
    checks: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, Choice]] = vmdk_create.CHOICES

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        if head.startswith(MAGICS):
            return Match.SURE
        # Nobody has so small a disk, and no descriptor is larger; what says that it is one is
        # refused by name.
        text = size <= MAX_LENGTH or head.startswith(b"# Disk DescriptorFile")
        return Match.SURE if text and looks_like_descriptor(head) else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._file = file
        self.files = [file]
        try:
            self._open(options)
        except BaseException:
            close_siblings(self.files)
            raise

    def _open(self, options: Options) -> None:
        opened = open_parts(self._file, options)
        self.files, self._parts = opened.files, opened.parts
        self._descriptor, self._text_at = opened.descriptor, opened.text_at
        self._monolithic = opened.monolithic
        self._refuse_descriptor()
        self._starts = [part.start for part in self._parts]
        self.size = self._parts[-1].end
        self.variant = self._descriptor.create_type or "without createType"
        self._arrange()
        self._name_parent(options)
        self._begun = False
        self._prepare()

    # What it is

    def _refuse_descriptor(self) -> None:
        descriptor = self._descriptor
        for key in descriptor.values:
            if key.startswith("encryption."):
                raise Unsupported(self._file, "descriptor", f"{key}: encrypted")
        if not self._file.writable:
            return
        if path := descriptor.values.get("changetrackpath"):
            text = f"changeTrackPath {path!r}: writes would not be tracked"
            raise Unsupported(self._file, "descriptor", text, hint="--read-only")
        for part in self._parts:
            if part.tables is not None and part.tables.compressed:
                text = "compressed extents are written once, from front to back"
                raise Unsupported(
                    part.tables.file, "header+8", text, hint="--read-only, or virtmount convert"
                )

    def _arrange(self) -> None:
        """Clusters such that each lies in one extent, or in flat ones only; see leaf()."""
        parts = self._parts
        grains = {part.grain for part in parts if part.grain is not None}
        edges = [part.start for part in parts[1:]]
        self._regular = True
        if not grains:
            self.cluster_size = FLAT_CLUSTER
        elif len(grains) == 1 and not any(edge % max(grains) for edge in edges):
            self.cluster_size = max(grains)
        else:
            self._regular = False
            common = math.gcd(*grains, *edges)
            self.cluster_size = common & -common
            if self._file.writable:
                text = "grains that do not begin where extents do: not written"
                raise Unsupported(self._file, "descriptor", text, hint="--read-only")
        common = math.gcd(self.cluster_size, *edges)
        self._grain = common & -common
        tabled = [part for part in parts if part.tables is not None] if self._regular else []
        leaf = MAX_LEAF
        for part in tabled:
            assert part.tables is not None
            leaf = min(leaf, part.tables.per_table)
            if first := part.start // self.cluster_size:
                leaf = min(leaf, first & -first)
        self.entries_per_leaf = leaf
        # Tables of another kind than the first one's are read entry by entry.
        self._decoded = tabled[0].tables if tabled else None
        if self._decoded is not None:
            self.layout = layout(self._decoded)
        if len(parts) == 1 and parts[0].kind is Kind.DATA:
            part = parts[0]
            if part.base + self.size <= self.files[part.number].size:
                self.flat, self.flat_file = part.base, part.number
        self.memory = sum(sparse.memory() for sparse in self._sparse())

    def _sparse(self) -> Iterator[Tables | vmdk_sesparse.SeSparseExtent]:
        for part in self._parts:
            if part.tables is not None:
                yield part.tables
            elif part.se_sparse is not None:
                yield part.se_sparse

    def _tables(self) -> list[Tables]:
        return [part.tables for part in self._parts if part.tables is not None]

    def _name_parent(self, options: Options) -> None:
        descriptor = self._descriptor
        self.identity = descriptor.uuid("image")
        cid = descriptor.cid
        self.stamp = None if cid is None else f"{cid:08x}"
        self.parent = vmdk_parent.reference(self._file, descriptor, options)
        if (
            self.parent is not None
            and not self._tables()
            and not any(part.se_sparse for part in self._parts)
        ):
            if self.flat is None:
                return
            self.parent = None  # every byte is here

    def _prepare(self) -> None:
        writable = self._file.writable
        for tables in self._tables():
            if writable:
                tables.prepare()
            elif tables.unclean:
                tables.merge(lenient=True)
        self._writing = list(self._tables()) if writable else []
        if self._writing and len(self._parts) > 1:
            self.zones = [(part.end, part.number) for part in self._parts]
        fixed = any(part.kind in (Kind.SHARED, Kind.INVALID) for part in self._parts)
        self.caps = Caps(
            write=writable,
            discard=writable and not fixed,
            zero_hides_parent=all(tables.zeroed for tables in self._tables()),
        )

    # Reading

    @property
    def grain(self) -> int:
        return self._grain

    def leaf(self, index: int) -> Leaf:
        first = index * self.entries_per_leaf * self.cluster_size
        end = min(first + self.entries_per_leaf * self.cluster_size, self.size)
        part = self._part(first)
        if end > part.end:
            return Leaf(kind=Kind.PARTIAL)  # several extents
        if part.kind is Kind.DATA:
            return Leaf(base=part.base + first - part.start, data_file=part.number)
        if part.kind in (Kind.ZERO, Kind.INVALID):
            return Leaf(kind=part.kind)
        tables = part.tables
        if tables is None or self._decoded is None or not alike(tables, self._decoded):
            return Leaf(kind=Kind.PARTIAL)
        table, within = divmod((first - part.start) // self.cluster_size, tables.per_table)
        at = tables.table(table)
        if at is None:
            return Leaf()
        return Leaf(table=at + within * ENTRY, table_file=part.number, data_file=part.number)

    def _part(self, offset: int) -> Part:
        return self._parts[bisect_right(self._starts, offset) - 1]

    def _between(self, start: int, end: int) -> Iterator[tuple[Part, int, int]]:
        """The parts that have the guest bytes start … end, with the stretch that each has."""
        index = bisect_right(self._starts, start) - 1
        end = min(end, self.size)
        while start < end:
            part = self._parts[index]
            stop = min(end, part.end)
            yield part, start, stop
            start, index = stop, index + 1

    def slow(self, cluster: int) -> Sequence[Extent]:
        start = cluster * self.cluster_size
        end = start + self.cluster_size
        found: list[Extent] = []
        for part, low, high in self._between(start, end):
            found += part.pieces(low, high)
        # Behind the disk's end nobody looks; pieces are multiples of `grain` all the same.
        last = found[-1]
        found[-1] = last._replace(length=end - last.guest_offset)
        return found

    def inflate(self, cluster: int) -> bytes:
        offset = cluster * self.cluster_size
        part = self._part(offset)
        if not isinstance(part.tables, SparseExtent) or not part.tables.compressed:
            raise Corrupt(self._file, f"cluster {cluster}", "not compressed")
        grain, within = divmod(offset - part.start, part.tables.grain)
        data = part.tables.inflate(grain)
        return data[within : within + self.cluster_size]

    def metadata(self) -> Iterable[Span]:
        if self._monolithic:
            yield Span(self._text_at, self._descriptor.room or 0)
        for sparse in self._sparse():
            for offset, length in sparse.metadata():
                yield Span(offset, length, sparse.number)

    def details(self) -> dict[str, Any]:
        descriptor = self._descriptor
        return {
            "create_type": descriptor.create_type,
            "cid": self.stamp,
            "parent_cid": None if descriptor.parent_cid is None else f"{descriptor.parent_cid:08x}",
            "adapter": descriptor.values.get("ddb.adaptertype"),
            "thin": descriptor.values.get("ddb.thinprovisioned") == "1",
            "unclean": any(tables.unclean for tables in self._tables()),
            "extents": [self._describe(part) for part in self._parts],
        }

    def _describe(self, part: Part) -> dict[str, Any]:
        sparse = part.tables or part.se_sparse
        kinds = {Kind.ZERO: "zero", Kind.INVALID: "no access", Kind.SHARED: "flat, read-only"}
        told: dict[str, Any] = {
            "type": sparse.kind if sparse else kinds.get(part.kind, "flat"),
            "size": part.end - part.start,
        }
        if part.kind not in (Kind.ZERO, Kind.INVALID):
            told["file"] = self.files[part.number].path.name
        if sparse:
            told["grain"] = sparse.grain
        if isinstance(sparse, SparseExtent):
            told["version"] = sparse.version
            told["compressed"] = sparse.compressed
            told["redundant_tables"] = sparse.redundant is not None
            told["zeroed_grains"] = sparse.zeroed
        return told

    # Writing

    def begin(self) -> Plan:
        """Another CID (children compare it), and the extents' unclean flags."""
        self._begun = True
        steps: list[Step] = list(self._new_cid())
        for tables in self._writing:
            steps += tables.begin()
        return Plan(*steps, Barrier)

    def _new_cid(self) -> Iterator[Step]:
        descriptor = self._descriptor
        old = descriptor.text
        new = descriptor.with_new_cid() or old
        if descriptor.uuid("modification"):
            start, end = descriptor.spans["ddb.uuid.modification"]
            value = str(uuid.uuid4()).encode()
            if end - start == len(value):  # and no byte moves
                new = new[:start] + value + new[end:]
        self._descriptor = parse(self._file, "descriptor ", new, descriptor.room)
        yield from rewrite(old, new, self._text_at, descriptor.room)

    def reserve(self, count: int) -> Reservation:
        return self._reserve(self._writing[0] if self._writing else None, count)

    def reserve_at(self, count: int, guest_offset: int) -> Reservation:
        return self._reserve(self._part(guest_offset).tables, count)

    def _reserve(self, tables: Tables | None, count: int) -> Reservation:
        if tables is None:
            text = "this extent holds zeros only, or may not be written"
            raise OSError(errno.EROFS, f"{self._file}: {text}")
        run, plan, reused = tables.reserve(count)
        return Reservation((run,), plan, reused)

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        if not dirty:
            return Plan()
        changes: dict[int, dict[int, int]] = {}
        parts: dict[int, Tables] = {}
        for item in dirty:
            part = self._part(item.cluster * self.cluster_size)
            assert part.tables is not None
            parts[part.number] = part.tables
            grain = item.cluster - part.start // self.cluster_size
            changes.setdefault(part.number, {})[grain] = item.host_offset
        first: list[Step] = [Barrier] if any(item.barrier for item in dirty) else []
        return Plan(*first, *self._mapped(parts[n].commit(c) for n, c in changes.items()))

    @staticmethod
    def _mapped(changes: Iterable[tuple[list[Step], list[Step]]]) -> list[Step]:
        """Tables, and what names new ones after a barrier."""
        tables: list[Step] = []
        directories: list[Step] = []
        for low, high in changes:
            tables += low
            directories += high
        if directories:
            directories.append(Barrier)
        return [*tables, Barrier, *directories] if tables else []

    def discard(self, first: int, count: int) -> Plan:
        punches: list[Step] = []
        marks: list[tuple[list[Step], list[Step]]] = []
        start = first * self.cluster_size
        for part, low, high in self._between(start, start + count * self.cluster_size):
            if part.kind is Kind.DATA:
                punches.append(Punch(part.base + low - part.start, high - low, part.number))
            if part.tables is None:
                continue
            grain = (low - part.start) // self.cluster_size
            grains = -(-(high - low) // self.cluster_size)
            punches += part.tables.punches(grain, grains)
            if self.parent is not None:
                marks.append(part.tables.mark_zero(grain, grains))
        return Plan(*self._mapped(marks), *punches)

    def release(self, runs: Sequence[Run]) -> None:
        for run in runs:
            next(t for t in self._writing if t.number == run.file).release(run)

    def end(self) -> Plan:
        if not self._begun:
            return Plan()
        self._begun = False
        steps: list[Step] = []
        for tables in self._writing:
            steps += tables.end(over_parent=self.parent is not None)
        return Plan(*steps, Barrier) if steps else Plan()

    # Whole images

    @classmethod
    def create(cls, new: New) -> Plan:
        return vmdk_create.create(new)

    @classmethod
    def packer(cls, new: New) -> Packer:
        return vmdk_stream.StreamPacker(new)

    @classmethod
    def check(
        cls, file: HostFile, options: Options, repair: Repair
    ) -> Iterator[Finding | Plan | Progress]:
        return vmdk_check.check(cls, file, options, repair)

    def tidy(self, holes: Mapping[int, Sequence[int]]) -> Iterator[Plan]:
        """For check: a session that writes nothing, so the CID stays, for children to find.

        `holes` are grains that nothing uses, by file.
        """
        self._begun = True
        yield Plan(*(step for tables in self._writing for step in tables.begin()), Barrier)
        for tables in self._writing:
            for offset in holes.get(tables.number, ()):
                tables.release(Run(offset, 1, tables.number))
        yield self.end()

    def resize(self, size: int) -> Plan:
        return vmdk_resize.grow(
            self.files, self._parts, self._descriptor, self._text_at, size, self._monolithic
        )

    def rebase(self, parent: Image | None, name: str) -> Plan:
        new = vmdk_parent.rebased(self._file, self._descriptor, parent, name)
        steps = rewrite(self._descriptor.text, new, self._text_at, self._descriptor.room)
        return Plan(*steps, Barrier)


def layout(tables: Tables) -> Layout:
    """How the engine decodes an extent's tables."""
    rules = [Rule(0xFFFFFFFF, 0, Kind.ABSENT)]
    if tables.zeroed:
        rules.append(Rule(0xFFFFFFFF, ZERO_GRAIN, Kind.ZERO))
    if tables.compressed:
        rules.append(Rule(0, 0, Kind.COMPRESSED))
    return Layout(
        width=ENTRY,
        byteorder="little",
        mask=0xFFFFFFFF,
        scale=SECTOR,
        rules=tuple(rules),
        low=tables.header_size,
    )


def alike(tables: Tables, other: Tables) -> bool:
    """Whether one layout decodes both."""
    return tables is other or layout(tables) == layout(other)
