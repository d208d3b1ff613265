"""VMDK descriptors: the text that says which extents make up a disk and what it is based on.

Source: VMware, Virtual Disk Format 5.0, "The Descriptor File".  Programs differ in spaces around
the equals sign, in the case of keys, in line ends, in a byte order mark or blank lines in front;
all of that is accepted.  What is changed is changed in place: every line that is not understood,
and every byte that need not change, stays as it was.
"""

from __future__ import annotations

import codecs
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

from virtmount.errors import Corrupt, Unsupported
from virtmount.plan import Barrier, Step, Truncate, Write

MAX_LENGTH = 1 << 20  # bytes of text
MAX_EXTENTS = 4096
SECTOR = 512
MAX_SECTORS = 1 << 50  # of one extent
PROBED = 4096  # bytes of text in which its keys have to turn up

NO_PARENT = 0xFFFFFFFF
NO_UUID = "00000000-0000-0000-0000-000000000000"
READ_WRITE, READ_ONLY, NO_ACCESS = "RW", "RDONLY", "NOACCESS"
FLAT, VMFS, ZERO, SPARSE = "FLAT", "VMFS", "ZERO", "SPARSE"
VMFS_SPARSE, SE_SPARSE = "VMFSSPARSE", "SESPARSE"
TYPES = (FLAT, VMFS, ZERO, SPARSE, VMFS_SPARSE, SE_SPARSE)

