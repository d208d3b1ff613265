"""Writing streamOptimized VMDKs: compressed grains in order, their tables behind them, a footer.

Source: VMware, Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse Extents".  Markers are
a sector: a number of sectors that follow, 0, a type.  The header in front says that the directory
is at the end, and is written last, so that half an image is none.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from virtmount.errors import Unsupported
from virtmount.formats import vmdk_sparse
from virtmount.formats.vmdk_create import (
    DESCRIPTOR_SECTORS,
    GRAIN,
    PER_TABLE,
    descriptor,
    header_bytes,
    sectors_of,
    tables_of,
)
from virtmount.formats.vmdk_entries import ENTRY, SECTOR, packed
from virtmount.formats.vmdk_grains import LIMIT
from virtmount.plan import Barrier, Plan, Step, Write
from virtmount.upkeep import New, Packer

END_OF_STREAM, TABLE, DIRECTORY, FOOTER = range(4)
LEVEL = 6
FIRST = 128  # sector of the first grain
FLAGS = vmdk_sparse.NEWLINE_TEST | vmdk_sparse.COMPRESSED | vmdk_sparse.MARKERS


class StreamPacker(Packer):
    def __init__(self, new: New) -> None:
        if new.parent is not None:
            raise Unsupported(new.name, "subformat", "a streamOptimized image has no parent")
        self.cluster_size = GRAIN * SECTOR
        self._sectors = sectors_of(new)
        if self._sectors > LIMIT * GRAIN:
            text = f"{self._sectors} sectors, at most {LIMIT * GRAIN}"
            raise Unsupported(new.name, "size", text)
        line = f'RW {self._sectors} SPARSE "{new.name}"'
        self._text = descriptor(new, "streamOptimized", [line])
        self._next = FIRST  # sector
        self._tables: dict[int, dict[int, int]] = {}  # table -> entry -> sector
        self._directory = [0] * tables_of(self._sectors)

    def encode(self, data: bytes) -> bytes | None:
        """Always: a grain that does not become smaller is stored in the stream's own way."""
        return zlib.compress(data, LEVEL)

    def add(self, cluster: int, data: bytes, packed: bool) -> Plan:
        if not packed:
            data = zlib.compress(data.ljust(self.cluster_size, b"\0"), LEVEL)
        table, entry = divmod(cluster, PER_TABLE)
        steps: list[Step] = []
        for done in [number for number in self._tables if number < table]:
            steps += self._put_table(done)
        self._tables.setdefault(table, {})[entry] = self._next
        marker = (cluster * GRAIN).to_bytes(8, "little") + len(data).to_bytes(4, "little")
        steps.append(self._put(marker + data))
        return Plan(*steps)

    def _put(self, data: bytes) -> Write:
        at = self._next
        self._next += -(-len(data) // SECTOR)
        if self._next > LIMIT:
            raise OSError(27, f"a streamOptimized image of more than {LIMIT * SECTOR} bytes")
        return Write(at * SECTOR, data.ljust((self._next - at) * SECTOR, b"\0"))

    def _marker(self, kind: int, length: int) -> Write:
        return self._put(
            (-(-length // SECTOR)).to_bytes(8, "little") + bytes(4) + kind.to_bytes(4, "little")
        )

    def _put_table(self, number: int) -> Iterator[Step]:
        entries = self._tables.pop(number)
        raw = packed(entries.get(i, 0) for i in range(PER_TABLE))
        yield self._marker(TABLE, len(raw))
        self._directory[number] = self._next
        yield self._put(raw)

    def end(self) -> Plan:
        steps: list[Step] = []
        for number in list(self._tables):
            steps += self._put_table(number)
        raw = packed(self._directory)
        steps.append(self._marker(DIRECTORY, len(self._directory) * ENTRY))
        directory = self._next
        steps.append(self._put(raw))
        steps.append(self._marker(FOOTER, SECTOR))
        steps.append(self._put(self._header(directory)))
        steps.append(self._put(bytes(SECTOR)))  # the end-of-stream marker
        header = Write(0, self._header(vmdk_sparse.AT_END))
        return Plan(*steps, Write(SECTOR, self._text), Barrier, header, Barrier)

    def _header(self, directory: int) -> bytes:
        return header_bytes(
            version=3,
            flags=FLAGS,
            capacity=self._sectors,
            descriptor_offset=1,
            descriptor_size=DESCRIPTOR_SECTORS,
            directory_offset=directory,
            overhead=FIRST,
            compression=vmdk_sparse.DEFLATE,
        )
