"""QCOW2 reference counts: which host clusters are free, and in which order counts are written.

Source: qemu's docs/interop/qcow2.rst, "Host cluster management".  Used by qcow2.py only.

Invariants:

1. A cluster is handed out only where its count is 0, it is not reserved, and no metadata that was
   there at open lies in it.
2. Nothing is cached between two plans: the file holds the truth then, and memory stays bounded by
   what one plan touches.  While a plan is drafted, `_pages` is what the file will hold after it.
3. A reservation changes nothing in the file but its length, and wipes what is free: its plan may
   fail, then release() makes it undone.  Reserved clusters have count 0; counts, and the refcount
   blocks for them, are written by the plan that maps the clusters.
4. A count rises before, and falls after, the reference that it stands for; a crash leaks.
5. A new block is durable, and with it the count of its own cluster, before the refcount table
   names it; a larger table is whole before the header names it.
"""

from __future__ import annotations

import errno
import os
import sys
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from virtmount.errors import Corrupt
from virtmount.formats.qcow2_header import MAX_REFCOUNT_TABLE, REPAIR
from virtmount.hostfile import HostFile
from virtmount.plan import Barrier, Extend, Plan, Punch, Step, Write

SECTOR = 512  # what a disk writes whole; no count or table entry crosses one
PAGE = 4096  # counts are read in pieces of this size, so that 2 MiB blocks cost no more
MAX_HOST = 1 << 56  # table entries have 56 bits
MAX_PAST_END = 64 << 30  # bytes past the file's end in which counted clusters are believed
MAX_EMPTY = (512 << 20, 1 << 17)  # bytes, blocks: empty ones past the end, looked through at open
SCAN = 64  # pages looked through for free clusters per reservation
BLOCK = 0xFFFFFFFFFFFFFE00  # bits 9-63 of a refcount table entry


def read_table(file: HostFile, offset: int, count: int) -> array[int]:
    """`count` big-endian 64-bit entries; what lies past the file's end is 0."""
    table = array("Q", file.pread_padded(offset, count * 8))
    if sys.byteorder == "little":
        table.byteswap()
    return table


def table_bytes(entries: array[int]) -> bytes:
    if sys.byteorder == "little":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


def coalesce(sectors: Mapping[int, bytes | bytearray]) -> list[Write]:
    """Writes for {offset: bytes}, adjacent ones joined."""
    writes: list[Write] = []
    parts: list[bytes | bytearray] = []
    start = end = -1
    for offset, data in sorted(sectors.items()):
        if offset != end and parts:
            writes.append(Write(start, b"".join(parts)))
            parts = []
        if not parts:
            start = offset
        parts.append(data)
        end = offset + len(data)
    if parts:
        writes.append(Write(start, b"".join(parts)))
    return writes


