"""VHD, Microsoft's virtual hard disk of 2006: fixed, dynamic and differencing images.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0.  Tried with images made by
qemu-img 7.2 and 11, VirtualBox 7.2, Windows (Hyper-V, diskpart) and Disk2vhd; read by qemu-img,
libvhdi and 7-Zip.  The parts: vhd_footer.py (structures), vhd_table.py (where blocks lie),
vhd_write.py (writing), vhd_make.py (create, resize, rebase), vhd_check.py.

Size.  A footer has two: current_size, and that of its geometry (C x H x S sectors).  Virtual PC
and qemu without force_size ("vpc ", "qemu") show their guests the geometry's, everybody else
current_size; so do we, by the creator's name, unless the user says `size_from`.  Where a GPT's
second header lies at the end of current_size, the guest was shown that.

Bitmaps.  A bit that is clear makes its sector absent: zeros in a dynamic image, the parent's in a
differencing one.  Most images have only full bitmaps.  Where that has been seen to be so at open,
blocks are the smallest piece (`grain`); else sectors are.

What is looked at in probe().  A fixed image has nothing but a footer behind the disk, so a raw
disk whose guest writes such a sector at its end looks the same.  A whole footer of a fixed disk
of exactly that length is SURE (a guest that also wrote another format's header into its first
sector then makes two, and is refused), and formats.probe() refuses it in a file that is named
like a raw disk.  A bare cookie is LIKELY: then the constructor says what is wrong with it,
and nobody serves it as raw.

Refused by name: block sizes that are no power of two, or not from 4 KiB to 32 MiB; more than
MAX_BLOCKS blocks.
"""

from __future__ import annotations

import datetime
import struct
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

from virtmount.errors import Corrupt, Unsupported
from virtmount.formats import vhd_check, vhd_footer, vhd_make
from virtmount.formats.vhd_footer import (
    DIFFERENCING,
    ENTRY,
    EPOCH,
    FIXED,
    FREE,
    HEADER,
    HEADER_CHECKSUM_AT,
    NO_UUID,
    SECTOR,
    TYPES,
    Copies,
    Copy,
    Locator,
)
from virtmount.formats.vhd_table import Geometry, pieces, touched
from virtmount.formats.vhd_write import Writer
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
    ParentRef,
    Reservation,
    Rule,
    Run,
    Span,
    extents,
)
from virtmount.plan import Plan, Punch
from virtmount.upkeep import Choice, Finding, New, Progress, Repair

FIXED_CLUSTER = 64 << 10  # nominal: what discard gives back
LEAF = 1024  # entries, where blocks are whole
PARTIAL_LEAF = 16  # ... and where each bitmap has to be read
LOOK_SECONDS = 0.5  # spent at open on finding out whether all bitmaps are full

# What is known of a block's bitmap.  PARTLY too where the file ends before the block.
UNKNOWN, WHOLE, PARTLY, EMPTY = 0, 1, 2, 3


