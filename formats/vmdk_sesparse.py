"""seSparse extents of a VMDK, which ESX makes since 6.5; read only.

There is no public specification.  Source: what is said of the format on the qemu-devel list
("vmdk: Add read-only support for seSparse snapshots", 2019), from traces of ESX; no image made by
ESX was at hand, so all of this is best effort.  Writing would have to keep a journal, a bitmap of
free grains and a map from grains back to the disk, of which nothing is known: refused by name, as
is an image whose journal has to be replayed.

Entries are 64 bits wide.  A directory entry has 1 in its top four bits and the number of a table;
a table entry says in its top four bits: 0 nothing, 1 unmapped by the guest, 2 zeros, 3 a grain,
whose number has its low 12 bits in bits 48 to 59 and the rest in bits 0 to 47.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from construct import Const, ConstructError, Int64ul, Padding, Struct

from virtmount.errors import Corrupt, NeedsRecovery, NotAnImage, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import Kind

MAGIC = (0xCAFEBABE).to_bytes(8, "little")
VOLATILE_MAGIC = (0xCAFECAFE).to_bytes(8, "little")
VERSION = 0x0000000200000001
SECTOR = 512
GRAIN_SIZE = 8  # sectors
TABLE_SIZE = 64  # sectors
GRAIN = GRAIN_SIZE * SECTOR
PER_TABLE = TABLE_SIZE * SECTOR // 8
MAX_DIRECTORY = 1 << 22  # entries: 64 TiB
KEPT = 4  # tables in memory
_TABLE_FLAG = 0x10000000  # of the upper half of a directory entry
_NIBBLE = 60
_UNALLOCATED, _UNMAPPED, _ZERO, _GRAIN = range(4)

Header = Struct(
    "magic" / Const(MAGIC),
    "version" / Int64ul,
    "capacity" / Int64ul,  # sectors, as are all offsets and sizes that follow
    "grain_size" / Int64ul,
    "table_size" / Int64ul,
    "flags" / Int64ul,
    Padding(4 * 8),
    "volatile_offset" / Int64ul,
    "volatile_size" / Int64ul,
    Padding(4 * 8),  # journal
    "directory_offset" / Int64ul,
    "directory_size" / Int64ul,
    "tables_offset" / Int64ul,
    "tables_size" / Int64ul,
    Padding(4 * 8),  # free bitmap, back map
    "grains_offset" / Int64ul,
    "grains_size" / Int64ul,
)
assert Header.sizeof() == 208

Volatile = Struct(
    "magic" / Const(VOLATILE_MAGIC),
    "free_table" / Int64ul,
    "next_transaction" / Int64ul,
    "replay_journal" / Int64ul,
)


class SeSparseExtent:
    """One file with grains of its own."""

    kind = "seSparse"
    grain = GRAIN

    def __init__(self, file: HostFile, number: int, start: int) -> None:
        self.file, self.number, self.start = file, number, start
        if file.writable:
            raise Unsupported(file, "", "seSparse extents cannot be written", hint="--read-only")
        try:
            header = Header.parse(file.pread(0, SECTOR))
        except ConstructError as error:
            raise NotAnImage(file, "header+0", "no seSparse signature") from error
        for field, at, known in (
            ("version", 8, VERSION),
            ("grain_size", 24, GRAIN_SIZE),
            ("table_size", 32, TABLE_SIZE),
            ("flags", 40, 0),
        ):
            if header[field] != known:
                text = f"{field} {header[field]:#x}, know {known:#x}"
                raise Unsupported(file, f"header+{at}", text)
        if not 0 < header.capacity <= MAX_DIRECTORY * PER_TABLE * GRAIN_SIZE:
            raise Corrupt(file, "header+16", f"capacity {header.capacity} sectors")
        self.capacity: int = header.capacity * SECTOR
        self._read_volatile(self._bytes("header+80", header.volatile_offset))
        tables = -(-self.capacity // (GRAIN * PER_TABLE))
        if header.directory_size * SECTOR < tables * 8:
            text = f"directory of {header.directory_size} sectors for {tables} tables"
            raise Corrupt(file, "header+136", text)
        at = self._bytes("header+128", header.directory_offset)
        self.directory_at = at
        self.directory = array("Q")
        self.directory.frombytes(file.pread(at, tables * 8))
        self._tables_at = self._bytes("header+144", header.tables_offset)
        self._grains_at = self._bytes("header+192", header.grains_offset)
        self._kept: dict[int, array[int]] = {}

    def _bytes(self, place: str, sector: int) -> int:
        if not 0 < sector * SECTOR <= self.file.size:
            text = f"sector {sector}, the file ends at {self.file.size}"
            raise Corrupt(self.file, place, text)
        return sector * SECTOR

    def _read_volatile(self, at: int) -> None:
        try:
            header = Volatile.parse(self.file.pread(at, SECTOR))
        except ConstructError as error:
            text = "no signature of a volatile header"
            raise Corrupt(self.file, f"byte {at}", text) from error
        if header.replay_journal:
            text = "the journal has to be replayed, and only ESX knows how"
            raise NeedsRecovery(self.file, f"volatile header at {at}+24", text)

    def memory(self) -> int:
        return len(self.directory) * 8 + KEPT * PER_TABLE * 8

    def metadata(self) -> Iterator[tuple[int, int]]:
        yield 0, SECTOR
        yield self.directory_at, len(self.directory) * 8

    def lookup(self, grain: int) -> tuple[Kind, int]:
        """Kind and host offset of a grain."""
        index, within = divmod(grain, PER_TABLE)
        entry = self.directory[index]
        if not entry:
            return Kind.ABSENT, 0
        if entry >> 32 != _TABLE_FLAG:
            place = f"grain directory entry {index} at {self.directory_at + index * 8}"
            raise Corrupt(
                self.file, place, f"{entry:#x}, expected {_TABLE_FLAG:#x} in its top half"
            )
        entry = self._table(index, entry & 0xFFFFFFFF)[within]
        kind, number = entry >> _NIBBLE, entry & ((1 << _NIBBLE) - 1)
        if kind in (_UNMAPPED, _ZERO):
            return Kind.ZERO, 0
        if kind == _UNALLOCATED and not number:
            return Kind.ABSENT, 0
        if kind != _GRAIN:
            return Kind.INVALID, 0
        host = self._grains_at + ((number >> 48) | (number & ((1 << 48) - 1)) << 12) * GRAIN
        return (Kind.DATA, host) if host < self.file.size else (Kind.INVALID, 0)

    def _table(self, index: int, number: int) -> array[int]:
        """The image is only read, so a table stays as it is."""
        if (known := self._kept.get(index)) is not None:
            return known
        at = self._tables_at + number * TABLE_SIZE * SECTOR
        wanted = min(PER_TABLE, -(-self.capacity // GRAIN) - index * PER_TABLE)
        if at + wanted * 8 > self.file.size:
            text = f"table at {at}, the file ends at {self.file.size}"
            place = f"grain directory entry {index} at {self.directory_at + index * 8}"
            raise Corrupt(self.file, place, text)
        table = array("Q")
        table.frombytes(self.file.pread(at, wanted * 8))
        while len(self._kept) >= KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept[index] = table
        return table