def runs_of(clusters: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of adjacent clusters; `clusters` is sorted."""
    first = count = 0
    for cluster in clusters:
        if count and cluster == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = cluster, 1
    if count:
        yield first, count


class Draft:
    """What one plan is going to do, in the epochs that settle() puts barriers between."""

    def __init__(self) -> None:
        self.extend = 0  # file size
        self.wipe: list[tuple[int, int]] = []  # (offset, length) that must read as zeros first
        self.fresh: dict[int, bytearray] = {}  # sectors of tables that nothing names yet
        self.tables: set[int] = set()  # their offsets
        self.mapping: dict[int, bytearray] = {}  # sectors of tables that are in use
        self.roots: set[int] = set()  # sectors of the L1 table that change with it
        self.head: dict[int, bytes] = {}  # of the header's first sector, after all these
        self.moved_l1 = False
        self.freed: list[int] = []  # guest clusters that lose one reference each
        self.retired: list[int] = []  # the same for tables


class Ranges:
    """Sorted ranges of bytes that do not overlap."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._starts, self._ends = array("Q"), array("Q")
        for offset, length in ranges:
            self._starts.append(offset)
            self._ends.append(offset + length)

    def touch(self, offset: int, cluster_size: int) -> bool:
        i = bisect_right(self._starts, offset + cluster_size - 1) - 1
        return i >= 0 and self._ends[i] > offset


class Refcounts:
    """The counts of one image that is open for writing, and its free clusters."""

    def __init__(
        self,
        file: HostFile,
        head: bytearray,
        table: array[int],
        metadata: Iterable[tuple[int, int]],
        *,
        cluster_size: int,
        order: int,
        table_offset: int,
    ) -> None:
        """`head` is the header's first sector, shared with the driver: the table may move.

        `metadata` are sorted ranges of bytes in use by tables.
        """
        self._file, self._head, self._table = file, head, table
        self._table_offset = table_offset
        self.cluster_size = cluster_size
        self._width = 1 << order  # bits
        self._page_bytes = min(PAGE, cluster_size)
        self._per_page = self._page_bytes * 8 >> order
        self._per_block = cluster_size * 8 >> order
        self._metadata = Ranges(metadata)
        self.reserved: set[int] = set()
        self._pages: dict[int, bytearray] = {}  # of the draft; see invariant 2
        self._dirty: dict[int, tuple[int, int]] = {}  # file offset of a sector -> page, byte in it
        self._new_blocks: set[int] = set()  # read as zeros until the draft is settled
        self._entries: set[int] = set()  # of the table, changed in the draft
        self._moved = False  # the draft moves the table
        # The first cluster past all others.  A device cannot grow: nothing lies past its end.
        size = -(-file.size // cluster_size)
        self._device = file.is_device
        self.opened_end = size
        most = min(MAX_EMPTY[0] // cluster_size, MAX_EMPTY[1])
        self.end = file.size // cluster_size if self._device else self._last_used(size, most) + 1
        if (self.end - size) * cluster_size > MAX_PAST_END:
            raise Corrupt(
                file,
                "refcount blocks",
                f"cluster {self.end - 1} is counted, the file ends at cluster {size}",
                hint=f"{REPAIR} {file}",
            )
        # What a table of the largest size can count, less the table and all the blocks themselves.
        most = MAX_REFCOUNT_TABLE // 8
        self._most = min(
            most * self._per_block - most - MAX_REFCOUNT_TABLE // cluster_size,
            MAX_HOST // cluster_size,
        )
        # Reserved for tables, so that they need not lie behind what is reserved for data.
        self._stock: deque[int] = deque()
        # page -> free clusters in it, for the pages below _scanned and from _scan_end on.
        self._free: dict[int, int] = {}
        self._total = 0
        self._scanned = 0
        self._scan_end = -(-self.end // self._per_page)

    # Single counts

    def count(self, cluster: int) -> int:
        number, index = divmod(cluster, self._per_page)
        page = self._page(number)
        if page is None:
            return 0
        width = self._width
        if width < 8:
            byte, bit = divmod(index * width, 8)
            return page[byte] >> bit & (1 << width) - 1  # the first count is in the lowest bits
        at = index * width // 8
        return int.from_bytes(page[at : at + width // 8], "big")

    def all_alone(self, clusters: Iterable[int]) -> bool:
        """Whether each of them has a count of 1.  No draft is open; the page just seen is kept."""
        width, number, page = self._width, -1, None
        for cluster in clusters:
            own, index = divmod(cluster, self._per_page)
            if own != number:
                number, page = own, self._page(own)
            if page is None:
                return False
            if width < 8:
                byte, bit = divmod(index * width, 8)
                if page[byte] >> bit & (1 << width) - 1 != 1:
                    return False
            else:
                at = index * width // 8
                if int.from_bytes(page[at : at + width // 8], "big") != 1:
                    return False
        return True

    def use(self, draft: Draft, clusters: Sequence[int]) -> None:
        """The clusters are in use from the draft on: their counts become 1."""
        missing = {
            block
            for block in {cluster // self._per_block for cluster in clusters}
            if not self._block(block)
        }
        if missing:
            self._make_blocks(draft, missing)
        for cluster in clusters:
            self._set(cluster, 1)
        self.reserved.difference_update(clusters)

    def _set(self, cluster: int, value: int) -> None:
        number, index = divmod(cluster, self._per_page)
        page = self._pages.get(number)
        if page is None:
            page = self._page(number)
            assert page is not None, "a cluster in use has a refcount block"
            self._pages[number] = page
        width = self._width
        if width < 8:
            at, bit = divmod(index * width, 8)
            page[at] = page[at] & ~((1 << width) - 1 << bit) | value << bit
        else:
            at = index * width // 8
            page[at : at + width // 8] = value.to_bytes(width // 8, "big")
        at -= at % SECTOR
        self._dirty[self._page_offset(number) + at] = (number, at)

    def _drop(self, cluster: int) -> bool:
        """Take one reference away; whether the cluster is free then."""
        count = self.count(cluster)
        if not count:
            return False  # the count was wrong before; a lower one would not mend it
        self._set(cluster, count - 1)
        if count > 1:
            return False
        self._freed(cluster)
        return True

    # Pages and blocks

    def _block(self, block: int) -> int:
        """The offset of a refcount block, 0 where there is none."""
        return self._table[block] & BLOCK if block < len(self._table) else 0

    def _page_offset(self, number: int) -> int:
        block, within = divmod(number * self._page_bytes, self.cluster_size)
        offset = self._block(block)
        return offset + within if offset else 0

    def _page(self, number: int) -> bytearray | None:
        """The counts of one page as the draft leaves them, None where no block exists."""
        page = self._pages.get(number)
        if page is not None:
            return page
        offset = self._page_offset(number)
        if not offset:
            return None
        if number * self._page_bytes // self.cluster_size in self._new_blocks:
            return bytearray(self._page_bytes)
        return bytearray(self._file.pread_padded(offset, self._page_bytes))

    def _last_used(self, low: int, most: int | None = None) -> int:
        """The highest cluster from `low` on whose count is not 0, or low - 1.  No draft is open.

        Corrupt if more than `most` blocks have to be read for that.
        """
        empty = 0
        for block in range(len(self._table) - 1, low // self._per_block - 1, -1):
            offset = self._block(block)
            if not offset:
                continue
            if empty == most:
                raise Corrupt(
                    self._file,
                    "refcount table",
                    f"more than {most} empty blocks for clusters past the file's end",
                )
            first = block * self._per_block
            skip = max(0, low - first) * self._width // 8
            counts = self._file.pread_padded(offset + skip, self.cluster_size - skip)
            counts = counts.rstrip(b"\0")
            if not counts:
                empty += 1
                continue
            byte = skip + len(counts) - 1
            if self._width < 8:
                first += byte * 8 // self._width + (counts[-1].bit_length() - 1) // self._width
            else:
                first += byte * 8 // self._width
            return max(first, low - 1)
        return low - 1

    # Free clusters

    def reserve(self, draft: Draft, want: int, tables: int) -> tuple[list[tuple[int, int]], bool]:
        """At least one and about `want` clusters, as (first, count), and whether they are stale.

        Stale ones are wiped by the draft, the others read as zeros once it has extended the file.
        Enough is left over for the tables that may be needed to map all that is reserved, of which
        there are `tables` at most.  Nothing has changed when this raises OSError.
        """
        if self._device:
            blocks = self.end // self._per_block + 1
            blocks += self._table_clusters(blocks)
            enough = blocks + len(self.reserved) + 2 * want
            while self._total < enough and self._scanned < self._scan_end:
                self._scan(SCAN)
            want = min(want, self._room(self._total - blocks, tables))
            if want < 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._take(draft, want), True
        self._scan(SCAN)
        # A handful of holes is not worth a refill that brings no more than them.
        if self._total >= max(1, want // 8):
            return self._take(draft, want), True
        return self._append_data(draft, want, tables), False

    def _room(self, free: int, tables: int) -> int:
        """How many of `free` clusters may be reserved when each may need a table."""
        return max((free - len(self.reserved)) // 2, free - tables)

    def release(self, first: int, count: int) -> None:
        """Reserved clusters come back.  The plan that reserved them may have failed."""
        for cluster in range(first, first + count):
            self.reserved.remove(cluster)
        there = -(-self._file.size // self.cluster_size)
        if first + count < self.end or first < there:
            for cluster in range(first, first + count):
                self._freed(cluster)
            return
        # The file did not grow: ask for less the next time.
        self.end = first
        while self._stock and self._stock[-1] == self.end - 1 >= there:
            self.reserved.remove(self._stock.pop())
            self.end -= 1

    def allocate(self, draft: Draft, want: int) -> list[int]:
        """Exactly `want` clusters for tables that the draft writes; they read as zeros."""
        clusters = self._some(draft, want)
        self.use(draft, clusters)
        return clusters

    def allocate_run(self, draft: Draft, count: int) -> int:
        """The first of `count` adjacent clusters for a table; they read as zeros."""
        first = self._take_run(draft, count) if self._device else self._append(draft, count)
        self.use(draft, range(first, first + count))
        return first

    def _some(self, draft: Draft, want: int) -> list[int]:
        """Exactly `want` clusters, reserved: holes first, then the stock, then the file grows."""
        while self._device and self._total < want and self._scanned < self._scan_end:
            self._scan(SCAN)
        clusters: list[int] = []
        if self._total:
            for first, count in self._take(draft, want):
                clusters += range(first, first + count)
        while self._stock and len(clusters) < want:
            self._reach(draft)
            clusters.append(self._stock.popleft())
        left = want - len(clusters)
        if left:
            first = self._append(draft, left)
            clusters += range(first, first + left)
        return clusters

    def _append_data(self, draft: Draft, want: int, tables: int) -> list[tuple[int, int]]:
        # As many tables and blocks as `want` clusters in a row need; holes will do for them.
        stock = 2 + want * 8 // self.cluster_size + want // self._per_block
        stock = max(0, stock - len(self._stock) - self._total)
        want = min(want, self._room(self._most - self.end - stock, tables))
        if want < 1:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if stock:
            first = self._append(draft, stock)
            self._stock.extend(range(first, first + stock))
        return [(self._append(draft, want), want)]

    def _append(self, draft: Draft, count: int) -> int:
        """The first of `count` adjacent clusters that were not there before."""
        first = self.end
        if self._device or (first + count) * self.cluster_size > MAX_HOST:
            code = errno.ENOSPC if self._device else errno.EFBIG
            raise OSError(code, os.strerror(code))
        self.end += count
        self.reserved.update(range(first, self.end))
        self._reach(draft)
        return first

    def _reach(self, draft: Draft) -> None:
        """The draft uses clusters that may lie past the file's end."""
        if not self._device and self._file.size < self.end * self.cluster_size:
            draft.extend = self.end * self.cluster_size

    def _freed(self, cluster: int) -> None:
        page = cluster // self._per_page
        if cluster in self.reserved:
            return
        if page < self._scanned or page >= self._scan_end:
            self._free[page] = self._free.get(page, 0) + 1
            self._total += 1

    def _scan(self, pages: int) -> None:
        """Count the free clusters of up to `pages` more pages."""
        stop = min(self._scanned + pages, self._scan_end)
        for number in range(self._scanned, stop):
            free = len(self._free_in(number))
            if free:
                self._free[number] = free
                self._total += free
        self._scanned = stop

    def _free_in(self, number: int) -> list[int]:
        first = number * self._per_page
        last = min(first + self._per_page, self.end)
        page = self._page(number)
        free: Iterable[int]
        if page is None or page.count(0) == len(page):
            free = range(first, last)
        elif self._width < 8:
            width, mask = self._width, (1 << self._width) - 1
            free = (
                first + byte * 8 // width + i
                for byte, counts in enumerate(page[: -(-(last - first) * width // 8)])
                if counts != 0xFF
                for i in range(8 // width)
                if not counts >> i * width & mask
            )
        else:
            counts = array({8: "B", 16: "H", 32: "I", 64: "Q"}[self._width], bytes(page))
            free = (first + i for i, count in enumerate(counts) if not count)
        return [cluster for cluster in free if cluster < last and cluster not in self.reserved]

    def _take(self, draft: Draft, want: int) -> list[tuple[int, int]]:
        """Up to `want` of the clusters that are known to be free, from the emptiest pages."""
        clusters: list[int] = []
        for number in sorted(self._free, key=lambda page: (-min(self._free[page], want), page)):
            found = self._free_in(number)
            assert len(found) == self._free[number]
            clusters += self._chosen(number, found[: want - len(clusters)])
            if len(clusters) == want:
                break
        self._wipe(draft, clusters)
        return list(runs_of(sorted(clusters)))

    def _take_run(self, draft: Draft, count: int) -> int:
        """The first of `count` adjacent free clusters; for a device, where none can be appended."""
        self._scan(self._scan_end)
        run: list[int] = []
        for number in sorted(self._free):
            for cluster in self._free_in(number):
                if run and cluster != run[-1] + 1:
                    run.clear()
                run.append(cluster)
                if len(run) < count:
                    continue
                for page in {cluster // self._per_page for cluster in run}:
                    self._chosen(page, [c for c in run if c // self._per_page == page])
                self._wipe(draft, run)
                return run[0]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _chosen(self, number: int, clusters: list[int]) -> list[int]:
        """These free clusters of a page are free no longer: reserved, until they are counted."""
        for cluster in clusters:
            self._refuse_metadata(cluster)
        self.reserved.update(clusters)
        self._total -= len(clusters)
        self._free[number] -= len(clusters)
        if not self._free[number]:
            del self._free[number]
        return clusters

    def _wipe(self, draft: Draft, clusters: list[int]) -> None:
        size = self.cluster_size
        self._reach(draft)
        draft.wipe += [(first * size, count * size) for first, count in runs_of(sorted(clusters))]

    def _refuse_metadata(self, cluster: int) -> None:
        if self._metadata.touch(cluster * self.cluster_size, self.cluster_size):
            raise Corrupt(
                self._file,
                f"byte {cluster * self.cluster_size}",
                "a table lies here, but the reference count is 0",
                hint=f"{REPAIR} {self._file}",
            )

    # New blocks

    def _make_blocks(self, draft: Draft, blocks: Iterable[int]) -> None:
        """Blocks, those that count these blocks, and a table that has room for all of them."""
        used: list[int] = []
        wanted = sorted(blocks)
        while wanted:
            block = wanted.pop()
            if self._block(block):
                continue
            before = len(used)
            if block >= len(self._table):
                used += self._enlarge_table(draft, block)
            used += self._some(draft, 1)
            self._table[block] = used[-1] * self.cluster_size
            self._entries.add(block)
            self._new_blocks.add(block)
            wanted += {cluster // self._per_block for cluster in used[before:]}
        for cluster in used:
            self._set(cluster, 1)
        self.reserved.difference_update(used)

    def _enlarge_table(self, draft: Draft, block: int) -> range:
        """A table that has room for `block`, and for some more after it; its clusters."""
        size = self.cluster_size
        needed = self._table_clusters(block + 1)
        most = MAX_REFCOUNT_TABLE // size
        if needed > most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        count = min(most, max(needed, len(self._table) * 8 // size * 3 // 2 + 1))
        first = self._take_run(draft, count) if self._device else self._append(draft, count)
        self._move_table(draft, first * size, count)
        return range(first, first + count)

    def _table_clusters(self, entries: int) -> int:
        return -(-entries * 8 // self.cluster_size)

    def _move_table(self, draft: Draft, offset: int, clusters: int) -> None:
        size = self.cluster_size
        old = self._table_offset // size
        draft.retired += range(old, old + len(self._table) * 8 // size)
        self._table.frombytes(bytes(clusters * size - len(self._table) * 8))
        self._table_offset = offset
        self._head[48:60] = offset.to_bytes(8, "big") + clusters.to_bytes(4, "big")
        self._moved = True

    # The plan

    def settle(self, draft: Draft) -> Plan:
        """The draft as a plan; it ends with a barrier unless clusters are given back after it."""
        steps: list[Step] = []
        if draft.extend:
            steps.append(Extend(draft.extend))
        steps += _punches(draft.wipe)
        counts = self._count_writes()
        if self._moved:
            counts.append(Write(self._table_offset, table_bytes(self._table)))
        writes = counts + coalesce(draft.fresh)
        if writes or draft.wipe:
            steps += [*writes, Barrier]
        if self._moved:
            steps += [Write(0, bytes(self._head)), Barrier]
        elif self._entries:
            steps += [*self._entry_writes(), Barrier]
        if draft.mapping:
            steps += [*coalesce(draft.mapping), Barrier]
        if draft.head:
            for at, data in draft.head.items():
                self._head[at : at + len(data)] = data
            steps += [Write(0, bytes(self._head)), Barrier]
        steps += self._give_back(draft)
        self._pages.clear()
        self._new_blocks.clear()
        self._entries.clear()
        self._moved = False
        return Plan(*steps)

    def _count_writes(self) -> list[Write]:
        sectors = {
            offset: bytes(self._pages[number][at : at + SECTOR])
            for offset, (number, at) in self._dirty.items()
        }
        self._dirty.clear()
        return coalesce(sectors)

    def _entry_writes(self) -> list[Write]:
        per_sector = SECTOR // 8
        sectors = {entry // per_sector for entry in self._entries}
        return coalesce(
            {
                self._table_offset + sector * SECTOR: table_bytes(
                    self._table[sector * per_sector : (sector + 1) * per_sector]
                )
                for sector in sectors
            }
        )

    def _give_back(self, draft: Draft) -> Sequence[Step]:
        """After the barrier that made them unreachable: lower the counts, then punch."""
        size = self.cluster_size
        free = []
        for cluster in draft.retired:
            if self._metadata.touch(cluster * size, size):
                # Whoever asked for metadata() at open would refuse data there: not before the
                # next session.
                self.reserved.add(cluster)
            if self._drop(cluster):
                free.append(cluster)
        for cluster in draft.freed:
            # A hostile entry may name a table: that is not the guest's to free.
            if not self._metadata.touch(cluster * size, size) and self._drop(cluster):
                free.append(cluster)
        free.sort()
        holes = [(first * size, count * size) for first, count in runs_of(free)]
        return [*self._count_writes(), *_punches(holes)]

    def used_end(self) -> int:
        """The size to which the file may be cut: all that was appended since and is not used.

        What was there at open stays: other writers have left images whose counts are too low.
        """
        return (self._last_used(self.opened_end) + 1) * self.cluster_size


def _punches(ranges: Iterable[tuple[int, int]]) -> list[Punch]:
    joined: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((offset, length))
    return [Punch(offset, length) for offset, length in joined]
