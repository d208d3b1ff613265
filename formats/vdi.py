"""VirtualBox VDI: dynamic, fixed, differencing and undo images.

Source: VirtualBox, VDICore.h, for the fields (vdi_header.py); the order of writes is our own,
because both VirtualBox and qemu write without barriers.  Tried with images made by qemu-img 7.2
(data at 1024) and by VirtualBox 7 (map at 1 MiB; a snapshot over its base).  An undo image is what
VirtualBox treats it as, a differencing one.  Images with a header before 1.1, or with extra data
that is no whole number of sectors, have blocks between sectors: they are read, through inflate(),
and not written.  Refused by name: block sizes that are no power of two.

What the file says while it is written, and why:

1. The map never names a block that the header's count does not cover.  qemu and VirtualBox take
   the count as the number of the next free block, so a count that is too small lets them write
   over data after a crash.  reserve() therefore raises it, durably, before commit() maps.
   A count that is too large costs nothing; `qemu-img check` reports it, and the next session that
   writes makes it right, as `virtmount check --repair` does.
2. On reading, the count means nothing; the next free block is the largest in the map plus one.
3. A block that discard() freed may be mapped again once its unmapping is durable and it reads
   as zeros.
4. At end() no block below the count is unmapped: two programs that compare the count with
   different things (the number of mapped blocks, the next free one) then both find it right.
   Freed blocks at the end of the file are cut off.  Those in the middle are punched and given to
   guest blocks that hold nothing, or over a parent to those that were discarded: they read as
   zeros as before.  Into what is left over a parent the last blocks move.  Where there are more
   than MAX_HOLES of them, or MAX_MOVED bytes, they stay, at the cost of a complaint of
   `qemu-img check`.
5. Over a parent, a discarded block is one that reads as zeros: all that is discarded is marked so,
   also where this image held nothing.
"""

from __future__ import annotations

import errno
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import vdi_check, vdi_create, vdi_map, vdi_parent, vdi_resize
from virtmount.formats.vdi_header import (
    AT,
    BASES,
    DIFFERENCING,
    DYNAMIC,
    ENTRY,
    FIXED,
    MAX_COPIED_BLOCK,
    NO_UUID,
    SECTOR,
    TYPES,
    Header,
    is_vdi,
    put,
    read,
    validate,
)
from virtmount.formats.vdi_map import DISCARDED, NEVER_WRITTEN, runs
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

COUNT_AT = AT["blocks_allocated"]
LEAF = 1024  # entries
MAX_HOLES = 1 << 16  # that one session fills
MAX_MOVED = 64 << 20  # bytes of data that move at the end of one

# What a file block is used for.  Every block below _end has one of these in _use.
STALE = 0  # nothing; its content is unknown
MAPPED = 1
RESERVED = 2  # handed out by reserve(), not mapped yet
CLEAN = 3  # nothing; reads as zeros


