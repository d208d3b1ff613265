"""The parent locator of a differencing VHDX: which image the parent is, and where it may lie.

Source: [MS-VHDX] 20240423, section 2.6.2.6.  A locator is a list of keys and values in UTF-16.
Windows writes parent_linkage, parent_linkage2 and three paths.

The parent's identity is the DataWriteGuid of its headers, so a parent that was written to since is
another image.  parent_linkage2 is a second one that would be right as well; most files have zeros
there.  Only parent_linkage is compared here: one parent too many is refused, none too few.

Paths are those of a Windows machine.  Volumes and drives mean nothing here, so only the last name
of such a path is used, beside the child.  An absolute path of this system, which our create() puts
into absolute_win32_path where it was given one, is taken as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from construct import Bytes, Int16ul, Padding, Struct

from virtmount.errors import Corrupt, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import Image

TYPE = UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913")
LINKAGE = "parent_linkage"
RELATIVE, VOLUME, ABSOLUTE = "relative_path", "volume_path", "absolute_win32_path"
KEYS = (LINKAGE, "parent_linkage2", RELATIVE, VOLUME, ABSOLUTE)
MAX_KEYS = 64  # Windows writes five
MAX_VALUE = 0xFFFF  # bytes

LocatorHeader = Struct("type" / Bytes(16), Padding(2), "count" / Int16ul)
assert LocatorHeader.sizeof() == 20
_ENTRY = struct.Struct("<IIHH")  # byte offsets of key and value in the item, then their lengths
assert _ENTRY.size == 12


@dataclass(frozen=True, slots=True)
class Locator:
    """What a parent locator says; the values by their keys."""

    identity: UUID
    values: Mapping[str, str]

    def names(self, child: str) -> tuple[str, ...]:
        """Paths to try, relative ones to the child's folder; `child` is the child's own name.

        First beside the child, whatever folders the paths lead through: chains are moved as a
        whole, and what is there under that name is the parent if its identity is right.
        """
        beside: list[str] = []
        elsewhere: list[str] = []
        for key in (RELATIVE, VOLUME, ABSOLUTE):
            path = self.values.get(key, "").replace("\\", "/")
            if key == RELATIVE:
                local = not path.startswith("/") and ":" not in path.partition("/")[0]
                path = path.removeprefix("./") if local else path
            else:
                local = key == ABSOLUTE and self.values.get(key, "").startswith("/")
            last = path.rpartition("/")[2]
            if local and last == path:
                beside.append(path)
            elif last not in (".", "..", child):  # it is never its own parent
                beside.append(last)
            if local and last != path:
                elsewhere.append(path)
        return tuple(dict.fromkeys(name for name in beside + elsewhere if name))


def parse(file: HostFile, offset: int, raw: bytes) -> Locator:
    """The locator whose bytes lie at `offset` of the file."""
    place = f"parent locator at {offset}"
    if len(raw) < LocatorHeader.sizeof():
        raise Corrupt(file, place, f"{len(raw)} bytes, the header alone has 20")
    header = LocatorHeader.parse(raw)
    kind = UUID(bytes_le=header.type)
    if kind != TYPE:
        raise Unsupported(file, place, f"type {kind}, know {TYPE}")
    if header.count > MAX_KEYS:
        raise Corrupt(file, place, f"{header.count} keys, at most {MAX_KEYS}")
    end = LocatorHeader.sizeof() + header.count * _ENTRY.size
    if end > len(raw):
        raise Corrupt(file, place, f"{header.count} keys in {len(raw)} bytes")
    values: dict[str, str] = {}
    table = raw[LocatorHeader.sizeof() : end]
    for i, (key_at, value_at, key_length, value_length) in enumerate(_ENTRY.iter_unpack(table)):
        where = f"{place}, key {i}"
        key = _text(file, where, raw, key_at, key_length)
        if key in values:
            raise Corrupt(file, where, f"{key!r} a second time")
        values[key] = _text(file, where, raw, value_at, value_length)
    if LINKAGE not in values:
        raise Corrupt(file, place, f"no {LINKAGE}")
    try:
        identity = UUID(values[LINKAGE])
    except ValueError as error:
        text = f"{LINKAGE} is {values[LINKAGE][:64]!r}, not a GUID"
        raise Corrupt(file, place, text) from error
    locator = Locator(identity, values)
    if not locator.names(""):
        raise Corrupt(file, place, f"none of {RELATIVE}, {VOLUME} and {ABSOLUTE}")
    return locator


def _text(file: HostFile, place: str, raw: bytes, offset: int, length: int) -> str:
    if offset + length > len(raw):
        text = f"{length} bytes at {offset}, the locator has {len(raw)}"
        raise Corrupt(file, place, text)
    try:
        # Windows allows half a surrogate pair in a file's name.
        text = raw[offset : offset + length].decode("utf-16-le", "surrogatepass")
    except UnicodeDecodeError as error:
        raise Corrupt(file, place, f"{length} bytes at {offset} are not UTF-16") from error
    return text.rstrip("\0")


def identity_of(file: HostFile, parent: Image) -> UUID:
    """What a child of `parent` records; `file` is the child's."""
    if parent.name != "vhdx" or parent.identity is None:
        raise Unsupported(file, "parent", f"{parent.files[0]} is {parent.name}, it must be vhdx")
    return UUID(parent.identity)


def pack(file: HostFile, identity: UUID, name: str) -> bytes:
    """A locator for the parent `name`, a path of this system."""
    if "\\" in name:
        raise Unsupported(file, "parent", f"a backslash in the name {name!r}")
    if name.startswith("/"):
        key, path = ABSOLUTE, name
    else:
        below = name.removeprefix("./")
        key = RELATIVE
        path = (below if below.startswith("../") else f"./{below}").replace("/", "\\")
    pairs = ((LINKAGE, f"{{{identity}}}"), (key, path))
    try:
        texts = [text.encode("utf-16-le") for pair in pairs for text in pair]
    except UnicodeEncodeError as error:
        raise Unsupported(file, "parent", f"the name {name!r} is not text") from error
    if any(len(text) > MAX_VALUE for text in texts):
        raise Unsupported(file, "parent", f"a name of more than {MAX_VALUE} bytes")
    table, rest = b"", b""
    first = LocatorHeader.sizeof() + len(pairs) * _ENTRY.size
    for key_text, value_text in zip(texts[::2], texts[1::2], strict=True):
        at = first + len(rest)
        table += _ENTRY.pack(at, at + len(key_text), len(key_text), len(value_text))
        rest += key_text + value_text
    head: bytes = LocatorHeader.build({"type": TYPE.bytes_le, "count": len(pairs)})
    return head + table + rest
