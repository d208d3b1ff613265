"""Where every byte of a disk lies, through all parents: what `virtmount map` prints.

Tables are read, data is not.  Field names and their meaning are those of
`qemu-img map --output=json`, so that scripts carry over.  Differences: host offsets are also given
where qemu-img leaves them out (VHDX), and `present` is false for what an image of any format has
never held (qemu-img says true for VDI).
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

from virtmount.disk import SECTOR, round_up
from virtmount.engine import Decoder, Ranges
from virtmount.fill import HOST_SHIFT, KIND_SHIFT
from virtmount.image import Chain, Extent, Image, Kind, last_place

HAS_OFFSET = (Kind.DATA, Kind.SHARED)
HOST_MASK = (1 << 51) - 1


class Mapped(NamedTuple):
    """Guest bytes start … start+length; of the image `depth` steps down the chain, the top is 0.

    `present`: some image says something about them.  `zero`: they read as zeros.  `data`: they
    take space as data.  `offset`: their place in the file, where they lie there as they are.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool = False
    invalid: bool = False  # reading them fails
    offset: int | None = None
    file: int = 0  # of the image's host files

    def to_dict(self) -> dict[str, Any]:
        fields = self._asdict()
        del fields["file"]
        if self.offset is None:
            del fields["offset"]
        if not self.invalid:
            del fields["invalid"]
        return fields

    def continues(self, before: Mapped) -> bool:
        """Whether `before` and this are one extent."""
        alike = before._replace(start=0, length=0, offset=None) == self._replace(
            start=0, length=0, offset=None
        )
        if not alike or before.start + before.length != self.start:
            return False
        if before.offset is None or self.offset is None:
            return before.offset is self.offset
        return before.offset + before.length == self.offset


def mapped(chain: Chain) -> Iterator[Mapped]:
    """The whole disk of a chain in order and without gaps, neighbours merged."""
    size = round_up(chain.top.size, chain.top.sector_size)
    last: Mapped | None = None
    layers = [Layer(image) for image in chain.images]
    for item in _resolve(layers, 0, 0, size):
        if last is not None and item.continues(last):
            last = last._replace(length=last.length + item.length)
            continue
        if last is not None:
            yield last
        last = item
    if last is not None:
        yield last


def _resolve(layers: list[Layer], depth: int, start: int, end: int) -> Iterator[Mapped]:
    layer = layers[depth]
    image = layer.image
    # What lies past the end of a parent is its child's word: never written.
    inside = min(end, round_up(image.size, SECTOR)) if depth else end
    for run in layer.runs(start, inside):
        at, length, kind, host, file = run
        if kind in HAS_OFFSET:
            if image.flat is not None:
                yield from _holes(image, depth, run)
            else:
                yield Mapped(at, length, depth, True, False, True, offset=host, file=file)
        elif kind is Kind.ZERO:
            yield Mapped(at, length, depth, True, True, False)
        elif kind is Kind.COMPRESSED:
            yield Mapped(at, length, depth, True, False, True, compressed=True)
        elif kind is not Kind.ABSENT:
            yield Mapped(at, length, depth, True, False, True, invalid=True)
        elif depth + 1 < len(layers):
            yield from _resolve(layers, depth + 1, at, at + length)
        else:
            yield Mapped(at, length, depth, False, True, False)
    inside = max(inside, start)
    if inside < end:
        yield Mapped(inside, end - inside, depth - 1, False, True, False)


