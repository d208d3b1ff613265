"""EWF (E01) images, written from the description of the format; ewfexport reads them as well."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

SECTOR = 512
MAGIC = b"EVF\x09\x0d\x0a\xff\x00"
PACKED = 0x80000000
GUID = bytes(range(16))


def section(kind: str, at: int, body: bytes, *, last: bool = False) -> bytes:
    """A section at byte `at` of its file."""
    size = 76 + len(body)
    head = struct.pack("<16sQQ40x", kind.encode(), at if last else at + size, 0 if last else size)
    return head + struct.pack("<I", zlib.adler32(head)) + body


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.adler32(body))


def volume(chunks: int, chunk_sectors: int, sectors: int, sector: int = SECTOR) -> bytes:
    head = struct.pack("<BxxxIIIQ", 1, chunks, chunk_sectors, sector, sectors)
    head = head.ljust(36, b"\0") + b"\x01"
    return sealed((head.ljust(64, b"\0") + GUID).ljust(1048, b"\0"))


def table(offsets: Sequence[int], base: int = 0) -> bytes:
    head = sealed(struct.pack("<IxxxxQxxxx", len(offsets), base))
    return head + sealed(struct.pack(f"<{len(offsets)}I", *offsets))


def make_segments(
    content: bytes,
    *,
    chunk_sectors: int = 8,
    segments: int = 1,
    tables: int = 2,
    base: bool = False,
    packed: Callable[[int], bool] = lambda number: number % 3 != 0,
) -> list[bytes]:
    """The segments of a disk: each with so many tables, the chunks shared out among them all."""
    size = chunk_sectors * SECTOR
    parts = [content[at : at + size] for at in range(0, len(content), size)]
    share = -(-len(parts) // (segments * tables))
    made = []
    done = 0
    for segment in range(1, segments + 1):
        raw = MAGIC + b"\x01" + struct.pack("<H", segment) + b"\0\0"
        head = volume(len(parts), chunk_sectors, len(content) // SECTOR)
        raw += section("volume" if segment == 1 else "data", len(raw), head)
        for _ in range(tables):
            chosen = parts[done : done + share]
            if not chosen:
                break
            start = len(raw)
            offsets, data = [], b""
            for number, part in enumerate(chosen, done):
                at = start + 76 + len(data) - (start if base else 0)
                squeezed = packed(number)
                offsets.append(at | (PACKED if squeezed else 0))
                data += zlib.compress(part) if squeezed else sealed(part)
            done += len(chosen)
            raw += section("sectors", start, data)
            for kind in ("table", "table2"):
                raw += section(kind, len(raw), table(offsets, start if base else 0))
        if segment == segments:
            raw += section("hash", len(raw), sealed(hashlib.md5(content).digest() + bytes(16)))
        raw += section("done" if segment == segments else "next", len(raw), b"", last=True)
        made.append(raw)
    return made


def write(path: Path, made: Sequence[bytes]) -> None:
    """NAME.E01 and what follows it."""
    for number, raw in enumerate(made, 1):
        path.with_suffix(f".E{number:02}").write_bytes(raw)
