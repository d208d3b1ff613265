"""vmfsSparse extents of a VMDK ("COWD"): what ESX makes for snapshots.

Source: VMware, Virtual Disk Format 1.1, "ESX Server Sparse Extents"; libyal's documentation of
COWD.  Tables have 4096 entries, exist only where something was written, and there is one copy of
them; grains are small, often of one sector.  ESX finds free space by the header's number of the
next free sector, so that is raised, durably, before anything behind it is used.
"""

from __future__ import annotations

from construct import Const, ConstructError, Int32ul, Struct

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats.vmdk_entries import SECTOR
from virtmount.formats.vmdk_grains import MAX_GRAIN, Tables
from virtmount.hostfile import HostFile
from virtmount.plan import Step, Write

MAGIC = b"COWD"
VERSION = 1
PER_TABLE = 4096
HEADER_SIZE = 4 * SECTOR
FREE_SECTOR_AT = 28
UNCLEAN_AT = 1648

Header = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ul,
    "flags" / Int32ul,
    "capacity" / Int32ul,  # sectors, as are all that follow
    "grain_size" / Int32ul,
    "directory_offset" / Int32ul,
    "directory_entries" / Int32ul,
    "free_sector" / Int32ul,
)
assert Header.sizeof() == 32


class CowdExtent(Tables):
    """One file with grains of its own."""

    kind = "vmfsSparse"
    header_size = HEADER_SIZE

    def __init__(self, file: HostFile, number: int, start: int) -> None:
        super().__init__(file, number, start)
        raw = file.pread(0, HEADER_SIZE)
        try:
            header = Header.parse(raw)
        except ConstructError as error:
            raise NotAnImage(file, "header+0", "no COWD signature") from error
        if header.version != VERSION:
            raise Unsupported(file, "header+4", f"version {header.version}, know 1")
        if not header.capacity:
            raise Corrupt(file, "header+12", "capacity 0")
        grain: int = header.grain_size
        if grain & (grain - 1) or not SECTOR <= grain * SECTOR <= MAX_GRAIN:
            text = f"grains of {grain} sectors, know powers of two up to {MAX_GRAIN // SECTOR}"
            raise Corrupt(file, "header+16", text)
        self._header = bytearray(raw)
        self.grain = grain * SECTOR
        self.per_table = PER_TABLE
        self.capacity = header.capacity * SECTOR
        self.zeroed = False
        self.free_sector: int = header.free_sector
        self.unclean = bool(int.from_bytes(raw[UNCLEAN_AT : UNCLEAN_AT + 4], "little"))
        if header.directory_entries < self.tables:
            text = f"{header.directory_entries} directory entries, {self.tables} are needed"
            raise Corrupt(file, "header+24", text)
        self.directory_at = header.directory_offset * SECTOR
        self.directory = self.read_directory(self.directory_at, "grain directory", "header+20")

    def used_end(self) -> int:
        """As far as the file goes; a number that is much too large would cost all space."""
        return min(self.free_sector * SECTOR, -(-self.file.size // self.grain) * self.grain)

    def reserves_in_header(self) -> bool:
        return True

    def header_writes(self, *, unclean: bool, end: int) -> list[Step]:
        free = min(-(-end // SECTOR), 0xFFFFFFFF)
        self._header[FREE_SECTOR_AT : FREE_SECTOR_AT + 4] = free.to_bytes(4, "little")
        self._header[UNCLEAN_AT : UNCLEAN_AT + 4] = int(unclean).to_bytes(4, "little")
        return [
            Write(0, bytes(self._header[:SECTOR]), self.number),
            Write(
                UNCLEAN_AT // SECTOR * SECTOR,
                bytes(self._header[UNCLEAN_AT // SECTOR * SECTOR :]),
                self.number,
            ),
        ]
