"""Bochs growing images (a redolog of its own), versions 1 and 2, read.

Source: the Bochs emulator's hdimage.h.  Images are written by tests/formats/make_packed.py, and
qemu-img 7.2 reads them as well.  A catalog has the number of each extent; an extent is a bitmap,
one bit a sector (the lowest first), and the sectors.  A sector whose bit is clear was never
written.
Refused by name: undoable and volatile redologs, which lie over an image that they do not name, and
flat or sparse Bochs images, which have another header.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from construct import Bytes, Int32ul, Struct

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Extent, Image, Kind, Leaf, Match, Options, Span

MAGIC = b"Bochs Virtual HD Image"
TYPE, SUBTYPE = b"Redolog", b"Growing"
VERSIONS = {0x00010000: "1", 0x00020000: "2"}
ABSENT = 0xFFFFFFFF
ENTRY = 4
SECTOR = 512
LEAF = 1024

HEADER = 512
MIN_EXTENT, MAX_EXTENT = 512, 32 << 20  # Bochs takes 32 MiB for 128 TiB
MIN_CATALOG = 1 << 16  # entries that are always allowed; beyond, Bochs has extents of 8 bytes each

Header = Struct(
    "magic" / Bytes(32),
    "type" / Bytes(16),
    "subtype" / Bytes(16),
    "version" / Int32ul,
    "header_size" / Int32ul,
    "catalog" / Int32ul,  # entries
    "bitmap" / Int32ul,  # bytes of each
    "extent" / Int32ul,  # bytes of guest data in each
    "disk" / Bytes(12),  # version 1: the size; 2: a timestamp, then the size
)
assert Header.sizeof() == 96


class Bochs(Image):
    name: ClassVar[str] = "bochs"
    suffixes: ClassVar[tuple[str, ...]] = ("bochs",)

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if head.startswith(MAGIC) else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        header = Header.parse(file.pread_padded(0, Header.sizeof()))
        if _text(header.magic) != MAGIC:
            raise NotAnImage(file, "header+0", "no Bochs image")
        self._file = file
        self.files = [file]
        self._check_kind(header)
        if file.writable:
            raise Unsupported(file, "", "bochs images are only read", hint="--read-only")
        self.size = int.from_bytes(
            header.disk[:8] if header.version == 0x00010000 else header.disk[4:], "little"
        )
        self._check_sizes(header)
        self.variant = f"growing {VERSIONS[header.version]}"
        self._catalog: int = header.catalog
        self._catalog_at: int = header.header_size
        self._data = header.header_size + header.catalog * ENTRY
        # Both are rounded up to sectors.
        self._bitmap = -(-header.bitmap // SECTOR) * SECTOR
        self._step = self._bitmap + header.extent
        self.cluster_size = header.extent
        self.entries_per_leaf = LEAF

    def _check_kind(self, header: Any) -> None:
        file = self._file
        for place, found, wanted in (
            (32, header.type, TYPE),
            (48, header.subtype, SUBTYPE),
        ):
            if _text(found) != wanted:
                text = f"{_text(found).decode('ascii', 'backslashreplace')!r}, know {wanted!r}"
                raise Unsupported(file, f"header+{place}", text)
        if header.version not in VERSIONS:
            text = f"version {header.version:#x}, know 0x10000 and 0x20000"
            raise Unsupported(file, "header+64", text)

    def _check_sizes(self, header: Any) -> None:
        file, extent = self._file, header.extent
        if header.header_size < HEADER or header.header_size % SECTOR:
            text = f"header of {header.header_size} bytes, expected {HEADER}"
            raise Corrupt(file, "header+68", text)
        if extent & (extent - 1) or not MIN_EXTENT <= extent <= MAX_EXTENT:
            text = (
                f"extents of {extent} bytes, know powers of two from {MIN_EXTENT} to {MAX_EXTENT}"
            )
            raise Unsupported(file, "header+80", text)
        if header.bitmap * 8 < extent // SECTOR:
            text = f"bitmaps of {header.bitmap} bytes for extents of {extent // SECTOR} sectors"
            raise Corrupt(file, "header+76", text)
        if header.bitmap > MAX_EXTENT:
            text = f"bitmaps of {header.bitmap} bytes, the most is {MAX_EXTENT}"
            raise Unsupported(file, "header+76", text)
        most = max(MIN_CATALOG, extent // 4)
        if not 0 < header.catalog <= most:
            text = f"{header.catalog} catalog entries for extents of {extent}, know 1 to {most}"
            raise Unsupported(file, "header+72", text)
        if header.catalog * ENTRY % SECTOR:
            text = f"{header.catalog} catalog entries: extents would not begin at a sector"
            raise Unsupported(file, "header+72", text)
        end = header.header_size + header.catalog * ENTRY
        if end > file.size:
            text = f"catalog ends at {end}, the file at {file.size}"
            raise Corrupt(file, "header+72", text)
        at = 84 if header.version == 0x00010000 else 88
        if not self.size or self.size % SECTOR:
            text = f"disk size {self.size}, not a multiple of {SECTOR} above 0"
            raise Corrupt(file, f"header+{at}", text)
        if self.size > header.catalog * extent:
            text = f"disk size {self.size}, the catalog has room for {header.catalog * extent}"
            raise Corrupt(file, f"header+{at}", text)

    @property
    def grain(self) -> int:
        return SECTOR

    def leaf(self, index: int) -> Leaf:
        at = self._catalog_at + index * LEAF * ENTRY
        count = min(LEAF, self._catalog - index * LEAF)
        if self._file.pread(at, count * ENTRY).count(0xFF) == count * ENTRY:
            return Leaf(kind=Kind.ABSENT)
        return Leaf(kind=Kind.PARTIAL)

    def slow(self, cluster: int) -> Sequence[Extent]:
        start, size = cluster * self.cluster_size, self.cluster_size
        at = self._catalog_at + cluster * ENTRY
        number = int.from_bytes(self._file.pread(at, ENTRY), "little")
        if number == ABSENT:
            return (Extent(start, size, Kind.ABSENT),)
        host = self._data + number * self._step
        if host + self._bitmap > self._file.size:
            text = f"extent {number} lies at {host}, the file ends at {self._file.size}"
            raise Corrupt(self._file, f"catalog entry {cluster} at {at}", text)
        bits = self._file.pread(host, -(-size // SECTOR // 8))
        data = host + self._bitmap
        in_file = max(0, self._file.size - data) // SECTOR
        pieces = []
        for first, end, present in _runs(bits, size // SECTOR):
            middle = max(first, min(end, in_file)) if present else end
            for low, high, kind in (
                (first, middle, Kind.DATA if present else Kind.ABSENT),
                (middle, end, Kind.INVALID),  # the file ends before
            ):
                if low < high:
                    place = data + low * SECTOR if kind is Kind.DATA else 0
                    pieces.append(Extent(start + low * SECTOR, (high - low) * SECTOR, kind, place))
        return pieces

    def metadata(self) -> Iterator[Span]:
        yield Span(0, self._data)

    def details(self) -> dict[str, Any]:
        return {
            "version": self.variant.removeprefix("growing "),
            "catalog_entries": self._catalog,
            "bitmap_size": self._bitmap,
            "extent_size": self.cluster_size,
        }


def _text(raw: bytes) -> bytes:
    return raw.split(b"\0")[0]


def _runs(bits: bytes, count: int) -> Iterator[tuple[int, int, bool]]:
    """The first `count` bits, lowest first, as runs: first, one past the last, value."""
    if not bits.strip(b"\0"):
        yield 0, count, False
        return
    if not bits.strip(b"\xff"):
        yield 0, count, True
        return
    first, value = 0, bits[0] & 1
    for i in range(1, count):
        if bits[i >> 3] >> (i & 7) & 1 != value:
            yield first, i, bool(value)
            first, value = i, value ^ 1
    yield first, count, bool(value)
