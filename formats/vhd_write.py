"""VHD: the writing of dynamic and differencing images.

The order of writes is our own: qemu leaves the file without a footer at its end for an instant and
syncs three times a block, VirtualBox writes everything in parallel.

1. At every instant the footer at the beginning is whole, and so is one at the end of the file: a
   new one is durable at the new end before a block goes over the old one.
2. A new block's bitmap is full, durably, before the table names it: qemu does not look at bitmaps,
   others do.  Its data is durable before where it hides a parent's or its place was used before.
3. A block that was replaced or discarded is emptied and used again only once the table that does
   not name it any more is durable.
4. New blocks' data is aligned to 4 KiB, except in the place of an older block that is not.
   (qemu takes what lies behind the last block for zeros, without looking.  After a crash that may
   be data of blocks which the table does not name yet, up to the footer: a session of ours, or
   `check --repair`, cuts it off, and should come before qemu writes to such an image again.)
5. At end() the file ends with its last block and the footer.  Free places in the middle are holes
   in the file; the next session finds them by the table and uses them first.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence

from virtmount.errors import Corrupt
from virtmount.formats.vhd_footer import ENTRY, FREE, SECTOR, Copies
from virtmount.formats.vhd_table import (
    ALIGN,
    Geometry,
    Scan,
    aligned,
    last_block,
    pieces,
    table_writes,
    touched,
)
from virtmount.hostfile import HostFile
from virtmount.image import Dirty, Reservation, Run
from virtmount.plan import Barrier, Plan, Punch, Step, Truncate, Write


class Writer:
    """The places for blocks in one file that is open for writing, and the plans that fill them."""

    def __init__(self, file: HostFile, geometry: Geometry, copies: Copies, footer: bytes) -> None:
        """`footer` is the copy that the image goes by.  Corrupt where the table is not sound."""
        self._file, self.geometry, self.footer = file, geometry, footer
        self._head_whole = copies.head is not None and copies.head.raw == footer
        tail = copies.tail
        # A footer cut short, or with something behind it, stays until there is a better one.
        limit = tail.offset if tail is not None and tail.whole else file.size
        scan = Scan(file, geometry, limit)
        for wrong in scan.run():
            place = f"table entry {wrong.index} at {geometry.entry_at(wrong.index)}"
            raise Corrupt(
                file,
                place,
                f"{wrong.text}: not written",
                hint=f"open it read-only, or virtmount check --repair {file}",
            )
        self.free_from = scan.end  # nothing that is used lies here or later
        # Free places, taken from the end: what reads as zeros, what was given back in this
        # session with unknown content, and what the table leaves between blocks.
        self._clean: list[int] = []
        self._stale: list[int] = []
        self._holes = sorted(scan.holes(), reverse=True)
        self._tail_at = limit
        self._begun = False

    def begin(self) -> Plan:
        """Mend the copy of the footer that is missing: any one suffices to read the image."""
        self._begun = True
        steps: list[Step] = []
        if not self._head_whole:
            steps += [Write(0, self.footer), Barrier]
            self._head_whole = True
        return Plan(*steps, *self.footer_at(self.free_from))

    def footer_at(self, end: int) -> list[Step]:
        """Have a whole footer at the end of the file, and not below `end`."""
        size = self._file.size
        if size % SECTOR == 0 and end <= size - SECTOR and self._tail_is_whole(size):
            self._tail_at = size - SECTOR
            return []
        if self._file.is_device and end + SECTOR > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file))
        self._tail_at = max(end, -(-size // SECTOR) * SECTOR - SECTOR)
        return [Write(self._tail_at, self.footer), Barrier]

    def _tail_is_whole(self, size: int) -> bool:
        return self._file.pread(size - SECTOR, SECTOR) == self.footer

    def exchange_footer(self, footer: bytes) -> list[Step]:
        """Put another footer into both places, once what it leads to is durable."""
        steps = self.footer_at(self.free_from)
        self.footer = footer
        return [*steps, Write(self._tail_at, footer), Barrier, Write(0, footer), Barrier]

    def adopt(self, geometry: Geometry) -> None:
        """The metadata lies elsewhere from now on, also in places that were free."""
        self.geometry = geometry
        for places in (self._clean, self._stale, self._holes):
            places[:] = [
                start for start in places if not touched(geometry.spans, start, geometry.stride)
            ]

    # Places

    def reserve(self, count: int) -> Reservation:
        count = max(1, count)
        for places in (self._clean, self._stale, self._holes):
            if places:
                taken = [places.pop() for _ in range(min(count, len(places)))]
                # A reservation that failed leaves places behind the end of the file.
                steps = self.footer_at(max(taken) + self.geometry.stride)
                if places is not self._clean:
                    steps += (Punch(start, self.geometry.stride) for start in taken)
                steps += (Write(start, self.geometry.full) for start in taken)
                return Reservation(self._runs(taken), Plan(*steps), reused=True)
        return self._grow(count)

    def _grow(self, count: int) -> Reservation:
        geometry, size = self.geometry, self._file.size
        starts: list[int] = []
        end = low = self.free_from
        for _ in range(count):
            start = aligned(end, geometry)
            after = start + geometry.stride
            if start // SECTOR >= FREE or (self._file.is_device and after + SECTOR > size):
                break
            starts.append(start)
            end = after
        if not starts:
            code = errno.ENOSPC if self._file.is_device else errno.EFBIG
            raise OSError(code, os.strerror(code), str(self._file))
        # The old footer, and what a crash may have left behind it.
        old = min(end, size)
        garbage = max(0, old - low)
        steps = self.footer_at(end)
        if garbage:
            emptied = Write(low, bytes(garbage)) if garbage <= ALIGN else Punch(low, garbage)
            steps.append(emptied)
        steps += (Write(start, geometry.full) for start in starts)
        self.free_from = end
        reused = old > starts[0] + geometry.bitmap
        return Reservation(self._runs(starts), Plan(*steps, Barrier), reused)

    def _runs(self, starts: Sequence[int]) -> tuple[Run, ...]:
        return tuple(Run(start + self.geometry.bitmap, 1) for start in starts)

    def release(self, runs: Sequence[Run]) -> None:
        for run in runs:
            for i in range(run.count):
                at = run.host_offset + i * self.geometry.block
                self._stale.append(at - self.geometry.bitmap)

    # The table

    def _entry(self, index: int) -> int:
        raw = self._file.pread(self.geometry.entry_at(index), ENTRY)
        return int(struct.unpack(">I", raw)[0])

    def commit(self, dirty: Sequence[Dirty]) -> Plan:
        changes: dict[int, int] = {}
        freed: list[int] = []
        for item in dirty:
            changes[item.cluster] = (item.host_offset - self.geometry.bitmap) // SECTOR
            if (old := self._entry(item.cluster)) != FREE:
                freed.append(old * SECTOR)
        first = [Barrier] if freed or any(item.barrier for item in dirty) else []
        writes = table_writes(self._file, self.geometry, changes)
        return Plan(*first, *writes, Barrier, *self._emptied(freed))

    def discard(self, first: int, count: int) -> Plan:
        freed: list[int] = []
        changes: dict[int, int] = {}
        for at, entries in pieces(self._file, self.geometry, first, count):
            for index, entry in enumerate(entries, at):
                if entry != FREE:
                    freed.append(entry * SECTOR)
                    changes[index] = FREE
        if not freed:
            return Plan()
        writes = table_writes(self._file, self.geometry, changes)
        return Plan(*writes, Barrier, *self._emptied(freed))

    def _emptied(self, freed: Sequence[int]) -> list[Step]:
        """For the end of a plan after which the table does not name them any more."""
        self._clean += freed
        return [Punch(start, self.geometry.stride) for start in freed]

    def end(self) -> Plan:
        if not self._begun:
            return Plan()
        geometry, size = self.geometry, self._file.size
        end = max(geometry.metadata_end, last_block(self._file, geometry))
        steps: list[Step] = []
        steps += (
            Punch(start, geometry.stride) for start in self._stale if start + geometry.stride <= end
        )
        if not self._file.is_device and size > end + SECTOR:
            steps += [Write(end, self.footer), Barrier, Truncate(end + SECTOR)]
        return Plan(*steps, Barrier)
