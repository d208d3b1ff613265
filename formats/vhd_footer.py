"""VHD: the footer, its copies, the dynamic header and the parent locators.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0 of 2006: Hard Disk Footer
Format, Dynamic Disk Header Format, Implementing a Differencing Hard Disk, appendix CHS
Calculation.  Where Windows and VirtualBox do something else than it says, the comment says so.

A dynamic or differencing image has its footer twice, at the beginning and at the end; a fixed one
only at the end.  Any one whole copy is enough to open an image.
"""

from __future__ import annotations

import ntpath
import os
import struct
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from construct import (
    Array,
    Bytes,
    Const,
    ConstructError,
    Int8ub,
    Int16ub,
    Int32ub,
    Int64ub,
    Padding,
    Struct,
)

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.hostfile import HostFile

SECTOR = 512
COOKIE = b"conectix"
HEADER_COOKIE = b"cxsparse"
VERSION = 0x00010000
NO_OFFSET = 0xFFFFFFFFFFFFFFFF  # the specification says 32 bits, everybody writes 64
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
TYPES = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}
EPOCH = 946684800  # 2000-01-01 00:00 UTC
FREE = 0xFFFFFFFF  # a table entry without a block
ENTRY = 4

MAX_SIZE = 2040 << 30  # what the specification's readers take
MAX_PADDING = 64 << 10  # zeros behind the footer, in which it is looked for
MAX_LOCATOR = 16 << 10  # bytes of one parent's path
MIN_BLOCK, MAX_BLOCK = 4096, 32 << 20  # so that a bitmap of single bits costs no second
MAX_BLOCKS = 1 << 22  # 2 TiB in blocks of 512 KiB; a table of 16 MiB
NO_UUID = bytes(16)

FooterStruct = Struct(
    "cookie" / Const(COOKIE),
    "features" / Int32ub,
    "version" / Int32ub,
    "data_offset" / Int64ub,  # of the dynamic header
    "timestamp" / Int32ub,  # creation, seconds since 2000
    "creator_app" / Bytes(4),
    "creator_version" / Int32ub,
    "creator_os" / Bytes(4),
    "original_size" / Int64ub,
    "current_size" / Int64ub,
    "cylinders" / Int16ub,
    "heads" / Int8ub,
    "sectors" / Int8ub,  # of a track
    "type" / Int32ub,
    "checksum" / Int32ub,
    "uuid" / Bytes(16),
    "saved_state" / Int8ub,
    Padding(427),
)
assert FooterStruct.sizeof() == SECTOR

LocatorStruct = Struct(
    "code" / Bytes(4),
    "space" / Int32ub,  # sectors says the specification; Virtual PC and Hyper-V write bytes
    "length" / Int32ub,  # bytes of the path
    Padding(4),
    "offset" / Int64ub,  # in the file
)
LOCATORS = 8

HeaderStruct = Struct(
    "cookie" / Const(HEADER_COOKIE),
    "data_offset" / Int64ub,  # unused
    "table_offset" / Int64ub,
    "version" / Int32ub,
    "entries" / Int32ub,  # of the table
    "block_size" / Int32ub,  # without its bitmap
    "checksum" / Int32ub,
    "parent_uuid" / Bytes(16),
    "parent_timestamp" / Int32ub,
    Padding(4),
    "parent_name" / Bytes(512),  # UTF-16BE
    "locators" / Array(LOCATORS, LocatorStruct),
    Padding(256),
)
HEADER = HeaderStruct.sizeof()
assert HEADER == 1024

CHECKSUM_AT = 64  # in the footer
HEADER_CHECKSUM_AT = 36
# offset and format of the fields that are changed in place
FOOTER_FIELDS = {
    "data_offset": (16, ">Q"),
    "current_size": (48, ">Q"),
    "geometry": (56, ">HBB"),
    "type": (60, ">I"),
}
HEADER_FIELDS = {"table_offset": (16, ">Q"), "entries": (28, ">I")}


def checksum(raw: bytes, at: int) -> int:
    """The ones' complement of the sum of all bytes but the checksum's own four."""
    return ~(sum(raw) - sum(raw[at : at + 4])) & 0xFFFFFFFF


def is_whole(raw: bytes, at: int) -> bool:
    return int.from_bytes(raw[at : at + 4], "big") == checksum(raw, at)


def summed(raw: bytes, at: int) -> bytes:
    return raw[:at] + checksum(raw, at).to_bytes(4, "big") + raw[at + 4 :]


def changed_footer(raw: bytes, **fields: int | tuple[int, int, int]) -> bytes:
    """The footer with other values in FOOTER_FIELDS; whatever else it holds stays."""
    return _changed(raw, CHECKSUM_AT, FOOTER_FIELDS, fields)


