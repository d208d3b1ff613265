"""The extents of a VMDK as parts of the guest disk: what each of them says about its bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats import vmdk_cowd, vmdk_sparse
from virtmount.formats.vmdk_descriptor import (
    FLAT,
    NO_ACCESS,
    READ_WRITE,
    SE_SPARSE,
    VMFS,
    ZERO,
    Descriptor,
    ExtentLine,
)
from virtmount.formats.vmdk_grains import SECTOR, Tables
from virtmount.formats.vmdk_sesparse import SeSparseExtent
from virtmount.formats.vmdk_sparse import SparseExtent
from virtmount.hostfile import HostFile
from virtmount.image import Extent, Kind, Options
from virtmount.siblings import open_sibling

MAX_DISK = 1 << 60


@dataclass(slots=True)
class Part:
    """Guest bytes `start` … `end`.

    `tables` or `se_sparse` say where they are; else `number` and `base` do where `kind` is DATA or
    SHARED (an extent that may not be written), and ZERO and INVALID need no more.
    """

    start: int
    end: int
    kind: Kind
    number: int = 0
    base: int = 0
    tables: Tables | None = None
    se_sparse: SeSparseExtent | None = None

    @property
    def grain(self) -> int | None:
        sparse = self.tables or self.se_sparse
        return sparse.grain if sparse else None

    def pieces(self, start: int, end: int) -> Iterator[Extent]:
        """Extents of the guest bytes start … end, which lie in here."""
        if self.tables is None and self.se_sparse is None:
            host = self.base + start - self.start if self.kind is not Kind.ZERO else 0
            yield Extent(start, end - start, self.kind, host, self.number)
            return
        grain = self.grain
        assert grain
        while start < end:
            number, within = divmod(start - self.start, grain)
            stop = min(end, start + grain - within)
            kind, host = self._lookup(number)
            if kind is Kind.DATA:
                yield Extent(start, stop - start, kind, host + within, self.number)
            else:
                yield Extent(start, stop - start, kind)
            start = stop

    def _lookup(self, grain: int) -> tuple[Kind, int]:
        if self.se_sparse is not None:
            return self.se_sparse.lookup(grain)
        tables = self.tables
        assert tables is not None
        entry = tables.entry(grain)
        if not tables.is_grain(entry):
            return (Kind.ZERO if entry else Kind.ABSENT), 0
        if tables.compressed:
            return Kind.COMPRESSED, 0
        host = entry * SECTOR
        if host < tables.header_size or host >= tables.file.size:
            return Kind.INVALID, 0
        return Kind.DATA, host


class Opener:
    """Opens what a descriptor names.  `files` grows; the caller closes it if anything is raised."""

    def __init__(self, file: HostFile, descriptor: Descriptor, options: Options) -> None:
        self.files = [file]
        self._file, self._descriptor, self._options = file, descriptor, options
        self._numbers: dict[str, int] = {}  # of files by the name in the descriptor
        self._sparse: set[int] = set()

    def parts(self) -> list[Part]:
        if not self._descriptor.extents:
            raise Corrupt(self._file, "descriptor", "no extents")
        parts: list[Part] = []
        start = 0
        for line in self._descriptor.extents:
            parts.append(self._part(line, start))
            start += line.size
            if start > MAX_DISK:
                raise Corrupt(self._file, line.place, f"a disk of more than {MAX_DISK} bytes")
        return parts

    def _part(self, line: ExtentLine, start: int) -> Part:
        end = start + line.size
        if line.access == NO_ACCESS:
            return Part(start, end, Kind.INVALID)
        if line.type == ZERO:
            return Part(start, end, Kind.ZERO)
        number = self._open(line)
        file = self.files[number]
        if line.type in (FLAT, VMFS):
            if number in self._sparse:
                raise Corrupt(self._file, line.place, f"{file} is a sparse extent too")
            if file.writable and line.offset + line.size > file.size:
                text = f"{line.size} bytes from {line.offset} on, {file} ends at {file.size}"
                raise Corrupt(self._file, line.place, text, hint="--read-only")
            shared = file.writable and line.access != READ_WRITE
            return Part(start, end, Kind.SHARED if shared else Kind.DATA, number, line.offset)
        if line.offset:
            text = f"a {line.type} extent that begins at byte {line.offset} of its file"
            raise Unsupported(self._file, line.place, text)
        if number in self._sparse or number != len(self.files) - 1:
            raise Corrupt(self._file, line.place, f"{file} is another extent too")
        self._sparse.add(number)
        part = self._opened(line, number, start, end)
        if file.writable and line.access != READ_WRITE:
            text = f"{line.access} for a {line.type} extent: not written"
            raise Unsupported(self._file, line.place, text, hint="--read-only")
        return part

    def _opened(self, line: ExtentLine, number: int, start: int, end: int) -> Part:
        file = self.files[number]
        part = Part(start, end, Kind.PARTIAL, number)
        if line.type == SE_SPARSE:
            part.se_sparse = SeSparseExtent(file, number, start)
            capacity = part.se_sparse.capacity
        else:
            magic = file.pread_padded(0, 4)
            # Some programs write SPARSE for a COWD extent; the file knows better.
            known = {vmdk_sparse.MAGIC: SparseExtent, vmdk_cowd.MAGIC: vmdk_cowd.CowdExtent}
            if magic not in known:
                text = f"{line.type} extent without a signature: {magic!r}"
                raise NotAnImage(file, "header+0", text)
            part.tables = known[magic](file, number, start)
            capacity = part.tables.capacity
        if capacity < end - start:
            text = f"{line.size} bytes, {file} has {capacity}"
            raise Corrupt(self._file, line.place, text)
        return part

    def _open(self, line: ExtentLine) -> int:
        """The number of the extent's file.  One name is one file, however often it is said."""
        name = line.names[0]
        if name in self._numbers:
            return self._numbers[name]
        for i, name in enumerate(line.names):
            try:
                opened = open_sibling(
                    self._file, line.place, name, self._options, others=self.files[1:]
                )
                break
            except NotAnImage as error:
                if isinstance(error, Corrupt) or i + 1 == len(line.names):
                    raise
        self.files.append(opened)
        number = self._numbers[line.names[0]] = len(self.files) - 1
        return number


def single(extent: SparseExtent) -> list[Part]:
    """A file that is descriptor and extent at once."""
    return [Part(0, extent.capacity, Kind.PARTIAL, 0, tables=extent)]


SUFFIXES = ("-flat", "-delta", "-sesparse", "-s", "-f")


def descriptor_of(file: HostFile) -> str | None:
    """The name of the descriptor that an extent's name stands for, if that file is there."""
    stem, suffix = os.path.splitext(file.path.name)
    for ending in SUFFIXES:
        head, found, number = stem.rpartition(ending)
        if found and head and (not number or number.isdecimal()):
            name = head + suffix
            if os.path.isfile(file.path.with_name(name)):
                return name
    return None
