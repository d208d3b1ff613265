"""Images that are a row of packed chunks of any length: what DMG, cloop and EWF have in common.

The engine wants clusters of a power of two, and chunks are what their maker liked: 256 KiB from a
partition's odd first sector on, or 100 sectors.  A cluster is put together here out of the chunks
that it touches.  Where one chunk lies in the file as it is and holds a whole cluster, the engine
reads it there itself.

Only reading: such images are written once, from front to back.
"""

from __future__ import annotations

import threading
import zlib
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

from virtmount.errors import Corrupt, Unsupported
from virtmount.hostfile import HostFile
from virtmount.image import Extent, Image, Kind, Leaf

SECTOR = 512
CLUSTER = 64 << 10
MIN_CLUSTER, MAX_CLUSTER = 4 << 10, 1 << 20  # of chunks that are clusters themselves
MAX_CHUNK = 8 << 20  # several are unpacked at once
CACHE = 16 << 20  # bytes of unpacked chunks
LOCKS = 16
LEAF = 1024


class Chunk(NamedTuple):
    """Guest bytes start … start+length.

    ZERO, or `stored` bytes at `host` of file number `file`: DATA as they are, COMPRESSED as
    unpack() knows them by `method`.
    """

    start: int
    length: int
    kind: Kind
    host: int = 0
    stored: int = 0
    file: int = 0
    method: int = 0


class Chunked(Image):
    """A driver has chunks() and unpack(); its constructor begins with _only_read().

    Chunks of one power of two are clusters: it sets cluster_size to cluster_of(length).
    """

    cluster_size = CLUSTER
    entries_per_leaf = LEAF
    cache: ClassVar[int] = CACHE

    def _only_read(self, file: HostFile) -> None:
        if file.writable:
            raise Unsupported(file, "", f"{self.name} images are only read", hint="--read-only")
        self.files = [file]
        self._cached: OrderedDict[int, bytes] = OrderedDict()  # by guest offset, oldest first
        self._held = 0  # bytes in there
        self._guard = threading.Lock()
        self._locks = [threading.Lock() for _ in range(LOCKS)]

    @abstractmethod
    def chunks(self, start: int, end: int) -> Iterator[Chunk]:
        """The chunks that touch guest bytes start … end, in order; between them are zeros.

        Called from several threads at once, as unpack() is.
        """

    @abstractmethod
    def unpack(self, chunk: Chunk) -> bytes:
        """The `length` bytes of a COMPRESSED chunk.  Corrupt or OSError."""

    def leaf(self, index: int) -> Leaf:
        start = index * LEAF * self.cluster_size
        end = min(start + LEAF * self.cluster_size, self.size)
        if next(self.chunks(start, end), None) is None:
            return Leaf(kind=Kind.ZERO)
        return Leaf(kind=Kind.PARTIAL)

    def slow(self, cluster: int) -> Sequence[Extent]:
        """One piece: a mixture is put together by inflate()."""
        start = cluster * self.cluster_size
        end = min(start + self.cluster_size, self.size)
        kind, host, file = Kind.ZERO, 0, 0
        for chunk in self.chunks(start, end):
            if chunk.kind is Kind.ZERO:
                continue
            kind, host, file = Kind.COMPRESSED, 0, 0
            at = chunk.host + start - chunk.start
            whole = chunk.start <= start and end <= chunk.start + chunk.length
            if chunk.kind is Kind.DATA and whole and at % SECTOR == 0:
                kind, host, file = Kind.DATA, at, chunk.file
            break
        return (Extent(start, self.cluster_size, kind, host, file),)

    def inflate(self, cluster: int) -> bytes:
        start = cluster * self.cluster_size
        end = min(start + self.cluster_size, self.size)
        whole = bytearray(self.cluster_size)
        for chunk in self.chunks(start, end):
            if chunk.kind is Kind.ZERO:
                continue
            low, high = max(start, chunk.start), min(end, chunk.start + chunk.length)
            first, last = low - chunk.start, high - chunk.start
            if chunk.kind is Kind.DATA:
                data = self.files[chunk.file].pread(chunk.host + first, last - first)
            else:
                data = self._unpacked(chunk)
                if len(data) == self.cluster_size and chunk.start == start:
                    return data
                data = data[first:last]
            whole[low - start : high - start] = data
        return bytes(whole)

    def _unpacked(self, chunk: Chunk) -> bytes:
        """Neighbouring clusters often want one chunk, and at the same time: it is unpacked once."""
        with self._locks[chunk.start // SECTOR % LOCKS]:
            with self._guard:
                if (known := self._cached.get(chunk.start)) is not None:
                    self._cached.move_to_end(chunk.start)
                    return known
            data = self.unpack(chunk)
            if len(data) != chunk.length:
                raise ValueError(f"{self.name}: {len(data)} bytes in a chunk of {chunk.length}")
            with self._guard:
                self._cached[chunk.start] = data
                self._held += len(data)
                while self._held > self.cache and len(self._cached) > 1:
                    self._held -= len(self._cached.popitem(last=False)[1])
            return data


def cluster_of(length: int) -> int:
    """The cluster size for chunks of this length."""
    fits = MIN_CLUSTER <= length <= MAX_CLUSTER and not length & (length - 1)
    return length if fits else CLUSTER


def inflated(file: HostFile, place: str, raw: bytes, length: int) -> bytes:
    """What a zlib stream holds: at most `length` bytes, or Corrupt.  Its checksum is verified."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(raw, length)
        more = inflater.decompress(inflater.unconsumed_tail, 1)
    except zlib.error as error:
        raise Corrupt(file, place, str(error)) from error
    if more or not inflater.eof:
        text = f"more than {length} bytes" if more else f"ends after {len(data)} bytes, unfinished"
        raise Corrupt(file, place, f"zlib stream: {text}")
    return data
