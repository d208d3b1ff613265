"""How often each host cluster of a QCOW2 image is referred to, and the same as reference counts.

Source: qemu's docs/interop/qcow2.rst, "Host cluster management".  Used by the checks of
QCOW2 and of QCOW.

One byte a cluster: that is all the memory that grows with the file.  Untouched parts of it take
none, so a file that is long but empty costs nothing.
"""

from __future__ import annotations

import mmap
import re
import sys
from array import array
from collections.abc import Iterator, Sequence

TABLE = 0x80  # a table, or the header, lies here
MANY = 0x7F  # the number is in _many
_NUMBER = bytes(value & MANY for value in range(256))
_NEXT = bytes(value + 1 if value < MANY else MANY for value in range(128)) + bytes(128)
_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}
STRIDE = 1 << 20
_USED = re.compile(rb"[^\0]")


class Tally:
    """References to host clusters 0 … length-1."""

    def __init__(self, length: int) -> None:
        # Private: reading a page that was never written takes no memory.
        self._bytes = mmap.mmap(-1, max(1, length), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._many: dict[int, int] = {}
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, cluster: int) -> int:
        number = self._bytes[cluster] & MANY
        return self._many[cluster] if number == MANY else number

    def add(self, cluster: int, times: int = 1) -> None:
        """May be negative."""
        byte = self._bytes[cluster]
        number = (self._many[cluster] if byte & MANY == MANY else byte & MANY) + times
        self._many.pop(cluster, None)
        if number >= MANY:
            self._many[cluster] = number
        self._bytes[cluster] = byte & TABLE | min(number, MANY)

    def add_run(self, first: int, count: int, times: int) -> bool:
        """One more each, quickly; False, and nothing done, where that is not possible."""
        old = self._bytes[first : first + count]
        if times != 1 or max(old) >= MANY - 1:
            return False
        self._bytes[first : first + count] = old.translate(_NEXT)
        return True

    def take_run(self, first: int, count: int, times: int) -> bool:
        """Tables, quickly; False, and nothing done, where something is there already."""
        if times >= MANY or self._bytes[first : first + count].count(0) != count:
            return False
        self._bytes[first : first + count] = bytes((TABLE | times,)) * count
        return True

    def mark(self, cluster: int) -> bool:
        """A table lies here; whether one did already."""
        byte = self._bytes[cluster]
        self._bytes[cluster] = byte | TABLE
        return bool(byte & TABLE)

    def is_table(self, cluster: int) -> bool:
        return bool(self._bytes[cluster] & TABLE)

    def used(self, first: int, count: int) -> bool:
        """Whether any of these clusters is referred to; those past the end are not."""
        for at in range(first, min(first + count, self._length), STRIDE):
            part = self._bytes[at : min(at + STRIDE, first + count, self._length)]
            if part.count(0) != len(part) and part.translate(_NUMBER).strip(b"\0"):
                return True
        return False

    def numbers(self, first: int, count: int) -> Sequence[int]:
        """References of `count` clusters, 0 for those past the end."""
        part = self._bytes[first : min(first + count, self._length)].translate(_NUMBER)
        part += bytes(count - len(part))
        if MANY not in part:
            return part
        found = array("Q", list(part))
        at = part.find(MANY)
        while at >= 0:
            found[at] = self._many[first + at]
            at = part.find(MANY, at + 1)
        return found

    def free(self, first: int, count: int) -> bool:
        """Whether nothing refers to these clusters, and no table lies in them."""
        return self._bytes[first : first + count].count(0) == count

    def last_used(self) -> int:
        """The highest cluster that is not free, -1 where none is."""
        at = self._length
        while at > 0:
            low = max(0, at - STRIDE)
            part = self._bytes[low:at].rstrip(b"\0")
            if part:
                return low + len(part) - 1
            at = low
        return -1

    def unused(self, end: int) -> Iterator[tuple[int, int]]:
        """(first, count) of the free clusters below `end`."""
        at, end = 0, min(end, self._length)
        while at < end:
            first = self._bytes.find(b"\0", at, end)
            if first < 0:
                return
            match = _USED.search(self._bytes, first, end)
            at = match.start() if match else end
            yield first, at - first


def encode(numbers: Sequence[int], width: int) -> bytes:
    """Reference counts of `width` bits; OverflowError if one does not fit."""
    if width < 8:
        # The first count of a byte is in its lowest bits: shifted numbers, added as one.
        if max(numbers, default=0) >> width:
            raise OverflowError
        per, code = 8 // width, bytes(numbers)
        size = len(code) // per
        packed = 0
        for i in range(per):
            packed |= int.from_bytes(code[i::per], "little") << i * width
        return packed.to_bytes(size, "little")
    if isinstance(numbers, bytes):
        spread = bytearray(len(numbers) * width // 8)
        spread[width // 8 - 1 :: width // 8] = numbers
        return bytes(spread)
    counts = array(_CODES[width], numbers)
    if sys.byteorder == "little":
        counts.byteswap()
    return counts.tobytes()


def decode(raw: bytes, width: int) -> Sequence[int]:
    """The counts in some bytes of a refcount block."""
    if width < 8:
        per, mask = 8 // width, (1 << width) - 1
        numbers = bytearray(len(raw) * per)
        for i in range(per):
            numbers[i::per] = raw.translate(bytes(b >> i * width & mask for b in range(256)))
        return numbers
    counts = array(_CODES[width], raw)
    if sys.byteorder == "little":
        counts.byteswap()
    return counts