def changed_header(raw: bytes, **fields: int) -> bytes:
    return _changed(raw, HEADER_CHECKSUM_AT, HEADER_FIELDS, fields)


def _changed(
    raw: bytes,
    at: int,
    known: Mapping[str, tuple[int, str]],
    fields: Mapping[str, int | tuple[int, int, int]],
) -> bytes:
    new = bytearray(raw)
    for name, value in fields.items():
        offset, code = known[name]
        struct.pack_into(code, new, offset, *(value if isinstance(value, tuple) else (value,)))
    return summed(bytes(new), at)


def now() -> int:
    """Seconds since 2000, as a footer has them."""
    return max(0, int(time.time()) - EPOCH) & 0xFFFFFFFF


def geometry(size: int) -> tuple[int, int, int]:
    """Cylinders, heads, sectors per track for a disk; their product is at most its size."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return total // 255 // 16, 16, 255
    sectors = 17
    tracks = total // sectors
    heads = max(4, -(-tracks // 1024))
    if tracks >= heads * 1024 or heads > 16:
        sectors, heads = 31, 16
        tracks = total // sectors
    if tracks >= heads * 1024:
        sectors, heads = 63, 16
        tracks = total // sectors
    return tracks // heads, heads, sectors


LARGEST_GEOMETRY = (65535, 16, 255)


def new_footer(
    kind: int, size: int, data_offset: int, uuid: bytes, timestamp: int | None = None
) -> bytes:
    """A footer as Windows makes it: programs that take CHS for the size of a disk made by Virtual
    PC or an early qemu take the exact size of one made by Windows ("win ")."""
    raw = FooterStruct.build(
        {
            "cookie": COOKIE,
            "features": 2,  # reserved, always set
            "version": VERSION,
            "data_offset": data_offset,
            "timestamp": now() if timestamp is None else timestamp,
            "creator_app": b"win ",
            "creator_version": 0x000A0000,
            "creator_os": b"Wi2k",
            "original_size": size,
            "current_size": size,
            "cylinders": geometry(size)[0],
            "heads": geometry(size)[1],
            "sectors": geometry(size)[2],
            "type": kind,
            "checksum": 0,
            "uuid": uuid,
            "saved_state": 0,
        }
    )
    return summed(bytes(raw), CHECKSUM_AT)


# The copies of the footer


@dataclass(frozen=True, slots=True)
class Copy:
    """One place with the footer's cookie; `raw` is 512 bytes even where the file has 511."""

    offset: int
    length: int
    raw: bytes

    @property
    def whole(self) -> bool:
        return is_whole(self.raw, CHECKSUM_AT)

    @property
    def type(self) -> int:
        return int.from_bytes(self.raw[60:64], "big")

    @property
    def current_size(self) -> int:
        return int.from_bytes(self.raw[48:56], "big")

    @property
    def state(self) -> str:
        if self.whole:
            return "whole" if self.length == SECTOR else f"whole, {self.length} bytes"
        found = int.from_bytes(self.raw[CHECKSUM_AT : CHECKSUM_AT + 4], "big")
        return f"checksum {found:08x}, computed {checksum(self.raw, CHECKSUM_AT):08x}"

    @property
    def is_exact_fixed(self) -> bool:
        """A whole footer of a fixed disk, which lies right behind that disk."""
        return self.whole and self.type == FIXED and self.current_size == self.offset

    @property
    def is_sparse(self) -> bool:
        return self.type in (DYNAMIC, DIFFERENCING)


class Copies(NamedTuple):
    """What was found at the beginning and at the end of a file."""

    head: Copy | None
    tail: Copy | None

    def choose(self) -> Copy | None:
        """The copy to go by, if one is whole.

        A fixed disk's guest may write whatever it likes to the first sector, so a whole footer
        that fits behind a fixed disk comes before one at the beginning.  Else the head goes
        first: a tail is moved with every new block.
        """
        head, tail = self
        if tail is not None and tail.is_exact_fixed:
            return tail
        if head is not None and head.whole and head.is_sparse:
            return head
        if tail is not None and tail.whole:
            return tail
        return None


def copies_in(head: bytes, tail: bytes, size: int) -> Copies:
    """The footers in the first and the last bytes of a file of `size` bytes."""
    first = Copy(0, SECTOR, head[:SECTOR]) if head.startswith(COOKIE) and size >= SECTOR else None
    return Copies(first, _tail_in(tail, size))


def _tail_in(tail: bytes, size: int) -> Copy | None:
    """At the very end; 511 bytes long, as Virtual PC before 2004 wrote it; or before zeros."""
    for length in (SECTOR, SECTOR - 1):
        raw = tail[-length:]
        if len(raw) == length and raw.startswith(COOKIE):
            return Copy(size - length, length, raw.ljust(SECTOR, b"\0"))
    at = tail.rfind(COOKIE)
    offset = size - len(tail) + at
    if at < 0 or offset % SECTOR or at + SECTOR > len(tail) or any(tail[at + SECTOR :]):
        return None
    return Copy(offset, SECTOR, tail[at : at + SECTOR])


