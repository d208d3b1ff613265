"""Entries of VMDK tables: numbers of sectors, and whether the grains that they name overlap."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from itertools import pairwise

SECTOR = 512
ENTRY = 4
CHUNK = 512  # entries that are compared with a run at once


def unpacked(raw: bytes) -> array[int]:
    entries = array("I")
    assert entries.itemsize == ENTRY
    entries.frombytes(raw)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def packed(entries: Iterable[int]) -> bytes:
    raw = array("I", entries)
    if sys.byteorder == "big":
        raw.byteswap()
    return raw.tobytes()


class Overlap(Exception):
    """Two grains overlap: the sector numbers of both."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(first, second)
        self.first, self.second = first, second


class Claims:
    """Which grains of a file are taken.  Two overlap if they begin less than a grain apart.

    The file is divided into slots of a grain's size; each remembers where in it a grain begins.
    """

    def __init__(self, grain: int, file_size: int) -> None:
        self._grain = grain  # sectors
        self.count = file_size // (grain * SECTOR) + 2
        self._slots = array("H" if grain < 0xFFFF else "I", [0]) * self.count
        self.highest = 0  # sector at which the last grain ends

    def take(self, entries: array[int]) -> None:
        """Entries of a table that name grains, no other ones: all of them, or Overlap."""
        taken: list[tuple[int, int]] = []
        try:
            self._take_all(entries, taken)
        except Overlap:
            for first, count in taken:
                for i in range(count):
                    self._slots[first // self._grain + i] = 0
            raise

    def _take_all(self, entries: array[int], taken: list[tuple[int, int]]) -> None:
        for low in range(0, len(entries), CHUNK):
            for first, count in self._runs(entries[low : low + CHUNK]):
                self._take(first, count)
                taken.append((first, count))

    def _runs(self, entries: array[int]) -> Iterator[tuple[int, int]]:
        """(first, count) of grains that follow each other; as a rule all of them do."""
        grain, count = self._grain, len(entries)
        first = entries[0]
        if entries[-1] - first == (count - 1) * grain and entries == array(
            "I", range(first, first + count * grain, grain)
        ):
            yield first, count
            return
        start = 0
        for i in range(1, count):
            if entries[i] != entries[i - 1] + grain:
                yield entries[start], i - start
                start = i
        yield entries[start], count - start

    def _take(self, first: int, count: int) -> None:
        slot, phase = divmod(first, self._grain)
        slots = self._slots
        end = slot + count
        self.highest = max(self.highest, first + count * self._grain)
        if end >= self.count:  # only where the caller did not look at the file's end
            self._slots.frombytes(bytes((end + 2 - self.count) * slots.itemsize))
            self.count = end + 2
        if any(slots[slot:end]):
            at = next(i for i in range(slot, end) if slots[i])
            raise Overlap(at * self._grain + slots[at] - 1, first + (at - slot) * self._grain)
        if slot and slots[slot - 1] > phase + 1:
            raise Overlap((slot - 1) * self._grain + slots[slot - 1] - 1, first)
        if slots[end] and slots[end] < phase + 1:
            raise Overlap(end * self._grain + slots[end] - 1, first + (count - 1) * self._grain)
        slots[slot:end] = array(slots.typecode, [phase + 1]) * count

    def free(self, first: int, last: int) -> Iterator[int]:
        """Slots first … last-1 that no grain reaches into."""
        slots = self._slots
        for slot in range(first, min(last, self.count)):
            if not slots[slot] and not (slot and slots[slot - 1] > 1):
                yield slot


def joined(stretches: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, length), sorted, neighbours as one."""
    result: list[tuple[int, int]] = []
    for offset, length in sorted(stretches):
        if result and sum(result[-1]) == offset:
            result[-1] = result[-1][0], result[-1][1] + length
        else:
            result.append((offset, length))
    return result


def merge(first: bytes, second: bytes) -> bytes:
    """Entries of either copy, the first one's where both have one."""
    pairs = zip(unpacked(first), unpacked(second), strict=True)
    return packed(one or other for one, other in pairs)


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
