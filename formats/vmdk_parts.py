"""The extents of a VMDK as parts of the guest disk: what each of them says about its bytes."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats import vmdk_cowd, vmdk_sesparse, vmdk_sparse
from virtmount.formats.vmdk_descriptor import (
    FLAT,
    MAX_LENGTH,
    NO_ACCESS,
    READ_WRITE,
    SE_SPARSE,
    VMFS,
    ZERO,
    Descriptor,
    ExtentLine,
    looks_like_descriptor,
    parse,
)
from virtmount.formats.vmdk_entries import SECTOR
from virtmount.formats.vmdk_grains import Tables
from virtmount.formats.vmdk_sesparse import SeSparseExtent
from virtmount.formats.vmdk_sparse import SparseExtent
from virtmount.hostfile import HostFile
from virtmount.image import Extent, Kind, Options
from virtmount.siblings import open_sibling

MAX_DISK = 1 << 60
MAGICS = (vmdk_sparse.MAGIC, vmdk_cowd.MAGIC, vmdk_sesparse.MAGIC)


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


@dataclass(slots=True)
class Opened:
    """An image's files and what is in them; `text_at` is where the descriptor is in the first."""

    files: list[HostFile]
    parts: list[Part]
    descriptor: Descriptor
    text_at: int = 0
    monolithic: bool = False


def open_parts(file: HostFile, options: Options, *, lenient: bool = False) -> Opened:
    """Open a descriptor with its extents, or a file that is both.

    `lenient`: for checking; what writing would refuse is taken as it is.
    """
    head = file.pread_padded(0, 8)
    if head.startswith(vmdk_sparse.MAGIC):
        extent = SparseExtent(file, 0, 0, lenient=lenient)
        part = Part(0, extent.capacity, Kind.PARTIAL, 0, tables=extent)
        return Opened([file], [part], _embedded(file, extent), extent.descriptor_at, True)
    if head.startswith(MAGICS):
        _refuse_extent(file)
    descriptor = read_text(file)
    opener = Opener(file, descriptor, options, lenient=lenient)
    try:
        return Opened(opener.files, opener.parts(), descriptor)
    except BaseException:
        close_siblings(opener.files)
        raise


def close_siblings(files: list[HostFile]) -> None:
    for sibling in files[1:]:
        sibling.close()


def read_text(file: HostFile) -> Descriptor:
    """The descriptor in a file of its own."""
    size = file.size
    raw = file.pread_padded(0, min(size, MAX_LENGTH))
    if not looks_like_descriptor(raw):
        raise NotAnImage(file, "byte 0", "neither a VMDK extent nor a descriptor")
    if size > MAX_LENGTH:
        text = f"a descriptor of {size} bytes, at most {MAX_LENGTH} are supported"
        raise Unsupported(file, "", text)
    return parse(file, "", raw)


def _embedded(file: HostFile, extent: SparseExtent) -> Descriptor:
    raw = extent.descriptor()
    if not looks_like_descriptor(raw):
        _refuse_extent(file)
    descriptor = parse(file, "descriptor ", raw, extent.descriptor_room)
    if len(descriptor.extents) != 1:
        text = f"{len(descriptor.extents)} extents in the descriptor of a sparse file, know 1"
        raise Unsupported(file, "descriptor", text)
    return descriptor


def _refuse_extent(file: HostFile) -> NoReturn:
    name = descriptor_of(file)
    text = "an extent of an image whose descriptor is another file"
    hint = f"its descriptor seems to be {name}" if name else "open the descriptor, a small text"
    raise Unsupported(file, "", text, hint=hint)


class Opener:
    """Opens what a descriptor names.  `files` grows; the caller closes it if anything is raised."""

    def __init__(
        self, file: HostFile, descriptor: Descriptor, options: Options, *, lenient: bool = False
    ) -> None:
        self.files = [file]
        self._lenient = lenient
        self._file, self._descriptor, self._options = file, descriptor, options
        self._numbers: dict[str, int] = {}  # of files by the name in the descriptor
        self._sparse: set[int] = set()
        self._flat: dict[int, list[tuple[int, int]]] = {}  # stretches of each file

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
            if file.writable and not self._lenient and line.offset + line.size > file.size:
                text = f"{line.size} bytes from {line.offset} on, {file} ends at {file.size}"
                raise Corrupt(self._file, line.place, text, hint="--read-only")
            self._refuse_twice(line, number)
            shared = file.writable and line.access != READ_WRITE
            return Part(start, end, Kind.SHARED if shared else Kind.DATA, number, line.offset)
        if line.offset:
            text = f"a {line.type} extent that begins at byte {line.offset} of its file"
            raise Unsupported(self._file, line.place, text)
        if number in self._sparse or number in self._flat:
            raise Corrupt(self._file, line.place, f"{file} is another extent too")
        self._sparse.add(number)
        part = self._opened(line, number, start, end)
        if file.writable and line.access != READ_WRITE and not self._lenient:
            text = f"{line.access} for a {line.type} extent: not written"
            raise Unsupported(self._file, line.place, text, hint="--read-only")
        return part

    def _refuse_twice(self, line: ExtentLine, number: int) -> None:
        """Two places of the disk that are one in the file are not written."""
        start, end = line.offset, line.offset + line.size
        taken = self._flat.setdefault(number, [])
        at = bisect_left(taken, (start, end))
        near = taken[max(0, at - 1) : at + 1]
        writable = self.files[number].writable and not self._lenient
        if writable and any(low < end and start < high for low, high in near):
            text = f"bytes {start} to {end} of the file are another extent's too"
            raise Corrupt(self._file, line.place, text, hint="--read-only")
        taken.insert(at, (start, end))

    def _opened(self, line: ExtentLine, number: int, start: int, end: int) -> Part:
        file = self.files[number]
        part = Part(start, end, Kind.PARTIAL, number)
        if line.type == SE_SPARSE:
            part.se_sparse = SeSparseExtent(file, number, start)
            capacity = part.se_sparse.capacity
        else:
            magic = file.pread_padded(0, 4)
            # Some programs write SPARSE for a COWD extent; the file knows better.
            if magic == vmdk_cowd.MAGIC:
                part.tables = vmdk_cowd.CowdExtent(file, number, start)
            elif magic == vmdk_sparse.MAGIC:
                part.tables = SparseExtent(file, number, start, lenient=self._lenient)
            else:
                text = f"{line.type} extent without a signature: {magic!r}"
                raise NotAnImage(file, "header+0", text)
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