def find(file: HostFile) -> Copies:
    size = file.size
    length = min(size, MAX_PADDING)
    return copies_in(file.pread_padded(0, SECTOR), file.pread_padded(size - length, length), size)


def parse_footer(file: HostFile, copy: Copy) -> Any:
    """The fields of a whole footer, with those checked that do not need the rest of the file."""
    try:
        footer = FooterStruct.parse(copy.raw)
    except ConstructError as error:  # a copy has the cookie, so this cannot be
        raise NotAnImage(file, f"footer at {copy.offset}", "no VHD footer") from error
    at = copy.offset
    if footer.version >> 16 != 1:
        text = f"version {footer.version >> 16}.{footer.version & 0xFFFF}, know 1.0"
        raise Unsupported(file, f"footer+12 at {at}", text)
    if footer.type not in TYPES:
        text = f"disk type {footer.type}, know 2 (fixed), 3 (dynamic) and 4 (differencing)"
        raise Unsupported(file, f"footer+60 at {at}", text)
    if footer.current_size < SECTOR:
        raise Corrupt(file, f"footer+48 at {at}", f"current_size {footer.current_size}")
    if footer.current_size > 1 << 62:
        text = f"current_size {footer.current_size}, no file is that long"
        raise Corrupt(file, f"footer+48 at {at}", text)
    return footer


def no_footer(file: HostFile, copies: Copies) -> NotAnImage:
    """Why there is none to go by."""
    found = [copy for copy in copies if copy is not None]
    if not found:
        return NotAnImage(file, "footer", "no VHD footer, neither at the beginning nor at the end")
    if (head := copies.head) and head.whole:
        text = f"disk type {head.type} at the beginning, and no whole footer at the end"
        return Corrupt(file, "footer+60 at 0", text)
    states = " and ".join(f"at {copy.offset}: {copy.state}" for copy in found)
    return Corrupt(
        file, "footer", f"no whole copy: {states}", hint=f"virtmount check --repair {file}"
    )


# Size


def size_by_geometry(footer: Any) -> int:
    return int(footer.cylinders * footer.heads * footer.sectors * SECTOR)


# Their disks have the size of their geometry; all others that of current_size.
BY_GEOMETRY = (b"vpc ", b"qemu")


def goes_by_geometry(footer: Any) -> bool:
    """Whether the program that made the image shows a disk of C x H x S sectors.

    The largest geometry stands for every size that is beyond it.
    """
    shape = (footer.cylinders, footer.heads, footer.sectors)
    return footer.creator_app in BY_GEOMETRY and shape != LARGEST_GEOMETRY


# The dynamic header


def parse_header(file: HostFile, offset: int) -> tuple[Any, bytes]:
    """The dynamic header at `offset`, as fields and as bytes; its checksum is not looked at."""
    place = f"header at {offset}"
    if offset < SECTOR or offset % SECTOR or offset + HEADER > file.size:
        text = f"data_offset {offset}, the file has {file.size} bytes"
        raise Corrupt(file, "footer+16", text)
    raw = file.pread(offset, HEADER)
    try:
        header = HeaderStruct.parse(raw)
    except ConstructError as error:
        text = f"{raw[:8]!r}, expected {HEADER_COOKIE!r}"
        raise Corrupt(file, f"{place}+0", text) from error
    return header, raw


