"""Bytes that a file is to be read with, though they are not in it: a log replayed in memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class _Zeros:
    """As many zeros as wanted, without the memory for them."""

    __slots__ = ("_length",)

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> bytes:
        return bytes(len(range(*part.indices(self._length))))


class Patches:
    """What is put later hides what was put before.

    The pieces are kept sorted and do not overlap: a log may have thousands, and a long table is
    read in thousands of parts.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pieces: list[bytes | _Zeros] = []
        self.end = 0  # of the last one that was put, in bytes of the file

    def __bool__(self) -> bool:
        return bool(self._starts)

    def put(self, start: int, data: bytes) -> None:
        self._put(start, data)

    def put_zeros(self, start: int, length: int) -> None:
        """However many."""
        self._put(start, _Zeros(length))

    def _put(self, start: int, data: bytes | _Zeros) -> None:
        if not len(data):
            return
        end = start + len(data)
        self.end = max(self.end, end)
        starts, pieces = self._starts, self._pieces
        low, high = bisect_right(starts, start), bisect_left(starts, end)
        if low and start < starts[low - 1] + len(pieces[low - 1]):
            low -= 1
        kept = [(start, data)]
        if low < high:  # the first and the last one that it hides may reach past it
            if starts[low] < start:
                kept.insert(0, (starts[low], _part(pieces[low], 0, start - starts[low])))
            last, piece = starts[high - 1], pieces[high - 1]
            if last + len(piece) > end:
                kept.append((end, _part(piece, end - last, len(piece))))
        starts[low:high] = [at for at, _ in kept]
        pieces[low:high] = [piece for _, piece in kept]

    def applied(self, offset: int, data: bytes) -> bytes:
        """`data`, which was read at `offset`, as it is to be."""
        end = offset + len(data)
        i = max(0, bisect_right(self._starts, offset) - 1)
        patched: bytearray | None = None
        while i < len(self._starts) and self._starts[i] < end:
            start, piece = self._starts[i], self._pieces[i]
            low, high = max(start, offset), min(start + len(piece), end)
            if low < high:
                patched = patched or bytearray(data)
                patched[low - offset : high - offset] = piece[low - start : high - start]
            i += 1
        return data if patched is None else bytes(patched)

    def clear(self) -> None:
        self._starts.clear()
        self._pieces.clear()
        self.end = 0


def _part(data: bytes | _Zeros, low: int, high: int) -> bytes | _Zeros:
    return _Zeros(high - low) if isinstance(data, _Zeros) else data[low:high]
