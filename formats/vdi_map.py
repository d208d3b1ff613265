"""The map of a VDI: one 32-bit entry for every guest block, read and written in pieces."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

from virtmount.formats.vdi_header import ENTRY, SECTOR, Header
from virtmount.hostfile import HostFile
from virtmount.plan import Write

DISCARDED = 0xFFFFFFFE  # VDICore.h calls this "zero"; smaller entries are block numbers
NEVER_WRITTEN = 0xFFFFFFFF  # ... and this "free"
SCAN = 1 << 16  # bytes of map looked at in one go


def pieces(file: HostFile, header: Header, first: int, count: int) -> Iterator[tuple[int, bytes]]:
    """(index, bytes) of `count` entries from number `first` on."""
    step = SCAN // ENTRY
    for at in range(first, first + count, step):
        length = min(step, first + count - at)
        yield at, file.pread(header.map_offset + at * ENTRY, length * ENTRY)


def is_empty(raw: bytes) -> bool:
    """Whether all entries are NEVER_WRITTEN."""
    return raw.count(0xFF) == len(raw)


def unpacked(raw: bytes) -> array[int]:
    entries = array("I")
    assert entries.itemsize == ENTRY
    entries.frombytes(raw)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def packed(entries: array[int]) -> bytes:
    if sys.byteorder == "big":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


def writes(file: HostFile, map_offset: int, changes: Mapping[int, int]) -> Iterator[Write]:
    """Map sectors with the entries in `changes` (index to entry) replaced.

    Whole sectors, because a disk tears at sectors only.  Neighbours are joined.
    """
    by_sector: dict[int, list[int]] = {}
    for index in sorted(changes):
        by_sector.setdefault((map_offset + index * ENTRY) // SECTOR, []).append(index)
    for run in runs(by_sector):
        start = run[0] * SECTOR
        data = bytearray(file.pread_padded(start, len(run) * SECTOR))
        for sector in run:
            for index in by_sector[sector]:
                at = map_offset + index * ENTRY - start
                data[at : at + ENTRY] = changes[index].to_bytes(ENTRY, "little")
        yield Write(start, bytes(data))


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """Sorted numbers as lists of neighbours: 1 2 5 -> [1, 2] [5]."""
    ordered = list(numbers)
    if not ordered:
        return []
    answer = [[ordered[0]]]
    for previous, number in pairwise(ordered):
        if number == previous + 1:
            answer[-1].append(number)
        else:
            answer.append([number])
    return answer
