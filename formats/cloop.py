"""cloop, version 2.0: the compressed loop device of Knoppix, read.

Source: the cloop driver's compressed_loop.h.  Images are written by tests/formats/make_packed.py,
and qemu-img 7.2 reads them as well.  Blocks of one length, each a zlib stream; all numbers are
big-endian.
Refused: everything but version 2.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from construct import Bytes, Int32ub, Int64ub, Struct

from virtmount.errors import Corrupt, NotAnImage, Unsupported
from virtmount.formats.chunks import MAX_CHUNK, SECTOR, Chunk, Chunked, cluster_of, inflated
from virtmount.hostfile import HostFile
from virtmount.image import DEFAULTS, Kind, Match, Options

MAGIC = b"#!/bin/sh\n#V2.0 Format"  # the file is a script that mounts itself

Header = Struct(
    "script" / Bytes(128),
    "block_size" / Int32ub,
    "blocks" / Int32ub,
)  # followed by blocks + 1 offsets of 64 bits: where each block begins, and the last one ends
assert Header.sizeof() == 136
BLOCK_SIZE_AT, BLOCKS_AT, TABLE_AT = 128, 132, 136
OFFSET = Int64ub.sizeof()


class Cloop(Chunked):
    name: ClassVar[str] = "cloop"
    suffixes: ClassVar[tuple[str, ...]] = ("cloop",)
    variant = "2.0"

    @classmethod
    def probe(cls, head: bytes, tail: bytes, size: int) -> Match:
        return Match.SURE if head.startswith(MAGIC) else Match.NO

    def __init__(self, file: HostFile, options: Options = DEFAULTS) -> None:
        self._only_read(file)
        header = Header.parse(file.pread_padded(0, Header.sizeof()))
        if not header.script.startswith(MAGIC):
            raise NotAnImage(file, "header+0", "no script of cloop version 2.0")
        self._file = file
        self._block: int = header.block_size
        self._blocks: int = header.blocks
        if not self._block or self._block % SECTOR:
            text = f"block size {self._block}, not a multiple of {SECTOR}"
            raise Corrupt(file, f"header+{BLOCK_SIZE_AT}", text)
        if self._block > MAX_CHUNK:
            text = f"block size {self._block}, the most is {MAX_CHUNK}"
            raise Unsupported(file, f"header+{BLOCK_SIZE_AT}", text)
        if not self._blocks:
            raise Corrupt(file, f"header+{BLOCKS_AT}", "0 blocks")
        self._data = TABLE_AT + (self._blocks + 1) * OFFSET
        if self._data > file.size:
            text = f"{self._blocks} blocks: offsets end at {self._data}, the file at {file.size}"
            raise Corrupt(file, f"header+{BLOCKS_AT}", text)
        self.size = self._blocks * self._block
        self.cluster_size = cluster_of(self._block)

    def chunks(self, start: int, end: int) -> Iterator[Chunk]:
        for number in range(start // self._block, min(-(-end // self._block), self._blocks)):
            at = number * self._block
            yield Chunk(at, self._block, Kind.COMPRESSED)

    def unpack(self, chunk: Chunk) -> bytes:
        number = chunk.start // self._block
        at = TABLE_AT + number * OFFSET
        raw = self._file.pread(at, 2 * OFFSET)
        begin, end = (int.from_bytes(raw[i : i + OFFSET], "big") for i in (0, OFFSET))
        if not self._data <= begin < end <= self._file.size:
            text = f"block {number} from {begin} to {end}, in a file of {self._file.size}"
            raise Corrupt(self._file, f"offset {number} at {at}", text)
        if end - begin > 2 * self._block + SECTOR:
            text = f"block {number} takes {end - begin} bytes for {self._block}"
            raise Corrupt(self._file, f"offset {number} at {at}", text)
        place = f"block {number} at {begin}"
        data = inflated(self._file, place, self._file.pread(begin, end - begin), self._block)
        if len(data) < self._block:
            text = f"{len(data)} bytes, expected {self._block}"
            raise Corrupt(self._file, place, text)
        return data

    def details(self) -> dict[str, Any]:
        return {"block_size": self._block, "blocks": self._blocks, "data_offset": self._data}