BOM = codecs.BOM_UTF8
_LINE = re.compile(rb"[^\r\n]+")
_PAIR = re.compile(rb"[ \t\v\f]*([A-Za-z0-9_.:-]+)[ \t\v\f]*=[ \t\v\f]*(.*)", re.DOTALL)
_EXTENT = re.compile(
    rb'(RW|RDONLY|NOACCESS)\s+([0-9]{1,19})\s+([A-Z]+)(?:\s*"([^"]*)"(?:\s+([0-9]{1,19}))?.*)?',
    re.IGNORECASE | re.DOTALL,
)
_LOOKS_LIKE_EXTENT = re.compile(rb"(RW|RDONLY|NOACCESS)[ \t]", re.IGNORECASE)
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")
# What VMware calls encodings of file names, and Python.
ENCODINGS = {
    "utf-8": "utf-8",
    "windows-1250": "cp1250",
    "windows-1251": "cp1251",
    "windows-1252": "cp1252",
    "windows-1253": "cp1253",
    "windows-1254": "cp1254",
    "windows-1256": "cp1256",
    "gbk": "gbk",
    "gb18030": "gb18030",
    "big5": "big5",
    "shift_jis": "cp932",
    "windows-31j": "cp932",
    "ibm-943_p15a-2003": "cp932",
    "ibm-1386_p100-2001": "gbk",
    "iso-8859-1": "latin-1",
    "euc-kr": "cp949",
}


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One line of the extent section; `size` and `offset` are bytes, `names` in order of trust."""

    place: str
    access: str
    size: int
    type: str
    names: tuple[str, ...] = ()
    offset: int = 0
    # Bytes of the text: where the number of sectors stands.
    start: int = 0
    end: int = 0


@dataclass(slots=True)
class Descriptor:
    """A parsed text.  `text` is without the padding behind it, `room` how long it may become."""

    text: bytes
    room: int | None = None  # None: a file of its own
    values: dict[str, str] = field(default_factory=dict)  # by key in lower case, the first wins
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # of the values in the text
    extents: list[ExtentLine] = field(default_factory=list)

    @property
    def cid(self) -> int | None:
        return _number(self.values.get("cid"))

    @property
    def parent_cid(self) -> int | None:
        """None where there is no parent by this rule."""
        number = _number(self.values.get("parentcid"))
        return None if number in (None, NO_PARENT) else number

    @property
    def create_type(self) -> str:
        return self.values.get("createtype", "")

    @property
    def hint(self) -> str:
        return self.values.get("parentfilenamehint", "")

    def uuid(self, name: str) -> str | None:
        """VirtualBox's ddb.uuid.NAME, unless it is missing or null."""
        value = self.values.get(f"ddb.uuid.{name}", "").lower()
        return None if value in ("", NO_UUID) else value

    def with_new_cid(self) -> bytes | None:
        """The text with another CID of the same length; None where it has no CID.

        No byte moves, so that one sector changes, or two.
        """
        span = self.spans.get("cid")
        if span is None or self.cid is None:
            return None
        start, end = span
        while True:
            number = secrets.randbelow(min(1 << 4 * (end - start), 0xFFFFFFFE))
            if number != self.cid:
                break
        return self.text[:start] + b"%0*x" % (end - start, number) + self.text[end:]

    def with_values(self, **values: str) -> bytes:
        """The text with other values: of keys that are there, else in lines of their own."""
        text = self.text
        spans = {key.lower(): value for key, value in values.items()}
        for key in sorted(
            (key for key in spans if key in self.spans),
            key=lambda key: self.spans[key][0],
            reverse=True,
        ):
            start, end = self.spans[key]
            text = text[:start] + os.fsencode(spans[key]) + text[end:]
        new = [(key, value) for key, value in values.items() if key.lower() not in self.spans]
        if not new:
            return text
        # Behind the line of the last of the two CIDs, before the extents.
        again = parse(None, "", text, self.room)
        at = max(
            (again.spans[key][1] for key in ("cid", "parentcid") if key in again.spans), default=0
        )
        while at < len(text) and text[at] not in b"\r\n":
            at += 1
        stop = b"\r\n" if text[at : at + 2] == b"\r\n" else b"\n"
        lines = b"".join(stop + b"%s=%s" % (k.encode(), os.fsencode(v)) for k, v in new)
        return text[:at] + lines + text[at:]

    def without(self, key: str) -> bytes:
        """The text without the line of this key."""
        if key not in self.spans:
            return self.text
        start, end = self.spans[key]
        while start and self.text[start - 1] not in b"\r\n":
            start -= 1
        while end < len(self.text) and self.text[end] not in b"\r\n":
            end += 1
        if self.text[end : end + 2] == b"\r\n":
            end += 1
        return self.text[:start] + self.text[end + 1 :]

    def with_extent_size(self, index: int, size: int) -> bytes:
        """The text with another size of one extent."""
        line = self.extents[index]
        return self.text[: line.start] + b"%d" % (size // SECTOR) + self.text[line.end :]


def looks_like_descriptor(head: bytes) -> bool:
    """Whether a file that begins so is a descriptor; for probing.

    What a guest writes to a raw disk must not be taken for one easily: it is text from its first
    byte on.
    """
    text = head[:PROBED].removeprefix(BOM).split(b"\0")[0].lstrip()
    if text.lower().startswith(b"# disk descriptorfile"):
        return True
    first = _LINE.match(text)
    if first is None or not (first[0].startswith(b"#") or _PAIR.fullmatch(first[0])):
        return False
    keys = {match[1].lower() for line in _LINE.findall(text) if (match := _PAIR.match(line))}
    return {b"createtype", b"cid"} <= keys or {b"createtype", b"version"} <= keys


def parse(file: object, place: str, raw: bytes, room: int | None = None) -> Descriptor:
    """Parse a text; `place` is for messages.  Raises Corrupt and Unsupported, naming the line."""
    text = raw.split(b"\0")[0]
    found = Descriptor(text, room)
    pairs: list[tuple[int, re.Match[bytes]]] = []
    for number, start, line in _lines(text):
        stripped = line.strip(b" \t\v\f")
        if not stripped or stripped.startswith(b"#"):
            continue
        if _LOOKS_LIKE_EXTENT.match(stripped):
            pairs.append((number, _extent(file, place, number, stripped)))
            found.extents.append(_shell(place, number, pairs[-1][1], start + line.index(stripped)))
            if len(found.extents) > MAX_EXTENTS:
                text_ = f"more than {MAX_EXTENTS} extents"
                raise Unsupported(file, f"{place}line {number}", text_)
            continue
        if match := _PAIR.match(line):
            key = match[1].decode().lower()
            if key in found.values:
                continue
            low, high = _trimmed(line, match.start(2))
            found.spans[key] = (start + low, start + high)
            found.values[key] = os.fsdecode(line[low:high])
    encoding = found.values.get("encoding", "UTF-8")
    extents = [match for _, match in pairs]
    found.extents = [
        _named(line, match[4], encoding) for line, match in zip(found.extents, extents, strict=True)
    ]
    return found


def decoded(raw: bytes, encoding: str) -> tuple[str, ...]:
    """A file's name as the encoding has it, then byte for byte."""
    plain = os.fsdecode(raw)
    codec = ENCODINGS.get(encoding.lower())
    if codec is None:
        return (plain,)
    try:
        return tuple(dict.fromkeys((raw.decode(codec), plain)))
    except UnicodeDecodeError:
        return (plain,)


def rewrite(old: bytes, new: bytes, at: int, room: int | None) -> list[Step]:
    """Put one text in place of another at byte `at` of file 0, by whole sectors where they differ.

    What comes later in the text goes first and is durable before the first sector changes, in which
    as a rule everything lies that says what is where.  `room`: None for a file of its own.
    """
    width = max(len(old), len(new))
    steps: list[Step] = []
    first: list[Step] = []
    padded = new.ljust(width, b"\0")
    for start in range(0, width, SECTOR):
        part = padded[start : start + SECTOR]
        if part != old[start : start + SECTOR]:
            (steps if first else first).append(Write(at + start, part))
    if len(new) < len(old) and room is None:
        steps.append(Truncate(at + len(new)))
    return [*steps, Barrier, *first] if steps else first


def _lines(text: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, line), without its end.  A byte order mark is not part of a line."""
    skip = len(BOM) if text.startswith(BOM) else 0
    number, counted = 1, 0
    for match in _LINE.finditer(text, skip):
        between = text[counted : match.start()]
        number += between.count(b"\n") or between.count(b"\r")
        counted = match.end()
        yield number, match.start(), match[0]


def _trimmed(line: bytes, start: int) -> tuple[int, int]:
    """Where a value begins and ends, without spaces and quotes."""
    end = len(line)
    while end > start and line[end - 1] in b" \t\v\f":
        end -= 1
    if end - start >= 2 and line[start] == line[end - 1] == ord('"'):
        return start + 1, end - 1
    return start, end


def _extent(file: object, place: str, number: int, line: bytes) -> re.Match[bytes]:
    match = _EXTENT.fullmatch(line)
    if match is None:
        raise Corrupt(file, f"{place}line {number}", f"no extent: {os.fsdecode(line[:64])!r}")
    kind = match[3].decode().upper()
    if kind not in TYPES:
        text = f"extent type {kind[:32]}, know {', '.join(TYPES)}"
        raise Unsupported(file, f"{place}line {number}", text)
    if kind != ZERO and not match[4]:
        raise Corrupt(file, f"{place}line {number}", f"a {kind} extent without a file")
    if not 0 < int(match[2]) <= MAX_SECTORS:
        text = f"extent of {int(match[2])} sectors, know 1 to {MAX_SECTORS}"
        raise Corrupt(file, f"{place}line {number}", text)
    if int(match[5] or 0) > MAX_SECTORS:
        text = f"extent at sector {int(match[5])}, at most {MAX_SECTORS}"
        raise Corrupt(file, f"{place}line {number}", text)
    return match


def _shell(place: str, number: int, match: re.Match[bytes], start: int) -> ExtentLine:
    return ExtentLine(
        place=f"{place}line {number}",
        access=match[1].decode().upper(),
        size=int(match[2]) * SECTOR,
        type=match[3].decode().upper(),
        offset=int(match[5] or 0) * SECTOR,
        start=start + match.start(2),
        end=start + match.end(2),
    )


def _named(line: ExtentLine, raw: bytes | None, encoding: str) -> ExtentLine:
    if raw is None:
        return line
    names = decoded(raw, encoding)
    return ExtentLine(
        line.place, line.access, line.size, line.type, names, line.offset, line.start, line.end
    )


def _number(value: str | None) -> int | None:
    return int(value, 16) if value is not None and _HEX.fullmatch(value) else None
