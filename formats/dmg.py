"""Apple disk images (UDIF, .dmg): UDRO, UDCO, UDZO, UDBZ, ULFO and ULMO, read.

Source: the trailer ("koly") and the tables ("mish") as documented by J. Vollrath, "Demystifying the
DMG file format".  Images are written by tests/formats/make_dmg.py with Python's own compressors,
and read by qemu-img 7.2 and 7-Zip as well.  All numbers are big-endian.  At the end of the file a
trailer leads to a property list that holds, in base64, a table of chunks for each partition.

LZFSE is unpacked by the reference implementation that the package `lzfse` contains; refused by name
where that is not installed.  Refused by name: encrypted images, images in several files, and
those of before Mac OS X 10.2 that have a resource fork only.  Checksums over whole partitions are
not verified; zlib, bzip2 and xz have their own.
"""

from __future__ import annotations

import bisect
import bz2
import ctypes
import functools
import importlib.util
import lzma
import struct
from array import array
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from construct import Bytes, Const, ConstructError, Int32ub, Int64ub, Padding, Struct

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats.chunks import MAX_CHUNK, SECTOR, Chunk, Chunked, inflated
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Kind, Match, Options

KOLY, MISH = b"koly", b"mish"
TRAILER = 512

Trailer = Struct(
    "signature" / Const(KOLY),
    "version" / Int32ub,
    "header_size" / Int32ub,
    "flags" / Int32ub,
    Padding(8),
    "data_fork_offset" / Int64ub,  # chunks are counted from there
    "data_fork_length" / Int64ub,
    "resource_fork_offset" / Int64ub,
    "resource_fork_length" / Int64ub,
    "segment" / Int32ub,
    "segments" / Int32ub,
    Padding(16),
    Padding(4 + 4 + 128),  # checksum of the data fork
    "xml_offset" / Int64ub,
    "xml_length" / Int64ub,
    Padding(120),
    Padding(4 + 4 + 128),  # checksum of the checksums
    "variant" / Int32ub,
    "sectors" / Int64ub,
    Padding(12),
)
assert Trailer.sizeof() == TRAILER

Partition = Struct(
    "signature" / Const(MISH),
    "version" / Int32ub,
    "first_sector" / Int64ub,
    "sectors" / Int64ub,
    "data_offset" / Int64ub,
    Padding(4),
    "descriptor" / Int32ub,
    Padding(6 * 4),
    "checksum" / Bytes(4 + 4 + 128),
    "chunks" / Int32ub,
)
assert Partition.sizeof() == 204
ENTRY = struct.Struct(">IIQQQQ")  # method, comment, first sector, sectors, offset, length
assert ENTRY.size == 40

ZEROS, PLAIN, IGNORED = 0, 1, 2
ADC, ZLIB, BZIP2, LZFSE, LZMA = range(0x80000004, 0x80000009)
COMMENT, END = 0x7FFFFFFE, 0xFFFFFFFF
NAMES = {ADC: "UDCO", ZLIB: "UDZO", BZIP2: "UDBZ", LZFSE: "ULFO", LZMA: "ULMO"}

MAX_PLIST = 16 << 20
MAX_TAGS = 1 << 15  # of which a plist for expat to build has some hundred
MAX_CHUNKS = 1 << 18
MAX_SIZE = 1 << 60
MAX_ADC = 1 << 20  # unpacked by Python itself
LZMA_MEMORY = 64 << 20


