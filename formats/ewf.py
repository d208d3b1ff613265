"""Expert Witness images (EWF: E01 of EnCase and FTK, S01 of SMART), read.

Source: J. Metz, "Expert Witness Compression Format specification" (libewf), and images written by
libewf's ewfacquire 20140813 as EnCase 1 to 7, FTK, SMART and linen.  A set of segment files
(NAME.E01, NAME.E02 …), each a row of sections; all numbers are little-endian.  Guest data lies in
chunks of 64 sectors as a rule, each a zlib stream, or plain with a checksum behind it: whatever is
read is also verified.

Our own reader and not libewf: that one opens files by itself, where this program's rules (locks,
nothing outside of the image's folder) do not hold, and is one lock for all threads.

Refused by name: EWF version 2 (Ex01), logical evidence (L01), delta files (d01), sets whose later
segment is named instead of the first one.  A set whose last segments are missing is refused too.
The hashes over the whole disk are shown, not verified.
"""

from __future__ import annotations

import bisect
import sys
import threading
import uuid
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from construct import (
    Bytes,
    Const,
    ConstructError,
    Int8ul,
    Int16ul,
    Int32ul,
    Int64ul,
    Padding,
    Struct,
)

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats.chunks import MAX_CHUNK, Chunk, Chunked, cluster_of, inflated
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Kind, Match, Options
from virtmount.siblings import open_sibling

MAGIC = b"EVF\x09\x0d\x0a\xff\x00"
FileHeader = Struct(
    "magic" / Const(MAGIC),
    "fields_start" / Const(b"\x01"),
    "segment" / Int16ul,  # from 1
    "fields_end" / Const(b"\0\0"),
)
assert FileHeader.sizeof() == 13

Section = Struct(
    "type" / Bytes(16),
    "next" / Int64ul,  # bytes from the start of the segment
    "size" / Int64ul,  # with this header
    Padding(40),
    "checksum" / Int32ul,  # Adler-32 of all before
)
assert Section.sizeof() == 76

# The beginning of both kinds of volume section; in SMART's the number of sectors has 32 bits.
Volume = Struct(
    "media" / Int8ul,
    Padding(3),
    "chunks" / Int32ul,
    "chunk_sectors" / Int32ul,
    "sector_size" / Int32ul,
    "sectors" / Int64ul,
)
assert Volume.sizeof() == 24
VOLUME, VOLUME_SMART = 1052, 94  # bytes, with the checksum at the end
GUID_AT = 64

Table = Struct(
    "entries" / Int32ul,
    Padding(4),
    "base" / Int64ul,  # is added to every offset; not before EnCase 6
    Padding(4),
    "checksum" / Int32ul,  # Adler-32 of all before
)
assert Table.sizeof() == 24

COMPRESSED, OFFSET = 0x80000000, 0x7FFFFFFF  # of a table entry
ENTRY = 4
CHECKSUM = 4
MAX_SEGMENTS = 255  # as many files as the engine knows in one disk; names end at 14971, .ZZZ
MAX_SECTIONS = 1 << 14  # of all segments together
MAX_ENTRIES = 1 << 18  # of one table: 1 MiB
MAX_SECTOR = 4096
TABLES = 16  # kept in memory
SHOWN = ("hash", "digest")


class _Table(NamedTuple):
    """The offsets of `entries` chunks from number `first` on, and where their data ends."""

    file: int
    first: int
    entries: int
    at: int  # of the section's header
    base: int
    low: int  # the data lies within these bytes
    high: int


