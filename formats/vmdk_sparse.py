"""Hosted sparse extents of a VMDK ("KDMV"), versions 1 to 3, streamOptimized ones among them.

Source: VMware, Virtual Disk Format 5.0, "Hosted Sparse Extents" and "Stream-Optimized Compressed
Sparse Extents"; the upper half of the flags is incompatible, the lower compatible (open-vmdk).
Grains are zlib streams (RFC 1950), though the document says RFC 1951: every writer does that.
Version 3 says that changes are tracked in another file (qemu's block/vmdk.c).  Refused by name:
unknown incompatible flags, compression methods and versions.
"""

from __future__ import annotations

import zlib
from typing import Any

from construct import Bytes, Const, ConstructError, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats.vmdk_entries import SECTOR
from virtmount.formats.vmdk_grains import MAX_GRAIN, MIN_GRAIN, Tables
from virtmount.hostfile import HostFile
from virtmount.plan import Step, Write

MAGIC = b"KDMV"
VERSIONS = (1, 2, 3)
NEWLINE_TEST, REDUNDANT, ZEROED = 1, 2, 4
COMPRESSED, MARKERS = 1 << 16, 1 << 17
INCOMPATIBLE = 0xFFFF0000
NEWLINES = b"\n \r\n"
DEFLATE = 1
AT_END = 0xFFFFFFFFFFFFFFFF  # the directory: the real header is at the end of the file
FOOTER_FROM_END = 2 * SECTOR
MIN_TABLE, MAX_TABLE = 128, 8192  # entries
MAX_PACKED_GRAIN = 16 << 20
MAX_CAPACITY = 1 << 42  # sectors; entries reach 2 TiB of file, compressed and zero grains further
MAX_DESCRIPTOR = 1 << 20
MARKER_SIZE = 12  # sector on the disk, length of the data

Header = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ul,
    "flags" / Int32ul,
    "capacity" / Int64ul,  # this and what follows in sectors, from the file's start
    "grain_size" / Int64ul,
    "descriptor_offset" / Int64ul,
    "descriptor_size" / Int64ul,
    "entries_per_table" / Int32ul,
    "redundant_offset" / Int64ul,
    "directory_offset" / Int64ul,
    "overhead" / Int64ul,
    "unclean_shutdown" / Int8ul,
    "newlines" / Bytes(4),
    "compression" / Int16ul,
)
assert Header.sizeof() == 79
UNCLEAN_AT = 72


