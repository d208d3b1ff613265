"""DMG images, written from the description of the format, with every way of packing there is."""

from __future__ import annotations

import bz2
import ctypes
import importlib.util
import lzma
import plistlib
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512
ZEROS, PLAIN, IGNORED = 0, 1, 2
ADC, ZLIB, BZIP2, LZFSE, XZ = range(0x80000004, 0x80000009)
COMMENT, END = 0x7FFFFFFE, 0xFFFFFFFF


def pack_adc(data: bytes) -> bytes:
    """Literals, and for what repeats one byte, or what came 3000 bytes before, copies."""
    out = bytearray()
    i = 0
    while i < len(data):
        same = 0
        while i and same < 67 and i + same < len(data) and data[i + same] == data[i - 1]:
            same += 1
        if same >= 4:
            out += struct.pack(">BH", 0x40 | (same - 4), 0)
            i += same
        elif same == 3:
            out += bytes([0, 0])
            i += 3
        elif i >= 3000 and data[i : i + 8] == data[i - 3000 : i - 2992] and i + 8 <= len(data):
            out += struct.pack(">BH", 0x40 | 4, 2999)
            i += 8
        else:
            start = i
            i += 1
            while i < len(data) and i - start < 128 and data[i] != data[i - 1]:
                if i >= 3000 and data[i : i + 8] == data[i - 3000 : i - 2992]:
                    break
                i += 1
            out += bytes([0x80 | (i - start - 1)]) + data[start:i]
    return bytes(out)


def pack_lzfse(data: bytes) -> bytes:
    found = importlib.util.find_spec("lzfse")
    assert found is not None
    assert found.origin is not None
    encode = ctypes.CDLL(found.origin).lzfse_encode_buffer
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    encode.restype, encode.argtypes = size, [pointer, size, ctypes.c_char_p, size, pointer]
    target = ctypes.create_string_buffer(len(data) + 4096)
    length = encode(target, len(target), data, len(data), None)
    return target.raw[:length]


PACKERS: dict[int, Callable[[bytes], bytes]] = {
    PLAIN: bytes,
    ADC: pack_adc,
    ZLIB: zlib.compress,
    BZIP2: bz2.compress,
    LZFSE: pack_lzfse,
    XZ: lambda data: lzma.compress(data, lzma.FORMAT_XZ),
}


@dataclass
class Chunk:
    """`sectors` of the disk from sector `first` on, packed by `method`."""

    method: int
    first: int
    sectors: int


@dataclass
class Part:
    """A partition: its chunks, which the disk's sectors are counted from `first` in."""

    name: str
    first: int
    sectors: int
    chunks: list[Chunk] = field(default_factory=list)


@dataclass
class Made:
    """Where things lie in the file."""

    path: Path
    data_end: int
    xml: int
    xml_length: int
    trailer: int


def cut(first: int, sectors: int, step: int, methods: Sequence[int]) -> list[Chunk]:
    """Chunks of `step` sectors, the methods in turn."""
    return [
        Chunk(methods[i % len(methods)], at, min(step, first + sectors - at))
        for i, at in enumerate(range(first, first + sectors, step))
    ]


def make(
    path: Path, content: bytes, parts: Sequence[Part], *, backwards: bool = True, fork: int = 0
) -> Made:
    """An image of `content`.  Chunks lie `backwards` in the file, its data from byte `fork` on."""
    chunks = [(chunk, number) for number, part in enumerate(parts) for chunk in part.chunks]
    data, places = bytearray(), {}
    for chunk, _ in reversed(chunks) if backwards else chunks:
        if chunk.method in PACKERS:
            at, length = chunk.first * SECTOR, chunk.sectors * SECTOR
            packed = PACKERS[chunk.method](content[at : at + length])
            places[chunk.first] = len(data), len(packed)
            data += packed
    tables = []
    for number, part in enumerate(parts):
        rows = [struct.pack(">IIQQQQ", COMMENT, 0x2B626567, 0, 0, 0, 0)]
        for chunk in part.chunks:
            at, length = places.get(chunk.first, (0, 0))
            row = (chunk.method, 0, chunk.first - part.first, chunk.sectors, at, length)
            rows.append(struct.pack(">IIQQQQ", *row))
        rows.append(struct.pack(">IIQQQQ", END, 0, part.sectors, 0, len(data), 0))
        checksum = 0
        for chunk in part.chunks:
            if chunk.method != IGNORED:  # those are not counted
                at, length = chunk.first * SECTOR, chunk.sectors * SECTOR
                checksum = zlib.crc32(content[at : at + length], checksum)
        tables.append(table(part.first, part.sectors, number, rows, checksum))
    return write(path, bytes(fork) + data, tables, [part.name for part in parts], content, fork)


def table(first: int, sectors: int, number: int, rows: Sequence[bytes], checksum: int = 0) -> bytes:
    head = struct.pack(">4sIQQQII", b"mish", 1, first, sectors, 0, 0x208, number & 0xFFFFFFFF)
    head += bytes(24) + struct.pack(">III", 2, 32, checksum) + bytes(124)
    return head + struct.pack(">I", len(rows)) + b"".join(rows)


def plist(tables: Sequence[bytes], names: Sequence[str]) -> bytes:
    blkx = [
        {"Attributes": "0x0050", "CFName": name, "Data": data, "ID": str(i), "Name": name}
        for i, (data, name) in enumerate(zip(tables, names, strict=True))
    ]
    return plistlib.dumps({"resource-fork": {"blkx": blkx, "plst": []}})


def write(
    path: Path,
    data: bytes,
    tables: Sequence[bytes],
    names: Sequence[str],
    content: bytes,
    fork: int = 0,
) -> Made:
    xml = plist(tables, names)
    end = trailer(fork, len(data) - fork, len(data), len(xml), len(content) // SECTOR)
    path.write_bytes(data + xml + end)
    return Made(path, len(data), len(data), len(xml), len(data) + len(xml))


def trailer(fork: int, data: int, xml: int, length: int, sectors: int) -> bytes:
    head = struct.pack(">4sIIIQQQQQII", b"koly", 4, 512, 1, 0, fork, data, 0, 0, 1, 1)
    head += bytes(16) + struct.pack(">II", 2, 32) + bytes(128)
    head += struct.pack(">QQ", xml, length) + bytes(120)
    head += struct.pack(">II", 2, 32) + bytes(128)
    return head + struct.pack(">IQ", 1, sectors) + bytes(12)
