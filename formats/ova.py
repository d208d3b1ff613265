"""OVA: a virtual machine in a tar file, of which we serve the disk, read-only.

Source: DMTF DSP0243 (OVF), "Distribution as a single file"; POSIX.1-1988 ustar, with the long names
of GNU and pax.  The disk is the one member called *.vmdk, which is a VMDK of a single file, as a
rule a streamOptimized one, lying in the tar as it is.  Where there are several, none is chosen.
The tar is read by hand because Python's tarfile believes lengths.

Made by VirtualBox and ovftool are said to be such; tried with tars of GNU tar and Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats import vmdk_sparse
from virtmount.formats.vmdk import VMDK
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Extent, Image, Kind, Leaf, Match, Options, Span

BLOCK = 512
MAX_MEMBERS = 4096
MAX_NAME = 64 << 10  # bytes of one header of long names
SHOWN = 8  # disks named in an error
MAGIC_AT, MAGIC = 257, b"ustar"
REGULAR = (b"0", b"\0", b"7")
LONG_NAME, PAX, PAX_ALL = b"L", b"x", b"g"

Read = Callable[[int, int], bytes]  # offset, length


class Member(NamedTuple):
    name: str
    start: int  # of its data, bytes
    size: int
    regular: bool


class Window(HostFile):
    """`length` bytes of a file from `start` on.  Closing it does nothing: the file is another's."""

    def __init__(self, file: HostFile, start: int, length: int) -> None:
        self.path = file.path
        self.writable = False
        self.locked = file.locked
        self.is_device = False
        self.fd = file.fd
        self._file, self._start, self._length = file, start, length

    @property
    def size(self) -> int:
        return self._length

    def close(self) -> None:
        pass

    def pread_padded(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length >= 1 << 63:
            raise Corrupt(self, f"byte {offset}", f"{length} bytes wanted, no file is that long")
        inside = max(0, min(length, self._length - offset))
        data = self._file.pread_padded(self._start + offset, inside) if inside else b""
        return data.ljust(length, b"\0")

    def patch(self, offset: int, data: bytes) -> None:
        self._file.patch(self._start + offset, data)


class OVA(Image):
    name: ClassVar[str] = "ova"
    suffixes: ClassVar[tuple[str, ...]] = ("ova",)

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        """A tar that begins with an OVF, or has a VMDK near its beginning."""
        if head[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
            return Match.NO

        def read(offset: int, length: int) -> bytes:
            return head[offset : offset + length]

        try:
            for member in members("", read, len(head)):
                if member.name.lower().endswith((".ovf", ".vmdk")):
                    return Match.SURE
        except Corrupt:
            pass
        return Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self.files = [file]
        if file.writable:
            raise Unsupported(file, "", "an OVA is only read", hint="--read-only")
        if file.pread_padded(MAGIC_AT, len(MAGIC)) != MAGIC:
            raise NotAnImage(file, f"byte {MAGIC_AT}", "no tar")
        disk = self._find()
        self._start = disk.start
        window = Window(file, disk.start, disk.size)
        if window.pread_padded(0, 4) != vmdk_sparse.MAGIC:
            text = f"{disk.name} is not a VMDK of a single file"
            raise Unsupported(file, f"byte {disk.start}", text, hint="unpack it with tar")
        inner = self._inner = VMDK(window, options)
        if inner.parent is not None:
            raise Unsupported(file, f"byte {disk.start}", f"{disk.name} has a parent")
        self._disk = disk
        self.variant = inner.variant
        self.size = inner.size
        self.cluster_size = inner.cluster_size
        self.entries_per_leaf = inner.entries_per_leaf
        self.identity, self.stamp = inner.identity, inner.stamp
        self.memory = inner.memory
        assert inner.layout is not None
        layout = inner.layout
        self.layout = replace(layout, bias=disk.start, low=layout.low + disk.start)

    def _find(self) -> Member:
        file = self.files[0]
        found = list(members(file, file.pread_padded, file.size))
        disks = [member for member in found if member.name.lower().endswith(".vmdk")]
        if not disks:
            packed = [m.name for m in found if ".vmdk." in m.name.lower()]
            if packed:
                text = f"{packed[0]} is packed, or one of several pieces"
                raise Unsupported(file, "", text, hint="unpack it with tar")
            raise NotAnImage(file, "", f"no VMDK among the {len(found)} files in the tar")
        if len(disks) > 1:
            names = ", ".join(member.name for member in disks[:SHOWN])
            text = f"{len(disks)} disks: {names}"
            raise Unsupported(file, "", text, hint="unpack the one you want with tar")
        disk = disks[0]
        if not disk.regular:
            raise Unsupported(file, f"byte {disk.start}", f"{disk.name} is not a regular file")
        return disk

    @property
    def grain(self) -> int:
        return self._inner.grain

    def leaf(self, index: int) -> Leaf:
        leaf = self._inner.leaf(index)
        return leaf if leaf.table is None else replace(leaf, table=leaf.table + self._start)

    def slow(self, cluster: int) -> Sequence[Extent]:
        return [
            extent._replace(host_offset=extent.host_offset + self._start)
            if extent.kind is Kind.DATA
            else extent
            for extent in self._inner.slow(cluster)
        ]

    def inflate(self, cluster: int) -> bytes:
        return self._inner.inflate(cluster)

    def metadata(self) -> Iterable[Span]:
        """And what else is in the tar."""
        yield Span(0, self._start)
        end = self._start + self._disk.size
        if end < self.files[0].size:
            yield Span(end, self.files[0].size - end)
        for span in self._inner.metadata():
            yield span._replace(offset=span.offset + self._start)

    def details(self) -> dict[str, Any]:
        return {"disk": self._disk.name, "disk_offset": self._start, **self._inner.details()}


def members(file: object, read: Read, size: int) -> Iterator[Member]:
    """The files in a tar, as far as `size`.  Corrupt for a header that cannot be right."""
    at = 0
    long_name: str | None = None
    for _ in range(MAX_MEMBERS):
        if at + BLOCK > size:
            return
        header = read(at, BLOCK)
        if not any(header):
            return
        place = f"tar header at {at}"
        if not _sum_is_right(header):
            raise Corrupt(file, place, "checksum")
        length = _number(header[124:136])
        if length is None or length < 0 or at + BLOCK + length >= 1 << 62:
            raise Corrupt(file, place, f"size {header[124:136]!r}")
        kind, start = header[156:157], at + BLOCK
        at = start + -(-length // BLOCK) * BLOCK
        if kind in (LONG_NAME, PAX):
            if length > MAX_NAME:
                raise Corrupt(file, place, f"a name of {length} bytes")
            raw = read(start, length)
            found = raw.split(b"\0")[0] if kind == LONG_NAME else _pax_path(raw)
            long_name = long_name if found is None else found.decode("utf-8", "replace")
            continue
        if kind == PAX_ALL:
            continue
        name = long_name
        if name is None:
            prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
            base = header[:100].split(b"\0")[0]
            name = (prefix + b"/" + base if prefix else base).decode("utf-8", "replace")
        long_name = None
        yield Member(name, start, length, kind in REGULAR)
    raise Corrupt(file, "", f"more than {MAX_MEMBERS} files in the tar")


def _sum_is_right(header: bytes) -> bool:
    wanted = _number(header[148:156])
    return wanted == sum(header[:148]) + 8 * ord(" ") + sum(header[156:])


def _number(field: bytes) -> int | None:
    """Octal digits, or binary where the first bit is set (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None


def _pax_path(raw: bytes) -> bytes | None:
    """The value of `path` in records of `LENGTH key=value\\n`."""
    at = 0
    path: bytes | None = None
    while at < len(raw):
        digits, space, _ = raw[at : at + 16].partition(b" ")
        if not space or not digits.isdigit() or int(digits) <= len(digits):
            break
        record = raw[at + len(digits) + 1 : at + int(digits) - 1]
        key, _, value = record.partition(b"=")
        if key == b"path":
            path = value
        at += int(digits)
    return path