class VHD(Image):
    name: ClassVar[str] = "vhd"
    suffixes: ClassVar[tuple[str, ...]] = ("vhd", "avhd", "vpc")
    creates: ClassVar[bool] = True
    checks: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, Choice]] = vhd_make.CHOICES

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        copies = vhd_footer.copies_in(head, tail, size)
        if copies == Copies(None, None):
            return Match.NO
        copy = copies.choose()
        if copy is None:
            return Match.LIKELY
        if copy.is_exact_fixed:
            return Match.SURE if copy.offset + copy.length == size else Match.LIKELY
        header_at = int.from_bytes(copy.raw[16:24], "big")
        header = head[header_at : header_at + HEADER]
        named = header.startswith(vhd_footer.HEADER_COOKIE)
        if copy.is_sparse and named and vhd_footer.is_whole(header, HEADER_CHECKSUM_AT):
            return Match.SURE
        return Match.LIKELY

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._file = file
        self.files = [file]
        self._copies = vhd_footer.find(file)
        copy = self._copies.choose()
        if copy is None:
            raise vhd_footer.no_footer(file, self._copies)
        self._copy = copy
        footer = vhd_footer.parse_footer(file, copy)
        self._footer = footer
        self.variant = TYPES[footer.type]
        self.identity = str(uuid.UUID(bytes=footer.uuid)) if footer.uuid != NO_UUID else None
        self._writer: Writer | None = None
        self._locators: list[Locator] = []
        self._size_from = "current"
        self._size_from_asked = options.size_from
        if options.size_from not in (None, "chs", "current"):
            text = f"{options.size_from!r}, know chs and current"
            raise Unsupported(file, "--size-from", text)
        if footer.type == FIXED:
            self._open_fixed()
        else:
            self._open_sparse(options)

    # Opening

    def _open_fixed(self) -> None:
        file, copy = self._file, self._copy
        if copy.offset < self._footer.current_size:
            text = f"current_size {self._footer.current_size}, the data ends at {copy.offset}"
            raise Corrupt(file, f"footer+48 at {copy.offset}", text)
        self.cluster_size = FIXED_CLUSTER
        self.entries_per_leaf = LEAF
        self.flat = 0
        self.caps = Caps(write=file.writable, discard=file.writable, zero_hides_parent=True)
        self._choose_size(room=copy.offset)

    def _open_sparse(self, options: Options) -> None:
        file, footer = self._file, self._footer
        header, self._header_raw = vhd_footer.parse_header(file, footer.data_offset)
        self._header = header
        self._header_at: int = footer.data_offset
        size = footer.current_size // SECTOR * SECTOR
        vhd_footer.check_header(file, header, self._header_at, size)
        self._header_whole = vhd_footer.is_whole(self._header_raw, HEADER_CHECKSUM_AT)
        if footer.type == DIFFERENCING:
            self.parent = self._open_parent(options)
        block = header.block_size
        self.cluster_size = block
        self.geometry = Geometry(
            header.table_offset, -(-size // block), block, self._metadata(size)
        )
        self._absent = Kind.ABSENT if footer.type == DIFFERENCING else Kind.ZERO
        self.layout = Layout(
            width=ENTRY,
            byteorder="big",
            mask=0xFFFFFFFF,
            scale=SECTOR,
            bias=self.geometry.bitmap,
            rules=(Rule(0xFFFFFFFF, FREE, Kind.ABSENT),),
            low=SECTOR + self.geometry.bitmap,
        )
        self._known = bytearray(self.geometry.blocks)
        self._read: tuple[int, list[tuple[int, int]]] = (-1, [])
        self.memory = len(self._known)
        self.entries_per_leaf = LEAF
        self._whole = self._look_at_bitmaps()
        if not self._whole:
            self.entries_per_leaf = PARTIAL_LEAF
        self._choose_size(room=min(header.entries, self.geometry.blocks) * block)
        if file.writable:
            if not self._header_whole:
                found = int.from_bytes(self._header_raw[36:40], "big")
                expected = vhd_footer.checksum(self._header_raw, HEADER_CHECKSUM_AT)
                raise Corrupt(
                    file,
                    f"header+36 at {self._header_at}",
                    f"checksum {found:08x}, computed {expected:08x}: not written",
                    hint=f"virtmount check --repair {file}",
                )
            self._writer = Writer(file, self.geometry, self._copies, self._copy.raw)
            # XenServer keeps a second map behind the table, of blocks that are whole; it stays
            # true as long as none of them goes away.
            may_discard = footer.type != DIFFERENCING and footer.creator_app != b"tap\0"
            self.caps = Caps(write=True, discard=may_discard)

    def _open_parent(self, options: Options) -> ParentRef:
        """Chains get moved; the parent is known by its unique id.

        The timestamp is the parent's time of last change on the host that the child was made on
        (Windows may leave it 0).  Copying a chain changes it, so it is shown, and check() speaks
        of it, but no parent is refused for it.
        """
        header = self._header
        try:
            self._locators = list(vhd_footer.locators(self._file, header, self._header_at))
        except (Corrupt, Unsupported):
            if not options.changing_parent:
                raise
        wanted = header.parent_uuid
        return ParentRef(
            names=vhd_footer.parent_names(header, self._locators),
            format=self.name,
            identity=str(uuid.UUID(bytes=wanted)) if wanted != NO_UUID else None,
        )

    def _metadata(self, size: int) -> tuple[Span, ...]:
        table = -(-size // self._header.block_size) * ENTRY
        spans = [
            Span(0, SECTOR),
            Span(self._header_at, HEADER),
            Span(self._header.table_offset, -(-table // SECTOR) * SECTOR),
        ]
        self._names = [Span(item.offset, item.room) for item in self._locators]
        return (*spans, *self._names)

    def _choose_size(self, room: int) -> None:
        """Which of the two sizes the disk has; see the module's docstring."""
        footer = self._footer
        current = footer.current_size // SECTOR * SECTOR
        shaped = vhd_footer.size_by_geometry(footer)
        self.size = current
        if self._size_from_asked == "chs":
            if not 0 < shaped <= room:
                place = f"footer+56 at {self._copy.offset}"
                text = f"a geometry of {shaped} bytes, there is room for {room}"
                raise Corrupt(self._file, place, text)
            self.size, self._size_from = shaped, "chs"
        elif (
            self._size_from_asked is None
            and vhd_footer.goes_by_geometry(footer)
            and 0 < shaped < current
            and not self._has_gpt_at_end()
        ):
            self.size, self._size_from = shaped, "chs"

    def _has_gpt_at_end(self) -> bool:
        """Whether the disk's last sector, by current_size, is the second header of a GPT."""
        (last, *_) = [
            extent
            for extent in extents(self, self.size - SECTOR, SECTOR)
            if extent.guest_offset + extent.length >= self.size
        ]
        if last.kind is not Kind.DATA:
            return False
        at = last.host_offset + self.size - SECTOR - last.guest_offset
        return self._file.pread_padded(at, 8) == b"EFI PART"

    # Reading

    def _look_at_bitmaps(self) -> bool:
        """Whether every block is whole.  Stops at the first that is not, or when it takes long:
        then sectors are the pieces, which is right for any image and takes more memory."""
        until = time.monotonic() + LOOK_SECONDS
        looked = 0
        for first, entries in pieces(self._file, self.geometry, 0, self.geometry.blocks):
            for index, entry in enumerate(entries, first):
                if entry == FREE:
                    continue
                if self._state(index, entry) != WHOLE:
                    return False
                looked += 1
                if looked % 64 == 0 and time.monotonic() > until:
                    return False
        return True

    def _state(self, index: int, entry: int) -> int:
        known = self._known[index]
        if known != UNKNOWN:
            return known
        geometry, at = self.geometry, entry * SECTOR
        known = PARTLY
        if at + geometry.stride <= self._file.size:
            raw = self._file.pread(at, geometry.bits)
            if raw.count(0xFF) == len(raw):
                known = WHOLE
            elif raw.count(0) == len(raw):
                known = EMPTY
        self._known[index] = known
        return known

    @property
    def grain(self) -> int:
        return self.cluster_size if self.flat is not None or self._whole else SECTOR

    def leaf(self, index: int) -> Leaf:
        if self.flat is not None:
            return Leaf(base=index * LEAF * FIXED_CLUSTER)
        table = Leaf(table=self.geometry.entry_at(index * self.entries_per_leaf))
        if self._whole:
            return table
        for block, entry in self._entries(index):
            if entry != FREE and self._state(block, entry) != WHOLE:
                return Leaf(kind=Kind.PARTIAL)
        return table

    def _entries(self, index: int) -> list[tuple[int, int]]:
        """Blocks and their entries in a leaf of PARTIAL_LEAF; kept until a table changes."""
        if self._read[0] != index:
            first = index * PARTIAL_LEAF
            count = min(PARTIAL_LEAF, self.geometry.blocks - first)
            raw = self._file.pread(self.geometry.entry_at(first), count * ENTRY)
            entries = enumerate(struct.unpack(f">{count}I", raw), first)
            self._read = index, list(entries)
        return self._read[1]

    def slow(self, cluster: int) -> Sequence[Extent]:
        return list(self._pieces(cluster))

    def _pieces(self, cluster: int) -> Iterator[Extent]:
        """The runs of set and clear bits of one block; the first sector is the highest bit."""
        geometry, size = self.geometry, self.cluster_size
        guest = cluster * size
        entry = self._entries(cluster // PARTIAL_LEAF)[cluster % PARTIAL_LEAF][1]
        start = entry * SECTOR
        host, end = start + geometry.bitmap, self._file.size // SECTOR * SECTOR
        if entry == FREE:
            yield Extent(guest, size, Kind.ABSENT)
            return
        if host >= end or touched(geometry.spans, start, geometry.stride):
            yield Extent(guest, size, Kind.INVALID)
            return
        known = self._state(cluster, entry)
        if known != PARTLY:
            kind = Kind.DATA if known == WHOLE else self._absent
            yield Extent(guest, size, kind, host if known == WHOLE else 0)
            return
        raw = self._file.pread(start, geometry.bits)
        bits = f"{int.from_bytes(raw, 'big'):0{len(raw) * 8}b}"
        at = 0
        for bit, run in groupby(bits):
            length = len(list(run)) * SECTOR
            if bit == "0":
                yield Extent(guest + at, length, self._absent)
            else:
                there = max(0, min(length, end - host - at))
                if there:
                    yield Extent(guest + at, there, Kind.DATA, host + at)
                if there < length:
                    yield Extent(guest + at + there, length - there, Kind.INVALID)
            at += length

    def details(self) -> dict[str, Any]:
        footer, copies = self._footer, self._copies
        shape = (footer.cylinders, footer.heads, footer.sectors)
        shaped = vhd_footer.size_by_geometry(footer)
        version = f"{footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}"
        creator = footer.creator_app.decode("latin-1").rstrip(" \0") + f" {version}"
        found: dict[str, Any] = {
            "footer_used": f"{'head' if self._copy.offset == 0 else 'tail'}",
            "footer_head": _state_of(copies.head, expected=footer.type != FIXED),
            "footer_tail": _state_of(copies.tail, expected=True),
            "creator": creator,
            "created": _date(footer.timestamp),
            "size_from": self._size_from,
        }
        if shaped != footer.current_size:
            found["size_current"] = footer.current_size
            if shape != vhd_footer.LARGEST_GEOMETRY:
                found["size_chs"] = shaped
        found["geometry"] = "/".join(map(str, shape))
        found["saved_state"] = bool(footer.saved_state)
        if footer.type == FIXED:
            return found
        header = self._header
        found["header"] = "whole" if self._header_whole else "checksum wrong"
        found["block_size"] = header.block_size
        found["table_offset"] = header.table_offset
        found["table_entries"] = header.entries
        found["blocks_mapped"] = sum(
            len(entries) - entries.count(FREE)
            for _, entries in pieces(self._file, self.geometry, 0, self.geometry.blocks)
        )
        found["whole_blocks_only"] = self._whole
        if footer.type == DIFFERENCING:
            found["parent_uuid"] = str(uuid.UUID(bytes=header.parent_uuid))
            found["parent_timestamp"] = _date(header.parent_timestamp)
            found["parent_name"] = vhd_footer.parent_name(header)
            found["parent_locators"] = {
                item.code.decode("latin-1"): item.name for item in self._locators
            }
        return found

    def metadata(self) -> Iterable[Span]:
        return self.geometry.spans if self.flat is None else ()

    # Writing

    def begin(self) -> Plan:
        return self._writer.begin() if self._writer else Plan()

    def reserve(self, count: int) -> Reservation:
        assert self._writer, "a fixed image has all its clusters"
        return self._writer.reserve(count)

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        if not dirty:
            return Plan()
        assert self._writer, "a fixed image has all its clusters"
        self._read = (-1, [])
        for item in dirty:
            self._known[item.cluster] = WHOLE
        return self._writer.commit(dirty)

    def discard(self, first: int, count: int) -> Plan:
        """Fixed images are punched; over a parent nothing can be given back."""
        if self._writer is None:
            end = min((first + count) * FIXED_CLUSTER, self.size)
            return Plan(Punch(first * FIXED_CLUSTER, end - first * FIXED_CLUSTER))
        assert self.parent is None
        last = min(first + count, self.geometry.blocks)
        self._known[first:last] = bytes(last - first)
        self._read = (-1, [])
        return self._writer.discard(first, last - first)

    def release(self, runs: Sequence[Run]) -> None:
        if self._writer:
            self._writer.release(runs)

    def end(self) -> Plan:
        return self._writer.end() if self._writer else Plan()

    # Whole images

    @classmethod
    def create(cls, new: New) -> Plan:
        return vhd_make.create(new)

    @classmethod
    def check(
        cls, file: HostFile, options: Options, repair: Repair
    ) -> Iterator[Finding | Plan | Progress]:
        return vhd_check.check(file, options, repair)

    def resize(self, size: int) -> Plan:
        footer = self._footer
        if size % SECTOR:
            raise Unsupported(self._file, "size", f"{size}, not a multiple of {SECTOR}")
        if size < max(self.size, footer.current_size):
            text = f"{size} bytes, smaller than the {footer.current_size} that there are"
            raise Unsupported(self._file, "size", text)
        if footer.saved_state:
            text = "a virtual machine was suspended with this disk: not resized"
            raise Unsupported(self._file, f"footer+84 at {self._copy.offset}", text)
        if size > vhd_footer.MAX_SIZE:
            text = f"{size} bytes, a VHD has at most {vhd_footer.MAX_SIZE}"
            raise Unsupported(self._file, "size", text)
        if self._writer is None:
            plan = vhd_make.resize_fixed(self._file, self._copy, size)
        else:
            plan = self._writer.begin()
            header = (self._header_at, self._header_raw)
            grown = vhd_make.Growth(self._file, self._writer, header, size)
            plan += grown.plan
            self.geometry = self._writer.geometry
            self._header_raw = grown.header
            self._header = vhd_footer.HeaderStruct.parse(grown.header)
            self._known = self._known.ljust(self.geometry.blocks, b"\0")
        self.size = size
        return plan

    def rebase(self, parent: Image | None, name: str) -> Plan:
        if self._writer is None:
            raise Unsupported(self._file, "", "vhd fixed: no parents can be recorded")
        plan = self._writer.begin()
        old = [Span(self._header_at, HEADER), *self._names]
        changed, raw, self._names = vhd_make.rebase(
            self._file, self._writer, (self._header, old), parent, name
        )
        self._header_raw, self._header = raw, vhd_footer.HeaderStruct.parse(raw)
        self.geometry = self._writer.geometry
        return plan + changed


def _state_of(copy: Copy | None, *, expected: bool) -> str:
    if copy is None:
        return "missing" if expected else "none"
    return f"{copy.state}, at {copy.offset}"


def _date(seconds: int) -> str | None:
    if not seconds:
        return None
    moment = datetime.datetime.fromtimestamp(seconds + EPOCH, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