def check_header(file: HostFile, header: Any, offset: int, size: int) -> None:
    """Everything that is used; `size` is the disk's."""

    def place(at: int) -> str:
        return f"header+{at} at {offset}"

    if header.version >> 16 != 1:
        text = f"version {header.version >> 16}.{header.version & 0xFFFF}, know 1.0"
        raise Unsupported(file, place(24), text)
    block = header.block_size
    if block & (block - 1) or not MIN_BLOCK <= block <= MAX_BLOCK:
        text = f"block size {block}, know powers of two from {MIN_BLOCK} to {MAX_BLOCK}"
        raise Unsupported(file, place(32), text)
    blocks = -(-size // block)
    if blocks > MAX_BLOCKS:
        text = f"{blocks} blocks of {block} bytes, at most {MAX_BLOCKS} are supported"
        raise Unsupported(file, place(32), text)
    if header.entries < blocks:
        text = f"{header.entries} table entries, {blocks} expected for a disk of {size} bytes"
        raise Corrupt(file, place(28), text)
    table, end = header.table_offset, header.table_offset + blocks * ENTRY
    if table % SECTOR:
        raise Unsupported(file, place(16), f"table_offset {table}, not a multiple of {SECTOR}")
    if table < SECTOR or end > file.size:
        text = f"table from {table} to {end}, the file has {file.size} bytes"
        raise Corrupt(file, place(16), text)
    if table < offset + HEADER and offset < end:
        raise Corrupt(file, place(16), f"the table at {table} lies over the header")


# Parents

RELATIVE, ABSOLUTE = (b"W2ru", b"Wi2r"), (b"W2ku", b"Wi2k")
MAC = b"MacX"


class Locator(NamedTuple):
    code: bytes
    name: str  # as it is written there
    offset: int  # of the name in the file
    room: int  # bytes that are reserved for it


def locators(file: HostFile, header: Any, offset: int) -> Iterator[Locator]:
    """The parent's paths.  Corrupt for one that does not lie in the file."""
    for i, locator in enumerate(header.locators):
        code, length, at = locator.code, locator.length, locator.offset
        if code not in (*RELATIVE, *ABSOLUTE, MAC) or not length:
            continue
        place = f"header+{576 + 24 * i} at {offset}"
        if length > MAX_LOCATOR:
            text = f"a path of {length} bytes, at most {MAX_LOCATOR} are supported"
            raise Unsupported(file, place, text)
        if at < SECTOR or at + length > file.size:
            text = f"path from {at} to {at + length}, the file has {file.size} bytes"
            raise Corrupt(file, place, text)
        raw = file.pread(at, length)
        coding = "utf-16-le" if code in (b"W2ru", b"W2ku") else "utf-8"
        name = raw.decode(coding, "replace").split("\0")[0]
        if name:
            yield Locator(code, name, at, length)


def parent_name(header: Any) -> str:
    """The parent's name in the header itself: a bare one or a path."""
    return bytes(header.parent_name).decode("utf-16-be", "replace").split("\0")[0]


def parent_names(header: Any, found: list[Locator]) -> tuple[str, ...]:
    """Paths to try, in order.  Chains get moved, so what lies beside the child goes before all
    that leads elsewhere; a wrong file of the right name has another unique id."""
    inside: list[str] = []
    outside: list[str] = []
    absolute: list[str] = []
    bare: list[str] = []
    for locator in found:
        name = _local(locator)
        bare.append(os.path.basename(name))
        if os.path.isabs(name):
            absolute.append(os.path.normpath(name))
        elif locator.code in RELATIVE:
            name = os.path.normpath(name)
            (outside if name.startswith("..") else inside).append(name)
    bare.append(ntpath.basename(parent_name(header)))
    names = [*inside, *bare, *outside, *absolute]
    return tuple(dict.fromkeys(name for name in names if name and name not in (".", "..")))


def _local(locator: Locator) -> str:
    """A path of this system: `\\` is Windows' separator, `C:` leads nowhere here."""
    if locator.code == MAC:
        return urllib.parse.unquote(locator.name.removeprefix("file://localhost"))
    name = locator.name.replace("\\", "/")
    return name[2:].lstrip("/") if name[1:2] == ":" else name


def new_header(
    table_offset: int,
    entries: int,
    block_size: int,
    parent: tuple[bytes, int, str] | None = None,
    paths: list[tuple[bytes, int, bytes, int]] | None = None,
) -> bytes:
    """`parent`: unique id, timestamp, name; `paths`: code, offset, path, room in bytes."""
    found = [
        {"code": code, "space": room, "length": len(path), "offset": offset}
        for code, offset, path, room in paths or []
    ]
    nothing = {"code": bytes(4), "space": 0, "length": 0, "offset": 0}
    name = parent[2].encode("utf-16-be", "replace")[:510] if parent else b""
    raw = HeaderStruct.build(
        {
            "cookie": HEADER_COOKIE,
            "data_offset": NO_OFFSET,
            "table_offset": table_offset,
            "version": VERSION,
            "entries": entries,
            "block_size": block_size,
            "checksum": 0,
            "parent_uuid": parent[0] if parent else NO_UUID,
            "parent_timestamp": parent[1] if parent else 0,
            "parent_name": name.ljust(512, b"\0"),
            "locators": [*found, *[nothing] * (LOCATORS - len(found))],
        }
    )
    return summed(bytes(raw), HEADER_CHECKSUM_AT)


def parent_paths(name: str, absolute: str) -> list[tuple[bytes, bytes]]:
    """Code and bytes of the locators for a parent: as seen from the child's folder, and by its
    whole path.  Windows wants `.\\` in front of the former."""
    paths = []
    if not os.path.isabs(name):
        relative = os.path.normpath(name).replace("/", "\\")
        paths.append((b"W2ru", _utf16(f".\\{relative}")))
    paths.append((b"W2ku", _utf16(absolute)))
    return paths


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-le", "surrogatepass")