class EWF(Chunked):
    name: ClassVar[str] = "ewf"
    suffixes: ClassVar[tuple[str, ...]] = ("E01",)

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if head.startswith(MAGIC) else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._only_read(file)
        self._options = options
        self._tables: list[_Table] = []
        self._second: dict[int, int] = {}  # number of a table -> where its copy lies
        self._sections = 0
        self._found = 0  # chunks in the tables so far
        self._volume: Any = None
        self._hashes: dict[str, str] = {}
        self._loaded: OrderedDict[int, array[int]] = OrderedDict()
        self._loading = threading.Lock()
        try:
            self._read_segments()
        except BaseException:
            for further in self.files[1:]:
                further.close()
            raise
        self._firsts = [table.first for table in self._tables]

    def _read_segments(self) -> None:
        while not self._read_segment(len(self.files) - 1):
            number = len(self.files) + 1
            if number > MAX_SEGMENTS:
                raise Unsupported(self.files[0], "", f"more than {MAX_SEGMENTS} segments")
            place, name = f"segment {number}", segment_name(self.files[0].path.name, number)
            first, *others = self.files
            self.files.append(open_sibling(first, place, name, self._options, others=others))
        if self._volume is None:
            raise Corrupt(self.files[0], "", "no volume section")
        wanted = -(-self.size // self._chunk)
        if self._found < wanted:
            text = f"{self._found} chunks in all tables, {wanted} expected"
            raise Corrupt(self.files[-1], "tables", text)

    def _read_segment(self, number: int) -> bool:
        """Whether it is the last one."""
        file = self.files[number]
        raw = file.pread_padded(0, FileHeader.sizeof())
        try:
            header = FileHeader.parse(raw)
        except ConstructError as error:
            raise NotAnImage(file, "header+0", "no EWF signature") from error
        if header.segment != number + 1:
            hint = "name the first one, .E01" if not number else None
            text = f"segment {header.segment}, expected {number + 1}"
            raise NotAnImage(file, "header+9", text, hint=hint)
        at = FileHeader.sizeof()
        data: tuple[int, int] | None = None  # where the chunks of the next table lie
        damage: Corrupt | None = None  # of a table, whose copy must be next
        while True:
            kind, following, size = self._section(file, at)
            if damage and kind != "table2":
                raise damage
            body, end = at + Section.sizeof(), at + size
            if kind in ("volume", "disk") and number == 0:
                self._read_volume(file, body, size - Section.sizeof())
            elif kind == "data" and number:
                self._compare_set(file, body, size - Section.sizeof())
            elif kind == "sectors":
                data = (body, end)
            elif kind == "table":
                damage = None
                try:
                    self._read_table(number, at, size, data)
                except Corrupt as error:
                    damage = error
            elif kind == "table2" and damage:
                self._read_table(number, at, size, data)
                damage = None
            elif kind == "table2" and self._tables and self._tables[-1].file == number:
                self._second.setdefault(len(self._tables) - 1, at)
            elif kind in SHOWN:
                self._read_hash(file, kind, body, size - Section.sizeof())
            elif kind in ("done", "next"):
                return kind == "done"
            elif kind == "ltree":
                raise Unsupported(file, f"section at {at}", "logical evidence, not a disk")
            if following <= at:
                text = f"the next section at {following}, not behind this one"
                raise Corrupt(file, f"section {kind!r} at {at}", text)
            at = following

    def _section(self, file: HostFile, at: int) -> tuple[str, int, int]:
        """Type, where the next one is, size."""
        self._sections += 1
        if self._sections > MAX_SECTIONS:
            raise Unsupported(file, f"section at {at}", f"more than {MAX_SECTIONS} sections")
        if at + Section.sizeof() > file.size:
            text = f"wanted, the file ends at {file.size} without a last section"
            raise Corrupt(file, f"section at {at}", text)
        raw = file.pread(at, Section.sizeof())
        section = Section.parse(raw)
        if (found := zlib.adler32(raw[:-CHECKSUM])) != section.checksum:
            text = f"checksum {section.checksum:08x}, computed {found:08x}"
            raise Corrupt(file, f"section at {at}", text)
        kind = section.type.split(b"\0")[0].decode("ascii", "backslashreplace")
        size = section.size
        # EnCase and FTK leave the size of the last one 0.
        if kind not in ("done", "next") and not Section.sizeof() <= size <= file.size - at:
            text = f"{size} bytes, the file has {file.size - at} from there"
            raise Corrupt(file, f"section {kind!r} at {at}", text)
        return kind, section.next, size

    def _read_volume(self, file: HostFile, at: int, size: int) -> None:
        if self._volume is not None:
            return  # a copy
        if size not in (VOLUME, VOLUME_SMART):
            text = f"{size} bytes, know {VOLUME} and {VOLUME_SMART}"
            raise Unsupported(file, f"volume section at {at}", text)
        raw = file.pread(at, size)
        stored = int.from_bytes(raw[-CHECKSUM:], "little")
        if (found := zlib.adler32(raw[:-CHECKSUM])) != stored:
            text = f"checksum {stored:08x}, computed {found:08x}"
            raise Corrupt(file, f"volume section at {at}", text)
        volume = Volume.parse(raw)
        sectors = volume.sectors if size == VOLUME else volume.sectors & 0xFFFFFFFF
        place = f"volume section at {at}"
        sector = volume.sector_size
        if sector & (sector - 1) or not 512 <= sector <= MAX_SECTOR:
            text = f"sector size {sector}, know powers of two from 512 to {MAX_SECTOR}"
            raise Unsupported(file, place, text)
        if not sectors:
            raise Corrupt(file, place, "0 sectors")
        if not volume.chunk_sectors:
            raise Corrupt(file, place, "0 sectors in a chunk")
        self._chunk: int = volume.chunk_sectors * sector
        if self._chunk > MAX_CHUNK:
            raise Unsupported(
                file, place, f"chunks of {self._chunk} bytes, the most is {MAX_CHUNK}"
            )
        self.size = sectors * sector
        if self.size > volume.chunks * self._chunk:
            text = f"{volume.chunks} chunks of {self._chunk} bytes for {sectors} sectors"
            raise Corrupt(file, place, text)
        self._volume = volume
        if sector == 4096:
            self.sector_size = sector
        self.cluster_size = cluster_of(self._chunk)
        self.variant = "E01" if size == VOLUME else "S01"
        if size == VOLUME and any(raw[GUID_AT : GUID_AT + 16]):
            self.identity = str(uuid.UUID(bytes_le=raw[GUID_AT : GUID_AT + 16]))

    def _compare_set(self, file: HostFile, at: int, size: int) -> None:
        """Later segments have a copy of the volume section: is it of the same acquisition?"""
        if size != VOLUME or self.identity is None:
            return
        raw = file.pread(at + GUID_AT, 16)
        if any(raw) and (found := str(uuid.UUID(bytes_le=raw))) != self.identity:
            text = f"set {found}, the first segment is of {self.identity}"
            raise Corrupt(file, f"data section at {at}", text)

    def _read_table(self, number: int, at: int, size: int, data: tuple[int, int] | None) -> None:
        file, place = self.files[number], f"table section at {at}"
        start = at + Section.sizeof()
        if self._volume is None:
            raise Corrupt(file, place, "no volume section before")
        if size < Section.sizeof() + Table.sizeof():
            raise Corrupt(file, place, f"{size} bytes, no table is that short")
        raw = file.pread(start, Table.sizeof())
        header = Table.parse(raw)
        if (found := zlib.adler32(raw[:-CHECKSUM])) != header.checksum:
            text = f"checksum {header.checksum:08x}, computed {found:08x}"
            raise Corrupt(file, place, text)
        if header.entries > MAX_ENTRIES:
            text = f"{header.entries} entries, the most is {MAX_ENTRIES}"
            raise Unsupported(file, place, text)
        end = start + Table.sizeof() + header.entries * ENTRY
        if end > at + size:
            text = f"{header.entries} entries end at {end}, the section at {at + size}"
            raise Corrupt(file, place, text)
        if not header.entries:
            return
        # Without a sectors section the chunks lie behind the offsets, in the table section.
        low, high = data or (end, at + size)
        self._tables.append(_Table(number, self._found, header.entries, at, header.base, low, high))
        self._found += header.entries

    def _read_hash(self, file: HostFile, kind: str, at: int, size: int) -> None:
        raw = file.pread(at, min(size, 36))
        if len(raw) >= 16 and any(raw[:16]):
            self._hashes["md5"] = raw[:16].hex()
        if kind == "digest" and len(raw) >= 36 and any(raw[16:36]):
            self._hashes["sha1"] = raw[16:36].hex()

    def chunks(self, start: int, end: int) -> Iterator[Chunk]:
        for number in range(start // self._chunk, -(-end // self._chunk)):
            at = number * self._chunk
            yield Chunk(at, min(self._chunk, self.size - at), Kind.COMPRESSED)

    def unpack(self, chunk: Chunk) -> bytes:
        number = chunk.start // self._chunk
        which = bisect.bisect_right(self._firsts, number) - 1
        table = self._tables[which]
        file = self.files[table.file]
        packed, begin, end = self._place(which, number)
        place = f"chunk {number} at {begin}"
        raw = file.pread(begin, end - begin)
        if packed:
            data = inflated(file, place, raw, self._chunk)
        else:
            # EnCase pads the last one to a whole chunk, libewf does not.
            length = min(self._chunk, len(raw) - CHECKSUM)
            data = raw[:length]
            stored = int.from_bytes(raw[length : length + CHECKSUM], "little")
            if length < chunk.length or zlib.adler32(data) != stored:
                text = f"checksum {stored:08x} of {length} bytes, computed {zlib.adler32(data):08x}"
                raise Corrupt(file, place, text)
        if len(data) < chunk.length:
            raise Corrupt(file, place, f"{len(data)} bytes, expected {chunk.length}")
        return data[: chunk.length]

    def _place(self, which: int, number: int) -> tuple[bool, int, int]:
        """Of a chunk: whether it is packed, its first byte and one past its last."""
        table = self._tables[which]
        entries = self._entries(which)
        index = number - table.first
        begin = table.base + (entries[index] & OFFSET)
        last = index + 1 == table.entries
        end = table.high if last else table.base + (entries[index + 1] & OFFSET)
        most = 2 * self._chunk + 512
        if last:
            end = min(end, begin + most)
        if not table.low <= begin < end <= table.high or end - begin > most:
            text = f"chunk {number} from {begin} to {end}, data from {table.low} to {table.high}"
            raise Corrupt(self.files[table.file], f"table at {table.at}, entry {index}", text)
        return bool(entries[index] & COMPRESSED), begin, end

    def _entries(self, which: int) -> array[int]:
        """The offsets in a table: of its copy where its checksum is wrong."""
        with self._loading:
            if (known := self._loaded.get(which)) is not None:
                self._loaded.move_to_end(which)
                return known
            table = self._tables[which]
            raw = self._verified(table, table.at)
            if raw is None and which in self._second:
                raw = self._verified(table, self._second[which])
            if raw is None:
                text = "the checksum of its offsets is wrong, here and in its copy"
                raise Corrupt(self.files[table.file], f"table section at {table.at}", text)
            entries = array("I")
            entries.frombytes(raw)
            if sys.byteorder == "big":
                entries.byteswap()
            self._loaded[which] = entries
            if len(self._loaded) > TABLES:
                self._loaded.popitem(last=False)
            return entries

    def _verified(self, table: _Table, at: int) -> bytes | None:
        """The offsets in the table section at `at`, or None.  EnCase 1 has no checksum there."""
        file = self.files[table.file]
        at += Section.sizeof() + Table.sizeof()
        length = table.entries * ENTRY
        raw = file.pread(at, length)
        if table.low == at + length:
            return raw
        stored = int.from_bytes(file.pread_padded(at + length, CHECKSUM), "little")
        return raw if zlib.adler32(raw) == stored else None

    def details(self) -> dict[str, Any]:
        return {
            "segments": len(self.files),
            "chunk_size": self._chunk,
            "chunks": self._found,
            "media_sector_size": self._volume.sector_size,
            **self._hashes,
        }


def segment_name(first: str, number: int) -> str:
    """The file name of a segment: E01 … E99, then EAA … EZZ, FAA … ZZZ, in the case of the first.

    >>> [segment_name("disk.e01", n) for n in (2, 99, 100, 775, 776)]
    ['disk.e02', 'disk.e99', 'disk.eaa', 'disk.ezz', 'disk.faa']
    """
    stem, dot, suffix = first.rpartition(".")
    letter = suffix[:1] or "E"
    if not dot:
        stem, letter = first, "E"
    if number <= 99:
        return f"{stem}.{letter}{number:02}"
    number -= 100
    base = ord("a" if letter.islower() else "A")
    start = ord(letter) + number // 676
    return f"{stem}.{chr(start)}{chr(base + number // 26 % 26)}{chr(base + number % 26)}"
