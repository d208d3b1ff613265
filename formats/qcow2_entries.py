"""QCOW2 L2 entries: what one says, and what is written for it.  Pure; used by qcow2*.py only.

Source: qemu's docs/interop/qcow2.rst, "Cluster mapping", "Extended L2 Entries".

An entry has 64 bits, or 128 in images with extended L2 entries: then the second half says for each
of 32 subclusters whether it is there (bits 0-31) and whether it reads as zeros (bits 32-63), both
of which together are damage.  With an external data file a cluster lies at its guest offset there,
so that 0 is a place as well, told from nothing by the COPIED flag.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from virtmount.image import Extent, Kind, Layout, Rule

WORD = 8
OFFSET = 0x00FFFFFFFFFFFE00  # bits 9-55
COPIED = 1 << 63  # the count is exactly 1
COMPRESSED = 1 << 62
ZERO = 1  # version 3, not with extended entries; the offset may still hold a preallocated cluster
SUBCLUSTERS = 32
PRESENT = 0xFFFFFFFF  # all bits of a bitmap that say: it is there
ZEROS = PRESENT << 32  # all that say: it reads as zeros
SECTOR = 512  # compressed data is counted in these


class Entries:
    """How the L2 entries of one image are read and written."""

    def __init__(
        self, version: int, cluster_size: int, *, extended: bool = False, data_file: bool = False
    ) -> None:
        self.version, self.cluster_size = version, cluster_size
        self.extended, self.data_file = extended, data_file
        self.words = 2 if extended else 1
        self.width = self.words * WORD
        self.per_table = cluster_size // self.width
        self.grain = cluster_size // SUBCLUSTERS if extended else cluster_size
        # Where a compressed cluster's entry changes from byte offset to sector count.
        self._sectors_shift = 62 - (cluster_size.bit_length() - 1 - 8)

    def layout(self) -> Layout | None:
        """The rules for tables of single words; there are none for those of two."""
        if self.extended:
            return None
        # Version 2 has no zero flag: a set bit 0 is damage there.
        flag = Rule(ZERO, ZERO, Kind.ZERO if self.version > 2 else Kind.INVALID)
        rules = (
            (
                Rule(COMPRESSED, COMPRESSED, Kind.INVALID),
                flag,
                Rule(OFFSET | COPIED, 0, Kind.ABSENT),
            )
            if self.data_file
            else (
                Rule(COMPRESSED, COMPRESSED, Kind.COMPRESSED),
                flag,
                Rule(OFFSET, 0, Kind.ABSENT),
                Rule(COPIED, 0, Kind.SHARED),
            )
        )
        return Layout(
            width=WORD,
            byteorder="big",
            mask=OFFSET,
            rules=rules,
            low=0 if self.data_file else self.cluster_size,
            align=self.cluster_size,
        )

    # Reading

    def compressed(self, entry: int) -> tuple[int, int]:
        """Byte offset and longest length of the data of a compressed cluster."""
        start = entry & ((1 << self._sectors_shift) - 1)
        more = (entry & (COMPRESSED - 1)) >> self._sectors_shift
        return start, (more + 1) * SECTOR - start % SECTOR

    def named(self, entry: int) -> Iterable[int]:
        """The counted host clusters to which an entry refers: none in a data file."""
        size = self.cluster_size
        if self.data_file:
            return ()
        if entry & COMPRESSED:
            start, length = self.compressed(entry)
            return range(start // size, (start + length - 1) // size + 1)
        offset = entry & OFFSET
        return (offset // size,) if offset and not offset % size else ()

    def is_compressed(self, entry: int) -> bool:
        return bool(entry & COMPRESSED)

    def holds(self, entry: int) -> bool:
        """Whether an entry gives a place, as data or in reserve."""
        return bool(entry & (OFFSET | COMPRESSED) or (self.data_file and entry & COPIED))

    def pieces(
        self, cluster: int, words: Sequence[int], *, alone: bool, limit: int
    ) -> Sequence[Extent]:
        """The extents of one guest cluster.

        `alone`: the count of its host cluster is 1.  No cluster begins at `limit` or later.
        """
        size, entry = self.cluster_size, words[0]
        at = cluster * size
        if entry & COMPRESSED:
            kind = Kind.INVALID if self.data_file else Kind.COMPRESSED
            return (Extent(at, size, kind),)
        host = entry & OFFSET
        there = self.holds(entry)
        wrong = there and (
            host % size or host >= limit or (host != at if self.data_file else host < size)
        )
        present, zero = self._bits(entry, words)
        if present & zero or (present and (wrong or not there)):
            return (Extent(at, size, Kind.INVALID),)
        data = Kind.DATA if self.data_file or (alone and entry & COPIED) else Kind.SHARED
        return [
            Extent(at + first, length, data, host + first, int(self.data_file))
            if kind is Kind.DATA
            else Extent(at + first, length, kind)
            for first, length, kind in self._runs(present, zero)
        ]

    def _bits(self, entry: int, words: Sequence[int]) -> tuple[int, int]:
        """Which subclusters are there, and which read as zeros; of a plain entry all or none."""
        if self.extended:
            return words[1] & PRESENT, words[1] >> 32
        if entry & ZERO:  # version 2 has no such flag
            return (0, PRESENT) if self.version > 2 else (PRESENT, PRESENT)
        return (PRESENT if self.holds(entry) else 0), 0

    def _runs(self, present: int, zero: int) -> Iterator[tuple[int, int, Kind]]:
        """Offset in the cluster, length and kind of equal subclusters in a row."""
        for kind, bits in ((Kind.DATA, present), (Kind.ZERO, zero), (Kind.ABSENT, ~0)):
            if bits & PRESENT == PRESENT and not (kind is Kind.ABSENT and (present or zero)):
                yield 0, self.cluster_size, kind
                return
        first, before = 0, _kind(present, zero, 0)
        for i in range(1, SUBCLUSTERS):
            kind = _kind(present, zero, i)
            if kind is not before:
                yield first * self.grain, (i - first) * self.grain, before
                first, before = i, kind
        yield first * self.grain, (SUBCLUSTERS - first) * self.grain, before

    # Writing

    def mapped(self, host: int) -> tuple[int, ...]:
        """A whole cluster at `host` that nothing else uses."""
        return (host | COPIED, PRESENT) if self.extended else (host | COPIED,)

    def empty(self, hides: bool) -> tuple[int, ...]:
        """A cluster without a place: zeros where it `hides` a parent's, else nothing."""
        if self.extended:
            return (0, ZEROS if hides else 0)
        return (ZERO if hides else 0,)

    def packed(self, host: int, length: int) -> tuple[int, ...]:
        """A compressed cluster: `length` bytes from byte `host` on."""
        more = (host + length - 1) // SECTOR - host // SECTOR
        entry = COMPRESSED | more << self._sectors_shift | host
        return (entry, 0) if self.extended else (entry,)

    @property
    def most_packed(self) -> int:
        """No compressed cluster may begin at this byte or later."""
        return 1 << self._sectors_shift


def _kind(present: int, zero: int, i: int) -> Kind:
    if present >> i & 1:
        return Kind.DATA
    return Kind.ZERO if zero >> i & 1 else Kind.ABSENT