class Layer:
    """One image of the chain, read by native/decode.c: a disk may have a billion clusters."""

    def __init__(self, image: Image) -> None:
        self.image = image
        if image.layout is not None and image.flat is None:
            self._decoder = Decoder(image.layout, 0, image.cluster_size, 1)
            spans = [*image.metadata()] if len(image.files) > 1 else image.metadata()
            self._forbidden = [Ranges(spans, file) for file in range(len(image.files))]

    def runs(self, start: int, end: int) -> Iterator[Extent]:
        """What this image says about guest bytes start … end; clusters merged within a leaf."""
        image = self.image
        if image.flat is not None:
            if start < end:
                host = image.flat + start
                yield Extent(start, end - start, Kind.DATA, host, image.flat_file)
            return
        size, per_leaf = image.cluster_size, image.entries_per_leaf
        cluster, stop = start // size, -(-end // size)
        clusters = -(-image.size // size)
        while cluster < stop:
            if cluster >= clusters:  # the padding of the last sector
                padding = max(start, cluster * size)
                yield Extent(padding, end - padding, Kind.ABSENT)
                return
            index, within = divmod(cluster, per_leaf)
            count = min(min(stop, clusters) - cluster, per_leaf - within)
            for extent in self._leaf(index, cluster, within, count):
                low = max(extent.guest_offset, start)
                high = min(extent.guest_offset + extent.length, end)
                if low < high:
                    shift = low - extent.guest_offset if extent.kind in HAS_OFFSET else 0
                    host = extent.host_offset + shift
                    yield Extent(low, high - low, extent.kind, host, extent.file)
            cluster += count

    def _leaf(self, index: int, cluster: int, within: int, count: int) -> Iterator[Extent]:
        image, size = self.image, self.image.cluster_size
        leaf = image.leaf(index)
        at = cluster * size
        if leaf.table is None:
            if leaf.kind is Kind.PARTIAL and leaf.base is None:
                for i in range(cluster, cluster + count):
                    yield from image.slow(i)
            elif leaf.base is None:
                yield Extent(at, count * size, leaf.kind)
            else:
                host = leaf.base + within * size
                yield Extent(at, count * size, Kind.DATA, host, leaf.data_file)
            return
        assert image.layout is not None
        width = image.layout.width
        raw = image.files[leaf.table_file].pread(leaf.table + within * width, count * width)
        entries = array("Q", bytes(8 * count))
        self._decoder.decode(
            raw,
            entries,
            0,
            count,
            source=0,
            skip=0,
            limit=last_place(image.layout, size, image.files[leaf.data_file].size),
            forbidden=self._forbidden[leaf.data_file],
        )
        first, expected, step = 0, -1, 0  # of the open run
        for i, entry in enumerate(entries):
            if entry != expected:
                if i:
                    yield from self._run(at, first, i, entries[first], leaf.data_file)
                first, expected = i, entry
                # One PARTIAL cluster is not like the next.
                kind = entry >> KIND_SHIFT
                step = size >> HOST_SHIFT if kind in HAS_OFFSET else int(kind == Kind.PARTIAL)
            expected += step
        yield from self._run(at, first, count, entries[first], leaf.data_file)

    def _run(self, base: int, first: int, end: int, entry: int, file: int) -> Iterator[Extent]:
        """Entries first … end of a leaf, whose first cluster is at guest byte `base`."""
        size = self.image.cluster_size
        start, kind = base + first * size, Kind(entry >> KIND_SHIFT)
        if kind is Kind.PARTIAL:
            yield from self.image.slow(start // size)
            return
        host = (entry & HOST_MASK) << HOST_SHIFT if kind in HAS_OFFSET else 0
        yield Extent(start, (end - first) * size, kind, host, file)


def _holes(image: Image, depth: int, run: Extent) -> Iterator[Mapped]:
    """A flat image's bytes: the host's file system knows which were never written."""
    fd, shift = image.files[run.file].fd, run.host_offset - run.guest_offset
    at, end = run.guest_offset, run.guest_offset + run.length
    while at < end:
        data = _seek(fd, at + shift, os.SEEK_DATA, end + shift) - shift
        if at < data:
            yield Mapped(at, data - at, depth, True, True, False, offset=at + shift, file=run.file)
        if data < end:
            hole = _seek(fd, data + shift, os.SEEK_HOLE, end + shift) - shift
            length = hole - data
            yield Mapped(data, length, depth, True, False, True, offset=data + shift, file=run.file)
            data = hole
        at = data


def _seek(fd: int, offset: int, whence: int, end: int) -> int:
    try:
        found = os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole follows, or the file's end
            return end
        if whence == os.SEEK_DATA:  # a file system that does not know: all is data
            return offset
        return end
    return min(found, end)