class VDI(Image):
    name: ClassVar[str] = "vdi"
    suffixes: ClassVar[tuple[str, ...]] = ("vdi",)
    creates: ClassVar[bool] = True
    checks: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, Choice]] = vdi_create.CHOICES

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if is_vdi(head) else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._file = file
        self.files = [file]
        self._sector, header = read(file)  # the whole header: written at once
        validate(file, self._sector, header, any_parent=options.changing_parent)
        if file.writable:
            _refuse_writing(file, header)
        self._header = header
        self._map_offset = header.map_offset
        self._blocks = header.blocks
        self.variant = TYPES[header.type]
        # VirtualBox rounds down, qemu up; up shows all that was ever written.
        self.size = -(-header.disk_size // SECTOR) * SECTOR
        self.cluster_size = header.block_size
        self.entries_per_leaf = LEAF
        self.identity = _name(header.uuid)
        self.stamp = _name(header.modification_uuid)
        if header.type not in BASES and header.linkage_uuid != NO_UUID:
            self.parent = self._find_parent(options)

        self._use = bytearray(self._blocks)
        in_order = self._scan()
        self._mapped = self._use.count(MAPPED)
        in_file = -(-max(0, file.size - header.data_offset) // header.stride)
        highest = self._use.rfind(MAPPED)
        self._end = max(highest + 1, min(in_file, self._blocks))
        missing = highest >= 0 and self._host(highest) >= file.size
        if missing and (
            file.writable or (header.block_extra and self.cluster_size > MAX_COPIED_BLOCK)
        ):
            # Growing the file would turn what is missing into zeros.
            text = f"block {highest} lies past the end of the file at {file.size}"
            raise Corrupt(file, "map", f"{text}: not written", hint="open it read-only")
        # Layout cannot tell that a block lies in the file from that its extra data does.
        self._copied = not header.in_sectors or (missing and header.block_extra > 0)
        self.layout = self._layout()
        if (
            header.type == FIXED
            and in_order
            and header.stride == self.cluster_size
            and not self._copied
            and file.size >= header.first + self.size
        ):
            self.flat = header.first
        if not file.writable:
            self._use = bytearray()  # only writing asks for it
        self.memory = len(self._use)
        # A block that keeps its place when it is discarded: the engine would look for another one.
        kept = header.type == FIXED and self.flat is None
        self.caps = Caps(
            write=file.writable, discard=file.writable and not kept, zero_hides_parent=True
        )
        self._begun = False

    def _layout(self) -> Layout:
        rules = [
            Rule(0xFFFFFFFF, NEVER_WRITTEN, Kind.ABSENT),
            Rule(0xFFFFFFFF, DISCARDED, Kind.ZERO),
        ]
        if self._copied:
            rules.append(Rule(0, 0, Kind.COMPRESSED))
        return Layout(
            width=ENTRY,
            byteorder="little",
            mask=0xFFFFFFFF,
            scale=self._header.stride,
            bias=self._header.first,
            rules=tuple(rules),
            low=self._header.first,
        )

    def _find_parent(self, options: Options) -> ParentRef:
        header = self._header
        parent, modification = header.linkage_uuid, header.parent_modification_uuid
        names: tuple[str, ...] = ()
        if not options.changing_parent:
            names = vdi_parent.find(self._file, parent, modification, options)
        return ParentRef(names, self.name, _name(parent), searched=True, stamp=_name(modification))

    def _scan(self) -> bool:
        """Mark every mapped block in _use; True if the map is 0, 1, 2 … without a gap.

        Two owners of one block cannot both be right, so nothing is served then.
        """
        use, blocks = self._use, self._blocks
        in_order = 0  # entries
        for first, entries in self._entries(0, blocks):
            start, end = entries[0], entries[0] + len(entries)
            # Most stretches of most maps are runs.
            if (
                end <= blocks
                and entries == array("I", range(start, end))
                and use.find(MAPPED, start, end) < 0
            ):
                use[start:end] = bytes([MAPPED]) * len(entries)
                in_order += len(entries) if start == first else 0
                continue
            for index, block in enumerate(entries, first):
                if block >= DISCARDED:
                    continue
                if block >= blocks or use[block]:
                    raise self._wrong_entry(index, block)
                use[block] = MAPPED
        return in_order == blocks

    def _wrong_entry(self, index: int, block: int) -> Corrupt:
        text = f"block {block} has another owner as well"
        if block >= self._blocks:
            text = f"block {block}, know 0 to {self._blocks - 1}"
        place = f"map entry {index} at {self._map_offset + index * ENTRY}"
        return Corrupt(self._file, place, text, hint="virtmount check --repair")

    def _entries(
        self, first: int, count: int, *, whole: bool = False
    ) -> Iterator[tuple[int, array[int]]]:
        """(index, entries) of the map in pieces; those of NEVER_WRITTEN only are left out, unless
        the `whole` map is asked for."""
        for at, raw in vdi_map.pieces(self._file, self._header, first, count):
            if whole or not vdi_map.is_empty(raw):
                yield at, vdi_map.unpacked(raw)

    def leaf(self, index: int) -> Leaf:
        return Leaf(table=self._map_offset + index * LEAF * ENTRY)

    def inflate(self, cluster: int) -> bytes:
        """Only for blocks between sectors: nothing is compressed in a VDI."""
        at = self._map_offset + cluster * ENTRY
        block = int.from_bytes(self._file.pread(at, ENTRY), "little")
        if not self._copied or block >= self._blocks:
            raise self._wrong_entry(cluster, block)
        host = self._host(block)
        if host >= self._file.size:
            text = f"block {block} lies past the end of the file at {self._file.size}"
            raise Corrupt(self._file, f"map entry {cluster} at {at}", text)
        return self._file.pread_padded(host, self.cluster_size)

    def details(self) -> dict[str, Any]:
        header = self._header
        found: dict[str, Any] = {
            "version": f"{header.version >> 16}.{header.version & 0xFFFF}",
            "block_size": self.cluster_size,
            "blocks": self._blocks,
            "blocks_mapped": self._mapped,
            "blocks_allocated": header.blocks_allocated,
            "map_offset": self._map_offset,
            "data_offset": header.data_offset,
            "uuid": str(header.uuid),
            "modification_uuid": str(header.modification_uuid),
            "comment": header.comment,
        }
        if header.block_extra:
            found["block_extra"] = header.block_extra
        if self.parent is not None:
            found["parent_uuid"] = str(header.linkage_uuid)
            found["parent_modification_uuid"] = str(header.parent_modification_uuid)
            found["parent_found"] = list(self.parent.names)
        return found

    def metadata(self) -> Iterable[Span]:
        return (Span(0, self._header.data_offset),)

    # Writing

    def begin(self) -> Plan:
        """VirtualBox changes the modification UUID once a session; children compare it."""
        self._begun = True
        new = uuid.uuid4()
        put(self._sector, {"modification_uuid": new})
        self.stamp = str(new)
        return Plan(self._write_header(), Barrier)

    def _write_header(self) -> Write:
        put(self._sector, {"blocks_allocated": self._end})
        return Write(0, bytes(self._sector))

    def _start(self, block: int) -> int:
        """Where a block begins, with its extra data."""
        return self._header.data_offset + block * self._header.stride

    def _host(self, block: int) -> int:
        return self._header.first + block * self._header.stride

    def _block(self, host_offset: int) -> int:
        return (host_offset - self._header.first) // self._header.stride

    def reserve(self, count: int) -> Reservation:
        for state in (CLEAN, STALE):
            run = self._free_run(state, count)
            if run:
                self._use[run[0] : run[1]] = bytes([RESERVED]) * (run[1] - run[0])
                plan = Plan() if state == CLEAN else Plan(*self._punches(*run))
                if self._file.size < self._start(run[1]) or self._counted() < run[1]:
                    # Left by a reservation whose plan has failed.
                    plan += Plan(Extend(self._start(run[1])), self._write_header(), Barrier)
                return Reservation(self._runs(*run), plan, reused=True)
        first, last = self._end, min(self._end + max(1, count), self._blocks)
        if first == last:
            raise OSError(errno.ENOSPC, f"{self._file}: all {self._blocks} blocks are in use")
        self._use[first:last] = bytes([RESERVED]) * (last - first)
        self._end = last
        plan = Plan(Extend(self._start(last)), self._write_header(), Barrier)
        return Reservation(self._runs(first, last), plan)

    def _counted(self) -> int:
        """The count that the file's header has."""
        return int.from_bytes(self._file.pread(COUNT_AT, 4), "little")

    def _runs(self, first: int, last: int) -> tuple[Run, ...]:
        if self._header.block_extra:  # lies between them
            return tuple(Run(self._host(block), 1) for block in range(first, last))
        return (Run(self._host(first), last - first),)

    def _punches(self, first: int, last: int) -> Iterator[Punch]:
        for host_offset, count, _ in self._runs(first, last):
            yield Punch(host_offset, count * self.cluster_size)

    def _free_run(self, state: int, count: int) -> tuple[int, int] | None:
        """First and one past the last block of the first run in this state."""
        first = self._use.find(state, 0, self._end)
        if first < 0:
            return None
        last = first + 1
        while last < self._end and last - first < count and self._use[last] == state:
            last += 1
        return first, last

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        if not dirty:
            return Plan()
        changes = {}
        for item in dirty:
            block = self._block(item.host_offset)
            assert self._use[block] == RESERVED
            self._use[block] = MAPPED
            changes[item.cluster] = block
        self._mapped += len(changes)
        first = [Barrier] if any(item.barrier for item in dirty) else []
        return Plan(*first, *self._map_writes(changes), Barrier)

    def _map_writes(self, changes: Mapping[int, int]) -> Iterator[Write]:
        return vdi_map.writes(self._file, self._map_offset, changes)

    def discard(self, first: int, count: int) -> Plan:
        """Fixed images keep their blocks: they are punched where they lie."""
        freed: list[int] = []
        changes: dict[int, int] = {}
        over_parent = self._header.type not in BASES
        count = min(count, self._blocks - first)
        for start, entries in self._entries(first, count, whole=over_parent):
            for index, block in enumerate(entries, start):
                if block < DISCARDED:
                    freed.append(block)
                if block < DISCARDED or (over_parent and block == NEVER_WRITTEN):
                    changes[index] = DISCARDED
        if not changes:
            return Plan()
        punches = [
            punch for run in runs(sorted(freed)) for punch in self._punches(run[0], run[-1] + 1)
        ]
        if self._header.type == FIXED:
            return Plan(*punches)
        for block in freed:
            self._use[block] = CLEAN
        self._mapped -= len(freed)
        return Plan(*self._map_writes(changes), Barrier, *punches)

    def release(self, runs: Sequence[Run]) -> None:
        for run in runs:
            first = self._block(run.host_offset)
            assert self._use.count(RESERVED, first, first + run.count) == run.count
            self._use[first : first + run.count] = bytes([STALE]) * run.count

    def end(self) -> Plan:
        return self.tidy() if self._begun else Plan()

    def tidy(self) -> Plan:
        """Let the count and the file's end say what the map says (4)."""
        use = self._use
        self._end = use.rfind(MAPPED) + 1
        steps: list[Step] = []
        holes = self._holes()
        given = dict(zip(self._unmapped(), holes, strict=False))
        for run in runs(block for block in sorted(given.values()) if use[block] == STALE):
            steps += self._punches(run[0], run[-1] + 1)
        for block in given.values():
            use[block] = MAPPED
        self._mapped += len(given)
        moved = self._moves(holes[len(given) :])
        for source, target in moved.items():
            data = self._file.pread_padded(self._host(source), self.cluster_size)
            steps.append(Write(self._host(target), data))
            use[source], use[target] = STALE, MAPPED
        if given or moved:
            steps += [Barrier, *self._map_writes(given | self._owners(moved)), Barrier]
        self._end = use.rfind(MAPPED) + 1
        steps.append(self._write_header())
        if self._start(self._end) < self._file.size <= self._start(self._blocks):
            steps.append(Truncate(self._start(self._end)))
        return Plan(*steps, Barrier)

    def _moves(self, holes: Sequence[int]) -> dict[int, int]:
        """Which of the last blocks go into these holes, as nothing else may have them."""
        moved: dict[int, int] = {}
        top = self._end
        for target in holes[: MAX_MOVED // self.cluster_size]:
            top = self._use.rfind(MAPPED, 0, top)
            if top < target:
                break
            moved[top] = target
        return moved

    def _owners(self, moved: Mapping[int, int]) -> dict[int, int]:
        """Map entries that name a block in `moved`, with its new place."""
        if not moved:
            return {}
        return {
            index: moved[block]
            for first, entries in self._entries(0, self._blocks)
            for index, block in enumerate(entries, first)
            if block in moved
        }

    def _holes(self) -> list[int]:
        """The blocks below _end that are not mapped, unless a stranger's map has too many."""
        if self._end - self._mapped > MAX_HOLES:
            return []
        stale, clean = bytes([STALE]), bytes([CLEAN])
        return sorted([*self._all(stale), *self._all(clean)])

    def _all(self, state: bytes) -> Iterator[int]:
        block = self._use.find(state, 0, self._end)
        while block >= 0:
            yield block
            block = self._use.find(state, block + 1, self._end)

    def _unmapped(self) -> Iterator[int]:
        """Guest blocks that read as zeros, in order."""
        over_parent = self._header.type not in BASES
        done = 0
        for first, entries in self._entries(0, self._blocks):
            if not over_parent:
                yield from range(done, first)
            for index, block in enumerate(entries, first):
                if block == DISCARDED or (block == NEVER_WRITTEN and not over_parent):
                    yield index
            done = first + len(entries)
        if not over_parent:
            yield from range(done, self._blocks)

    # Whole images

    @classmethod
    def create(cls, new: New) -> Plan:
        return vdi_create.create(new)

    @classmethod
    def check(
        cls, file: HostFile, options: Options, repair: Repair
    ) -> Iterator[Finding | Plan | Progress]:
        return vdi_check.check(cls, file, options, repair)

    def resize(self, size: int) -> Plan:
        """Only larger.  The image has to be opened again afterwards."""
        return vdi_resize.grow(self._file, self._sector, self._header, self._use, size)

    def rebase(self, parent: Image | None, name: str) -> Plan:
        """Only the UUIDs are recorded; without a parent a differencing image becomes a dynamic one.

        `name` is for the message: the parent will be looked for (vdi_parent.py).
        """
        if self._header.type == FIXED:
            raise Unsupported(self._file, self._header.place("type"), "a fixed image has no parent")
        put(self._sector, vdi_create.linkage(self._file, parent, name))
        kind = self._header.type
        if parent is None:
            kind = DYNAMIC
        elif kind in BASES:
            kind = DIFFERENCING
        put(self._sector, {"type": kind})
        return Plan(Write(0, bytes(self._sector)), Barrier)


def _refuse_writing(file: HostFile, header: Header) -> None:
    if header.old:
        text = f"version {header.version >> 16}.{header.version & 0xFFFF} is only read"
        raise Unsupported(file, "header+68", text, hint="open it read-only")
    if not header.in_sectors:
        text = f"{header.block_extra} bytes of extra data a block are only read"
        raise Unsupported(file, header.place("block_extra"), text, hint="open it read-only")


def _name(value: uuid.UUID) -> str | None:
    return None if value == NO_UUID else str(value)