class SparseExtent(Tables):
    """One file with grains of its own."""

    kind = "sparse"

    def __init__(self, file: HostFile, number: int, start: int, *, lenient: bool = False) -> None:
        super().__init__(file, number, start)
        raw = file.pread(0, SECTOR)
        place = "header"
        try:
            header = Header.parse(raw)
        except ConstructError as error:
            raise NotAnImage(file, "header+0", "no VMDK signature") from error
        self._check_flags(header, place)
        self.footer = header.directory_offset == AT_END
        if self.footer:
            at = (file.size - FOOTER_FROM_END) // SECTOR * SECTOR
            place = f"footer at {at}"
            if at < SECTOR:
                raise Corrupt(file, "header+56", "the directory is at the end, and there is none")
            raw = file.pread(at, SECTOR)
            try:
                header = Header.parse(raw)
            except ConstructError as error:
                raise Corrupt(file, place, "no VMDK signature: the file is cut short") from error
            self._check_flags(header, place)
        self._header = bytearray(raw)
        self.version: int = header.version
        self.flags: int = header.flags
        self.compressed = bool(header.flags & COMPRESSED)
        self.markers = bool(header.flags & MARKERS)
        self.zeroed = bool(header.flags & ZEROED)
        self.unclean = bool(header.unclean_shutdown)
        self._check_sizes(header, place)
        self.grain = header.grain_size * SECTOR
        self.per_table = header.entries_per_table
        self.capacity = header.capacity * SECTOR
        self.overhead: int = header.overhead
        first = self.overhead * SECTOR
        self._first_grain = first if first <= file.size else 0
        self.descriptor_at: int = header.descriptor_offset * SECTOR
        self.descriptor_room: int = (
            header.descriptor_size * SECTOR if header.descriptor_offset else 0
        )
        self.lost_redundant = ""  # what is wrong with the second directory
        self.directory_at = header.directory_offset * SECTOR
        self.directory = self.read_directory(self.directory_at, "grain directory", f"{place}+56")
        if header.flags & REDUNDANT and not self.compressed:
            self.redundant_at = header.redundant_offset * SECTOR
            self._read_redundant(f"{place}+48", lenient)

    def _read_redundant(self, place: str, lenient: bool) -> None:
        assert self.redundant_at is not None
        try:
            self.redundant = self.read_directory(
                self.redundant_at, "redundant grain directory", place
            )
        except Corrupt as error:
            if self.file.writable and not lenient:
                raise
            self.redundant_at = None  # the first copy is whole
            self.lost_redundant = error.text

    def _check_flags(self, header: Any, place: str) -> None:
        file = self.file
        if header.version not in VERSIONS:
            text = f"version {header.version}, know 1 to 3"
            raise Unsupported(file, f"{place}+4", text)
        flags: int = header.flags
        if unknown := flags & INCOMPATIBLE & ~(COMPRESSED | MARKERS):
            raise Unsupported(file, f"{place}+8", f"unknown incompatible flags {unknown:#x}")
        if flags & NEWLINE_TEST and header.newlines != NEWLINES:
            found = header.newlines.hex(" ")
            text = f"line ends {found}, expected {NEWLINES.hex(' ')}: transferred as a text"
            raise Corrupt(file, f"{place}+73", text)
        compression: int = header.compression
        if compression > DEFLATE or (flags & COMPRESSED and compression != DEFLATE):
            raise Unsupported(file, f"{place}+77", f"compression method {compression}, know 1")

    def _check_sizes(self, header: Any, place: str) -> None:
        file = self.file
        capacity: int = header.capacity
        if not 0 < capacity <= MAX_CAPACITY:
            text = f"capacity {capacity} sectors, know 1 to {MAX_CAPACITY}"
            raise Corrupt(file, f"{place}+12", text)
        grain: int = header.grain_size
        most = MAX_PACKED_GRAIN if self.compressed else MAX_GRAIN
        if grain & (grain - 1) or not MIN_GRAIN <= grain * SECTOR <= most:
            text = f"grains of {grain} sectors, know powers of two up to {most // SECTOR}"
            raise Corrupt(file, f"{place}+20", text)
        entries: int = header.entries_per_table
        if entries & (entries - 1) or not MIN_TABLE <= entries <= MAX_TABLE:
            text = f"{entries} entries in a table, know powers of two {MIN_TABLE} to {MAX_TABLE}"
            raise Unsupported(file, f"{place}+44", text)
        offset: int = header.descriptor_offset
        length: int = header.descriptor_size
        if offset and (length * SECTOR > MAX_DESCRIPTOR or offset + length > file.size // SECTOR):
            text = (
                f"descriptor of {length} sectors at sector {offset}, the file ends at {file.size}"
            )
            raise Corrupt(file, f"{place}+28", text)

    def descriptor(self) -> bytes:
        """The embedded text with its padding; empty where there is none."""
        if not self.descriptor_room:
            return b""
        return self.file.pread(self.descriptor_at, self.descriptor_room)

    def fixed_end(self) -> int:
        """qemu does not open a file that ends before its first grain could begin."""
        return max(self.descriptor_at + self.descriptor_room, self._first_grain)

    def header_writes(self, *, unclean: bool, end: int) -> list[Step]:
        self._header[UNCLEAN_AT] = unclean
        return [Write(0, bytes(self._header), self.number)]

    # Compressed grains

    def inflate(self, grain: int) -> bytes:
        """The bytes of a grain; threads may call it at once.  Corrupt if it is not there."""
        sector = self.entry(grain)
        if not self.is_grain(sector):
            raise Corrupt(self.file, f"grain {grain}", "not compressed")
        place = f"grain {grain} at {sector * SECTOR}"
        at, length = self.marker(grain, sector)
        length = min(length, max(0, self.file.size - at))
        try:
            data = zlib.decompressobj().decompress(self.file.pread(at, length), self.grain)
        except zlib.error as error:
            raise Corrupt(self.file, place, str(error)) from error
        wanted = min(self.grain, self.capacity - grain * self.grain)
        if len(data) < wanted:
            raise Corrupt(self.file, place, f"{len(data)} bytes, expected {wanted}")
        return data.ljust(self.grain, b"\0")

    def marker(self, grain: int, sector: int) -> tuple[int, int]:
        """Where a compressed grain's bytes begin, and how many there are at the most."""
        at = sector * SECTOR
        place = f"grain {grain} at {at}"
        length = 2 * self.grain  # incompressible data becomes longer
        if at < self.header_size or at >= self.file.size:
            raise Corrupt(self.file, place, f"the file ends at {self.file.size}")
        if self.markers:
            marker = self.file.pread(at, MARKER_SIZE)
            start = int.from_bytes(marker[:8], "little")
            length = int.from_bytes(marker[8:], "little")
            if start != grain * (self.grain // SECTOR):
                text = f"a marker of sector {start}, expected {grain * (self.grain // SECTOR)}"
                raise Corrupt(self.file, place, text)
            if not 0 < length <= 2 * self.grain + SECTOR:
                raise Corrupt(self.file, place, f"{length} compressed bytes for {self.grain}")
            at += MARKER_SIZE
        return at, length
