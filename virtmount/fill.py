"""Turn what the drivers say into map entries, one leaf at a time, through all layers.

The top layer answers first; only what it leaves ABSENT is asked of the next.  Tables are decoded
by native/decode.c, the pieces of PARTIAL clusters and flat parents here.

An entry is kind << 60 | source << 52 | host offset / 512 (native/engine.h); the source is the
number of a file, or of a layer for COMPRESSED.  What stays ABSENT in every layer reads as zeros.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence

from virtmount.disk import SECTOR, Disk, round_up
from virtmount.engine import Decoder, Ranges
from virtmount.errors import Corrupt
from virtmount.image import Extent, Image, Kind, Leaf, last_place

KIND_SHIFT, SOURCE_SHIFT, HOST_SHIFT = 60, 52, 9
MAX_HOST = 1 << 59
INVALID = int(Kind.INVALID) << KIND_SHIFT
ZERO = int(Kind.ZERO) << KIND_SHIFT

log = logging.getLogger(__name__)


def entry(kind: Kind, source: int = 0, host_offset: int = 0) -> int:
    return int(kind) << KIND_SHIFT | source << SOURCE_SHIFT | host_offset >> HOST_SHIFT


class Filler:
    """Answers FILL.  One thread only, like the drivers."""

    def __init__(
        self,
        disk: Disk,
        complain: Callable[[Exception], None] = lambda error: log.error("%s", error),
    ) -> None:
        """`complain` hears of corruption that makes single clusters INVALID."""
        unit = disk.unit
        self._leaf_units = disk.config().leaf_units
        self._leaf_bytes = self._leaf_units * unit
        self._layers = [
            _Layer(image, number, unit, disk.numbers(number), complain)
            for number, image in enumerate(disk.layers)
        ]

    def leaf(self, offset: int) -> array[int]:
        """The map entries of the leaf at guest offset `offset`.  OSError: ask again later."""
        entries = array("Q", bytes(8 * self._leaf_units))
        for layer in self._layers:
            if layer.number and 0 not in entries:
                break
            layer.fill(entries, offset, self._leaf_bytes)
        return entries

    def is_metadata(self, host_offset: int, length: int, file: int) -> bool:
        """Whether a host range of the top image belongs to its own metadata."""
        return self._layers[0].forbidden[file].touch(host_offset, length)


class _Layer:
    def __init__(
        self,
        image: Image,
        number: int,
        unit: int,
        sources: list[int],
        complain: Callable[[Exception], None],
    ) -> None:
        self._image, self.number, self._unit = image, number, unit
        self._sources, self._complain = sources, complain
        self._cluster = image.cluster_size
        # A flat parent's nominal cluster may be smaller than the unit: it then counts as one.
        self._repeat = max(1, self._cluster // unit)
        self._clusters = -(-image.size // self._cluster)
        self._size = round_up(image.size, SECTOR)
        self._decoder = Decoder(image.layout, number, unit, self._repeat) if image.layout else None
        spans = [*image.metadata()] if len(image.files) > 1 else image.metadata()
        self.forbidden = [Ranges(spans, file) for file in range(len(image.files))]

    def fill(self, entries: array[int], offset: int, length: int) -> None:
        """Answer for what is still ABSENT in entries, which begin at guest offset `offset`."""
        inside = min(max(0, self._size - offset), length)
        # The last unit may reach past the end: of the top image it is the disk's own end, of a
        # parent that is not longer the disk ends there too (see Disk.unit).
        units = -(-inside // self._unit)
        if self._image.flat is not None:
            self._line(entries, 0, units, self._image.flat + offset, self._image.flat_file)
        else:
            self._tables(entries, offset, units)
        if self.number:
            self._all(entries, units, len(entries), ZERO)

    def _tables(self, entries: array[int], offset: int, units: int) -> None:
        image = self._image
        cluster, within = divmod(offset, self._cluster)
        skip = within // self._unit
        at = 0
        while at < units:
            index, first = divmod(cluster, image.entries_per_leaf)
            count = min(image.entries_per_leaf - first, self._clusters - cluster)
            count = min(count, -(-(units - at + skip) // self._repeat))
            if count <= 0:
                break
            end = min(units, at + count * self._repeat - skip)
            try:
                leaf = image.leaf(index)
                self._leaf(entries, at, end, leaf, first, count, skip, offset)
            except Corrupt as error:
                self._complain(error)
                self._all(entries, at, end, INVALID)
            cluster += count
            skip = 0
            at = end

    def _leaf(
        self,
        entries: array[int],
        at: int,
        end: int,
        leaf: Leaf,
        first: int,
        count: int,
        skip: int,
        offset: int,
    ) -> None:
        """Units at … end: entries first … first+count of `leaf`, less `skip` units."""
        if leaf.table is None:
            if leaf.base is not None:
                host = leaf.base + first * self._cluster + skip * self._unit
                self._line(entries, at, end, host, leaf.data_file)
            elif leaf.kind is Kind.COMPRESSED:
                self._all(entries, at, end, entry(leaf.kind, self.number))
            elif leaf.kind is Kind.PARTIAL:
                self._all(entries, at, end, int(Kind.PARTIAL) << KIND_SHIFT)
                self._slow(entries, at, end, offset)
            elif leaf.kind is not Kind.ABSENT:
                known = leaf.kind in (Kind.ZERO, Kind.INVALID)
                self._all(entries, at, end, entry(leaf.kind) if known else INVALID)
            return
        layout, decoder = self._image.layout, self._decoder
        if layout is None or decoder is None:
            raise TypeError(f"{self._image.name}: leaf() answered with a table, there is no layout")
        table = self._image.files[leaf.table_file]
        raw = table.pread(leaf.table + first * layout.width, count * layout.width)
        partial = decoder.decode(
            raw,
            entries,
            at,
            end - at,
            source=self._sources[leaf.data_file],
            skip=skip,
            limit=self._limit(leaf.data_file),
            forbidden=self.forbidden[leaf.data_file],
        )
        if partial:
            self._slow(entries, at, end, offset)

    def _limit(self, file: int) -> int:
        """Where a cluster may begin at the latest: the last one of a file may be cut short."""
        return last_place(self._image.layout, self._cluster, self._image.files[file].size)

    def _all(self, entries: array[int], at: int, end: int, value: int) -> None:
        if at < end and not any(entries[at:end]):
            entries[at:end] = array("Q", [value]) * (end - at)
            return
        for i in range(at, end):
            if not entries[i]:
                entries[i] = value

    def _line(self, entries: array[int], at: int, end: int, host: int, file: int) -> None:
        """Units at … end lie in order from host offset `host`."""
        limit = min(self._limit(file), MAX_HOST)
        fitting = max(0, -(-(limit - host) // self._unit))
        if host % SECTOR or host < 0:
            fitting = 0
        stop = min(end, at + fitting)
        step = self._unit >> HOST_SHIFT
        value = entry(Kind.DATA, self._sources[file], host)
        if at < stop:
            new = array("Q", range(value, value + (stop - at) * step, step))
            if not any(entries[at:stop]):
                entries[at:stop] = new
            else:
                for i in range(at, stop):
                    if not entries[i]:
                        entries[i] = new[i - at]
        self._all(entries, stop, end, INVALID)

    def _slow(self, entries: array[int], at: int, end: int, offset: int) -> None:
        """Replace PARTIAL units by what slow() says; its ABSENT pieces stay for the next layer."""
        partial = int(Kind.PARTIAL) << KIND_SHIFT
        i = at
        while i < end:
            if entries[i] != partial:
                i += 1
                continue
            cluster = (offset + i * self._unit) // self._cluster
            base = cluster * self._cluster
            start = (base - offset) // self._unit  # may lie before the leaf
            stop = min(end, start + self._repeat)
            try:
                pieces = self._pieces(cluster)
            except Corrupt as error:
                self._complain(error)
                pieces = [INVALID] * self._repeat
            for j in range(max(start, at), stop):
                if entries[j] == partial:
                    entries[j] = pieces[j - start]
            i = stop

    def _pieces(self, cluster: int) -> list[int]:
        """Map entries for all units of a PARTIAL cluster."""
        result: list[int] = []
        base = cluster * self._cluster
        # Asked of the host once: there may be half a million pieces.
        ends = [min(file.size, MAX_HOST) for file in self._image.files]
        for extent in self._image.slow(cluster):
            if extent.guest_offset != base + len(result) * self._unit or extent.length <= 0:
                raise ValueError(f"slow({cluster}): {extent} leaves a gap")
            if extent.length % self._unit:
                raise ValueError(f"slow({cluster}): {extent} is no multiple of {self._unit}")
            result.extend(self._run(extent, ends[extent.file]))
        if len(result) != self._repeat:
            raise ValueError(f"slow({cluster}): {len(result)} units, expected {self._repeat}")
        return result

    def _run(self, extent: Extent, end: int) -> Sequence[int]:
        """Map entries for all units of an extent; there may be thousands.  `end`: of its file."""
        count = extent.length // self._unit
        if extent.kind not in (Kind.DATA, Kind.SHARED):
            return [self._piece(extent, 0, end)] * count
        host, length = extent.host_offset, extent.length
        if 0 <= host <= end - length and not self.forbidden[extent.file].touch(host, length):
            first, step = self._piece(extent, 0, end), self._unit >> HOST_SHIFT
            if first != INVALID:
                return range(first, first + count * step, step)
        return [self._piece(extent, i, end) for i in range(count)]

    def _piece(self, extent: Extent, i: int, end: int) -> int:
        if extent.kind is Kind.COMPRESSED:
            return entry(extent.kind, self.number)
        if extent.kind not in (Kind.DATA, Kind.SHARED):
            return entry(extent.kind) if extent.kind is not Kind.PARTIAL else INVALID
        host = extent.host_offset + i * self._unit
        if not 0 <= host < end or host % SECTOR:
            return INVALID
        if self.forbidden[extent.file].touch(host, self._unit):
            return INVALID
        return entry(extent.kind, self._sources[extent.file], host)
