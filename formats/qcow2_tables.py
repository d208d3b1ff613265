"""QCOW2 L1 and L2 tables as they are changed: what becomes of them in a draft.

Source: qemu's docs/interop/qcow2.rst, "Cluster mapping".  Used by qcow2*.py only; the invariants
are those of qcow2.py.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable

from virtmount.formats.qcow2_entries import COPIED, OFFSET, Entries
from virtmount.formats.qcow2_refcount import SECTOR, Draft, Refcounts, table_bytes
from virtmount.hostfile import HostFile
from virtmount.plan import Plan

ENTRY = 8  # bytes of an L1 entry
PER_SECTOR = SECTOR // ENTRY


class Tables:
    """The tables of one image that is open for writing.  L1 is kept in memory, L2 is not."""

    def __init__(
        self,
        file: HostFile,
        entries: Entries,
        counts: Refcounts,
        l1: array[int],
        l1_offset: int,
        *,
        snapshots: bool,
    ) -> None:
        self._file, self.entries, self.counts = file, entries, counts
        self.l1, self.l1_offset = l1, l1_offset
        self._snapshots = snapshots

    def own(self, draft: Draft, indexes: Iterable[int]) -> None:
        """Give each of these L1 entries an L2 table that nothing else uses."""
        l1, size = self.l1, self.entries.cluster_size
        # An entry of 0 is not COPIED either.
        wanted = sorted(
            i for i in indexes if not (l1[i] & COPIED and l1[i] & OFFSET and self.alone(l1[i]))
        )
        for i, cluster in zip(wanted, self.counts.allocate(draft, len(wanted)), strict=True):
            new, old = cluster * size, l1[i] & OFFSET
            draft.tables.add(new)
            if old:
                content = self._file.pread(old, size)
                for at in range(0, size, SECTOR):
                    draft.fresh[new + at] = bytearray(content[at : at + SECTOR])
                draft.retired.append(old // size)
            l1[i] = new | COPIED
            draft.roots.add(i // PER_SECTOR)

    def clear(self, draft: Draft, first: int, last: int, target: tuple[int, ...]) -> None:
        """Set the L2 entries of guest clusters first … last-1, of one table, to `target`."""
        index, within = divmod(first, self.entries.per_table)
        table, width = self.l1[index] & OFFSET, self.entries.width
        packed = struct.pack(f">{len(target)}Q", *target)
        old = b""
        if table not in draft.tables:
            # Most of a large discard meets what is empty already: compare before taking apart.
            old = self._file.pread(table + within * width, (last - first) * width)
        start = first
        while first < last:
            count = min(last, round_up(first + 1, SECTOR // width)) - first
            at = (first - start) * width
            if old[at : at + count * width] != packed * count:
                self.set(draft, first, target * count)
            first += count

    def map_all(self, draft: Draft, first: int, last: int) -> None:
        """Map guest clusters first … last-1, of one table, to their guest offsets."""
        per_sector = SECTOR // self.entries.width
        while first < last:
            stop = min(last, round_up(first + 1, per_sector))
            words = [
                word
                for cluster in range(first, stop)
                for word in self.entries.mapped(cluster * self.entries.cluster_size)
            ]
            self.set(draft, first, tuple(words))
            first = stop

    def set(self, draft: Draft, first: int, words: tuple[int, ...]) -> None:
        """Replace the L2 entries of guest clusters from `first` on, which lie in one sector."""
        index, within = divmod(first, self.entries.per_table)
        table, entries = self.l1[index] & OFFSET, self.entries
        at = within * entries.width % SECTOR
        offset = table + within * entries.width - at
        fresh = table in draft.tables
        sectors = draft.fresh if fresh else draft.mapping
        sector = sectors.get(offset)
        if sector is None:
            sector = bytearray(SECTOR if fresh else self._file.pread(offset, SECTOR))
        code = f">{len(words)}Q"
        old = struct.unpack_from(code, sector, at)
        if old == words:
            return
        struct.pack_into(code, sector, at, *words)
        sectors[offset] = sector
        for entry in old[:: entries.words]:
            if entry:
                draft.freed += entries.named(entry)

    def is_empty(self, first: int, last: int, hides: bool) -> bool:
        """Whether clusters first … last-1, of one table, have to change to read as zeros."""
        index, within = divmod(first, self.entries.per_table)
        table, entries = self.l1[index] & OFFSET, self.entries
        if not table:
            return not hides
        old = self._file.pread(table + within * entries.width, (last - first) * entries.width)
        return old == struct.pack(f">{entries.words}Q", *entries.empty(hides)) * (last - first)

    def alone(self, entry: int) -> bool:
        """Whether what a COPIED entry names has one owner; without snapshots it is believed."""
        if not self._snapshots:
            return True
        return self.counts.count((entry & OFFSET) // self.entries.cluster_size) == 1

    def settle(self, draft: Draft) -> Plan:
        for sector in draft.roots:
            entries = self.l1[sector * PER_SECTOR : (sector + 1) * PER_SECTOR]
            offset = self.l1_offset + sector * SECTOR
            draft.mapping[offset] = bytearray(table_bytes(entries))
        return self.counts.settle(draft)


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step