class DMG(Chunked):
    name: ClassVar[str] = "dmg"
    suffixes: ClassVar[tuple[str, ...]] = ("dmg",)

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if tail[-TRAILER:].startswith(KOLY) else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._only_read(file)
        self._file = file
        self._trailer = self._read_trailer()
        self._starts = array("Q")  # of each chunk: first sector
        self._sectors = array("I")
        self._hosts = array("Q")  # bytes
        self._stored = array("I")  # bytes
        self._methods = array("I")
        self._names: list[str] = []
        self._read_partitions()
        self.size = self._trailer.sectors * SECTOR
        self._check_order()
        packed = sorted({NAMES[m] for m in set(self._methods) if m in NAMES})
        self.variant = "+".join(packed) or "UDRO"
        self.memory = len(self._starts) * 28

    def _read_trailer(self) -> Any:
        file = self._file
        at = file.size - TRAILER
        try:
            trailer = Trailer.parse(file.pread_padded(at, TRAILER) if at >= 0 else b"")
        except ConstructError as error:
            raise NotAnImage(file, f"trailer at {max(at, 0)}", "no koly signature") from error
        place = f"trailer at {at}"
        if trailer.version != 4:
            raise Unsupported(file, place, f"version {trailer.version}, know 4")
        if trailer.header_size != TRAILER:
            raise Corrupt(file, place, f"{trailer.header_size} bytes, expected {TRAILER}")
        if trailer.segments > 1:
            raise Unsupported(file, place, f"an image in {trailer.segments} files")
        if not 0 < trailer.sectors <= MAX_SIZE // SECTOR:
            text = f"{trailer.sectors} sectors, know 1 to {MAX_SIZE // SECTOR}"
            raise Corrupt(file, place, text)
        if not trailer.xml_length:
            text = "no property list; resource forks are not supported"
            raise Unsupported(file, place, text, hint="qemu-img convert -f dmg -O qcow2")
        if trailer.xml_length > MAX_PLIST:
            text = f"a property list of {trailer.xml_length} bytes, the most is {MAX_PLIST}"
            raise Unsupported(file, place, text)
        if trailer.xml_offset + trailer.xml_length > at:
            text = f"property list ends at {trailer.xml_offset + trailer.xml_length}"
            raise Corrupt(file, place, f"{text}, the trailer begins at {at}")
        return trailer

    def _read_partitions(self) -> None:
        # Takes longer to import than all the drivers, which are there for every probe.
        import plistlib
        from xml.parsers.expat import ExpatError

        file = self._file
        at = self._trailer.xml_offset
        place = f"property list at {at}"
        xml = file.pread(at, self._trailer.xml_length)
        if (tags := xml.count(b"<")) > MAX_TAGS:
            raise Unsupported(file, place, f"{tags} tags, the most is {MAX_TAGS}")
        try:
            plist: Any = plistlib.loads(xml, fmt=plistlib.FMT_XML)
        except (ExpatError, ValueError, TypeError, AttributeError, LookupError) as error:
            # plistlib raises whatever its code stumbles over.
            raise Corrupt(file, place, f"not a property list: {error}") from error
        del xml
        for key in ("resource-fork", "blkx"):
            plist = plist.get(key) if isinstance(plist, dict) else None
        if not isinstance(plist, list):
            raise Corrupt(file, place, "no list resource-fork/blkx")
        for number, item in enumerate(plist):
            data = item.get("Data") if isinstance(item, dict) else None
            if not isinstance(data, bytes):
                raise Corrupt(file, place, f"blkx {number}: no data")
            name = item.get("Name", item.get("CFName"))
            self._names.append(name if isinstance(name, str) else "")
            self._read_partition(f"blkx {number}", data)

    def _read_partition(self, place: str, data: bytes) -> None:
        file = self._file
        try:
            partition = Partition.parse(data)
        except ConstructError as error:
            raise Corrupt(file, place, f"no mish signature, or {len(data)} bytes") from error
        if partition.version != 1:
            raise Unsupported(file, place, f"version {partition.version}, know 1")
        table = memoryview(data)[Partition.sizeof() :]
        if partition.chunks * ENTRY.size > len(table):
            text = f"{partition.chunks} chunks, {len(table) // ENTRY.size} are there"
            raise Corrupt(file, place, text)
        if len(self._starts) + partition.chunks > MAX_CHUNKS:
            text = f"{partition.chunks} more chunks, the most of an image is {MAX_CHUNKS}"
            raise Unsupported(file, place, text)
        first, base = partition.first_sector, self._trailer.data_fork_offset + partition.data_offset
        limit, sectors = file.size, self._trailer.sectors
        entries = ENTRY.iter_unpack(table[: partition.chunks * ENTRY.size])
        for number, (method, _, start, count, offset, length) in enumerate(entries):
            if method == END:
                break
            if method in (COMMENT, ZEROS, IGNORED) or not count:
                continue
            start += first
            host = base + offset
            where = f"{place}, chunk {number}"
            if start + count > sectors:
                text = f"sectors {start} to {start + count}, the disk has {sectors}"
                raise Corrupt(file, where, text)
            if host + length > limit:
                text = f"bytes {host} to {host + length}, the file ends at {limit}"
                raise Corrupt(file, where, text)
            if method == PLAIN:
                if length < count * SECTOR:
                    text = f"{length} bytes for {count} sectors"
                    raise Corrupt(file, where, text)
                self._add_plain(start, count, host)
                continue
            if method not in NAMES:
                raise Unsupported(file, where, f"type {method:#x}")
            if method == LZFSE:
                lzfse_decoder(file)
            if count * SECTOR > MAX_CHUNK:
                text = f"{count * SECTOR} bytes in one chunk, the most is {MAX_CHUNK}"
                raise Unsupported(file, where, text)
            if method == ADC and count * SECTOR > MAX_ADC:
                text = f"{count * SECTOR} bytes in one chunk of ADC, the most is {MAX_ADC}"
                raise Unsupported(file, where, text)
            if not 0 < length <= 2 * count * SECTOR + 4096:
                text = f"{length} bytes stored for {count} sectors"
                raise Corrupt(file, where, text)
            self._add(start, count, host, length, method)

    def _add_plain(self, start: int, count: int, host: int) -> None:
        """Of any length: in pieces that the tables have room for."""
        most = 1 << 22  # sectors
        while count:
            if len(self._starts) >= 2 * MAX_CHUNKS:
                raise Unsupported(self._file, "blkx", f"more than {2 * MAX_CHUNKS} chunks")
            step = min(count, most)
            self._add(start, step, host, step * SECTOR, PLAIN)
            start, count, host = start + step, count - step, host + step * SECTOR

    def _add(self, start: int, count: int, host: int, stored: int, method: int) -> None:
        self._starts.append(start)
        self._sectors.append(count)
        self._hosts.append(host)
        self._stored.append(stored)
        self._methods.append(method)

    def _check_order(self) -> None:
        """Sort the chunks, and refuse two for one sector: both cannot be right."""
        starts, sectors = self._starts, self._sectors
        count = len(starts)
        if any(starts[i] > starts[i + 1] for i in range(count - 1)):
            order = sorted(range(count), key=starts.__getitem__)
            for name in ("_starts", "_sectors", "_hosts", "_stored", "_methods"):
                old: array[int] = getattr(self, name)
                setattr(self, name, array(old.typecode, (old[i] for i in order)))
            starts, sectors = self._starts, self._sectors
        for i in range(count - 1):
            if starts[i] + sectors[i] > starts[i + 1]:
                text = f"two chunks for sector {starts[i + 1]}"
                raise Corrupt(self._file, "blkx", text)

    def chunks(self, start: int, end: int) -> Iterator[Chunk]:
        starts = self._starts
        i = max(0, bisect.bisect_right(starts, start // SECTOR) - 1)
        while i < len(starts) and (at := starts[i] * SECTOR) < end:
            length = self._sectors[i] * SECTOR
            if at + length > start:
                method = self._methods[i]
                kind = Kind.DATA if method == PLAIN else Kind.COMPRESSED
                yield Chunk(at, length, kind, self._hosts[i], self._stored[i], 0, method)
            i += 1

    def unpack(self, chunk: Chunk) -> bytes:
        raw = self._file.pread(chunk.host, chunk.stored)
        place = f"chunk at {chunk.host}, {NAMES[chunk.method]}"
        if chunk.method == ZLIB:
            data = inflated(self._file, place, raw, chunk.length)
        else:
            try:
                data = UNPACKERS[chunk.method](raw, chunk.length)
            except (ValueError, OSError, EOFError, lzma.LZMAError) as error:
                raise Corrupt(self._file, place, str(error)) from error
        if len(data) != chunk.length:
            raise Corrupt(self._file, place, f"{len(data)} bytes, expected {chunk.length}")
        return data

    def details(self) -> dict[str, Any]:
        return {
            "partitions": self._names,
            "chunks": len(self._starts),
            "data_fork_offset": self._trailer.data_fork_offset,
        }


def _bunzip(raw: bytes, length: int) -> bytes:
    return _to_its_end(bz2.BZ2Decompressor(), raw, length)


def _unxz(raw: bytes, length: int) -> bytes:
    return _to_its_end(lzma.LZMADecompressor(lzma.FORMAT_XZ, LZMA_MEMORY), raw, length)


def _to_its_end(
    decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor, raw: bytes, length: int
) -> bytes:
    """At most `length` bytes, and no more are there: a checksum stands at the end."""
    data = decompressor.decompress(raw, length)
    if not decompressor.eof and (decompressor.needs_input or decompressor.decompress(b"", 1)):
        raise ValueError("the stream does not end with the chunk")
    return data


def unpack_adc(raw: bytes, length: int) -> bytes:
    """Apple Data Compression: literals, and copies of what came before.  ValueError."""
    data = bytearray()
    i, end = 0, len(raw)
    while i < end and len(data) < length:
        code = raw[i]
        if code & 0x80:
            count = (code & 0x7F) + 1
            data += raw[i + 1 : i + 1 + count]
            i += 1 + count
            continue
        if code & 0x40:
            if i + 3 > end:
                break
            count, back = (code & 0x3F) + 4, int.from_bytes(raw[i + 1 : i + 3], "big") + 1
            i += 3
        else:
            if i + 2 > end:
                break
            count, back = (code >> 2 & 15) + 3, ((code & 3) << 8 | raw[i + 1]) + 1
            i += 2
        at = len(data) - back
        if at < 0:
            raise ValueError(f"copies from {-at} bytes before its beginning")
        piece = data[at : at + count]
        # A copy may reach into itself.
        data += (piece * (count // len(piece) + 1))[:count]
    return bytes(data[:length])


@functools.cache
def _lzfse() -> Callable[..., int] | None:
    """lzfse_decode_buffer(target, its size, source, its size, NULL), or None.

    Not the package's own decompress(), which takes as much memory as the data asks for.
    """
    found = importlib.util.find_spec("lzfse")
    if found is None or found.origin is None:
        return None
    try:
        decode = ctypes.CDLL(found.origin).lzfse_decode_buffer
    except (OSError, AttributeError):
        return None
    decode.restype = ctypes.c_size_t
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    decode.argtypes = [pointer, size, ctypes.c_char_p, size, pointer]
    return decode


def lzfse_decoder(file: HostFile) -> Callable[..., int]:
    decode = _lzfse()
    if decode is None:
        text = "LZFSE (ULFO) needs the Python package lzfse"
        raise Unsupported(file, "", text, hint="pip install lzfse")
    return decode


def _unlzfse(raw: bytes, length: int) -> bytes:
    decode = _lzfse()
    if decode is None:
        raise ValueError("the package lzfse is gone")
    target = ctypes.create_string_buffer(length)
    done = decode(target, length, raw, len(raw), None)
    return target.raw[:done]


UNPACKERS: dict[int, Callable[[bytes, int], bytes]] = {
    ADC: unpack_adc,
    BZIP2: _bunzip,
    LZFSE: _unlzfse,
    LZMA: _unxz,
}
